"""The reference of dot_optax: README.md names everything public, and `__main__.py` makes pages of the docstrings."""
