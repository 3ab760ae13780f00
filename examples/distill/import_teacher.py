"""Makes a teacher of a PyTorch state dict: writes it as a checkpoint that `checkpoint.load_variables` reads.

    python -m examples.distill.import_teacher --model resnet32x4 --num_classes 100 --from FILE --to DIR

FILE is what `torch.save` wrote, for which PyTorch must be installed, or safetensors; whatever its name is. It is read as
data, never run as code. The state dict may lie inside of other things: of dicts such as {"state_dict": ...} or
{"model": ...}, of DataParallel, torch.compile, a LightningModule, or a distiller, whose student is then taken. Where the
same network is there twice, as trained and as an exponential moving average (EMA), the average is taken.
The tensors have torchvision's names (ResNets) or those of the CIFAR distillation repositories. Whatever does not fit
the model is an error, so a teacher that was imported is complete.
"""

import argparse
import collections
import difflib
import os
import re
import stat
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from flax import nnx

from examples.distill import models
from examples.trainer import checkpoint, paths, records
from examples.trainer.errors import UserError, one_line

# How the path of a parameter becomes the name of its tensor: every rule is applied once, in this order.
_Rules = Sequence[tuple[str, str | Callable[[re.Match], str]]]
_LEAVES: _Rules = (
    (r"kernel$|scale$", "weight"),
    (r"mean$", "running_mean"),
    (r"var$", "running_var"),
)
_LAYERS: _Rules = (
    (r"^stem", "conv1"),
    (r"^stages\.(\d)", lambda stage: f"layer{int(stage[1]) + 1}"),
    (r"conv(\d)\.conv", r"conv\1"),
    (r"conv(\d)\.norm", r"bn\1"),
    *_LEAVES,
)
_RESNET: _Rules = (
    (r"downsample\.conv", "downsample.0"),
    (r"downsample\.norm", "downsample.1"),
    (r"^classifier", "fc"),
    *_LAYERS,
)
# The networks of four stages in the CIFAR distillation repositories.
_RESNET_SMALL: _Rules = (
    (r"downsample\.conv", "shortcut.0"),
    (r"downsample\.norm", "shortcut.1"),
    (r"^classifier", "linear"),
    *_LAYERS,
)
_WIDE_RESNET: _Rules = (
    (r"^stem", "conv1"),
    (r"conv1\.conv", "conv1"),
    (r"conv1\.norm", "bn2"),
    (r"norm\.", "bn1."),
    (r"shortcut", "convShortcut"),
    (r"^stages\.(\d)", lambda stage: f"block{int(stage[1]) + 1}.layer"),
    (r"^classifier", "fc"),
    *_LEAVES,
)
_VGG: _Rules = (
    (r"^stages\.(\d)\.(\d)\.conv", lambda conv: f"block{conv[1]}.{3 * int(conv[2])}"),
    (r"^stages\.(\d)\.(\d)\.norm", lambda norm: f"block{norm[1]}.{3 * int(norm[2]) + 1}"),
    *_LEAVES,
)
_MOBILENET_V1: _Rules = (
    (r"^stem\.", "model.0.0."),
    (r"^stages\.(\d)\.(\d)", lambda block: f"model.{1 + sum((1, 2, 2, 6, 2)[: int(block[1])]) + int(block[2])}"),
    (r"depthwise\.", "0."),
    (r"pointwise\.", "3."),
    (r"\.(\d)\.conv", r".\1"),
    (r"\.(\d)\.norm", lambda norm: f".{int(norm[1]) + 1}"),
    (r"^classifier", "fc"),
    *_LEAVES,
)
_MOBILENET_V2_HALF: _Rules = (
    (r"^stem", "conv1.0"),
    (r"^head", "conv2.0"),
    (r"expand", "0"),
    (r"depthwise", "3"),
    (r"project", "6"),
    (r"\.(\d)\.conv", r".\1"),
    (r"\.(\d)\.norm", lambda norm: f".{int(norm[1]) + 1}"),
    (r"^stages\.(\d)\.(\d)", r"blocks.\1.\2.conv"),
    (r"^classifier", "classifier.0"),
    *_LEAVES,
)
_SHUFFLENET_V1: _Rules = (
    (r"conv2\.", "conv3."),
    (r"depthwise", "conv2"),
    (r"^classifier", "linear"),
    *_LAYERS,
)
_SHUFFLENET_V2: _Rules = (
    (r"\.0\.branch\.conv2\.", ".0.conv5."),
    (r"\.0\.branch\.depthwise", ".0.conv4"),
    (r"\.0\.branch\.conv1\.", ".0.conv3."),
    (r"\.pointwise", ".conv2"),
    (r"\.branch\.conv2\.", ".conv3."),
    (r"\.branch\.depthwise", ".conv2"),
    (r"\.branch", ""),
    (r"\.depthwise", ".conv1"),
    (r"^head", "conv2"),
    (r"^classifier", "linear"),
    *_LAYERS,
)
_CIFAR_RESNETS = tuple(f"resnet{size}" for size in ("8", "14", "20", "32", "44", "56", "110", "8x4", "32x4"))
# By model, the namings of its tensors that are in use.
_NAMINGS: dict[str, tuple[_Rules, ...]] = {
    **dict.fromkeys((*_CIFAR_RESNETS, "resnet18", "resnet34", "resnet50"), (_RESNET,)),
    **dict.fromkeys(("resnet18_small", "resnet50_small"), (_RESNET_SMALL, _RESNET)),
    **dict.fromkeys(("wrn_16_1", "wrn_16_2", "wrn_40_1", "wrn_40_2"), (_WIDE_RESNET,)),
    **dict.fromkeys(("vgg8", "vgg11", "vgg13", "vgg16", "vgg19"), (_VGG,)),
    "mobilenetv1": (_MOBILENET_V1,),
    "mobilenetv2_half": (_MOBILENET_V2_HALF,),
    "shufflenetv1": (_SHUFFLENET_V1,),
    "shufflenetv2": (_SHUFFLENET_V2,),
}

# Flax keeps kernels as (height, width, in, out) and (in, out), PyTorch as (out, in, height, width) and (out, in).
_TO_FLAX = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}
_TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}

_EMA = re.compile(r"(?<![a-z])ema(?![a-z])", re.IGNORECASE)  # a word of a name
_SHOWN_KEYS = 6
_ORBAX_BYTES = 2**20  # for what Orbax writes beside the arrays, which is less


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv` (without the program's name) and returns the exit code."""
    logging.set_verbosity(logging.FATAL)  # Orbax logs every save, and tracebacks beside what it raises.
    try:
        arguments = _parse(argv)
        result = import_teacher(
            arguments.model, arguments.num_classes, arguments.source, arguments.target, arguments.weights
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was imported", file=sys.stderr)
        return 130
    print(result)
    return 0


def import_teacher(
    model: str, num_classes: int, source: epath.PathLike, target: epath.PathLike, weights: str | None = None
) -> str:
    """Reads the state dict in `source`, writes the checkpoint `target`, a new folder, and returns what it took.

    Args:
        model: one of `models` whose names of tensors are known.
        num_classes: of the teacher.
        source: the file.
        target: the folder, here or in a bucket; its parents are made as well.
        weights: "ema" or "raw", for a file that has both; default: "ema" if it is complete.
    """
    if model not in _NAMINGS:
        raise UserError(f"cannot import a model {model!r}; known: {', '.join(_NAMINGS)}")
    if num_classes < 1:
        raise UserError(f"bad --num_classes={num_classes}: it must be at least 1")
    source, target = paths.resolve(source, "--from"), paths.resolve(target, "--to")
    checkpoint.check_path(target)
    if paths.in_bucket(source):
        raise UserError(f"--from={source} is in a bucket; copy it to this machine first")
    with records.reading(target):
        exists = target.exists()
    if exists:
        raise UserError(f"--to={target} exists already; choose another folder")
    content = read(Path(source))
    try:
        variables, taken = to_variables(model, num_classes, content, weights)
    except (ValueError, RecursionError) as error:  # A dict can contain itself.
        raise UserError(f"{source} does not fit {model} with {num_classes} classes: {error}") from error
    _write(target, *variables)
    count = sum(leaf.size for leaf in jax.tree.leaves(variables[0]))
    return f"{target}: {model} with {num_classes} classes, {count:,} parameters{taken}"


def read(path: Path) -> Mapping[Any, Any]:
    """Returns what is in a file, without running any code that may be in it; nested dicts have tensors as leaves."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path} is not a file")
        with path.open("rb") as file:
            start = file.read(16)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    reader = _reader(start)
    if reader is None:
        found = f"it begins with {start!r}" if start else "it is empty"
        raise UserError(f"cannot read {path}: neither what torch.save writes nor safetensors; {found}")
    try:
        content = reader(path)
    except ImportError as error:
        raise UserError(f"reading {path} needs the package {error.name}: pip install {error.name}") from error
    except Exception as error:  # Damaged files raise whatever the decoder stumbles over.
        found = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))  # of PyTorch, which refuses to run code
        why = (
            f"it holds {found[1]}, which is not plain data"
            if found
            else "damaged, or not a state dict of plain tensors"
        )
        raise UserError(
            f"cannot read {path}: {why}; torch.save(model.state_dict(), FILE) makes one to be read"
        ) from error
    if not isinstance(content, Mapping):
        raise UserError(f"cannot read {path}: it holds a {type(content).__name__}, not a dict of tensors")
    return content


def to_variables(
    model: str, num_classes: int, content: Mapping[Any, Any], weights: str | None = None
) -> tuple[tuple[Any, Any], str]:
    """Returns the (params, rest) of a model, and where in the content of a file they were if not at its top.

    Raises a ValueError that names what is there instead if there is no network that fits.
    """
    abstract = nnx.eval_shape(lambda: models.build(model, num_classes, rngs=nnx.Rngs(0)))
    shapes = tuple(models.split(abstract)[1:])
    tensors = dict(_flatten(content))
    namings = [
        {_torch_name(path, rules): leaf for path, leaf in jax.tree.leaves_with_path(shapes)}
        for rules in _NAMINGS[model]
    ]
    prefix, naming, taken = _find(namings, tensors, weights)
    found = {
        name.removeprefix(prefix): _to_numpy(name, tensor)
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    wanted = {name: tuple(leaf.shape[axis] for axis in _TO_TORCH[leaf.ndim]) for name, leaf in naming.items()}
    try:
        checkpoint.check_fit(wanted, found)
    except ValueError as error:
        raise ValueError(f"{error}{_hint(wanted, prefix, tensors, content)}") from error
    leaves = [jnp.asarray(found[name].transpose(_TO_FLAX[leaf.ndim]), leaf.dtype) for name, leaf in naming.items()]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves), taken


def _find(
    namings: Sequence[Mapping[str, Any]], tensors: Mapping[str, Any], weights: str | None
) -> tuple[str, Mapping[str, Any], str]:
    """Returns where a network is among the tensors: the prefix of its names, their naming, and words for both.

    It is where most of the wanted names are.
    """
    counts: collections.Counter[tuple[str, int]] = collections.Counter()
    for name in tensors:
        for start in (0, *(dot.end() for dot in re.finditer(r"\.", name))):
            counts.update((name[:start], i) for i, naming in enumerate(namings) if name[start:] in naming)
    prefixes = {prefix for prefix, _ in counts}
    ema = {prefix for prefix in prefixes if _is_ema(prefix, prefixes)}
    allowed = {None: prefixes, "ema": ema, "raw": prefixes - ema}[weights]
    if weights and prefixes and not allowed:
        raise ValueError(f"it has no weights of the kind --weights={weights}, only {_listed(_most(counts))}")
    best = _most({key: count for key, count in counts.items() if key[0] in allowed})
    best = _prefer(best, lambda prefix: "teacher" not in prefix.split("."))
    if weights is None:
        best = _prefer(best, lambda prefix: prefix in ema)
    if len(best) > 1:
        raise ValueError(f"it has several such networks: {_listed(best)}; save one of them alone")
    prefix, i = next(iter(best.items()), ("", 0))
    taken = f", taken from {_listed([prefix])}" if prefix else ""
    if ema and prefixes - ema:
        kind, other = ("EMA", "raw") if prefix in ema else ("raw", "ema")
        taken += f" ({kind} weights; --weights={other} takes the others)"
    return prefix, namings[i], taken


def _is_ema(prefix: str, prefixes: Collection[str]) -> bool:
    # Lightning's weight averaging moves the weights as trained out of the way of the average.
    swapped = prefix.startswith("state_dict.") and any(other.startswith("current_model_state.") for other in prefixes)
    return swapped or bool(_EMA.search(prefix))


def _most(counts: Mapping[tuple[str, int], int]) -> dict[str, int]:
    """Returns the prefixes with the highest count, each with the index of its naming."""
    return {prefix: i for (prefix, i), count in counts.items() if count == max(counts.values())}


def _prefer(best: dict[str, int], is_preferred: Callable[[str], bool]) -> dict[str, int]:
    return {prefix: i for prefix, i in best.items() if is_preferred(prefix)} or best


def _listed(prefixes: Collection[str]) -> str:
    return ", ".join(f"{prefix}*" for prefix in sorted(prefixes))


def _hint(wanted: Collection[str], prefix: str, tensors: Collection[str], content: Mapping[Any, Any]) -> str:
    """What the file has instead of a name that is missing."""
    missing = [name for name in wanted if prefix + name not in tensors]
    if not missing:
        return ""
    unused = [name for name in tensors if name.removeprefix(prefix) not in wanted]
    similar = difflib.get_close_matches(missing[0], unused, 1, cutoff=0.0)
    instead = f"; it has {similar[0]}, for example" if similar else "" if tensors else "; it has no tensors"
    keys = [str(key) for key in content]
    more = [f"and {len(keys) - _SHOWN_KEYS} more"] if len(keys) > _SHOWN_KEYS else []
    return f"{instead}; its top-level keys are {', '.join(keys[:_SHOWN_KEYS] + more) or 'none'}"


def _flatten(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Gives the tensors of nested dicts, by the names on the way to them, without what PyTorch only counts with."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{name}.")
        elif hasattr(value, "shape") and not name.endswith("num_batches_tracked"):
            yield name.replace("_orig_mod.", ""), value


def _to_numpy(name: str, tensor: Any) -> np.ndarray:
    if not hasattr(tensor, "detach"):
        return np.asarray(tensor)
    try:
        # NumPy has no bfloat16.
        return (tensor.float() if tensor.is_floating_point() else tensor).detach().numpy()
    except (TypeError, RuntimeError) as error:  # It is quantized, sparse, or without numbers.
        raise ValueError(f"{name} is no plain tensor: {one_line(error, 200)}") from error


def _write(target: epath.Path, params: Any, rest: Any) -> None:
    """Writes a checkpoint of which either all is there in the end, or nothing."""
    try:
        if paths.in_bucket(target):  # where Orbax marks a checkpoint when all is there
            checkpoint.save_variables(target, params, rest)
            return
        path = Path(target).resolve()
        existing = next(parent for parent in path.parents if os.path.lexists(parent))
        missing = path.relative_to(existing)
        with tempfile.TemporaryDirectory(prefix=".import_teacher_", dir=existing, ignore_cleanup_errors=True) as folder:
            Path(folder, missing).mkdir(parents=True)
            _check_room(folder, params, rest)
            checkpoint.save_variables(Path(folder, missing), params, rest)
            Path(folder, missing.parts[0]).rename(existing / missing.parts[0])
    except OSError as error:
        raise UserError(f"cannot write to --to={target}: {error.strerror}") from error
    except Exception as error:  # whatever Orbax and the resolution of links raise
        raise UserError(f"cannot write to --to={target}: {one_line(error, 200)}") from error


def _check_room(folder: str, params: Any, rest: Any) -> None:
    """Raises an OSError if there is no room for a network: on a full disk, Orbax fails in several threads at once."""
    with tempfile.TemporaryFile(dir=folder) as file:
        for leaf in jax.tree.leaves((params, rest)):
            file.write(np.asarray(leaf).tobytes())
        file.write(bytes(_ORBAX_BYTES))
        file.flush()


def _torch_name(path: jax.tree_util.KeyPath, rules: _Rules) -> str:
    name = jax.tree_util.keystr(path[1:], simple=True, separator=".")  # The first key tells params from rest.
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _reader(start: bytes) -> Callable[[Path], Any] | None:
    """Returns what reads a file that starts so, if anything does."""
    if start.startswith(b"PK\x03\x04"):
        return _read_torch
    if start[8:9] == b"{":  # after the length of this header, in eight bytes
        return _read_safetensors
    if start.startswith(b"\x80"):  # a pickle, as PyTorch wrote until 1.6
        return _read_torch
    return None


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    from safetensors.numpy import load_file

    return load_file(path)


def _read_torch(path: Path) -> Any:
    import torch

    # Plain data that training scripts keep beside the tensors: their arguments, accuracies as NumPy's numbers.
    scalar = np.float64(0).__reduce__()[0]
    numbers = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    dtypes = [np.dtype, *(type(np.dtype(kind)) for kind in ("float32", "float64", "int64"))]
    with torch.serialization.safe_globals([argparse.Namespace, *numbers, *dtypes]):
        with path.open("rb") as file:  # Of a path, PyTorch would look at the suffix.
            return torch.load(file, map_location="cpu", weights_only=True)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser("python -m examples.distill.import_teacher", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", required=True, help=f"one of {', '.join(_NAMINGS)}")
    parser.add_argument("--num_classes", required=True, type=int)
    parser.add_argument("--from", required=True, dest="source", metavar="FILE")
    parser.add_argument("--to", required=True, dest="target", metavar="DIR")
    parser.add_argument("--weights", choices=("ema", "raw"), help="which, where FILE has both (default: ema)")
    return parser.parse_args(argv)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(message)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
