"""Two tiers of tests: those that every change is tried with, and those that are `slow`."""

import pytest


def slow_but(cases, *quick):
    """Marks all cases of a parametrized test as slow but the named ones, which stand for them in the first tier."""
    missing = [case for case in quick if case not in cases]
    assert not missing, f"no such cases: {missing}"
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]
