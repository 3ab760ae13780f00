"""The working directory of an experiment: one config, one teacher, one folder per finished or unfinished arm.

`config.json` says which config the folder belongs to. Fields that do not change what an arm computes may differ from
run to run: which arms to train, and where this machine keeps the dataset.
"""

import json
import os
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from examples.distill import records
from examples.distill.errors import UserError

_FREE_FIELDS = ("method", "dataset.data_dir", "dataset.prepare")


def check(workdir: Path, config: ConfigDict) -> None:
    """Creates the folder; raises if it cannot be written, or if it belongs to another config."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --workdir={workdir}: {error.strerror}") from error
    if not os.access(workdir, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to --workdir={workdir}: permission denied")
    if (workdir / "config.json").exists():
        there, here = records.read_json(workdir / "config.json"), _identity(config)
        differences = [
            f"{field} is {there.get(field)!r} there and {here.get(field)!r} here"
            for field in there | here
            if there.get(field) != here.get(field)
        ]
        if differences:
            raise UserError(
                f"--workdir={workdir} belongs to another config: {', '.join(differences)}; choose another --workdir"
            )
    elif any(workdir.iterdir()):
        raise UserError(f"--workdir={workdir} is not empty, but no run of this program; choose another folder")


def claim(workdir: Path, config: ConfigDict) -> None:
    """Writes down that the folder belongs to `config`."""
    records.write_json(workdir / "config.json", _identity(config))


def fields(config: ConfigDict) -> dict[str, Any]:
    """The fields of a config by their names on the command line, such as `optimizer.delta`."""
    flat = {}
    for name, value in config.items():
        nested = isinstance(value, ConfigDict)
        flat |= {f"{name}.{field}": v for field, v in fields(value).items()} if nested else {name: value}
    return flat


def _identity(config: ConfigDict) -> dict[str, Any]:
    identity = {field: value for field, value in fields(config).items() if field not in _FREE_FIELDS}
    return json.loads(json.dumps(identity))  # Tuples become lists, as they do in the file.
