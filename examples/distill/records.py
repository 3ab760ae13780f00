"""Small JSON files: whole ones, replaced at one stroke, and logs with one record per line."""

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Writes so that an interruption leaves the old file or the new one, never half of one."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(unfinished, path)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def append_line(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def keep_lines(path: Path, count: int) -> None:
    """Keeps the first `count` lines of a log, which is created if it does not exist."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    path.write_text("".join(lines[:count]))
