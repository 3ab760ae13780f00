"""Runs through the real command that are killed, terminated, starved of disk or fed with NaN: see `tests/faults.py`."""

import pytest

from tests.faults import FAULTS, killed_at_random_moments
from tests.runs import DISTILL

CASES = {
    f"{program.module.removeprefix('examples.')}: {name}": (program, fault)
    for program, faults in FAULTS.items()
    for name, fault in faults.items()
    # A full disk is the trainer's to deal with, whatever it trains.
    if program is DISTILL or not name.startswith("no room")
}


# Steps whose loss is NaN are skipped in the first tier too: see test_distill_steps.py and test_distill_run.py.
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_run_survives(case, workspaces):
    program, fault = CASES[case]
    fewer = {"kills": 4} if fault is killed_at_random_moments else {}
    assert fault(workspaces(program), **fewer)
