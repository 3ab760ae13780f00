"""CIFAR-100, Tiny-ImageNet and ImageNet from files on disk: small ones, in the format and the names of the real ones."""

import io
from unittest import mock

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from examples.distill import data, images
from examples.distill.command_line import main, parse
from examples.distill.errors import UserError


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


def test_imagenet_is_augmented_anew_in_each_epoch_the_same_in_worker_processes(imagenet_dir):
    dataset = data.load(_config("imagenet_r34_r18", imagenet_dir))
    first, second, *_ = here = _batches(dataset, 7, epochs=2)
    assert first["image"].shape == (7, 224, 224, 3)
    assert sorted(first["label"]) == sorted(second["label"]) == [0, 0, 1, 1, 2, 2, 999]
    assert not {image.tobytes() for image in first["image"]} & {image.tobytes() for image in second["image"]}
    for batch, by_workers in zip(here, _batches(dataset._replace(workers=2), 7, epochs=2), strict=True):
        np.testing.assert_array_equal(batch["image"], by_workers["image"])


def test_an_image_that_is_cut_off_is_reported(tmp_path):
    cut_off = [
        {"image": encoded[: len(encoded) // 2], "label": wnid, "file_name": "x.JPEG"}
        for wnid, encoded in _IMAGENET_TRAIN[:2]
    ]
    _prepare("imagenet2012", tmp_path, {"train": cut_off, "validation": cut_off})
    dataset = data.load(_config("imagenet_r34_r18", tmp_path))
    for workers in (0, 1):
        with pytest.raises(
            UserError, match=rf"'train' of the dataset in {tmp_path}/imagenet2012/\S+ has an image that"
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
    """Two classes in the layout of the archive, whose list of classes is in no order."""
    folder = tmp_path / "data" / "downloads" / "manual" / "tiny-imagenet-200"
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "wnids.txt").write_text("n02124075\nn01443537\n")
    for wnid, seeds in (("n01443537", (0, 1)), ("n02124075", (2, 3, 4))):
        (folder / "train" / wnid / "images").mkdir(parents=True)
        for seed in seeds:
            pixels = _pixels(64, 64, seed)
            (folder / "train" / wnid / "images" / f"{wnid}_{seed}.JPEG").write_bytes(_encode(pixels))
    annotations = [("val_0.JPEG", "n02124075", 5), ("val_1.JPEG", "n01443537", 6)]
    for name, _, seed in annotations:
        (folder / "val" / "images" / name).write_bytes(_encode(_pixels(64, 64, seed), mode="L" if seed == 6 else "RGB"))
    (folder / "val" / "val_annotations.txt").write_text(
        "".join(f"{name}\t{wnid}\t0\t32\t44\t62\n" for name, wnid, _ in annotations)
    )
    return folder


def test_tiny_imagenet_from_its_folder(tiny_imagenet_folder, tmp_path):
    dataset = data.load(_config("tiny_imagenet_r18_shufflev2", tmp_path / "data", prepare=True))
    assert dataset.num_classes == 200
    assert sorted(example["label"] for example in dataset.train) == [0, 0, 1, 1, 1]  # as PyTorch numbers folders
    by_label = {int(example["label"]): example["image"] for example in dataset.validation}
    for label, name in ((0, "val_1.JPEG"), (1, "val_0.JPEG")):
        encoded = (tiny_imagenet_folder / "val" / "images" / name).read_bytes()
        np.testing.assert_array_equal(by_label[label], _decoded(encoded))
    assert _batches(dataset, 5)[0]["image"].shape == (5, 64, 64, 3)


def _error(capsys, name, data_dir, tmp_path):
    arguments = [f"--config={name}", f"--config.dataset.data_dir={data_dir}", "--config.dataset.prepare=True"]
    assert main([*arguments, "--config.teacher.train=True", f"--workdir={tmp_path / 'run'}"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("imagenet_r34_r18", "downloads/manual does not exist or is empty"),
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


def test_a_folder_that_is_not_tiny_imagenet(tiny_imagenet_folder, tmp_path, capsys):
    (tiny_imagenet_folder / "wnids.txt").unlink()
    assert "no tiny-imagenet-200/wnids.txt in " in _error(
        capsys, "tiny_imagenet_r18_shufflev2", tmp_path / "data", tmp_path
    )


def test_a_builder_that_needs_tensorflow(tmp_path, capsys, monkeypatch):
    def download_and_prepare(self):
        raise ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")

    monkeypatch.setattr(tfds.builder_cls("cifar100"), "download_and_prepare", download_and_prepare)
    line = _error(capsys, "cifar100_r32x4_r8x4", tmp_path / "data", tmp_path)
    assert "its builder in TFDS needs tensorflow; prepare it in an environment that has it, see examples/" in line
