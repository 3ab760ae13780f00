"""dot_optax in other frames: one short file each. The page is README.md."""
