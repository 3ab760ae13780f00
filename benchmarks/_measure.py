"""What several benchmarks share: timing forms against each other, and printing and writing what came out.

Machines are noisy, and more so as time goes by. So benchmarks compare forms within a run: `alternate` times all forms once in
every round, and `ratio` compares them round by round and takes the median.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax


def parser(doc: str) -> argparse.ArgumentParser:
    """Returns a parser with the first line of a module's docstring and the option `--json`."""
    result = argparse.ArgumentParser(description=doc.splitlines()[0])
    result.add_argument("--json", type=pathlib.Path, help="also write the figures to this file")
    return result


def alternate(forms: Mapping[Any, Callable[[], Any]], rounds: int, *, warmup: int = 1) -> dict[Any, list[float]]:
    """Returns the seconds of every call of each form: one call of each in every round, each round in another order.

    A call is over when the arrays that it returns are there, and what PyTorch has to do on a GPU is done. The first
    `warmup` rounds, in which things are compiled, do not count.
    """
    names, seconds = list(forms), {name: [] for name in forms}
    for i in range(warmup + rounds):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            time.sleep(0.005)  # threads of the form before may still be spinning
            start = time.perf_counter()
            _wait(forms[name]())
            taken = time.perf_counter() - start
            if i >= warmup:
                seconds[name].append(taken)
    return seconds


def _wait(result: Any) -> None:
    jax.block_until_ready(result)
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        torch.cuda.synchronize()


class Ratio(NamedTuple):
    """How much longer one form took than another: the median of the rounds, and the quartiles around it."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def ratio(seconds: Sequence[float], reference: Sequence[float]) -> Ratio:
    """Returns how much longer it took than the reference did in the same round."""
    ratios = [s / r for s, r in zip(seconds, reference, strict=True)]
    if len(ratios) == 1:
        return Ratio(*ratios * 3)
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, low, high)


def table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """Returns a table in Markdown with aligned columns: the first one to the left, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(row: Sequence[str]) -> str:
        first, *others = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return f"| {' | '.join([first, *others])} |"

    return "\n".join(line(row) for row in (cells[0], rule, *cells[1:]))


def machine(*packages: str) -> str:
    """Returns, in a line, the processor, the devices of JAX, and the versions of JAX and of further packages."""
    from importlib import metadata

    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", *packages))
    devices = jax.devices()
    kinds = f"{len(devices)} x {devices[0].device_kind}"
    return f"{len(os.sched_getaffinity(0))} cores of {_processor()}; {kinds}; {versions}"


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "an unknown processor"


def busy(seconds: float = 1.0) -> float:
    """Returns which share of the processors works now; call it while this program waits.

    Where other programs work, ratios of threads that wait for each other, as PyTorch's do, to threads that do not are
    no longer those of the programs alone.
    """

    def times() -> tuple[int, int]:
        ticks = [int(tick) for tick in pathlib.Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return ticks[3] + ticks[4], sum(ticks)  # idle or waiting for a disk; all

    try:
        (idle, total), _, (idle_after, total_after) = times(), time.sleep(seconds), times()
    except OSError:  # not Linux
        return float("nan")
    return 1 - (idle_after - idle) / max(total_after - total, 1)


def write(path: pathlib.Path | None, figures: Any) -> None:
    """Writes figures as JSON, if there is a path."""
    if path:
        path.write_text(json.dumps(figures, indent=1))
