"""The library stays small, and little of it only checks what was given."""

from tests import code_size


def test_the_library_stays_small():
    counts = code_size.modules()
    assert sum(code for code, _ in counts.values()) < 1800
    assert max(code for code, _ in counts.values()) <= 300


def test_checks_are_few():
    counts = code_size.modules().values()
    assert sum(checks for _, checks in counts) <= 0.15 * sum(code for code, _ in counts)


def test_what_counts_as_a_check(tmp_path):
    (tmp_path / "module.py").write_text(
        '"""Not a line of code."""\n\n'
        "def double(x):\n"
        '    """Not\n    code."""\n'
        "    if x is None:\n"
        "        raise ValueError('x')\n"
        "    # nor this\n"
        "    return 2 * x\n\n\n"
        "def check_number(x):\n"
        "    return float(x)\n"
    )
    (tmp_path / "_checks.py").write_text("ONE = 1\nTWO = 2\n")
    assert code_size.modules(tmp_path) == {"module.py": (6, 4), "_checks.py": (2, 2)}
