"""One file per experiment, each with `get_config()`; `--config=NAME` picks `NAME.py` from this folder."""
