"""What the loop is handed: one network to train, whatever it is and wherever its data come from."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import grain
from etils import epath

from examples.trainer.records import Record
from examples.trainer.step import Metrics, TrainState

Variables = tuple[Any, Any]  # (params, rest): what the optimizer trains, and what else the network carries along
Evaluate = Callable[[Variables, str], Record]


class MetricNames(NamedTuple):
    """The metrics of a job, by the names that steps and evaluations give them."""

    training: tuple[str, ...]  # of a step; the log has their means over an epoch, or null for one that there is not
    validation: tuple[str, ...]  # of an evaluation
    best: str  # of these: the higher, the better is the checkpoint; or ...
    lower_is_better: bool = False  # ... the lower
    shown: Mapping[str, str] = {}  # beside the progress bar: the name of a metric, and what to call it there


class Job(NamedTuple):
    """One network to train.

    In `directory` it leaves

        checkpoints/    see checkpoint.py
        metrics.jsonl   one line per epoch, see log.py; events.out... says the same to TensorBoard
        result.json     the metrics on each of the `splits`; written last, so a job that has it is finished
    """

    name: str
    directory: epath.Path
    init_state: Callable[[], TrainState]  # the state before the first step, as one device has it
    step: Callable[[TrainState, Any], tuple[TrainState, Metrics]]  # (state, batch), compiled; see step.py
    evaluate: Evaluate  # (variables, split) -> means over the split
    batches: Callable[[], AbstractContextManager[grain.DatasetIterator]]  # of all epochs, each the argument of a step
    batch_size: int  # in units
    steps_per_epoch: int
    epochs: int
    seed: int  # on which the initial state and the batches depend
    splits: Mapping[str, str]  # to evaluate in the end: names, and what tells whether two of them are the same
    metrics: MetricNames
    unit: str  # such as "images"
    remedy: str  # what to change when the loss is not finite
    cost: Callable[[], Record] = dict  # what a step computes, to be written down with the result
    # (variables) -> further entries of the result, which JSON can hold
    further: Callable[[Variables], Record] = lambda variables: {}
