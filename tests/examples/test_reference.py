"""The pages of the docstrings: each public name is on one, and nothing is left that a browser would not show as meant."""

import html.parser
import types

import pytest

from examples.reference.__main__ import main, markdown, public_modules, public_names


class Docstrings(html.parser.HTMLParser):
    """What a browser shows of the docstrings of a page, without code, and the names that the page has a section for."""

    def __init__(self, page):
        super().__init__()
        self.text, self.names, self.open = "", set(), []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "section":
            self.names.add(attributes.get("id"))
        if tag in ("div", "pre", "code") and (self.open or attributes.get("class") == "docstring"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open and tag == self.open[-1]:
            self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] == "div":
            self.text += data


@pytest.mark.slow
def test_every_public_name_is_on_a_page_that_a_browser_shows_as_meant(tmp_path, capsys):
    main(["--output", str(tmp_path)])
    modules = public_modules()
    assert {module.__name__ for module in modules} >= {
        f"dot_optax{name}" for name in ("", ".losses", ".weightings", ".nnx")
    }
    assert (tmp_path / "index.html").exists() and (tmp_path / "search.js").exists()
    for module in modules:
        page = (tmp_path / f"{module.__name__.replace('.', '/')}.html").read_text(encoding="utf-8")
        assert "mathjax" in page.lower()
        shown = Docstrings(page)
        assert {
            name for name in public_names(module) if not isinstance(getattr(module, name), types.ModuleType)
        } <= shown.names
        for raw in (".. math::", ":math:", "`", "&#", "Alias for field", "References:\n "):
            assert raw not in shown.text
        for begin, end in ((r"\[", r"\]"), (r"\(", r"\)"), (r"\begin{aligned}", r"\end{aligned}")):
            assert shown.text.count(begin) == shown.text.count(end)
        assert "jaxlib" not in page  # what pdoc makes of jax.Array, where a signature is not as it is written
    assert str(tmp_path / "dot_optax.html") in capsys.readouterr().out


def shown(docstring):
    return html.unescape(markdown(docstring))


def test_a_formula_keeps_its_backslashes_and_lines():
    text = shown("Two momenta.\n\n.. math::\n    v &\\leftarrow g_{kd} \\\\\n    u &= v\n\nAnd on.\n").strip()
    assert (
        text == "Two momenta.\n\n" + r"\[\begin{aligned}v &\leftarrow g_{kd} \\ u &= v\end{aligned}\]" + "\n\nAnd on."
    )
    assert shown("With :math:`\\beta_1 *\n    x`.").strip() == r"With \(\beta_1 * x\)."
    assert not set("\\_{}*&") & set(markdown("Is :math:`\\beta_{1} * x`.").replace("&#", ""))  # for Markdown to change


def test_a_link_becomes_one_of_markdown():
    reference = (
        "Zhao et al., `A Distillation-Oriented\n    Trainer <https://arxiv.org/abs/2307.08436>`_, 2023, and `dot`."
    )
    expected = "[A Distillation-Oriented Trainer](https://arxiv.org/abs/2307.08436)"
    assert shown(reference).strip() == f"Zhao et al., {expected}, 2023, and `dot`."
