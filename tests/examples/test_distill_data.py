"""The dataset and the order in which training and evaluation see it."""

import numpy as np
import pytest
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits

from examples.distill import data
from examples.distill.configs.digits import get_config


@pytest.fixture
def config(data_dir):
    config = get_config().dataset
    config.data_dir = str(data_dir)
    return config


@pytest.fixture
def dataset(config):
    return data.load(config)


def _identities(batches):
    """The images of some batches as comparable values, in order; no two digits of the dataset are equal."""
    return [image.tobytes() for batch in batches for image in batch["image"]]


def test_builder_has_exactly_the_digits_of_scikit_learn(data_dir):
    source = tfds.builder("sklearn_digits", data_dir=data_dir, file_format="array_record").as_data_source("train")
    expected = load_digits()
    assert len(source) == 1797
    assert all(example["image"].shape == (8, 8, 1) and example["image"].dtype == np.uint8 for example in source)
    stored = sorted((example["image"][..., 0].astype(float).tobytes(), example["label"]) for example in source)
    original = sorted(
        (image.tobytes(), int(label)) for image, label in zip(expected.images, expected.target, strict=True)
    )
    assert stored == original


def test_preparing_prints_one_line(config, tmp_path, capsys):
    config.data_dir = str(tmp_path)
    data.load(config)
    assert capsys.readouterr() == (f"Preparing dataset 'sklearn_digits' in {tmp_path}/sklearn_digits/1.0.0\n", "")


def test_splits_share_no_image_and_miss_none(dataset):
    splits = [_identities([{"image": [e["image"] for e in split]}]) for split in dataset[:3]]
    assert [len(split) for split in splits] == [900, 450, 447]
    assert len(set().union(*splits)) == 1797


def test_images_are_normalized(config):
    config.mean, config.std = (4.0,), (8.0,)
    dataset = data.load(config)
    values = np.unique([example["image"] for example in dataset.train])
    np.testing.assert_array_equal(values, (np.arange(17) - 4) / 8)
    assert dataset.train[0]["image"].dtype == np.float32
    assert dataset.image_shape == (8, 8, 1)
    assert dataset.num_classes == 10


def test_every_image_once_per_epoch_in_a_new_order(dataset):
    batches = list(data.train_batches(dataset.train, batch_size=100, seed=0, epochs=2))
    first, second = _identities(batches[:9]), _identities(batches[9:])
    assert len(batches) == 18
    assert set(first) == set(second) == set(_identities([{"image": [e["image"] for e in dataset.train]}]))
    assert len(set(first)) == len(first) == 900
    assert first != second


def test_the_ragged_training_batch_is_dropped(dataset):
    batches = list(data.train_batches(dataset.train, batch_size=64, seed=0, epochs=1))
    assert len(batches) == data.steps_per_epoch(dataset, 64) == 14
    assert {batch["image"].shape for batch in batches} == {(64, 8, 8, 1)}
    assert len(set(_identities(batches))) == 14 * 64


def test_the_order_depends_on_the_seed_only(dataset, config):
    def order(dataset, seed):
        return _identities(data.train_batches(dataset.train, batch_size=64, seed=seed, epochs=2))

    config.in_memory = False
    assert order(dataset, 0) == order(data.load(config), 0)
    assert order(dataset, 0) != order(dataset, 1)


def test_iterator_state_continues_in_the_middle_of_an_epoch(dataset):
    whole = list(data.train_batches(dataset.train, batch_size=64, seed=0, epochs=2))
    interrupted = data.train_batches(dataset.train, batch_size=64, seed=0, epochs=2)
    for _ in range(17):
        next(interrupted)
    resumed = data.train_batches(dataset.train, batch_size=64, seed=0, epochs=2)
    resumed.set_state(interrupted.get_state())
    assert _identities(resumed) == _identities(whole[17:])


@pytest.mark.parametrize("batch_size", [64, 149, 447, 500])
def test_evaluation_sees_every_image_once(dataset, batch_size):
    batches = list(data.eval_batches(dataset.test, batch_size))
    assert {batch["image"].shape for batch in batches} == {(batch_size, 8, 8, 1)}
    valid = [{"image": batch["image"][batch["valid"]]} for batch in batches]
    assert _identities(valid) == [example["image"].tobytes() for example in dataset.test]
