"""dot_optax in your trainer: one short file each. The page is README.md."""
