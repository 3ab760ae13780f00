"""Checkpoints of one arm, with Orbax: `<workdir>/<arm>/checkpoints/<step>/`.

A checkpoint has three items, so that each reader takes only what it needs:

    variables   {'params', 'rest'}: the network
    optimizer   {'step', 'opt_state'}
    progress    JSON: epoch, seconds, and the state of the Grain iterator, which is the same on all hosts
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from examples.distill.errors import UserError, one_line
from examples.distill.steps import TrainState

_SHOWN_PROBLEMS = 5


class Progress(NamedTuple):
    """How far an arm has come."""

    epoch: int  # finished epochs
    seconds: float  # spent on them, over all runs of the command


def manager(arm_dir: Path) -> ocp.CheckpointManager:
    """Opens the checkpoints of an arm; use it as a context manager, which waits for the last save."""
    policy = ocp.checkpoint_managers.LatestN(2)
    options = ocp.CheckpointManagerOptions(preservation_policy=policy, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(_directory(arm_dir), options=options)


def save(
    checkpoints: ocp.CheckpointManager, state: TrainState, batches: grain.DatasetIterator, progress: Progress
) -> None:
    """Copies the arrays and returns; the files are written in the background."""
    checkpoints.save(
        int(state.step),
        args=ocp.args.Composite(
            variables=ocp.args.StandardSave({"params": state.params, "rest": state.rest}),
            optimizer=ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
            progress=ocp.args.JsonSave(progress._asdict() | {"data": batches.get_state()}),
        ),
    )


def restore_latest(
    checkpoints: ocp.CheckpointManager, state: TrainState, batches: grain.DatasetIterator
) -> tuple[TrainState, Progress]:
    """Returns what the latest checkpoint holds and sets `batches` to where it was; without one, returns the start.

    `state` says which structure, dtypes and shardings to restore to.
    """
    latest = checkpoints.latest_step()
    if latest is None:
        return state, Progress(epoch=0, seconds=0.0)
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    restored = _restore(
        checkpoints,
        latest,
        ocp.args.Composite(
            variables=ocp.args.StandardRestore({"params": like.params, "rest": like.rest}),
            optimizer=ocp.args.StandardRestore({"step": like.step, "opt_state": like.opt_state}),
            progress=ocp.args.JsonRestore(),
        ),
    )
    batches.set_state(restored.progress["data"])
    progress = Progress(restored.progress["epoch"], restored.progress["seconds"])
    return TrainState(**restored.variables, **restored.optimizer), progress


def saved_steps(arm_dir: Path) -> list[int]:
    """Returns the steps of the checkpoints that were saved to the end."""
    return ocp.utils.checkpoint_steps(_directory(arm_dir))


def save_variables(arm_dir: Path, params: Any, rest: Any) -> None:
    """Writes a network that was not trained here, as one that `has_network`."""
    with manager(arm_dir) as checkpoints:
        checkpoints.save(0, args=ocp.args.Composite(variables=ocp.args.StandardSave({"params": params, "rest": rest})))


def is_imported(arm_dir: Path) -> bool:
    """Whether the network comes from `save_variables`: training saves after an epoch, hence never at step 0."""
    return (_directory(arm_dir) / "0").is_dir()


def has_network(arm_dir: Path) -> bool:
    """Whether the folder holds a network to be used: imported, or trained to the end."""
    return is_imported(arm_dir) or (bool(saved_steps(arm_dir)) and (arm_dir / "result.json").exists())


def load_variables(arm_dir: Path) -> tuple[Any, Any]:
    """Returns the (params, rest) of a trained network: nested dicts of NumPy arrays, ready for `models.apply`."""
    if not saved_steps(arm_dir):
        raise UserError(f"no checkpoint in {_directory(arm_dir)}; delete {arm_dir} to train it again")
    folder = _directory(arm_dir) / str(max(saved_steps(arm_dir)))
    with _explained(folder), ocp.StandardCheckpointer() as checkpointer:
        # To NumPy: the devices that saved it need not be there.
        saved = checkpointer.metadata(folder / "variables").item_metadata.tree
        like = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), saved)
        variables = checkpointer.restore(folder / "variables", like)
    return variables["params"], variables["rest"]


def _restore(checkpoints: ocp.CheckpointManager, step: int, args: ocp.args.Composite) -> ocp.args.Composite:
    with _explained(checkpoints.directory / str(step)):
        return checkpoints.restore(step, args=args)


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Orbax raises whatever it stumbles over.
        raise UserError(
            f"cannot read the checkpoint {folder} ({one_line(error, 200)}); restore that folder, or delete it"
        ) from error


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


def _directory(arm_dir: Path) -> Path:
    return (arm_dir / "checkpoints").absolute()  # Orbax takes absolute paths only.
