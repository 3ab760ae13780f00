"""Runs through the real command that are killed, terminated, starved of disk or fed with NaN: see `tests/faults.py`."""

import pytest

from tests import faults
from tests.tiers import slow_but


@pytest.mark.parametrize(
    "fault", slow_but(faults.FAULTS, "SIGTERM", "stdout and stderr closed", "batches whose loss is NaN")
)
def test_a_run_survives(fault, workspace):
    assert faults.FAULTS[fault](workspace)
