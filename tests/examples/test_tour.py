"""The notebook runs from top to bottom, and shows what it says.

Its outputs are those of `jupyter execute --inplace examples/tour.ipynb`, which comes with nbclient.
"""

import base64
import os
import pathlib
import re

import nbclient
import nbformat
import pytest

import examples

TOUR = pathlib.Path(examples.__file__).with_name("tour.ipynb")
ROW = re.compile(r"^(KD|KD, gain-matched|DOT) +([\d.]+)" + r" +([\d.]+) ± [\d.]+" * 4 + "$", flags=re.MULTILINE)


def outputs(notebook):
    """Of each cell of code what it printed, and the pictures that it drew."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            printed = "".join(output.text for output in cell.outputs if output.output_type == "stream")
            drawn = [base64.b64decode(o.data["image/png"]) for o in cell.outputs if "image/png" in o.get("data", {})]
            yield printed, drawn


def assert_that_it_shows_what_it_says(notebook):
    text = "".join(printed for printed, _ in outputs(notebook))
    assert "task 5.71, kd 40.00" in text
    rows = ROW.findall(text)
    assert [row[0] for row in rows] == 2 * ["KD", "KD, gain-matched", "DOT"]
    shared, best = ([(float(x[1]), float(x[2]), float(x[3])) for x in part] for part in (rows[:3], rows[3:]))
    assert [rate for rate, *_ in shared] == [0.01] * 3
    for _, task, kd in shared[1:]:  # the control and DOT
        assert task < shared[0][1] and kd < shared[0][2]
    assert best[0][0] > max(rate for rate, *_ in best[1:])  # plain distillation wants a larger learning rate
    assert best[0][1] < 1.5 * best[2][1]  # ... and is then where DOT is, where it had 2.5 times its loss


def test_the_outputs_that_it_holds_are_those_of_a_whole_run():
    notebook = nbformat.read(TOUR, as_version=4)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    pictures = [picture for _, drawn in outputs(notebook) for picture in drawn]
    assert len(pictures) == 2 and all(len(picture) < 100_000 for picture in pictures)
    assert not [o for cell in notebook.cells for o in cell.get("outputs", []) if o.get("name") == "stderr"]
    assert_that_it_shows_what_it_says(notebook)


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path):
    notebook = nbformat.read(TOUR, as_version=4)
    stored = list(outputs(notebook))
    ours = ("JAX_NUM_CPU_DEVICES", "JAX_NUMPY_RANK_PROMOTION", "XLA_FLAGS")  # of conftest.py; a user has none of them
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment |= {"PYTHONPATH": str(TOUR.parent.parent), "IPYTHONDIR": str(tmp_path)}
    client = nbclient.NotebookClient(notebook, timeout=None, kernel_name="python3", coalesce_streams=True)
    client.execute(env=environment)  # raises where a cell does
    words = lambda text: re.sub(r"[\d.]+(e[+-]\d+)?", "0", text).split()  # noqa: E731
    for (printed, drawn), (stored_text, stored_pictures) in zip(outputs(notebook), stored, strict=True):
        assert words(printed) == words(stored_text)
        assert len(drawn) == len(stored_pictures)
    assert_that_it_shows_what_it_says(notebook)
