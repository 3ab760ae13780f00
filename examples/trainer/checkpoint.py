"""Checkpoints of one job, with Orbax: `<workdir>/<job>/checkpoints/<step>/`.

A checkpoint has three items, so that each reader takes only what it needs:

    variables   {'params', 'rest'}: the network
    optimizer   {'step', 'opt_state'}, and if losses have params or a rest of their own, {'own'}: these
    progress    JSON: see `Progress`; the state of the Grain iterator, which is the same on all hosts; and checksums

The files are written in the background, into a folder that gets its name when all is there. Kept are the last few
checkpoints and the one that validated best. Orbax does not notice every bit that flips in its files; so checksums are
kept of all arrays, and compared with those of what is read.
"""

import contextlib
import functools
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from examples.trainer import paths
from examples.trainer.errors import UserError, one_line
from examples.trainer.log import warn
from examples.trainer.records import reading, writing
from examples.trainer.step import OWN, TrainState, has_own, network

_REMEDY = "; restore that folder, or delete it"
_SHOWN_PROBLEMS = 5


class Best(NamedTuple):
    """The best validation of a job."""

    step: int
    value: float  # of the metric that it is the best by


class Progress(NamedTuple):
    """What a checkpoint tells beside the arrays and the place in the data.

    Every random number is a function of the seed and of that place: there is no other state.
    """

    seed: int
    seconds: float = 0.0  # spent so far, over all runs of the command
    best: Best | None = None
    log: Mapping[str, Any] = {}  # `Log.state()`

    def validated(self, step: int, value: float, *, lower_is_better: bool = False) -> "Progress":
        """Returns the progress after a validation."""
        if self.best and (self.best.value <= value if lower_is_better else self.best.value >= value):
            return self
        return self._replace(best=Best(step, value))


class Checkpoints:
    """The checkpoints of a job while it trains: the last `keep` of them, and the best.

    Use it as a context manager, which waits for the last save.
    """

    def __init__(self, job_dir: epath.Path, keep: int) -> None:
        self._directory = _directory(job_dir)
        self._best = _OneStep()
        self._saving: int | None = None
        latest = ocp.checkpoint_managers.LatestN(keep)
        policy = ocp.checkpoint_managers.AnyPreservationPolicy([latest, self._best])
        options = ocp.CheckpointManagerOptions(preservation_policy=policy)
        with writing(self._directory):
            if jax.process_index() == 0:
                _remove_unfinished(self._directory)
            self._manager = _Manager(self._directory, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._settle()
        finally:
            with contextlib.suppress(Exception):  # It raises once more what was reported.
                self._manager.close()

    def latest(self) -> epath.Path | None:
        """The folder of the latest checkpoint that is written to the end."""
        self._settle()
        step = self._manager.latest_step()
        return None if step is None else self._directory / str(step)

    def has(self, step: int) -> bool:
        """Whether there is a checkpoint of this step that is written to the end."""
        self._settle()
        return step in self._manager.all_steps()

    def save(
        self, state: TrainState, batches: grain.DatasetIterator, progress: Progress, *, wait: bool = False
    ) -> Progress:
        """Copies the arrays and returns; the files are written in the background.

        That this failed, as on a full disk, is said at the next save, and training goes on. With `wait` it returns when
        all is written, and raises a `UserError` if that cannot be; so it does on several hosts, which do not know of
        each other's failures. Returns the progress as it is saved: a best validation that was never saved is forgotten.
        """
        self._settle(go_on=not wait)
        step, saved = int(state.step), self._manager.all_steps()
        if progress.best and progress.best.step not in (step, *saved):
            progress = progress._replace(best=None)
        self._best.step = progress.best.step if progress.best else None
        self._saving = step
        items = _items(state)
        record = progress._asdict() | {"best": progress.best and progress.best._asdict(), "data": batches.get_state()}
        try:
            if not self._manager.save(step, args=_save_args(items, record)):
                raise ValueError("there is a later one")
        except Exception as error:  # Orbax raises whatever it stumbles over.
            self._failed(error, go_on=not wait)
        if wait:
            self._settle(go_on=False)
        return progress

    def restore_latest(
        self, state: TrainState, batches: grain.DatasetIterator, seed: int
    ) -> tuple[TrainState, Progress]:
        """Returns what the latest checkpoint holds and sets `batches` to where it was; without one, returns the start.

        `state` says which structure, dtypes and shardings to restore to. Damaged checkpoints are moved out of the way if
        there is an older one to go on from.
        """
        step = self._find_intact(_items(state))
        if step is None:
            return state, Progress(seed)
        folder = self._directory / str(step)
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, _items(state))
        with _explained(folder):
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardRestore(item) for name, item in like.items()},
                    progress=ocp.args.JsonRestore(),
                ),
            )
        record = restored["progress"]
        del record["checksums"]
        if record["seed"] != seed:
            raise UserError(f"{folder} is of a run with --config.seed={record['seed']}")
        batches.set_state(record.pop("data"))
        best = record["best"] and Best(*record["best"].values())  # The value was once called "top1".
        self._best.step = best.step if best else None
        own = restored["optimizer"].pop("own", {})
        variables = {
            name: tree | {OWN: own[name]} if name in own else tree for name, tree in restored["variables"].items()
        }
        return TrainState(**variables, **restored["optimizer"]), Progress(**record | {"best": best})

    def _find_intact(self, like: Mapping[str, Any]) -> int | None:
        """Returns the step of the newest intact checkpoint, which the first host finds out for all."""
        step = None
        if jax.process_index() == 0:
            damaged: dict[int, UserError] = {}
            for step in sorted(self._manager.all_steps(), reverse=True):
                try:
                    with _explained(self._directory / str(step), remedy=""):
                        _read(self._directory / str(step), like)
                except UserError as error:
                    damaged[step] = error
                else:
                    break
            if len(damaged) == len(self._manager.all_steps()) > 0:
                raise UserError(
                    f"{damaged[max(damaged)]}, nor any older one; restore one of them, or delete"
                    f" {self._directory.parent} to train from the start"
                )
            self._set_aside(damaged, step)
        if jax.process_count() > 1:
            found = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if step is None else step)))
            step = None if found < 0 else found
        self._manager.reload()
        return step

    def _set_aside(self, damaged: Mapping[int, UserError], intact: int | None) -> None:
        folder = self._directory.with_name("damaged_checkpoints")
        for step, error in damaged.items():
            with writing(folder):
                folder.mkdir(exist_ok=True)
                (folder / str(step)).rmtree(missing_ok=True)
                paths.move(self._directory / str(step), folder / str(step))
            warn(f"{error}; it is now in {folder}, and training goes on from step {intact}")

    def _settle(self, *, go_on: bool = True) -> None:
        """Waits for the last save."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._failed(error, go_on=go_on)

    def _failed(self, error: Exception, *, go_on: bool) -> None:
        """Removes what a failed save left, and reports it."""
        found = re.search(r": ([^:]+) \[os_error_code=", str(error))  # the end of what TensorStore says
        reason = found[1] if found else one_line(error, 200)
        with reading(self._directory):
            self._manager.reload()
        if self._saving not in self._manager.all_steps():
            with contextlib.suppress(Exception):  # A part may still be written; the next start removes it then.
                _remove_unfinished(self._directory)
        step = self._manager.latest_step()
        message = f"cannot save the checkpoint {self._directory / str(self._saving)} ({reason})"
        kept = "no other was saved" if step is None else f"the latest is that of step {step}"
        if jax.process_count() > 1:
            raise UserError(f"{message}; {kept}; see what the other hosts say, and start all of them again") from error
        if not go_on:
            raise UserError(f"{message}; {kept}; put this right, and the same command goes on from there") from error
        warn(f"{message}; {kept}")


def _remove_unfinished(directory: epath.Path) -> None:
    """Removes what interrupted saves left.

    Orbax can do that too, but in the background, and what fails there it raises at each save.
    """
    for folder in directory.iterdir() if directory.exists() else ():
        if re.match(r"\d+(\.|$)", folder.name) and ocp.utils.is_tmp_checkpoint(folder):
            folder.rmtree(missing_ok=True)


class _OneStep:
    """A preservation policy of Orbax: keeps the checkpoint of one step."""

    step: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        return [checkpoint.step == self.step for checkpoint in checkpoints]


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        return False  # preemption.py asks; JAX's service must be asked with one and the same count of calls.


def check_path(folder: epath.Path) -> None:
    """Raises if Orbax can write to the folder, but would not find there what it wrote."""
    if re.search(r"\[.*\]", str(paths.resolve(folder))):
        raise UserError(f"no checkpoints can be in {folder}: Orbax takes [ ] in a path for a pattern; use other names")


def saved_steps(job_dir: epath.Path) -> list[int]:
    """Returns the steps of the checkpoints that were saved to the end, in order."""
    folder = _directory(job_dir)
    with reading(folder):
        return sorted(ocp.utils.checkpoint_steps(folder))


def save_variables(job_dir: epath.Path, params: Any, rest: Any) -> None:
    """Writes a network that was not trained here, as one that `has_network`."""
    with ocp.CheckpointManager(_directory(job_dir)) as checkpoints:
        checkpoints.save(0, args=_save_args({"variables": {"params": params, "rest": rest}}, {}))


def is_imported(job_dir: epath.Path) -> bool:
    """Whether the network comes from `save_variables`: training saves after a step, hence never at step 0."""
    return 0 in saved_steps(job_dir)


def has_network(job_dir: epath.Path) -> bool:
    """Whether the folder holds a network to be used: imported, or trained to the end."""
    steps = saved_steps(job_dir)
    with reading(job_dir):
        return 0 in steps or (bool(steps) and (job_dir / "result.json").exists())


def load_variables(job_dir: epath.Path, step: int | None = None) -> tuple[Any, Any]:
    """Returns the (params, rest) of a network, by default as last saved: nested dicts of NumPy arrays, for `models.apply`.

    The `step` with the best validation is in `result.json`.
    """
    check_path(job_dir)
    steps = saved_steps(job_dir)
    if not steps or step not in (None, *steps):
        of_step = "" if step is None else f" of step {step}"
        hint = f"there are {', '.join(map(str, steps))}" if steps else "give the folder of a method or of a teacher"
        raise UserError(f"no checkpoint{of_step} in {_directory(job_dir)}; {hint}")
    folder = _directory(job_dir) / str(max(steps) if step is None else step)
    with _explained(folder):
        variables = _read(folder, {"variables": None})["variables"]
    return variables["params"], variables["rest"]


def load_fitting(job_dir: epath.Path, like: tuple[Any, Any]) -> tuple[Any, Any]:
    """Returns the (params, rest) of a network, which must fit the shapes of the `like` ones, else it is a ValueError.

    Random state, such as that of Dropout, may be missing.
    """
    variables = load_variables(job_dir)
    wanted, found = (
        {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)} for tree in (like, variables)
    )
    random_state = {name for name, leaf in wanted.items() if not jnp.issubdtype(leaf.dtype, jnp.floating)}
    check_fit(
        {name: leaf.shape for name, leaf in wanted.items() if name not in random_state},
        {name: leaf for name, leaf in found.items() if name not in random_state},
    )
    return variables


def _name(path: jax.tree_util.KeyPath) -> str:
    return jax.tree_util.keystr(path[1:], simple=True, separator=".")  # The first key tells params from rest.


def _read(folder: epath.Path, like: Mapping[str, Any]) -> dict[str, Any]:
    """Returns items of a checkpoint, of NumPy arrays, on this host alone; raises if they are not what was saved.

    `like` says which items, and how each is built of which shapes; None stands for nested dicts, of whatever is there.
    """
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix=f"host{jax.process_index()}",
    )
    with (
        ocp.StandardCheckpointer(multiprocessing_options=alone) as arrays,
        ocp.Checkpointer(ocp.JsonCheckpointHandler(), multiprocessing_options=alone) as records,
    ):
        items = {}
        for name, item in like.items():
            item = _number_lists(arrays.metadata(folder / name).item_metadata.tree) if item is None else item
            # To NumPy: the devices that saved it need not be there.
            target = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), item)
            items[name] = arrays.restore(folder / name, target)
        _check(records.restore(folder / "progress"), items)
    return items


def _number_lists(tree: Any) -> Any:
    """Makes numbers of the indices of lists, which Orbax returns as strings: "10" would come before "2"."""
    if not isinstance(tree, Mapping):
        return tree
    return {int(key) if key.isdecimal() else key: _number_lists(value) for key, value in tree.items()}


def _items(state: TrainState) -> dict[str, Any]:
    variables = {"params": state.params, "rest": state.rest}
    own = {name: tree[OWN] for name, tree in variables.items() if has_own(tree)}
    return {
        "variables": {name: network(tree) for name, tree in variables.items()},
        "optimizer": {"step": state.step, "opt_state": state.opt_state} | ({"own": own} if own else {}),
    }


def _save_args(items: Mapping[str, Any], record: Mapping[str, Any]) -> ocp.args.Composite:
    """What to save: the items, and a record with their checksums and its own."""
    record = {**record, "checksums": {name: checksum(item) for name, item in items.items()}}
    record["checksums"]["progress"] = _crc32(record)
    saved = {name: ocp.args.StandardSave(item) for name, item in items.items()}
    return ocp.args.Composite(**saved, progress=ocp.args.JsonSave(record))


def _check(record: dict[str, Any], items: Mapping[str, Any]) -> None:
    """Raises if a record or one of the items is not what `_save_args` was given."""
    checksums = record["checksums"]
    if checksums.pop("progress") != _crc32(record):
        raise ValueError("the checksum of its progress is wrong")
    for name, item in items.items():
        if checksum(item) != checksums[name]:
            raise ValueError(f"the checksum of its {name} is wrong")


def _crc32(record: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _sum_words(array: Any, xp: Any = np) -> Any:
    """A sum of all 32-bit words modulo 2**32, each times an odd number of its own: one that changes is always noticed."""
    words = xp.atleast_1d(array).view(f"uint{min(8 * array.dtype.itemsize, 32)}").astype(xp.uint32)
    weights = 2 * xp.arange(words.size, dtype=xp.uint32).reshape(words.shape) + 1
    return xp.sum(words * weights, dtype=xp.uint32)


_sum_words_on_devices = jax.jit(functools.partial(_sum_words, xp=jnp))  # compiled for every shape


def checksum(tree: Any) -> int:
    """A checksum of the arrays of a tree, on the host or on devices, in the order of its leaves."""
    sums = [
        _sum_words_on_devices(leaf) if isinstance(leaf, jax.Array) else _sum_words(np.asarray(leaf))
        for leaf in jax.tree.leaves(tree)
    ]
    return int(_sum_words(np.stack(jax.device_get(sums))))


@contextlib.contextmanager
def _explained(folder: epath.Path, remedy: str = _REMEDY) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise UserError(f"cannot read the checkpoint {folder} ({one_line(error, 200)}){remedy}") from error


def check_fit(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, Any]) -> None:
    """Raises a ValueError that names the arrays that are missing, superfluous, or not of the wanted shape or kind."""
    problems = [f"missing {name}" for name in wanted if name not in found]
    for name, array in found.items():
        if name not in wanted:
            problems.append(f"unexpected {name}")
        elif array.shape != wanted[name]:
            problems.append(f"{name} has shape {array.shape} instead of {wanted[name]}")
        elif not jnp.issubdtype(array.dtype, jnp.floating):
            problems.append(f"{name} holds {array.dtype}, not floating-point numbers")
        elif not jnp.isfinite(array).all():
            problems.append(f"{name} holds numbers that are not finite")
    if problems:
        more = [f"and {len(problems) - _SHOWN_PROBLEMS} more"] if len(problems) > _SHOWN_PROBLEMS else []
        raise ValueError("; ".join(problems[:_SHOWN_PROBLEMS] + more))


def _directory(job_dir: epath.Path) -> epath.Path:
    return paths.resolve(job_dir) / "checkpoints"  # Orbax takes absolute paths only.
