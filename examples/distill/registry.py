"""The names that a user's file adds to those of this example: of datasets, preprocessings, models and methods."""

import traceback
from collections.abc import Collection

from examples.trainer.errors import UserError

_PLACES: dict[tuple[str, str], tuple[str, int | None]] = {}  # by kind and name: file and line


def claim(kind: str, name: str, known: Collection[str]) -> None:
    """Claims a name for the lines that call `register`; the same lines may run again.

    Raises:
      UserError: if the name is no text, or is one of those `known` and was not claimed by these lines.
    """
    if not isinstance(name, str):
        raise UserError(f'a {kind} is registered by a name: register("NAME")')
    caller = traceback.extract_stack(limit=3)[0]
    place, claimed = (caller.filename, caller.lineno), _PLACES.get((kind, name))
    if name in known and place != claimed:
        by = " in {}, line {}".format(*claimed) if claimed else ""
        raise UserError(f"there is a {kind} {name!r} already{by}; choose another name")
    _PLACES[kind, name] = place
