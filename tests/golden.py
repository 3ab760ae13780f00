"""Reads the trajectories of the published implementation in `data/`, in float64.

Arrays are stacked over the steps; `meta/*` holds the hyperparameters.
"""

import pathlib

import numpy as np


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(pathlib.Path(__file__).parent / "data" / f"{name}.npz") as file:
        return dict(file)


def group(arrays: dict[str, np.ndarray], prefix: str, step: int | None = None) -> dict[str, np.ndarray]:
    """The arrays below `prefix/`, at one step if given."""
    found = {k.removeprefix(f"{prefix}/"): v for k, v in arrays.items() if k.startswith(f"{prefix}/")}
    return found if step is None else {k: v[step] for k, v in found.items()}
