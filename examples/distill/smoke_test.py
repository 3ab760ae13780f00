"""A config tried out in about a minute, without its data or a teacher: a few steps and an evaluation on random images.

Everything else is what a run does. Then it says how long the run would take on this machine.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from examples.distill import data, jobs
from examples.distill.jobs import Shared
from examples.distill.settings import Settings
from examples.distill.steps import Teacher
from examples.trainer import loop, parallel
from examples.trainer.errors import UserError
from examples.trainer.job import Evaluate, Job, Variables
from examples.trainer.preemption import Preempted
from examples.trainer.records import Record
from examples.trainer.sampling import Sampling, check_rows

_STEPS = 4  # of which the first compiles
_MOST_STEPS = 32
_BATCHES = 2  # of an evaluation
_NUMBERS = 2**19  # in the images of a batch: 3 images of ImageNet, or 170 of CIFAR


def run(settings: Settings, name: str, preempted: Callable[[], bool]) -> None:
    """Tries a config out, and prints how long it would take."""
    if jax.process_count() > 1:
        raise UserError("--smoke_test runs on one host: leave out what joins the others")
    config = settings.config.copy_and_resolve_references()
    config.dataset.synthetic = True
    layout = parallel.make_layout(config)
    whole = data.load(config.dataset)
    data.steps_per_epoch(whole, config.batch_size)  # raises as the run would
    sampling = Sampling.from_config(config.sampling)
    check_rows(sampling, config.batch_size, layout.mesh.size)
    turn = _turn(sampling)
    steps = 1 + max(_STEPS - 1, turn)  # a whole turn without the step that compiles
    unit = layout.mesh.size * (sampling.period if sampling.form == "examples" else 1)

    def divisible(size: int) -> int:
        return max(size // unit, 1) * unit

    most = divisible(_NUMBERS // math.prod(whole.image_shape))
    batch_size = min(config.batch_size, most, divisible(len(whole.train) // steps))
    eval_batch_size = min(config.eval_batch_size, most)
    images = {
        "train": steps * batch_size,
        "validation": _BATCHES * eval_batch_size,
        "test": _BATCHES * eval_batch_size,
    }
    dataset = whole._replace(**{split: getattr(whole, split)[:count] for split, count in images.items()})
    config.batch_size, config.eval_batch_size = batch_size, eval_batch_size
    shared = Shared(config, dataset, layout, preempted)
    jobs.check(settings.methods, shared)
    print(f"Smoke test of {name} on random images, {batch_size} in a batch; none of its files is read or written.")
    network, *variables = jobs.network(config.teacher.model, shared)
    teacher = Teacher(network, parallel.replicate(layout.mesh, tuple(variables)))
    with tempfile.TemporaryDirectory() as folder:
        directory = epath.Path(folder)
        tried = [jobs.teacher(shared, directory)] if config.teacher.train and not config.teacher.checkpoint else []
        tried += [jobs.student(method, shared, directory, teacher) for method in settings.methods]
        try:
            seconds = {job.name: _seconds(job, shared, whole) for job in tried}
        except (KeyboardInterrupt, Preempted) as end:
            raise type(end)("a smoke test saves nothing") from None
    for job, value in seconds.items():
        print(f"{job:>15}: about {_duration(value)}")
    print(
        f"It works. Here the run would take about {_duration(sum(seconds.values()))}, and the time to read its images."
    )


def _turn(sampling: Sampling) -> int:
    """How many steps to try for their mean: those that differ, of which a longer turn has only one that is rare."""
    return min(len(sampling.kinds()), _MOST_STEPS)


def _seconds(job: Job, shared: Shared, whole: data.Dataset) -> float:
    """Trains a job for a few steps, and returns how long all of it would take."""
    steps, evaluations = [], []
    timed = job._replace(epochs=1, step=_timed_step(job, steps), evaluate=_timed_evaluate(job, evaluations), cost=dict)
    loop.fit(timed, loop.options(shared.config, shared.layout, shared.preempted))
    # The first compiles; of a few images there is no second step. Sampled steps differ, and their turn has a mean.
    turn = _turn(Sampling.from_config(shared.config.sampling))
    mean = statistics.median if turn == 1 else statistics.fmean
    an_image = mean(steps[1:][-turn if turn > 1 else 0 :] or steps) / job.batch_size
    evaluated_image = statistics.median(evaluations[1:])
    in_the_end = sum(len(getattr(whole, split)) for split in job.splits)
    trained = job.epochs * len(whole.train)
    evaluated = job.epochs * len(whole.validation) + in_the_end
    return steps[0] + trained * an_image + evaluated * evaluated_image


def _timed_step(job: Job, seconds: list[float]) -> Callable[..., Any]:
    def step(*args: Any) -> Any:
        begun = time.perf_counter()
        result = jax.block_until_ready(job.step(*args))
        seconds.append(time.perf_counter() - begun)
        return result

    return step


def _timed_evaluate(job: Job, seconds_per_image: list[float]) -> Evaluate:
    def evaluate(variables: Variables, split: str) -> Record:
        begun = time.perf_counter()
        means = job.evaluate(variables, split)
        seconds_per_image.append((time.perf_counter() - begun) / means["count"])
        return means

    return evaluate


def _duration(seconds: float) -> str:
    """A time in the unit in which people say it."""
    for unit, length in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"
