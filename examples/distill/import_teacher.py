"""Makes a teacher of a PyTorch state dict: writes it as a checkpoint that `checkpoint.load_variables` reads.

    python -m examples.distill.import_teacher --model resnet32x4 --num_classes 100 --from FILE --to DIR

FILE is .safetensors, or .pth (.pt, .tar), for which PyTorch must be installed; it is read as data, never run as code.
Its tensors have torchvision's names (ResNets) or those of the CIFAR distillation repositories (ResNet8x4/32x4, VGG8/13).
Whatever does not fit the model is an error, so a teacher that was imported is complete.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from examples.distill import models
from examples.trainer import checkpoint
from examples.trainer.errors import UserError

# How the path of a parameter becomes the name of its tensor: every rule is applied once, in this order.
_Rules = Sequence[tuple[str, str | Callable[[re.Match], str]]]
_LEAVES: _Rules = (
    (r"kernel$|scale$", "weight"),
    (r"mean$", "running_mean"),
    (r"var$", "running_var"),
)
_RESNET: _Rules = (
    (r"^stem", "conv1"),
    (r"^stages\.(\d)", lambda stage: f"layer{int(stage[1]) + 1}"),
    (r"downsample\.conv", "downsample.0"),
    (r"downsample\.norm", "downsample.1"),
    (r"conv(\d)\.conv", r"conv\1"),
    (r"conv(\d)\.norm", r"bn\1"),
    (r"^classifier", "fc"),
    *_LEAVES,
)
_VGG: _Rules = (
    (r"^stages\.(\d)\.(\d)\.conv", lambda conv: f"block{conv[1]}.{3 * int(conv[2])}"),
    (r"^stages\.(\d)\.(\d)\.norm", lambda norm: f"block{norm[1]}.{3 * int(norm[2]) + 1}"),
    *_LEAVES,
)
_RULES = {
    **dict.fromkeys(("resnet8x4", "resnet32x4", "resnet18_small", "resnet18", "resnet34", "resnet50"), _RESNET),
    **dict.fromkeys(("vgg8", "vgg13"), _VGG),
}

# Flax keeps kernels as (height, width, in, out) and (in, out), PyTorch as (out, in, height, width) and (out, in).
_TO_FLAX = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}
_TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv` (without the program's name) and returns the exit code."""
    logging.set_verbosity(logging.ERROR)  # Orbax logs every save.
    try:
        arguments = _parse(argv)
        import_teacher(arguments.model, arguments.num_classes, arguments.source, arguments.target)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def import_teacher(model: str, num_classes: int, source: Path, target: Path) -> None:
    """Reads the state dict `source` and writes the checkpoint `target`, a new folder."""
    if model not in _RULES:
        raise UserError(f"cannot import a model {model!r}; known: {', '.join(sorted(_RULES))}")
    if num_classes < 1:
        raise UserError(f"bad --num_classes={num_classes}: it must be at least 1")
    checkpoint.check_path(target)
    if target.exists():
        raise UserError(f"--to={target} exists already; choose another folder")
    try:
        params, rest = to_variables(model, num_classes, read_state_dict(source))
    except ValueError as error:
        raise UserError(f"{source} does not fit {model} with {num_classes} classes: {error}") from error
    try:
        target.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write to --to={target}: {error.strerror}") from error
    checkpoint.save_variables(target, params, rest)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{target}: {model} with {num_classes} classes, {count:,} parameters")


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors in a file, by name, without what wraps them: a dict of more, a DataParallel module."""
    readers = {".safetensors": _read_safetensors, ".pth": _read_pth, ".pt": _read_pth, ".tar": _read_pth}
    if path.suffix not in readers:
        raise UserError(f"cannot read {path}: its name must end in {' or '.join(readers)}")
    if not path.is_file():
        raise UserError(f"{path} is not a file" if path.exists() else f"no such file: {path}")
    try:
        tensors = readers[path.suffix](path)
    except ImportError as error:
        raise UserError(
            f"reading {path.suffix} files needs the package {error.name}: pip install {error.name}"
        ) from error
    except Exception as error:  # Damaged files raise whatever the decoder stumbles over.
        found = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))  # of PyTorch, which refuses to run code
        why = f"it holds a {found[1]}" if found else "damaged, or not a state dict of plain tensors"
        raise UserError(
            f"cannot read {path}: {why}; torch.save(model.state_dict(), FILE) makes one to be read"
        ) from error
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}


def to_variables(model: str, num_classes: int, tensors: dict[str, np.ndarray]) -> tuple[Any, Any]:
    """Returns the (params, rest) of a model; raises a ValueError that names tensors which do not fit it."""
    abstract = nnx.eval_shape(lambda: models.build(model, num_classes, rngs=nnx.Rngs(0)))
    _, *variables = models.split(abstract)
    wanted = {
        _torch_name(path, model): tuple(leaf.shape[axis] for axis in _TO_TORCH[leaf.ndim])
        for path, leaf in jax.tree.leaves_with_path(tuple(variables))
    }
    checkpoint.check_fit(wanted, tensors)

    def convert(path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(tensors[_torch_name(path, model)].transpose(_TO_FLAX[leaf.ndim]), leaf.dtype)

    return jax.tree.map_with_path(convert, tuple(variables))


def _torch_name(path: jax.tree_util.KeyPath, model: str) -> str:
    name = jax.tree_util.keystr(path[1:], simple=True, separator=".")  # The first key tells params from rest.
    for pattern, replacement in _RULES[model]:
        name = re.sub(pattern, replacement, name)
    return name


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(path)


def _read_pth(path: Path) -> dict[str, np.ndarray]:
    import torch

    loaded = torch.load(path, map_location="cpu", weights_only=True)
    for wrapper in ("state_dict", "model", "net"):
        if isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    # NumPy has no bfloat16.
    return {
        str(name): (tensor.float() if tensor.is_floating_point() else tensor).detach().numpy()
        for name, tensor in loaded.items()
    }


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser("python -m examples.distill.import_teacher", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", required=True, help=f"one of {', '.join(sorted(_RULES))}")
    parser.add_argument("--num_classes", required=True, type=int)
    parser.add_argument("--from", required=True, type=Path, dest="source", metavar="FILE")
    parser.add_argument("--to", required=True, type=Path, dest="target", metavar="DIR")
    return parser.parse_args(argv)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(message)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
