"""Every malformed input of `malformed.py` raises and says what is wrong."""

import re

import pytest

from tests import malformed

CASES = [case for cases in malformed.GROUPS.values() for case in cases]


@pytest.mark.parametrize("case", CASES, ids=[case.what for case in CASES])
def test_it_raises_and_says_what_is_wrong(case):
    said = malformed.outcome(case)
    assert said is not None, "nothing was raised"
    assert re.search(case.says, said), said
    assert said.startswith(("ValueError", "TypeError")), said
