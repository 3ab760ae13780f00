"""Checkpoints of one arm, with Orbax: `<workdir>/<arm>/checkpoints/<step>/`.

A checkpoint has four items, so that each reader takes only what it needs:

    variables   {'params', 'rest'}: the network
    optimizer   {'step', 'opt_state'}
    data        the state of the Grain iterator
    progress    JSON: epoch, seconds
"""

from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import orbax.checkpoint as ocp

from examples.distill.errors import UserError
from examples.distill.steps import TrainState


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
            data=grain.checkpoint.CheckpointSave(batches),
            progress=ocp.args.JsonSave(progress._asdict()),
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
    restored = checkpoints.restore(
        latest,
        args=ocp.args.Composite(
            variables=ocp.args.StandardRestore({"params": like.params, "rest": like.rest}),
            optimizer=ocp.args.StandardRestore({"step": like.step, "opt_state": like.opt_state}),
            data=grain.checkpoint.CheckpointRestore(batches),
            progress=ocp.args.JsonRestore(),
        ),
    )
    return TrainState(**restored.variables, **restored.optimizer), Progress(**restored.progress)


def saved_steps(arm_dir: Path) -> list[int]:
    """Returns the steps of the checkpoints that were saved to the end."""
    return ocp.utils.checkpoint_steps(_directory(arm_dir))


def is_imported(arm_dir: Path) -> bool:
    """Whether the network comes from `import_teacher`: training saves after an epoch, hence never at step 0."""
    return (_directory(arm_dir) / "0").is_dir()


def load_variables(arm_dir: Path) -> tuple[Any, Any]:
    """Returns the (params, rest) of a trained network: nested dicts of arrays, ready for `models.apply`."""
    if not saved_steps(arm_dir):
        raise UserError(f"no checkpoint in {_directory(arm_dir)}; delete {arm_dir} to train it again")
    with ocp.CheckpointManager(_directory(arm_dir)) as checkpoints:
        args = ocp.args.Composite(variables=ocp.args.StandardRestore())
        variables = checkpoints.restore(checkpoints.latest_step(), args=args).variables
    return variables["params"], variables["rest"]


def _directory(arm_dir: Path) -> Path:
    return (arm_dir / "checkpoints").absolute()  # Orbax takes absolute paths only.
