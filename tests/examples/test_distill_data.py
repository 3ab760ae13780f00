"""The dataset and the order in which training and evaluation see it."""

import json
import os

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from sklearn.datasets import load_digits

from examples.distill import data, images
from examples.distill.configs.digits import get_config
from examples.trainer.errors import UserError
from tests.tiers import slow_but


def _config(data_dir):
    config = get_config().dataset
    config.data_dir = str(data_dir)
    return config


@pytest.fixture
def config(data_dir):
    return _config(data_dir)


@pytest.fixture(scope="module")
def dataset(data_dir):
    return data.load(_config(data_dir))


@pytest.fixture
def noisy(dataset):
    """The digits with an augmentation that tells which random numbers it was given."""
    return dataset._replace(preprocessing=images.Preprocessing(augment=_add_noise, view=_unchanged))


def _add_noise(image, size, rng):
    return image + rng.integers(256, size=image.shape, dtype=np.uint8)


def _unchanged(image, size):
    return image


def _die(image, size, rng):
    os._exit(9)


def _train(dataset, batch_size=64, seed=0, epochs=2, host=None):
    with data.train_batches(dataset, batch_size, seed, epochs, host=host) as batches:
        return list(batches)


def _host(index, count):
    return grain.sharding.ShardOptions(shard_index=index, shard_count=count)


def _identities(batches):
    """The images of some batches as comparable values, in order; no two digits of the dataset are equal."""
    return [image.tobytes() for batch in batches for image in np.asarray(batch["image"])]


def _valid(batches):
    return [{"image": np.asarray(batch["image"])[np.asarray(batch["valid"])]} for batch in batches]


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


def test_batches_have_the_stored_pixels(dataset):
    batch = next(iter(data.eval_batches(dataset, dataset.test, 447)))
    np.testing.assert_array_equal(batch["image"], [example["image"] for example in dataset.test])
    assert batch["image"].dtype == np.uint8
    assert dataset.image_shape == (8, 8, 1)
    assert dataset.num_classes == 10


def test_a_split_that_is_named_twice_is_read_once(config):
    config.validation = config.test
    dataset = data.load(config)
    assert dataset.validation is dataset.test


def test_every_image_once_per_epoch_in_a_new_order(dataset):
    batches = _train(dataset, batch_size=100, epochs=2)
    first, second = _identities(batches[:9]), _identities(batches[9:])
    assert len(batches) == 18
    assert set(first) == set(second) == set(_identities([{"image": [e["image"] for e in dataset.train]}]))
    assert len(set(first)) == len(first) == 900
    assert first != second


@pytest.mark.parametrize("hosts", [1, 2])
def test_batches_say_which_images_they_have(dataset, hosts):
    """By the place in the whole split: in every epoch, whatever the seed, on every host, and with a ragged batch."""
    for host in range(hosts):
        for batch in _train(dataset, batch_size=128, seed=3, epochs=3, host=_host(host, hosts)):
            assert batch["index"].dtype == np.int32
            stored = [dataset.train[int(i)] for i in batch["index"]]
            np.testing.assert_array_equal(batch["image"], [example["image"] for example in stored])
            np.testing.assert_array_equal(batch["label"], [example["label"] for example in stored])
            np.testing.assert_array_equal(dataset.labels()[np.asarray(batch["index"])], batch["label"])
    shapes = {name: (leaf.shape, leaf.dtype) for name, leaf in data.batch_shapes(dataset, 128 // hosts).items()}
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in batch.items()} == shapes


def test_the_labels_are_at_hand_where_the_images_are(dataset, config):
    assert dataset.labels().shape == (900,)
    assert dataset.labels() is dataset.labels()
    config.in_memory = False
    assert data.load(config).labels is None
    config.synthetic = True  # it stands for data that are not in memory
    assert data.load(config).labels is None


def test_the_ragged_training_batch_is_dropped(dataset):
    batches = _train(dataset, batch_size=64, epochs=2)
    assert len(batches) == 2 * data.steps_per_epoch(dataset, 64) == 2 * 14
    assert {batch["image"].shape for batch in batches} == {(64, 8, 8, 1)}
    assert len(set(_identities(batches[:14]))) == len(set(_identities(batches[14:]))) == 14 * 64


def test_the_order_depends_on_the_seed_only(dataset, config):
    config.in_memory = False
    assert _identities(_train(dataset)) == _identities(_train(data.load(config)))
    assert _identities(_train(dataset)) != _identities(_train(dataset, seed=1))


def test_hosts_share_each_batch_and_its_augmentations(noisy):
    whole = _train(noisy, batch_size=60)
    parts = [_train(noisy, batch_size=60, host=_host(index, 3)) for index in range(3)]
    assert {batch["image"].shape for part in parts for batch in part} == {(20, 8, 8, 1)}
    for batch, *shares in zip(whole, *parts, strict=True):
        assert sorted(_identities([batch])) == sorted(_identities(shares))


@pytest.mark.slow
def test_worker_processes_change_nothing(noisy):
    whole = _train(noisy, batch_size=60)
    workers = noisy._replace(workers=2)
    assert _identities(_train(workers, batch_size=60)) == _identities(whole)


def test_workers_are_processes_for_images_that_are_not_in_memory(config):
    config.workers = 1
    assert data.load(config).workers == 0
    config.in_memory = False
    assert data.load(config).workers == 1
    config.workers = 10_000
    assert data.load(config).workers == os.cpu_count()


def test_a_worker_process_that_dies_is_reported(dataset):
    deadly = dataset._replace(preprocessing=images.Preprocessing(augment=_die, view=_unchanged), workers=1)
    with pytest.raises(UserError, match=r"died \(exit code 9\), .* lower --config\.dataset\.workers"):
        _train(deadly)


@pytest.mark.parametrize("workers", slow_but([(0, 0), (0, 2)], (0, 0)))
def test_iterator_state_continues_in_the_middle_of_an_epoch(noisy, workers):
    before, after = (noisy._replace(workers=count) for count in workers)
    whole = _train(noisy)
    with data.train_batches(before, 64, 0, 2) as interrupted:
        for _ in range(17):
            next(interrupted)
        state = json.loads(json.dumps(interrupted.get_state()))  # as a checkpoint keeps it
    with data.train_batches(after, 64, 0, 2) as resumed:
        resumed.set_state(state)
        assert _identities(resumed) == _identities(whole[17:])


@pytest.mark.parametrize("batch_size", [64, 149, 447, 500])
def test_evaluation_sees_every_image_once(dataset, batch_size):
    batches = list(data.eval_batches(dataset, dataset.test, batch_size))
    assert {batch["image"].shape for batch in batches} == {(batch_size, 8, 8, 1)}
    assert _identities(_valid(batches)) == [example["image"].tobytes() for example in dataset.test]


@pytest.mark.parametrize(("count", "hosts", "batch_size"), [(447, 4, 64), (9, 4, 8), (5, 3, 3), (1, 2, 4), (8, 2, 4)])
def test_hosts_together_evaluate_every_image_once(dataset, count, hosts, batch_size):
    test = dataset.test[:count]
    parts = [list(data.eval_batches(dataset, test, batch_size, host=_host(index, hosts))) for index in range(hosts)]
    assert len({len(part) for part in parts}) == 1  # a host with fewer batches would leave the others waiting
    assert {batch["image"].shape[0] for part in parts for batch in part} == {batch_size // hosts}
    seen = [image for part in parts for image in _identities(_valid(part))]
    assert sorted(seen) == sorted(example["image"].tobytes() for example in test)


def test_batch_sizes_that_hosts_cannot_share(dataset):
    with pytest.raises(UserError, match=r"bad --config\.batch_size=64: it must be a multiple of the 3 hosts"):
        _train(dataset, host=_host(0, 3))
    with pytest.raises(UserError, match=r"bad --config\.eval_batch_size=64"):
        next(data.eval_batches(dataset, dataset.test, 64, host=_host(0, 3)))


def test_synthetic_data_have_the_shapes_and_sizes_of_the_dataset(config):
    config.synthetic, config.data_dir = True, "/nowhere"
    config.test = "train[90%:]"
    dataset = data.load(config)
    assert [len(split) for split in dataset[:3]] == [900, 450, 180]
    assert dataset.num_classes == 10
    batch = next(data.eval_batches(dataset, dataset.train, 32))
    assert batch["image"].shape == (32, 8, 8, 1)
    assert batch["image"].dtype == np.uint8
    assert set(np.asarray(batch["label"]).tolist()) == set(range(10))


@pytest.mark.parametrize("size", [0, -5, 2**31, 10**30, 2.5, None, "many"])
def test_sizes_of_synthetic_splits_that_make_no_sense(size, config):
    config.synthetic = True
    config.split_sizes = ConfigDict({"train": size}, type_safe=False)
    with pytest.raises(UserError, match=r"bad --config\.dataset\.split_sizes\.train="):
        data.load(config)


def test_synthetic_data_without_sizes(config):
    config.update(synthetic=True, split_sizes=ConfigDict())
    config.split_sizes = ConfigDict()
    with pytest.raises(UserError, match=r"synthetic data need --config\.dataset\.split_sizes"):
        data.load(config)


def test_large_synthetic_images_take_little_memory(config):
    config.update(synthetic=True, image_size=8000)
    dataset = data.load(config)
    assert dataset.train[3]["image"].shape == (8000, 8000, 1)


@pytest.mark.parametrize(
    ("batch_size", "devices", "size"),
    [(450, 1, 450), (450, 4, 452), (3_000_000, 1, 900), (3_000_000, 7, 903), (900, 8, 904), (1, 4, 4), (901, 1, 900)],
)
def test_evaluation_needs_no_larger_batch_than_the_largest_split(batch_size, devices, size, dataset):
    assert data.eval_batch_size(dataset, batch_size, devices) == size


def test_a_larger_batch_changes_nothing(dataset):
    small, large = (_valid(data.eval_batches(dataset, dataset.test, size)) for size in (900, 2000))
    assert _identities(small) == _identities(large)


def test_batches_that_no_memory_holds(dataset):
    with pytest.raises(UserError, match=r"images take \S+ GB, .* give a smaller --config\.eval_batch_size"):
        next(data.eval_batches(dataset, dataset.test, 10**13))


def test_images_that_no_memory_holds(config, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 100)  # 10,000 bytes, and 900 images of 64
    with pytest.raises(UserError, match=r"900 images take 0\.0 GB, .* give --config\.dataset\.in_memory=False"):
        data.load(config)
