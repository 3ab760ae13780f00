"""CIFAR-100, Tiny-ImageNet and ImageNet from files on disk: small ones, in the format and the names of the real ones."""

import importlib.util
import io
import shutil
from unittest import mock

import numpy as np
import pytest
import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from PIL import Image

from examples.distill import data, images
from examples.distill.command_line import main, parse
from examples.trainer.errors import UserError
from tests.tiers import slow_but


def _pixels(height, width, seed):
    """Blocks of colour, which JPEG files hold well."""
    blocks = np.random.default_rng(seed).integers(256, size=(height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return blocks.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]


def _encode(pixels, mode="RGB", format="jpeg"):
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format=format)
    return file.getvalue()


def _decoded(encoded):
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def _config(name, data_dir, **overrides):
    config = parse([f"--config={name}"])[0].dataset
    config.data_dir = str(data_dir)
    config.update(overrides)
    config.split_sizes = ConfigDict()  # the published ones, which small datasets do not have
    return config


def _prepare(name, data_dir, splits):
    """Writes a dataset of TFDS with its own builder, which is given encoded images in the place of its archives.

    `splits` maps names to lists of examples. The archives' readers in TFDS need TensorFlow; the rest does not.
    """
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    named = {
        split: [(f"{split}_{i}", example | {"image": io.BytesIO(example["image"])}) for i, example in enumerate(list_)]
        for split, list_ in splits.items()
    }
    with mock.patch.object(type(builder), "_split_generators", lambda self, dl_manager: named):
        builder.download_and_prepare()


_IMAGENET_TRAIN = [
    ("n01440764", _encode(_pixels(375, 500, 0))),
    ("n01440764", _encode(_pixels(500, 333, 1))),
    ("n01443537", _encode(_pixels(375, 500, 2), mode="L")),
    ("n01443537", _encode(_pixels(400, 400, 3), mode="CMYK")),
    ("n01484850", _encode(_pixels(300, 500, 4), format="png")),
    ("n01484850", _encode(_pixels(90, 70, 5))),
    ("n15075141", _encode(_pixels(375, 500, 6))),
]
_IMAGENET_VALIDATION = _IMAGENET_TRAIN[::-1][:5]


@pytest.fixture(scope="module")
def imagenet_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagenet")
    splits = {"train": _IMAGENET_TRAIN, "validation": _IMAGENET_VALIDATION}
    _prepare(
        "imagenet2012",
        folder,
        {
            split: [
                {"image": encoded, "label": wnid, "file_name": f"{wnid}_{i}.JPEG"}
                for i, (wnid, encoded) in enumerate(examples)
            ]
            for split, examples in splits.items()
        },
    )
    return folder


def _batches(dataset, batch_size, epochs=1):
    with data.train_batches(dataset, batch_size, 0, epochs) as batches:
        return [{name: np.asarray(value) for name, value in batch.items()} for batch in batches]


def test_imagenet_is_evaluated_in_the_view_of_the_paper(imagenet_dir):
    dataset = data.load(_config("imagenet_r34_r18", imagenet_dir))
    assert dataset.num_classes == 1000
    expected = {}
    for wnid, encoded in _IMAGENET_VALIDATION:
        view = images.resize_center_crop(_decoded(encoded), 224)
        expected[view.tobytes()] = {"n01440764": 0, "n01443537": 1, "n01484850": 2, "n15075141": 999}[wnid]
    seen = {}
    for batch in data.eval_batches(dataset, dataset.validation, 2):
        assert batch["image"].shape == (2, 224, 224, 3)
        for image, label, valid in zip(*map(np.asarray, batch.values()), strict=True):
            if valid:
                seen[image.tobytes()] = int(label)
    cmyk = images.resize_center_crop(images.decode(_IMAGENET_TRAIN[3][1], 3), 224)  # rounded otherwise than by Pillow
    expected[cmyk.tobytes()] = expected.pop(images.resize_center_crop(_decoded(_IMAGENET_TRAIN[3][1]), 224).tobytes())
    assert seen == expected


@pytest.mark.slow
def test_imagenet_is_augmented_anew_in_each_epoch_the_same_in_worker_processes(imagenet_dir):
    dataset = data.load(_config("imagenet_r34_r18", imagenet_dir))
    first, second, *_ = here = _batches(dataset, 7, epochs=2)
    assert first["image"].shape == (7, 224, 224, 3)
    assert sorted(first["label"]) == sorted(second["label"]) == [0, 0, 1, 1, 2, 2, 999]
    assert not {image.tobytes() for image in first["image"]} & {image.tobytes() for image in second["image"]}
    for batch, by_workers in zip(here, _batches(dataset._replace(workers=2), 7, epochs=2), strict=True):
        np.testing.assert_array_equal(batch["image"], by_workers["image"])


@pytest.mark.parametrize("workers", slow_but([0, 1], 0))
def test_an_image_that_is_cut_off_is_reported(workers, tmp_path):
    cut_off = [
        {"image": encoded[: len(encoded) // 2], "label": wnid, "file_name": "x.JPEG"}
        for wnid, encoded in _IMAGENET_TRAIN[:2]
    ]
    _prepare("imagenet2012", tmp_path, {"train": cut_off, "validation": cut_off})
    dataset = data.load(_config("imagenet_r34_r18", tmp_path))
    with pytest.raises(
        UserError, match=rf"the dataset in {tmp_path}/imagenet2012/\S+ is damaged \(image \d of 'train'"
    ):
        _batches(dataset._replace(workers=workers), 2)


def test_cifar_is_read_from_memory_and_augmented(tmp_path):
    stored = np.random.default_rng(0).integers(1, 256, size=(6, 32, 32, 3), dtype=np.uint8)
    examples = [
        {"image": _encode(image, format="png"), "label": 10 * i, "coarse_label": 0, "id": str(i)}
        for i, image in enumerate(stored)
    ]
    _prepare("cifar100", tmp_path, {"train": examples, "test": examples[:3]})
    dataset = data.load(_config("cifar100_r32x4_r8x4", tmp_path))
    assert (dataset.num_classes, dataset.image_shape, dataset.workers) == (100, (32, 32, 3), 0)
    [batch] = data.eval_batches(dataset, dataset.test, 3)
    for image, label in zip(np.asarray(batch["image"]), np.asarray(batch["label"]), strict=True):
        np.testing.assert_array_equal(image, stored[label // 10])
    moved = 0
    for batch in _batches(dataset, 6, epochs=4):
        for image, label in zip(batch["image"], batch["label"], strict=True):
            kept = image[image.all(axis=-1)]  # no stored pixel is black, all padding is
            assert {tuple(pixel) for pixel in kept} <= {tuple(pixel) for pixel in stored[label // 10].reshape(-1, 3)}
            assert len(kept) >= 28 * 28
            moved += not np.array_equal(image, stored[label // 10])
    assert moved > 12


@pytest.fixture
def tiny_imagenet_folder(tmp_path):
    """One image for each of 200 classes, in the layout of the archive, whose list of classes is in no order."""
    folder = tmp_path / "data" / "downloads" / "manual" / "tiny-imagenet-200"
    (folder / "val" / "images").mkdir(parents=True)
    wnids = [f"n{number:08d}" for number in range(200)]
    (folder / "wnids.txt").write_text("\n".join(wnids[::-1]) + "\n")
    for label, wnid in enumerate(wnids):
        (folder / "train" / wnid / "images").mkdir(parents=True)
        (folder / "train" / wnid / "images" / f"{wnid}_0.JPEG").write_bytes(_encode(_pixels(64, 64, label)))
        (folder / "train" / wnid / f"{wnid}_boxes.txt").touch()
    (folder / "train" / wnids[0] / "images" / ".DS_Store").touch()
    for name, seed, mode in (("val_0.JPEG", 5, "RGB"), ("val_1.JPEG", 6, "L")):
        (folder / "val" / "images" / name).write_bytes(_encode(_pixels(64, 64, seed), mode))
    (folder / "val" / "val_annotations.txt").write_text(
        f"val_0.JPEG\t{wnids[7]}\t0\t32\t44\t62\nval_1.JPEG\t{wnids[0]}\t0\t32\t44\t62\n"
    )
    return folder


def test_tiny_imagenet_from_its_folder(tiny_imagenet_folder, tmp_path):
    dataset = data.load(_config("tiny_imagenet_r18_shufflev2", tmp_path / "data", prepare=True))
    assert dataset.num_classes == 200
    stored = {int(example["label"]): example["image"] for example in dataset.train}
    assert sorted(stored) == list(range(200)) and len(dataset.train) == 200
    for label in (0, 7, 199):  # in alphabetical order, as PyTorch numbers folders
        np.testing.assert_array_equal(stored[label], _decoded(_encode(_pixels(64, 64, label))))
    by_label = {int(example["label"]): example["image"] for example in dataset.validation}
    for label, name in ((0, "val_1.JPEG"), (7, "val_0.JPEG")):
        encoded = (tiny_imagenet_folder / "val" / "images" / name).read_bytes()
        np.testing.assert_array_equal(by_label[label], _decoded(encoded))
    assert _batches(dataset, 5)[0]["image"].shape == (5, 64, 64, 3)


def _error(capsys, name, data_dir, tmp_path, *overrides):
    arguments = [
        f"--config={name}",
        f"--config.dataset.data_dir={data_dir}",
        "--config.dataset.prepare=True",
        *overrides,
    ]
    assert main([*arguments, "--config.teacher.train=True", f"--workdir={tmp_path / 'run'}"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("tiny_imagenet_r18_mobilenetv2", "downloads/manual does not exist or is empty"),
        (
            "tiny_imagenet_r18_shufflev2",
            "Put the folder tiny-imagenet-200, unpacked from tiny-imagenet-200.zip, there)",
        ),
    ],
)
def test_archives_that_are_not_there(name, reason, tmp_path, capsys):
    line = _error(capsys, name, tmp_path / "data", tmp_path)
    assert line.startswith("error: cannot prepare dataset ")
    assert reason in line
    assert "see examples/distill/README.md" in line


def _append(path, text):
    path.write_text(path.read_text() + text)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "wnids.txt").unlink(), "no tiny-imagenet-200/wnids.txt in "),
        (lambda folder: _append(folder / "wnids.txt", "n9\n"), "wnids.txt lists 201 classes instead of 200"),
        (lambda folder: shutil.rmtree(folder / "train" / "n00000003"), "no images in "),
        (lambda folder: (folder / "val" / "val_annotations.txt").unlink(), "val_annotations.txt'"),
        (lambda folder: _append(folder / "val" / "val_annotations.txt", "val_2.JPEG\tn9\n"), r"line 'val_2.JPEG\tn9'"),
        (lambda folder: _append(folder / "val" / "val_annotations.txt", "\n"), "no known class in its line ''"),
        (lambda folder: (folder / "val" / "images" / "val_1.JPEG").unlink(), "val_1.JPEG'"),
    ],
)
def test_a_folder_that_is_not_tiny_imagenet(damage, reason, tiny_imagenet_folder, tmp_path, capsys):
    damage(tiny_imagenet_folder)
    line = _error(capsys, "tiny_imagenet_r18_shufflev2", tmp_path / "data", tmp_path)
    assert line.startswith("error: cannot prepare dataset 'tiny_imagenet' in ")
    assert reason in line


def _rewrite(data_dir, damage):
    [path] = data_dir.glob("imagenet2012/*/*train.array_record*")
    damage(path)


_DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:1000]),
    "zeros": lambda path: path.write_bytes(path.read_bytes()[:70_000] + bytes(50_000) + path.read_bytes()[120_000:]),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", _DAMAGES)
def test_a_damaged_file_of_a_dataset(damage, imagenet_dir, tmp_path, capsys):
    shutil.copytree(imagenet_dir, tmp_path / "data")
    _rewrite(tmp_path / "data", _DAMAGES[damage])
    arguments = ["--config=imagenet_r34_r18", f"--config.dataset.data_dir={tmp_path / 'data'}", "--config.method=ce"]
    small = [
        "--config.dataset.split_sizes.train=7",
        "--config.dataset.split_sizes.validation=5",
        "--config.devices=1",
        "--config.batch_size=7",
        "--config.eval_batch_size=7",
        "--config.dataset.image_size=32",
        "--config.student.model.name=resnet8x4",
    ]
    assert main([*arguments, *small, f"--workdir={tmp_path / 'run'}"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: the dataset in {tmp_path}/data/imagenet2012/5.1.0 is damaged (image ")


def _write_info(folder, text):
    folder = folder / "imagenet2012" / "5.1.0"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text(text)


@pytest.mark.parametrize(
    ("info", "name", "reason"),
    [
        (
            '{"name": "imagenet2012", "version": "5.1.0", "fileFormat": "tfrecord"}',
            "imagenet2012",
            "another file format",
        ),
        ('{"name": ', "imagenet2012", "cannot open dataset 'imagenet2012' ("),
        (None, "cifar100:9.9.9", "cannot open dataset 'cifar100:9.9.9' ("),
        (None, "imdb_reviews", "it is not a dataset of images with labels"),
        (None, "a/b/c", "'a/b/c'"),
        (None, "", "''"),
    ],
)
def test_what_is_no_dataset(info, name, reason, tmp_path, capsys):
    if info:
        _write_info(tmp_path / "data", info)
    line = _error(capsys, "imagenet_r34_r18", tmp_path / "data", tmp_path, f"--config.dataset.name={name}")
    assert reason in line


def test_images_without_a_size_of_their_own(tmp_path, capsys):
    line = _error(capsys, "imagenet_r34_r18", tmp_path, tmp_path, "--config.dataset.preprocessing=none")
    assert "the images of 'imagenet2012' are stored with sizes of their own" in line


def test_a_builder_that_needs_tensorflow(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # also where it is installed
    line = _error(capsys, "cifar100_r32x4_r8x4", tmp_path / "data", tmp_path)
    assert "its builder in TFDS needs TensorFlow; prepare it with tfds build in an environment that has it" in line


def test_an_incomplete_dataset(imagenet_dir, tmp_path, capsys):
    line = _error(capsys, "imagenet_r34_r18", imagenet_dir, tmp_path)
    assert "has 7 images in its split 'train' instead of 1281167; prepare it again from complete files, or say" in line
