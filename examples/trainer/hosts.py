"""What hosts do together: one for all of them, as writing a file that the others read; and agree on what to do."""

import contextlib
import hashlib
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from examples.trainer.errors import UserError


def by_first(work: Callable[[], Any], what: str) -> Any:
    """Returns, on all hosts, what `work` returns on the first one, which alone does it while the others wait.

    Args:
        work: returns what JSON can hold.
        what: in words, after "the first host cannot".

    Raises:
        UserError: on the other hosts, if `work` raises on the first one; there it raises what `work` does.
    """
    if jax.process_count() == 1:
        return work()
    # The first collective connects the processes, which on CPUs they wait 30 seconds for, however long `work` takes.
    multihost_utils.sync_global_devices("by_first")
    found, error = b"", None
    if jax.process_index() == 0:
        try:
            found = json.dumps(work()).encode()
        except Exception as raised:
            error = raised
    size = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if error else len(found))))
    if error:
        raise error
    if size < 0:
        raise UserError(f"the first host cannot {what}; see what it says")
    return json.loads(multihost_utils.broadcast_one_to_all(np.frombuffer(found.ljust(size), np.uint8)).tobytes())


def check_agree(seen: Any) -> None:
    """Raises if hosts were started differently, or do not see the same files: they would wait for each other forever.

    `seen` is what each of them has: its config, what is missing in the folder, what is saved there.
    """
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).digest()
    try:
        multihost_utils.assert_equal(np.frombuffer(digest, np.uint8))
    except AssertionError:
        # It waits for the others: the first to end would abort those that still talk.
        with contextlib.suppress(Exception):
            jax.distributed.shutdown()
        raise UserError(
            "the hosts do not agree: start the same command on each, with a --workdir that all of them see"
        ) from None
