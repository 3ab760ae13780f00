"""The importer of PyTorch teachers: the same logits as PyTorch's, and a line for whatever is wrong with the input."""

import argparse
import pickle
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from flax import nnx

from examples.distill import import_teacher, models
from examples.trainer import checkpoint
from tests.tiers import slow_but

_CLASSES = 7


class _Block(torch.nn.Module):
    """A residual block; three convolutions make it a bottleneck."""

    def __init__(self, width_in, width, stride, convs):
        super().__init__()
        width_out = width if convs == 2 else 4 * width
        # (in, out, kernel, stride) of each convolution.
        shapes = [(width_in, width, 3, stride), (width, width, 3, 1)]
        if convs == 3:
            shapes = [(width_in, width, 1, 1), (width, width, 3, stride), (width, width_out, 1, 1)]
        for i, (a, b, k, s) in enumerate(shapes, 1):
            setattr(self, f"conv{i}", torch.nn.Conv2d(a, b, k, s, padding=k // 2, bias=False))
            setattr(self, f"bn{i}", torch.nn.BatchNorm2d(b))
        self.convs = convs
        self.downsample = None
        if stride != 1 or width_in != width_out:
            conv = torch.nn.Conv2d(width_in, width_out, 1, stride, bias=False)
            self.downsample = torch.nn.Sequential(conv, torch.nn.BatchNorm2d(width_out))

    def forward(self, x):
        y = x
        for i in range(1, self.convs + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            if i < self.convs:
                y = torch.relu(y)
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class _ResNet(torch.nn.Module):
    def __init__(self, blocks, *, convs=2, widths=(64, 128, 256, 512), stem=64, small=False):
        super().__init__()
        kernel, stride = (3, 1) if small else (7, 2)
        self.conv1 = torch.nn.Conv2d(3, stem, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(stem)
        self.maxpool = torch.nn.Identity() if small else torch.nn.MaxPool2d(3, 2, padding=1)
        width_in = stem
        for s, (size, width) in enumerate(zip(blocks, widths, strict=True), 1):
            stage = []
            for i in range(size):
                stage.append(_Block(width_in, width, 2 if i == 0 and s > 1 else 1, convs))
                width_in = width if convs == 2 else 4 * width
            setattr(self, f"layer{s}", torch.nn.Sequential(*stage))
        self.stages = len(blocks)
        self.fc = torch.nn.Linear(width_in, _CLASSES)

    def forward(self, x):
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        for s in range(1, self.stages + 1):
            x = getattr(self, f"layer{s}")(x)
        return self.fc(x.mean(dim=(2, 3)))


class _VGG(torch.nn.Module):
    def __init__(self, convs):
        super().__init__()
        width_in = 3
        for g, width in enumerate((64, 128, 256, 512, 512)):
            layers = []
            for _ in range(convs):
                conv = torch.nn.Conv2d(width_in, width, 3, padding=1)
                layers += [conv, torch.nn.BatchNorm2d(width), torch.nn.ReLU()]
                width_in = width
            setattr(self, f"block{g}", torch.nn.Sequential(*layers[:-1]))
        self.classifier = torch.nn.Linear(512, _CLASSES)

    def forward(self, x):
        pools = 4 if x.shape[2] == 64 else 3
        for g in range(5):
            x = torch.relu(getattr(self, f"block{g}")(x))
            if g < pools:
                x = torch.nn.functional.max_pool2d(x, 2)
        return self.classifier(x.mean(dim=(2, 3)))


_CIFAR = {"widths": (64, 128, 256), "stem": 32, "small": True}
_TORCH = {
    "resnet8x4": lambda: _ResNet((1, 1, 1), **_CIFAR),
    "resnet32x4": lambda: _ResNet((5, 5, 5), **_CIFAR),
    "vgg8": lambda: _VGG(1),
    "vgg13": lambda: _VGG(2),
    "resnet18_small": lambda: _ResNet((2, 2, 2, 2), small=True),
    "resnet18": lambda: _ResNet((2, 2, 2, 2)),
    "resnet34": lambda: _ResNet((3, 4, 6, 3)),
    "resnet50": lambda: _ResNet((3, 4, 6, 3), convs=3),
}


def _random(name):
    """The PyTorch network with random weights and random BatchNorm statistics, in evaluation mode.

    The statistics vary around those of random images. Around 0 and 1 the signal would die out or explode on its way
    through the layers: the logits would hardly depend on the images, or rounding errors would grow with them.
    """
    torch.manual_seed(0)
    network = _TORCH[name]()
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
        torch.nn.init.normal_(norm.bias, std=0.2)
    with torch.no_grad():
        network(torch.randn(8, 3, 64, 64))
        for norm in norms:
            norm.running_mean += 0.2 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
            norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.7, 1.5)
    return network.eval()


def _import(source, target, model="resnet8x4", num_classes=_CLASSES):
    flags = {"model": model, "num_classes": num_classes, "from": source, "to": target}
    return import_teacher.main([f"--{flag}={value}" for flag, value in flags.items()])


def _abstract(model):
    return nnx.eval_shape(lambda: models.build(model, _CLASSES, rngs=nnx.Rngs(0)))


def _logits(model, directory, images):
    graphdef, _, _ = models.split(_abstract(model))
    params, rest = checkpoint.load_variables(directory)
    apply = jax.jit(lambda params, rest, images: models.apply(graphdef, params, rest, images, train=False)[0])
    return np.asarray(apply(params, rest, images))


@pytest.fixture(scope="module")
def network():
    return _random("resnet8x4")


@pytest.fixture(scope="module")
def tensors(network):
    return {name: tensor.numpy() for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("model", slow_but(_TORCH, "resnet8x4", "vgg8"))
def test_logits_are_those_of_pytorch(model, tmp_path):
    network = _random(model)
    torch.save(network.state_dict(), tmp_path / "teacher.pth")
    assert _import(tmp_path / "teacher.pth", tmp_path / "teacher", model) == 0
    for size in (32, 64) if model.startswith("vgg") else (32,):
        images = np.random.default_rng(0).normal(size=(4, size, size, 3)).astype(np.float32)
        with torch.no_grad():
            expected = network(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
        assert expected.std(axis=0).mean() > 0.02  # The logits depend on the images.
        logits = _logits(model, tmp_path / "teacher", images)
        print(f"{model}, {size} px: largest deviation {np.abs(logits - expected).max():.1e}")
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


def test_every_importable_model_is_compared_with_pytorch():
    assert set(_TORCH) == set(import_teacher._RULES)


def _assert_equal(directory, expected):
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load_variables(directory), expected)


@pytest.fixture(scope="module")
def variables(tensors, tmp_path_factory):
    """What importing the plain tensors gives."""
    folder = tmp_path_factory.mktemp("plain")
    safetensors.numpy.save_file(tensors, folder / "teacher.safetensors")
    assert _import(folder / "teacher.safetensors", folder / "teacher") == 0
    return checkpoint.load_variables(folder / "teacher")


def test_a_teacher_has_the_form_of_a_trained_network(variables):
    network = models.split(_abstract("resnet8x4"))[1:]
    shapes = [
        [
            (jax.tree_util.keystr(path, simple=True), leaf.shape, leaf.dtype)
            for path, leaf in jax.tree.leaves_with_path(t)
        ]
        for t in (variables, network)
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"module." + name: tensor for name, tensor in state.items()},
        lambda state: {"state_dict": state, "epoch": 240},
        lambda state: {"model": {"module." + name: tensor for name, tensor in state.items()}, "best_acc": 79.4},
        lambda state: {name: torch.nn.Parameter(t, t.is_floating_point()) for name, t in state.items()},
        lambda state: {name: t for name, t in state.items() if "num_batches_tracked" not in name},
    ],
    ids=["plain", "DataParallel", "state_dict", "model", "parameters", "before num_batches_tracked"],
)
def test_wrapped_state_dicts(wrap, network, variables, tmp_path):
    torch.save(wrap(network.state_dict()), tmp_path / "teacher.pth")
    assert _import(tmp_path / "teacher.pth", tmp_path / "teacher") == 0
    _assert_equal(tmp_path / "teacher", variables)


def test_data_parallel_names_in_safetensors(tensors, variables, tmp_path):
    wrapped = {"module." + name: tensor for name, tensor in tensors.items()}
    safetensors.numpy.save_file(wrapped, tmp_path / "teacher.safetensors")
    assert _import(tmp_path / "teacher.safetensors", tmp_path / "teacher") == 0
    _assert_equal(tmp_path / "teacher", variables)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_other_precisions_become_float32(dtype, suffix, network, tmp_path):
    state = {name: tensor.to(dtype) for name, tensor in network.state_dict().items()}
    (torch.save if suffix == ".pth" else safetensors.torch.save_file)(state, tmp_path / f"teacher{suffix}")
    assert _import(tmp_path / f"teacher{suffix}", tmp_path / "teacher") == 0
    params, _ = checkpoint.load_variables(tmp_path / "teacher")
    assert params["classifier"]["kernel"].dtype == np.float32
    np.testing.assert_array_equal(params["classifier"]["kernel"], state["fc.weight"].float().numpy().T)


def test_safetensors_need_no_torch_and_pth_says_that_it_does(tensors, tmp_path, monkeypatch, capsys):
    safetensors.numpy.save_file(tensors, tmp_path / "teacher.safetensors")
    (tmp_path / "teacher.pth").touch()
    monkeypatch.setitem(sys.modules, "torch", None)
    assert _import(tmp_path / "teacher.safetensors", tmp_path / "teacher") == 0
    assert _import(tmp_path / "teacher.pth", tmp_path / "another") == 1
    assert capsys.readouterr().err == "error: reading .pth files needs the package torch: pip install torch\n"


def _without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: _without(t, "layer2.0.bn1.running_var"), "missing layer2.0.bn1.running_var"),
        (lambda t: t | {"layer2.1.conv1.weight": t["fc.bias"]}, "unexpected layer2.1.conv1.weight"),
        (lambda t: t | {"fc.bias": np.zeros(10, np.float32)}, "fc.bias has shape (10,) instead of (7,)"),
        (
            lambda t: t | {"layer1.0.conv1.weight": np.zeros((64, 32, 1, 1), np.float32)},
            "layer1.0.conv1.weight has shape (64, 32, 1, 1) instead of (64, 32, 3, 3)",
        ),
        (lambda t: t | {"fc.bias": np.zeros(7, np.int8)}, "fc.bias holds int8, not floating-point numbers"),
        (
            lambda t: _without(t, "conv1.weight") | {"stem.weight": t["conv1.weight"]},
            "missing conv1.weight; unexpected stem.weight",
        ),
        (lambda t: {f"vgg.{name}": tensor for name, tensor in t.items()}, "more"),
        (lambda t: {}, "missing "),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, tensors, tmp_path, capsys):
    safetensors.numpy.save_file(change(tensors), tmp_path / "teacher.safetensors")
    assert _import(tmp_path / "teacher.safetensors", tmp_path / "teacher") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'teacher.safetensors'} does not fit resnet8x4 with 7 classes: ")
    assert message in line
    assert not (tmp_path / "teacher").exists()


class _Malicious:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a file was run as code')",))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.pth", b""),
        ("text.pth", b"<html>404</html>"),
        ("text.safetensors", b"<html>404</html>"),
        ("empty.safetensors", b""),
        ("code.pth", pickle.dumps({"conv1.weight": _Malicious()})),
    ],
)
def test_files_that_are_damaged_or_code(name, content, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    assert _import(tmp_path / name, tmp_path / "teacher") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: cannot read {tmp_path / name}: damaged, or not a state dict of plain tensors; ")
    assert line.endswith("; torch.save(model.state_dict(), FILE) makes one to be read")
    assert not (tmp_path / "teacher").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_files(suffix, network, tmp_path, capsys):
    path = tmp_path / f"teacher{suffix}"
    (torch.save if suffix == ".pth" else safetensors.torch.save_file)(network.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-1000])
    assert _import(path, tmp_path / "teacher") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: cannot read {path}: damaged, or not a state dict of plain tensors; ")


def test_files_that_hold_more_than_tensors(network, tmp_path, capsys):
    path = tmp_path / "checkpoint.pth.tar"
    torch.save({"model": network.state_dict(), "args": argparse.Namespace(lr=0.1)}, path)
    assert _import(path, tmp_path / "teacher") == 1
    assert f"cannot read {path}: it holds a argparse.Namespace; torch.save(" in capsys.readouterr().err


def test_weights_that_are_not_finite(network, tmp_path, capsys):
    tensors = network.state_dict()
    torch.save({**tensors, "fc.bias": torch.full_like(tensors["fc.bias"], torch.nan)}, tmp_path / "teacher.pth")
    assert _import(tmp_path / "teacher.pth", tmp_path / "teacher") == 1
    assert capsys.readouterr().err.endswith("classes: fc.bias holds numbers that are not finite\n")


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"nets": {}}, {3: 4}, _random])
def test_pth_files_without_a_state_dict(content, tmp_path, capsys):
    path = tmp_path / "teacher.pth"
    torch.save(content, path)
    assert _import(path, tmp_path / "teacher") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: cannot read {path}: ")


def test_keys_that_are_not_names(network, tmp_path, capsys):
    torch.save({**network.state_dict(), 3: torch.zeros(1)}, tmp_path / "teacher.pth")
    assert _import(tmp_path / "teacher.pth", tmp_path / "teacher") == 1
    assert capsys.readouterr().err.endswith("does not fit resnet8x4 with 7 classes: unexpected 3\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--model": "resnet110"}, "cannot import a model 'resnet110'; known: resnet18, resnet18_small, resnet32x4"),
        ({"--model": "mobilenetv2"}, "cannot import a model 'mobilenetv2'; known: "),
        ({"--num_classes": "0"}, "bad --num_classes=0: it must be at least 1"),
        ({"--num_classes": "ten"}, "--num_classes: invalid int value: 'ten'"),
        ({"--from": "{folder}/none.pth"}, "no such file: {folder}/none.pth"),
        ({"--from": "{folder}"}, "its name must end in .safetensors or .pth or .pt or .tar"),
        ({"--to": "{folder}/a[1]"}, "no checkpoints can be in {folder}/a[1]: Orbax takes [ ] in a path for a pattern"),
        ({"--to": "{folder}"}, "--to={folder} exists already; choose another folder"),
        ({"--to": "{folder}/teacher.safetensors/x"}, "cannot write to --to={folder}/teacher.safetensors/x: Not a dir"),
        ({"--too": "x"}, "unrecognized arguments: --too"),
        ({"--to": None}, "the following arguments are required: --to"),
    ],
)
def test_bad_input(change, message, tensors, tmp_path, capsys):
    safetensors.numpy.save_file(tensors, tmp_path / "teacher.safetensors")
    flags = {
        "--model": "resnet8x4",
        "--num_classes": "7",
        "--from": "{folder}/teacher.safetensors",
        "--to": "{folder}/t",
    }
    flags = {flag: value.format(folder=tmp_path) for flag, value in (flags | change).items() if value is not None}
    assert import_teacher.main([f"{flag}={value}" for flag, value in flags.items()]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message.format(folder=tmp_path) in line
    assert not (tmp_path / "t").exists()


def test_the_command(tensors, tmp_path):
    safetensors.numpy.save_file(tensors, tmp_path / "teacher.safetensors")
    command = [sys.executable, "-m", "examples.distill.import_teacher", "--model", "resnet8x4", "--num_classes", "7"]
    command += ["--from", str(tmp_path / "teacher.safetensors"), "--to", str(tmp_path / "teacher")]
    first, second = (subprocess.run(command, capture_output=True, text=True, check=False) for _ in range(2))
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout == f"{tmp_path / 'teacher'}: resnet8x4 with 7 classes, 1,209,639 parameters\n"
    message = f"error: --to={tmp_path / 'teacher'} exists already; choose another folder\n"
    assert (second.returncode, second.stdout, second.stderr) == (1, "", message)


def test_a_run_uses_an_imported_teacher_and_does_not_train_it(distill, tmp_path, capsys):
    workdir = tmp_path / "run"
    params, rest = models.split(models.build("mlp", 10, input_shape=(8, 8, 1), hidden=(256, 256), rngs=nnx.Rngs(7)))[1:]
    checkpoint.save_variables(workdir / "teacher", params, rest)
    assert distill(workdir, "--config.method=kd") == 0, capsys.readouterr().err
    assert not (workdir / "teacher" / "metrics.jsonl").exists()
    kept, _ = checkpoint.load_variables(workdir / "teacher")
    for ours, theirs in zip(jax.tree.leaves(kept), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert (workdir / "kd" / "result.json").exists()
    assert distill(workdir, "--config.method=kd") == 0
    assert "Nothing left to train" in capsys.readouterr().out
