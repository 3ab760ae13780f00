"""Counts the library's lines of code, and how many of them only check what was given.

    python -m tests.code_size

prints both for each module.  A line of code is one that is not blank, a comment or part of a docstring.  It checks if it
is in `_checks.py`, in a function that checks or writes a message, in an `if` that does nothing but raise, in a handler
of exceptions that does nothing but raise, or in a `raise`.
"""

import ast
import pathlib
import sys

LIBRARY = pathlib.Path(__file__).parent.parent / "dot_optax"


def _lines(node):
    return set(range(node.lineno, node.end_lineno + 1))


def _docstrings(tree):
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef)
    return {
        line
        for node in ast.walk(tree)
        if isinstance(node, owners) and ast.get_docstring(node)
        for line in _lines(node.body[0])
    }


def _checks(node):
    if isinstance(node, ast.FunctionDef):
        return node.name.lstrip("_").startswith("check") or node.name in ("_mismatch", "_hint")
    if isinstance(node, (ast.If, ast.ExceptHandler)):
        return isinstance(node.body[-1], ast.Raise) and not getattr(node, "orelse", None)
    return isinstance(node, ast.Raise)


def count(path):
    """The lines of code of a module, and those of them that check."""
    text = path.read_text()
    tree = ast.parse(text)
    written = {i for i, line in enumerate(text.splitlines(), 1) if line.strip() and not line.strip().startswith("#")}
    code = written - _docstrings(tree)
    checks = {line for node in ast.walk(tree) if _checks(node) for line in _lines(node)}
    return len(code), len(code if path.name == "_checks.py" else code & checks)


def modules(folder=LIBRARY):
    """The counts of every module of a package, by its name."""
    return {path.relative_to(folder).as_posix(): count(path) for path in sorted(folder.rglob("*.py"))}


def main(folder=LIBRARY):
    counts = modules(pathlib.Path(folder))
    counts["all"] = tuple(map(sum, zip(*counts.values(), strict=True)))
    for name, (code, checks) in counts.items():
        print(f"{name:20} {code:5} lines {checks:4} of checks {checks / max(code, 1):5.0%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
