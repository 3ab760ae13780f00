r"""Pages of all docstrings of dot_optax, with formulas and links.

    pip install -e ".[docs]" && python -m examples.reference

takes some seconds and writes `runs/reference/dot_optax.html`, a page for each public module, and an index to search in.
pdoc makes the pages. Its pages load MathJax, which sets the formulas, from cdn.jsdelivr.net.

What pdoc would not read as it is written here is changed first: formulas of several lines, formulas whose backslashes
Markdown would take for its own, code that goes on in the next line, tables of names in the docstrings of modules, and type
aliases in signatures, which it would replace by what they stand for.
"""

import argparse
import ast
import contextlib
import importlib
import inspect
import pathlib
import pkgutil
import re
import textwrap
import types
from collections.abc import Callable, Mapping, Sequence
from unittest import mock

import pdoc
from pdoc import doc, docstrings, render

import dot_optax

_NAMED_TUPLE = re.compile(r"Alias for field number \d+|Create new instance of \w+\(.*\)")  # what says nothing


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the pages, and prints which one to open."""
    parser = argparse.ArgumentParser(prog="python -m examples.reference", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/reference"), help="the folder")
    folder = parser.parse_args(arguments).output
    render.configure(docformat="markdown", math=True)
    modules = public_modules()
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, "__all__", public_names(module), create=True))
        pages = {module.__name__: doc.Module(module) for module in modules}
        for page in pages.values():
            adapt(page)
        files = {f"{name.replace('.', '/')}.html": render.html_module(page, pages) for name, page in pages.items()}
        files |= {"index.html": render.html_index(pages), "search.js": render.search_index(pages)}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    print(f"{len(pages)} pages by pdoc {pdoc.__version__}: open {folder / 'dot_optax.html'}")


def public_modules() -> list[types.ModuleType]:
    """`dot_optax`, and each module in it whose name has no underscore in front."""
    names = [info.name for info in pkgutil.iter_modules(dot_optax.__path__) if not info.name.startswith("_")]
    return [dot_optax, *(importlib.import_module(f"dot_optax.{name}") for name in names)]


def public_names(module: types.ModuleType) -> list[str]:
    """The names that a user may write after that of the module: those that it lists, or all without an underscore."""
    return [name for name in getattr(module, "__all__", dir(module)) if not name.startswith("_")]


def adapt(page: doc.Module | doc.Class) -> None:
    """Changes what pdoc has read of a module or class, and of all in it, to what it can show."""
    page.docstring = markdown(_listed(page.docstring) if isinstance(page, doc.Module) else page.docstring)
    for member in page.members.values():
        if isinstance(member, doc.Class):
            adapt(member)
            continue
        if not isinstance(member, doc.Module):
            member.docstring = markdown("" if _NAMED_TUPLE.fullmatch(member.docstring) else member.docstring)
        if isinstance(member, doc.Function):
            written = _types(page.obj if isinstance(page, doc.Class) else member.obj)
            member.signature = _as_written(member.signature, written)
        elif isinstance(member, doc.Variable) and isinstance(page, doc.Class):
            member.annotation_str = f": {_types(page.obj).get(member.name, 'Any')}"


def markdown(docstring: str) -> str:
    """A docstring of this library in Markdown."""
    text = re.sub(r"^( *)\.\. math::\n((?:\1 +.*\n|\n)+?)(?=\n*(?:\1)?\S|\Z)", _displayed, docstring + "\n", flags=re.M)
    text = re.sub(r":math:`([^`]+)`", lambda match: _escaped(rf"\({_joined(match[1])}\)"), text)
    text = re.sub(r"`([^`<]+)<([^`>]+)>`_", lambda match: f"[{_joined(match[1])}]({''.join(match[2].split())})", text)
    # Code goes on in the next line, which in a list would end it.
    text = re.sub(r"`[^`]+`", lambda match: _joined(match[0]) if "\n" in match[0] else match[0], text)
    return docstrings.convert(text, "google", None)


def _displayed(match: re.Match[str]) -> str:
    indent, formula = match[1], _joined(match[2])
    if "&" in formula or r"\\" in formula:
        formula = rf"\begin{{aligned}}{formula}\end{{aligned}}"
    return indent + _escaped(rf"\[{formula}\]") + "\n"


def _joined(text: str) -> str:
    return " ".join(text.split())


def _escaped(formula: str) -> str:
    """As entities of HTML, in which Markdown finds nothing to change, and which MathJax sees as the browser shows them."""
    return re.sub(r"[^\w\s]|_", lambda match: f"&#{ord(match[0])};", formula)


def _listed(docstring: str) -> str:
    """Makes a list of a table of lines such as ``Gradients:    `value_and_grads`, `reached` ``."""
    row = re.compile(r"^([A-Z.][^`:\n]+): +(`.*)\n", flags=re.M)
    return re.sub(f"(?m:{row.pattern}){{2,}}", lambda table: row.sub(r"- **\1:** \2\n", table[0]), docstring)


class _Source(str):
    """A type or a default as it is written, where pdoc has evaluated it."""

    __repr__ = str.__str__


def _types(function_or_class: Callable) -> dict[str, _Source]:
    """The types in the source of a function, that of its result as `return`, or of the fields of a class."""
    try:
        definition = ast.parse(textwrap.dedent(inspect.getsource(function_or_class))).body[0]
    except OSError:  # a class that names another module than the one that it is written in
        return {}
    if isinstance(definition, ast.ClassDef):
        nodes = {node.target.id: node.annotation for node in definition.body if isinstance(node, ast.AnnAssign)}
    else:
        nodes = {node.arg: node.annotation for node in ast.walk(definition.args) if isinstance(node, ast.arg)}
        nodes["return"] = definition.returns
    return {name: _Source(ast.unparse(node)) for name, node in nodes.items() if node}


def _as_written(signature: inspect.Signature, written: Mapping[str, _Source]) -> inspect.Signature:
    parameters = []
    for name, parameter in signature.parameters.items():
        default = parameter.default
        if isinstance(default, type) and default is not parameter.empty:  # such as nnx.Param
            default = _Source(default.__name__)
        parameters.append(parameter.replace(annotation=written.get(name, parameter.annotation), default=default))
    return signature.replace(
        parameters=parameters, return_annotation=written.get("return", signature.return_annotation)
    )


if __name__ == "__main__":
    main()
