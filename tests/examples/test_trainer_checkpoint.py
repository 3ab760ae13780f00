"""Checksums, and what is saved and loaded by itself; what a run does with its checkpoints is in `test_distill_run.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from examples.trainer import checkpoint
from examples.trainer.errors import UserError

_RNG = np.random.default_rng(0)
_ARRAYS = {
    "float32": _RNG.normal(size=(4, 3, 5)).astype(np.float32),
    "bfloat16": _RNG.normal(size=(4, 3)).astype(jnp.bfloat16),
    "int8": np.array([-3, 5], np.int8),
    "bool": np.array([True, False, True]),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "float64": _RNG.normal(size=(2, 3)),
    "int64": np.array(-(2**40)),
}


@pytest.mark.parametrize("name", _ARRAYS)
def test_the_checksum_is_the_same_on_devices(name):
    array = _ARRAYS[name]
    with jax.enable_x64("64" in name):
        assert checkpoint.checksum(array) == checkpoint.checksum(jnp.asarray(array))


def test_the_checksum_of_an_array_that_is_divided_among_devices():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    array = _ARRAYS["float32"]
    assert checkpoint.checksum(jax.device_put(array, sharding)) == checkpoint.checksum(array)


def test_the_checksum_by_hand():
    """Checkpoints that were saved before need it: each word times 1, 3, 5, ..., and each of these sums once more."""
    tree = {"a": np.array([7, 2**31], np.uint32), "b": np.array(9, np.uint8)}
    assert checkpoint.checksum(tree) == ((7 + 3 * 2**31) % 2**32 + 3 * 9) % 2**32


@pytest.mark.parametrize("name", sorted(_ARRAYS.keys() - {"empty"}))
def test_every_changed_byte_is_noticed(name):
    before = _ARRAYS[name]
    for i in range(before.nbytes):
        content = bytearray(before.tobytes())
        content[i] ^= 1
        after = np.frombuffer(content, before.dtype).reshape(before.shape)
        assert checkpoint.checksum(after) != checkpoint.checksum(before)


def test_what_is_saved_is_loaded(tmp_path):
    checkpoint.save_variables(tmp_path / "network", _ARRAYS | {"empty": np.ones(1)}, {})
    params, rest = checkpoint.load_variables(tmp_path / "network")
    assert rest == {}
    for name in set(_ARRAYS) - {"empty"}:
        np.testing.assert_array_equal(params[name], _ARRAYS[name], strict=True)


def test_what_interrupted_saves_left_is_removed(tmp_path):
    checkpoint.save_variables(tmp_path, {"w": np.ones(3)}, {})
    folder = tmp_path / "checkpoints"
    for name in ("7.orbax-checkpoint-tmp", "8.orbax-checkpoint-tmp-5", "notes", "old.orbax-checkpoint-tmp"):
        (folder / name / "variables").mkdir(parents=True)
    (folder / "9.orbax-checkpoint-tmp").touch()
    with checkpoint.Checkpoints(tmp_path, keep=2):
        assert sorted(path.name for path in folder.iterdir()) == [
            "0",
            "9.orbax-checkpoint-tmp",
            "notes",
            "old.orbax-checkpoint-tmp",
        ]


def test_what_interrupted_saves_left_and_cannot_be_removed(tmp_path, monkeypatch):
    def refuse(path, missing_ok):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir(parents=True)
    monkeypatch.setattr(type(epath.Path(tmp_path)), "rmtree", refuse)
    with pytest.raises(UserError, match=r"^cannot write .*/checkpoints \(Permission denied\); put this right"):
        checkpoint.Checkpoints(tmp_path, keep=2)


def test_the_best_validation_is_the_highest_or_the_lowest():
    values = {10: 2.0, 20: 3.0, 30: 1.0, 40: 1.0, 50: 3.0}
    for lower_is_better, best in ((False, checkpoint.Best(20, 3.0)), (True, checkpoint.Best(30, 1.0))):
        progress = checkpoint.Progress(seed=0)
        for step, value in values.items():
            progress = progress.validated(step, value, lower_is_better=lower_is_better)
        assert progress.best == best
