"""Runs through the real command that are killed, terminated, starved of disk or fed with NaN: see `tests/faults.py`."""

import pytest

from tests import faults


@pytest.mark.parametrize("fault", faults.FAULTS)
def test_a_run_survives(fault, laboratory):
    assert faults.FAULTS[fault](laboratory)
