"""The importer of PyTorch teachers: the same logits as PyTorch's, and a line for whatever is wrong with the input."""

import argparse
import errno
import fractions
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

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

    def __init__(self, width_in, width, stride, convs, shortcut):
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
        self.name = shortcut
        if stride != 1 or width_in != width_out:
            conv = torch.nn.Conv2d(width_in, width_out, 1, stride, bias=False)
            setattr(self, shortcut, torch.nn.Sequential(conv, torch.nn.BatchNorm2d(width_out)))

    def forward(self, x):
        y = x
        for i in range(1, self.convs + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            if i < self.convs:
                y = torch.relu(y)
        return torch.relu(y + (getattr(self, self.name)(x) if hasattr(self, self.name) else x))


class _ResNet(torch.nn.Module):
    def __init__(
        self, blocks, *, convs=2, widths=(64, 128, 256, 512), stem=64, small=False, names=("downsample", "fc")
    ):
        super().__init__()
        kernel, stride = (3, 1) if small else (7, 2)
        self.conv1 = torch.nn.Conv2d(3, stem, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(stem)
        self.maxpool = torch.nn.Identity() if small else torch.nn.MaxPool2d(3, 2, padding=1)
        width_in = stem
        for s, (size, width) in enumerate(zip(blocks, widths, strict=True), 1):
            stage = []
            for i in range(size):
                stage.append(_Block(width_in, width, 2 if i == 0 and s > 1 else 1, convs, names[0]))
                width_in = width if convs == 2 else 4 * width
            setattr(self, f"layer{s}", torch.nn.Sequential(*stage))
        self.stages = len(blocks)
        self.classifier_name = names[1]
        setattr(self, names[1], torch.nn.Linear(width_in, _CLASSES))

    def forward(self, x):
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        for s in range(1, self.stages + 1):
            x = getattr(self, f"layer{s}")(x)
        return getattr(self, self.classifier_name)(x.mean(dim=(2, 3)))


class _WideBlock(torch.nn.Module):
    def __init__(self, width_in, width, stride):
        super().__init__()
        self.bn1 = torch.nn.BatchNorm2d(width_in)
        self.conv1 = torch.nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(width)
        self.conv2 = torch.nn.Conv2d(width, width, 3, padding=1, bias=False)
        if width != width_in:
            self.convShortcut = torch.nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x):
        y = torch.relu(self.bn1(x))
        x = self.convShortcut(y) if hasattr(self, "convShortcut") else x
        return x + self.conv2(torch.relu(self.bn2(self.conv1(y))))


class _WideResNet(torch.nn.Module):
    def __init__(self, depth, factor):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 16, 3, padding=1, bias=False)
        width_in = 16
        for s, width in enumerate((16 * factor, 32 * factor, 64 * factor), 1):
            stage = torch.nn.Module()
            blocks = [_WideBlock(width_in, width, 1 if s == 1 else 2)]
            blocks += [_WideBlock(width, width, 1) for _ in range((depth - 4) // 6 - 1)]
            stage.layer = torch.nn.Sequential(*blocks)
            setattr(self, f"block{s}", stage)
            width_in = width
        self.bn1 = torch.nn.BatchNorm2d(width_in)
        self.fc = torch.nn.Linear(width_in, _CLASSES)

    def forward(self, x):
        x = self.block3.layer(self.block2.layer(self.block1.layer(self.conv1(x))))
        return self.fc(torch.relu(self.bn1(x)).mean(dim=(2, 3)))


class _VGG(torch.nn.Module):
    def __init__(self, *convs):
        super().__init__()
        width_in = 3
        for g, (width, size) in enumerate(zip((64, 128, 256, 512, 512), convs, strict=True)):
            layers = []
            for _ in range(size):
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


def _conv(width_in, width, kernel, stride=1, groups=1, relu=True):
    """Convolution, BatchNorm and perhaps ReLU, as a list of layers."""
    conv = torch.nn.Conv2d(width_in, width, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, torch.nn.BatchNorm2d(width), *([torch.nn.ReLU()] if relu else [])]


class _MobileNetV1(torch.nn.Module):
    def __init__(self):
        super().__init__()
        blocks, width_in = [torch.nn.Sequential(*_conv(3, 32, 3, 2))], 32
        for width, stride in [
            *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
            *(5 * [(512, 1)]),
            *((1024, 2), (1024, 1)),
        ]:
            depthwise = _conv(width_in, width_in, 3, stride, groups=width_in)
            blocks.append(torch.nn.Sequential(*depthwise, *_conv(width_in, width, 1)))
            width_in = width
        self.model = torch.nn.Sequential(*blocks)
        self.fc = torch.nn.Linear(1024, _CLASSES)

    def forward(self, x):
        return self.fc(self.model(x).mean(dim=(2, 3)))


class _InvertedResidual(torch.nn.Module):
    def __init__(self, width_in, width, stride, expansion):
        super().__init__()
        hidden = expansion * width_in
        layers = [*_conv(width_in, hidden, 1), *_conv(hidden, hidden, 3, stride, groups=hidden)]
        self.conv = torch.nn.Sequential(*layers, *_conv(hidden, width, 1, relu=False))
        self.residual = stride == 1 and width_in == width

    def forward(self, x):
        return x + self.conv(x) if self.residual else self.conv(x)


class _MobileNetV2Half(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, width_in = torch.nn.Sequential(*_conv(3, 16, 3, 2)), 16
        stages = []
        # Half the widths of the paper, and strides for 32 pixels.
        for s, (width, size, stride) in enumerate(
            [(8, 1, 1), (12, 2, 1), (16, 3, 2), (32, 4, 2), (48, 3, 1), (80, 3, 2), (160, 1, 1)]
        ):
            blocks = []
            for i in range(size):
                blocks.append(_InvertedResidual(width_in, width, stride if i == 0 else 1, 6 if s else 1))
                width_in = width
            stages.append(torch.nn.Sequential(*blocks))
        self.blocks = torch.nn.Sequential(*stages)
        self.conv2 = torch.nn.Sequential(*_conv(width_in, 1280, 1))
        self.classifier = torch.nn.Sequential(torch.nn.Linear(1280, _CLASSES))

    def forward(self, x):
        return self.classifier(self.conv2(self.blocks(self.conv1(x))).mean(dim=(2, 3)))


def _name_layers(module, *convs):
    """conv1, bn1, conv2, bn2, ... in a module."""
    for i, (conv, norm, *_) in enumerate(convs, 1):
        setattr(module, f"conv{i}", conv)
        setattr(module, f"bn{i}", norm)


def _shuffled(x, groups):
    return torch.nn.functional.channel_shuffle(x, groups)


class _ShuffleUnitV1(torch.nn.Module):
    def __init__(self, width_in, width, stride, groups):
        super().__init__()
        hidden = width // 4
        _name_layers(
            self,
            _conv(width_in, hidden, 1, groups=groups),
            _conv(hidden, hidden, 3, stride, groups=hidden),
            _conv(hidden, width, 1, groups=3),
        )
        self.groups, self.stride = groups, stride

    def forward(self, x):
        y = _shuffled(torch.relu(self.bn1(self.conv1(x))), self.groups)
        y = self.bn3(self.conv3(torch.relu(self.bn2(self.conv2(y)))))
        if self.stride == 1:
            return torch.relu(x + y)
        return torch.relu(torch.cat([y, torch.nn.functional.avg_pool2d(x, 3, 2, padding=1)], 1))


class _ShuffleUnitV2(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        half = width // 2
        _name_layers(self, _conv(half, half, 1), _conv(half, half, 3, groups=half), _conv(half, half, 1))

    def forward(self, x):
        x, y = x.chunk(2, dim=1)
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(y)))))
        return _shuffled(torch.cat([x, torch.relu(self.bn3(self.conv3(y)))], 1), 2)


class _ShuffleDownV2(torch.nn.Module):
    def __init__(self, width_in, width):
        super().__init__()
        half = width // 2
        left = _conv(width_in, width_in, 3, 2, groups=width_in), _conv(width_in, half, 1)
        _name_layers(self, *left, _conv(width_in, half, 1), _conv(half, half, 3, 2, groups=half), _conv(half, half, 1))

    def forward(self, x):
        y = torch.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        x = self.bn4(self.conv4(torch.relu(self.bn3(self.conv3(x)))))
        return _shuffled(torch.cat([y, torch.relu(self.bn5(self.conv5(x)))], 1), 2)


class _ShuffleNet(torch.nn.Module):
    def __init__(self, version):
        super().__init__()
        convs, width_in = [_conv(3, 24, 1)], 24
        for s, (width, size) in enumerate(zip([(240, 480, 960), (116, 232, 464)][version - 1], (4, 8, 4), strict=True)):
            if version == 1:
                units = [_ShuffleUnitV1(width_in, width - width_in, 2, 1 if s == 0 else 3)]
                units += [_ShuffleUnitV1(width, width, 1, 3) for _ in range(size - 1)]
            else:
                units = [_ShuffleDownV2(width_in, width), *(_ShuffleUnitV2(width) for _ in range(size - 1))]
            setattr(self, f"layer{s + 1}", torch.nn.Sequential(*units))
            width_in = width
        if version == 2:
            convs.append(_conv(width_in, 1024, 1))
            width_in = 1024
        _name_layers(self, *convs)
        self.linear = torch.nn.Linear(width_in, _CLASSES)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(x))))))
        if hasattr(self, "conv2"):
            x = torch.relu(self.bn2(self.conv2(x)))
        return self.linear(x.mean(dim=(2, 3)))


def _cifar(depth, factor=1):
    widths = tuple(factor * width for width in (16, 32, 64))
    return lambda: _ResNet(3 * ((depth - 2) // 6,), widths=widths, stem=32 if factor > 1 else 16, small=True)


_OLD_NAMES = ("shortcut", "linear")
_TORCH = {
    **{f"resnet{depth}": _cifar(depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    "resnet8x4": _cifar(8, 4),
    "resnet32x4": _cifar(32, 4),
    "wrn_16_1": lambda: _WideResNet(16, 1),
    "wrn_16_2": lambda: _WideResNet(16, 2),
    "wrn_40_1": lambda: _WideResNet(40, 1),
    "wrn_40_2": lambda: _WideResNet(40, 2),
    "vgg8": lambda: _VGG(1, 1, 1, 1, 1),
    "vgg11": lambda: _VGG(1, 1, 2, 2, 2),
    "vgg13": lambda: _VGG(2, 2, 2, 2, 2),
    "vgg16": lambda: _VGG(2, 2, 3, 3, 3),
    "vgg19": lambda: _VGG(2, 2, 4, 4, 4),
    "mobilenetv1": _MobileNetV1,
    "mobilenetv2_half": _MobileNetV2Half,
    "shufflenetv1": lambda: _ShuffleNet(1),
    "shufflenetv2": lambda: _ShuffleNet(2),
    "resnet18_small": lambda: _ResNet((2, 2, 2, 2), small=True, names=_OLD_NAMES),
    "resnet50_small": lambda: _ResNet((3, 4, 6, 3), convs=3, small=True, names=_OLD_NAMES),
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


def _import(source, target, model="resnet8x4", num_classes=_CLASSES, **flags):
    flags = {"model": model, "num_classes": num_classes, "from": source, "to": target, **flags}
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


@pytest.mark.parametrize("model", slow_but(_TORCH, "resnet8", "vgg8", "wrn_16_1"))
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
    assert set(_TORCH) == set(import_teacher._NAMINGS)


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


def _prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


_ARGS = argparse.Namespace(lr=0.1)
_OPTIMIZER = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
# Content of a file, made of the network's state dict and that of another network; where the importer says it found it.
_FORMATS = {
    "plain": (lambda state, _: state, ""),
    "DataParallel": (lambda state, _: _prefixed("module.", state), "module.*"),
    "state_dict": (lambda state, _: {"state_dict": state, "epoch": 240}, "state_dict.*"),
    "model_state_dict": (
        lambda state, _: {"model_state_dict": state, "optimizer_state_dict": _OPTIMIZER},
        "model_state_dict.*",
    ),
    "net": (lambda state, _: {"net": _prefixed("module.", state), "acc": 79.4}, "net.module.*"),
    "student_best": (lambda state, _: {"model": state}, "model.*"),
    "a distiller": (
        lambda state, other: {
            "epoch": 240,
            "model": _prefixed("module.student.", state)
            | _prefixed("module.teacher.", other)
            | {"module.embed.weight": torch.ones(3, 3)},
            "optimizer": _OPTIMIZER,
            "best_acc": torch.tensor(76.3),
        },
        "model.module.student.*",
    ),
    "torch.compile": (lambda state, _: _prefixed("_orig_mod.", state), ""),
    "torch.compile, DataParallel": (
        lambda state, _: {"model": _prefixed("module._orig_mod.", state)},
        "model.module.*",
    ),
    "Lightning": (
        lambda state, _: {
            "state_dict": _prefixed("model.", state) | {"criterion.weight": torch.ones(7)},
            "hyper_parameters": {"lr": 0.1},
            "pytorch-lightning_version": "2.5.0",
        },
        "state_dict.model.*",
    ),
    "Lightning, a distiller": (
        lambda state, other: {"state_dict": _prefixed("teacher.", other) | _prefixed("student.", state)},
        "state_dict.student.*",
    ),
    "parameters": (lambda state, _: {k: torch.nn.Parameter(t, t.is_floating_point()) for k, t in state.items()}, ""),
    "before num_batches_tracked": (
        lambda state, _: {name: t for name, t in state.items() if "num_batches_tracked" not in name},
        "",
    ),
    "arguments and NumPy's numbers": (
        lambda state, _: {"model": state, "opt": _ARGS, "best_acc": np.float64(79.4), "epoch": np.int64(3)},
        "model.*",
    ),
}


@pytest.mark.parametrize("name", _FORMATS)
def test_formats(name, network, variables, tmp_path, capsys):
    content, place = _FORMATS[name]
    state = network.state_dict()
    torch.save(content(state, {name: tensor + 1 for name, tensor in state.items()}), tmp_path / "student_best")
    assert _import(tmp_path / "student_best", tmp_path / "teacher") == 0
    taken = f", taken from {place}" if place else ""
    expected = f"{tmp_path / 'teacher'}: resnet8x4 with 7 classes, 1,209,639 parameters{taken}\n"
    assert capsys.readouterr().out == expected
    _assert_equal(tmp_path / "teacher", variables)


def test_the_format_is_recognized_by_content(network, tensors, variables, tmp_path):
    torch.save(network.state_dict(), tmp_path / "zip.safetensors")
    torch.save(network.state_dict(), tmp_path / "pickle", _use_new_zipfile_serialization=False)
    safetensors.numpy.save_file(tensors, tmp_path / "safetensors.pth")
    for name in ("zip.safetensors", "pickle", "safetensors.pth"):
        assert _import(tmp_path / name, tmp_path / f"{name}-teacher") == 0
        _assert_equal(tmp_path / f"{name}-teacher", variables)


def test_both_namings_of_a_resnet_for_small_images():
    for names in (_OLD_NAMES, ("downsample", "fc")):
        state = _ResNet((2, 2, 2, 2), small=True, names=names).state_dict()
        (params, _), taken = import_teacher.to_variables("resnet18_small", _CLASSES, {"model": state, "epoch": 1})
        shortcut = state[f"layer2.0.{names[0]}.0.weight"]
        np.testing.assert_array_equal(
            params["stages"][1][0]["downsample"]["conv"]["kernel"], shortcut.permute(2, 3, 1, 0)
        )
        assert taken == ", taken from model.*"


# Content of a file, made of the state dicts of the weights as trained and of their average; the places of both.
_AVERAGES = {
    "timm": (
        lambda raw, ema: {"arch": "resnet", "state_dict": raw, "state_dict_ema": ema, "args": _ARGS},
        "state_dict.*",
        "state_dict_ema.*",
    ),
    "torchvision": (
        lambda raw, ema: {
            "model": raw,
            "model_ema": {"n_averaged": torch.tensor(9), **_prefixed("module.", ema)},
            "args": _ARGS,
        },
        "model.*",
        "model_ema.module.*",
    ),
    "Lightning": (
        lambda raw, ema: {
            "state_dict": _prefixed("model.", ema),
            "current_model_state": _prefixed("model.", raw),
            "averaging_state": {"n_averaged": torch.tensor(9)},
        },
        "current_model_state.model.*",
        "state_dict.model.*",
    ),
    "a module of the network": (
        lambda raw, ema: {"state_dict": _prefixed("net.", raw) | _prefixed("net_ema.", ema)},
        "state_dict.net.*",
        "state_dict.net_ema.*",
    ),
}


@pytest.mark.parametrize("name", _AVERAGES)
@pytest.mark.parametrize("weights", [None, "ema", "raw"])
def test_averaged_weights_beside_raw_ones(name, weights, network, variables, tmp_path, capsys):
    content, raw_place, ema_place = _AVERAGES[name]
    wanted = network.state_dict()
    other = {name: tensor + 1 for name, tensor in wanted.items()}
    torch.save(content(*((wanted, other) if weights == "raw" else (other, wanted))), tmp_path / "last.pth")
    flags = {} if weights is None else {"weights": weights}
    assert _import(tmp_path / "last.pth", tmp_path / "teacher", **flags) == 0
    _assert_equal(tmp_path / "teacher", variables)
    place, kind, another = (raw_place, "raw", "ema") if weights == "raw" else (ema_place, "EMA", "raw")
    expected = f", taken from {place} ({kind} weights; --weights={another} takes the others)\n"
    assert capsys.readouterr().out.endswith(expected)


def test_averages_without_statistics_are_not_taken_unless_wanted(network, variables, tmp_path, capsys):
    ema = dict(network.named_parameters())
    torch.save({"model": network.state_dict(), "ema": ema}, tmp_path / "last.pth")
    assert _import(tmp_path / "last.pth", tmp_path / "teacher") == 0
    _assert_equal(tmp_path / "teacher", variables)
    assert "from model.* (raw weights; --weights=ema takes the others)" in capsys.readouterr().out
    assert _import(tmp_path / "last.pth", tmp_path / "another", weights="ema") == 1
    assert "running_mean; and 15 more; it has model." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (lambda s: {"model": s}, {"weights": "ema"}, "it has no weights of the kind --weights=ema, only model.*"),
        (lambda s: {"ema": s}, {"weights": "raw"}, "it has no weights of the kind --weights=raw, only ema.*"),
        (
            lambda s: {"first": s, "second": s},
            {},
            "it has several such networks: first.*, second.*; save one of them alone",
        ),
        (
            lambda s: {"epoch": 3, "features": {"0.weight": s["conv1.weight"]}},
            {},
            "; and 48 more; it has features.0.weight, for example; its top-level keys are epoch, features",
        ),
        (lambda s: {"epoch": 3}, {}, "it has no tensors; its top-level keys are epoch"),
        (lambda s: {str(i): i for i in range(8)}, {}, "its top-level keys are 0, 1, 2, 3, 4, 5, and 2 more"),
        (lambda s: {}, {}, "its top-level keys are none"),
    ],
)
def test_files_in_which_no_network_is_found(content, flags, message, network, tmp_path, capsys):
    torch.save(content(network.state_dict()), tmp_path / "teacher.pth")
    assert _import(tmp_path / "teacher.pth", tmp_path / "teacher", **flags) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'teacher.pth'} does not fit resnet8x4 with 7 classes: ")
    assert line.endswith(message)
    assert not (tmp_path / "teacher").exists()


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


def test_safetensors_need_no_torch_and_what_torch_saved_says_that_it_does(
    network, tensors, tmp_path, monkeypatch, capsys
):
    safetensors.numpy.save_file(tensors, tmp_path / "teacher.safetensors")
    torch.save(network.state_dict(), tmp_path / "teacher.pth")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert _import(tmp_path / "teacher.safetensors", tmp_path / "teacher") == 0
    assert _import(tmp_path / "teacher.pth", tmp_path / "another") == 1
    message = f"error: reading {tmp_path / 'teacher.pth'} needs the package torch: pip install torch\n"
    assert capsys.readouterr().err == message


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
        (
            lambda t: _without(t, "fc.weight") | {"linear.weight": t["fc.weight"]},
            "; it has linear.weight, for example; ",
        ),
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
    ("content", "message"),
    [
        (b"", "neither what torch.save writes nor safetensors; it is empty"),
        (b"<html>404</html>", "neither what torch.save writes nor safetensors; it begins with b'<html>404</html>'"),
        (b"{}", "neither what torch.save writes nor safetensors; it begins with b'{}'"),
        (pickle.dumps({"conv1.weight": _Malicious()}), "damaged, or not a state dict of plain tensors; torch.save("),
        (
            pickle.dumps({"conv1.weight": _Malicious()}, protocol=2),
            "it holds exec, which is not plain data; torch.save(",
        ),
        (b"PK\x03\x04 and no more", "damaged, or not a state dict of plain tensors; torch.save("),
        (b"\x09" + bytes(7) + b"{}", "damaged, or not a state dict of plain tensors; torch.save("),
    ],
)
def test_files_that_are_damaged_or_something_else(content, message, tmp_path, capsys):
    (tmp_path / "teacher.pth").write_bytes(content)
    assert _import(tmp_path / "teacher.pth", tmp_path / "teacher") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: cannot read {tmp_path / 'teacher.pth'}: {message}")
    assert not (tmp_path / "teacher").exists()


@pytest.mark.parametrize("is_zip", [False, True])
def test_code_is_not_run(is_zip, tmp_path, capsys):
    path = tmp_path / "teacher.pth"
    torch.save({"conv1.weight": _Malicious()}, path, _use_new_zipfile_serialization=is_zip)
    assert _import(path, tmp_path / "teacher") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: cannot read {path}: it holds ")
    assert "exec, which is not plain data; " in line


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
    torch.save({"model": network.state_dict(), "git": fractions.Fraction(1)}, path)
    assert _import(path, tmp_path / "teacher") == 1
    assert (
        f"cannot read {path}: it holds fractions.Fraction, which is not plain data; torch.save("
        in capsys.readouterr().err
    )


def test_weights_that_are_not_finite(network, tmp_path, capsys):
    tensors = network.state_dict()
    torch.save({**tensors, "fc.bias": torch.full_like(tensors["fc.bias"], torch.nan)}, tmp_path / "teacher.pth")
    assert _import(tmp_path / "teacher.pth", tmp_path / "teacher") == 1
    assert capsys.readouterr().err.endswith("classes: fc.bias holds numbers that are not finite\n")


@pytest.mark.parametrize("change", [lambda tensor: tensor.to_sparse(), lambda tensor: tensor.to("meta")])
def test_tensors_that_are_not_plain(change, network, tmp_path, capsys):
    tensors = network.state_dict()
    changed = change(tensors["fc.weight"])
    torch.save({"model": {**tensors, "fc.weight": changed}}, tmp_path / "teacher.pth")
    assert _import(tmp_path / "teacher.pth", tmp_path / "teacher") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "does not fit resnet8x4 with 7 classes: model.fc.weight is no plain tensor: " in line
    torch.save({"model": tensors, "optimizer": {"momentum": changed}}, tmp_path / "teacher.pth")
    assert _import(tmp_path / "teacher.pth", tmp_path / "teacher") == 0  # What is beside the network does not matter.


def test_a_dict_that_contains_itself(network, tmp_path, capsys):
    content = dict(network.state_dict())
    content["self"] = content
    torch.save(content, tmp_path / "teacher.pth")
    assert _import(tmp_path / "teacher.pth", tmp_path / "teacher") == 1
    assert "does not fit resnet8x4 with 7 classes: maximum recursion depth" in capsys.readouterr().err


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), None, _random])
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
        ({"--model": "resnet9"}, "cannot import a model 'resnet9'; known: resnet8, resnet14, resnet20, "),
        ({"--model": "mobilenetv2"}, "cannot import a model 'mobilenetv2'; known: "),
        ({"--weights": "best"}, "argument --weights: invalid choice: 'best'"),
        ({"--num_classes": "0"}, "bad --num_classes=0: it must be at least 1"),
        ({"--num_classes": "ten"}, "--num_classes: invalid int value: 'ten'"),
        ({"--from": "{folder}/none.pth"}, "no such file: {folder}/none.pth"),
        ({"--from": "{folder}"}, "{folder} is not a file"),
        ({"--from": "{folder}/teacher.safetensors/x"}, "cannot read {folder}/teacher.safetensors/x: Not a directory"),
        ({"--from": "{folder}/" + 300 * "n"}, ": File name too long"),
        (
            {"--from": "~nobody-of-this-name/x"},
            "there is no such user; a folder of that name is ./~nobody-of-this-name/x",
        ),
        ({"--to": "{folder}/" + 300 * "n"}, "cannot write to --to={folder}/" + 300 * "n" + ": File name too long"),
        ({"--to": "{folder}/new/" + 300 * "n"}, ": File name too long"),
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
    assert [path.name for path in tmp_path.iterdir()] == ["teacher.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["imports", "refuses"])
def test_the_command(case, tensors, tmp_path):
    safetensors.numpy.save_file(tensors, tmp_path / "teacher.safetensors")
    if case == "refuses":
        (tmp_path / "teacher").mkdir()
    command = [sys.executable, "-m", "examples.distill.import_teacher", "--model", "resnet8x4", "--num_classes", "7"]
    command += ["--from", str(tmp_path / "teacher.safetensors"), "--to", str(tmp_path / "teacher")]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    expected = {
        "imports": (0, f"{tmp_path / 'teacher'}: resnet8x4 with 7 classes, 1,209,639 parameters\n", ""),
        "refuses": (1, "", f"error: --to={tmp_path / 'teacher'} exists already; choose another folder\n"),
    }
    assert (process.returncode, process.stdout, process.stderr) == expected[case]


def test_a_run_uses_an_imported_teacher_and_does_not_train_it(distill, tmp_path, capsys):
    workdir = tmp_path / "run"
    params, rest = models.split(models.build("mlp", 10, input_shape=(8, 8, 1), hidden=(256, 256), rngs=nnx.Rngs(7)))[1:]
    checkpoint.save_variables(workdir / "teacher", params, rest)
    flags = ("--config.method=kd", "--config.epochs=1")
    assert distill(workdir, *flags) == 0, capsys.readouterr().err
    assert not (workdir / "teacher" / "metrics.jsonl").exists()
    kept, _ = checkpoint.load_variables(workdir / "teacher")
    for ours, theirs in zip(jax.tree.leaves(kept), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert (workdir / "kd" / "result.json").exists()
    assert distill(workdir, *flags) == 0
    assert "Nothing left to train" in capsys.readouterr().out


def test_the_order_of_more_than_ten_layers_is_kept(tmp_path):
    params = {"layers": {i: {"kernel": np.full(3, i, np.float32)} for i in range(12)}}
    checkpoint.save_variables(tmp_path, params, {})
    loaded, _ = checkpoint.load_variables(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_home_folders(tensors, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    safetensors.numpy.save_file(tensors, tmp_path / "teacher.safetensors")
    assert _import("~/teacher.safetensors", "~/teachers/resnet8x4") == 0
    checkpoint.load_variables(tmp_path / "teachers" / "resnet8x4")


def test_links(tensors, variables, tmp_path, capsys):
    (tmp_path / "real").mkdir()
    safetensors.numpy.save_file(tensors, tmp_path / "real" / "blob")
    links = {"teacher.safetensors": "real/blob", "folder": "real", "taken": "real", "free": "real/free", "loop": "loop"}
    for link, place in links.items():
        (tmp_path / link).symlink_to(place)
    source = tmp_path / "teacher.safetensors"
    assert _import(source, tmp_path / "folder" / "teacher") == 0
    _assert_equal(tmp_path / "real" / "teacher", variables)
    assert _import(source, tmp_path / "free") == 0
    _assert_equal(tmp_path / "real" / "free", variables)
    assert _import(source, tmp_path / "taken") == 1
    assert _import(source, tmp_path / "loop") == 1
    assert _import(tmp_path / "loop", tmp_path / "t") == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"error: --to={tmp_path / 'taken'} exists already; choose another folder"
    assert lines[1].startswith(f"error: cannot write to --to={tmp_path / 'loop'}: ")
    assert lines[2].startswith(f"error: cannot read {tmp_path / 'loop'}: ")
    assert len(lines) == 3


def test_pipes_and_files_without_permission(tensors, tmp_path, monkeypatch, capsys):
    os.mkfifo(tmp_path / "pipe")  # Reading it would wait forever.
    assert _import(tmp_path / "pipe", tmp_path / "teacher") == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'pipe'} is not a file\n"
    safetensors.numpy.save_file(tensors, tmp_path / "secret")

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # Permissions do not keep root from reading.
    assert _import(tmp_path / "secret", tmp_path / "teacher") == 1
    assert capsys.readouterr().err == f"error: cannot read {tmp_path / 'secret'}: Permission denied\n"


def test_an_interrupted_import_leaves_nothing(tensors, variables, tmp_path, monkeypatch, capsys):
    safetensors.numpy.save_file(tensors, tmp_path / "teacher.safetensors")
    save_variables = checkpoint.save_variables

    def interrupt(folder, *network):
        save_variables(folder, *network)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_variables", interrupt)
    assert _import(tmp_path / "teacher.safetensors", tmp_path / "new" / "teacher") == 130
    assert capsys.readouterr().err == "interrupted: nothing was imported\n"
    assert [path.name for path in tmp_path.iterdir()] == ["teacher.safetensors"]
    monkeypatch.undo()
    assert _import(tmp_path / "teacher.safetensors", tmp_path / "new" / "teacher") == 0
    _assert_equal(tmp_path / "new" / "teacher", variables)


def test_a_full_disk_leaves_nothing(tensors, variables, tmp_path, capsys):
    """No file of this process may be larger, while it imports."""
    safetensors.numpy.save_file(tensors, tmp_path / "teacher.safetensors")
    target = tmp_path / "new" / "teacher"
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (10, 4_000_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            assert _import(tmp_path / "teacher.safetensors", target) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert capsys.readouterr() == ("", f"error: cannot write to --to={target}: File too large\n")
        assert [path.name for path in tmp_path.iterdir()] == ["teacher.safetensors"]
    assert _import(tmp_path / "teacher.safetensors", target) == 0
    _assert_equal(target, variables)
