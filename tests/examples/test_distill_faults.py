"""Runs through the real command that are killed, terminated, starved of disk or fed with NaN: see `tests/faults.py`."""

import pytest

from tests import faults
from tests.tiers import slow_but

_QUICK = (
    "SIGTERM",
    "checkpoints with a file cut in half, a bit flipped in a momentum, a part missing, a number changed",
    "batches whose loss is NaN",
)


@pytest.mark.parametrize("fault", slow_but(faults.FAULTS, *_QUICK))
def test_a_run_survives(fault, laboratory):
    assert faults.FAULTS[fault](laboratory)
