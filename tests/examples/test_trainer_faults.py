"""Runs through the real command that are killed, terminated, starved of disk or fed with NaN: see `tests/faults.py`."""

import pytest

from tests import faults
from tests.tiers import slow_but


# Steps whose loss is NaN are skipped in the first tier too: see test_distill_steps.py and test_distill_run.py.
@pytest.mark.parametrize("fault", slow_but(faults.FAULTS, "SIGTERM", "stdout and stderr closed"))
def test_a_run_survives(fault, workspace):
    assert faults.FAULTS[fault](workspace)
