"""The order in which training and evaluation see the sequences of a text."""

import json
import os

import grain
import numpy as np
import pytest

from examples.language_model import data
from examples.language_model.corpus import Corpus, Split
from examples.trainer.errors import UserError
from tests.tiers import slow_but

LENGTH = 8


def _split(count, dtype=np.uint16):
    """All tokens differ, so that they tell where they are from."""
    return Split(np.arange(100, 100 + count, dtype=dtype), count, 1)


@pytest.fixture(scope="module")
def split():
    return _split(50 * LENGTH + 4)  # 50 sequences, and three tokens that are left over


@pytest.fixture(scope="module")
def cache():
    rng = np.random.default_rng(0)
    log_probs = rng.normal(size=(50, LENGTH, 3)).astype(np.float16)
    return data.CachedTeacher(log_probs, rng.integers(2**16, size=(50, LENGTH, 3), dtype=np.uint16))


def _host(index, count):
    return grain.sharding.ShardOptions(shard_index=index, shard_count=count)


def _train(split, batch_size=10, seed=0, epochs=2, host=None, cache=None):
    with data.train_batches(split, LENGTH, batch_size, seed, epochs, host=host, cache=cache) as batches:
        return list(batches)


def _starts(batches):
    """Which sequences some batches have, in order."""
    return [(int(row[0]) - 100) // LENGTH for batch in batches for row in np.asarray(batch["tokens"])]


def _predicted(batches):
    return sorted(
        int(token) for batch in batches for token in np.asarray(batch["tokens"])[:, 1:][np.asarray(batch["valid"])]
    )


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_sequences_share_a_token_with_their_neighbours(dtype):
    [batch] = _train(_split(3 * LENGTH + 1, dtype), batch_size=3, epochs=1)
    assert batch["tokens"].dtype == np.int32
    rows = np.sort(np.asarray(batch["tokens"]), axis=0)
    np.testing.assert_array_equal(rows, 100 + LENGTH * np.arange(3)[:, None] + np.arange(LENGTH + 1)[None])


def test_every_sequence_once_per_epoch_in_a_new_order(split):
    batches = _train(split)
    first, second = _starts(batches[:5]), _starts(batches[5:])
    assert sorted(first) == sorted(second) == list(range(50)) != first
    assert first != second
    assert first != _starts(_train(split, seed=1)[:5])
    assert _starts(_train(split)) == first + second


def test_the_ragged_training_batch_is_dropped(split):
    batches = _train(split, batch_size=16, epochs=2)
    assert len(batches) == 2 * data.steps_per_epoch(split, LENGTH, 16) == 2 * 3
    for epoch in (batches[:3], batches[3:]):
        assert len(set(_starts(epoch))) == 48


def test_batches_have_what_the_cache_says_of_their_sequences(split, cache):
    batches = _train(split, cache=cache)
    assert _starts(batches) == _starts(_train(split))
    for batch in batches:
        rows = _starts([batch])
        np.testing.assert_array_equal(batch["teacher_log_probs"], cache.log_probs[rows])
        np.testing.assert_array_equal(batch["teacher_indices"], cache.indices[rows])
        shapes = {name: (leaf.shape, leaf.dtype) for name, leaf in data.batch_shapes(LENGTH, 10, 3).items()}
        assert {name: (leaf.shape, leaf.dtype) for name, leaf in batch.items()} == shapes
    assert set(data.batch_shapes(LENGTH, 10)) == {"tokens"}


@pytest.mark.parametrize("hosts", [2, 5])
def test_hosts_share_each_batch(split, cache, hosts):
    whole = _train(split, cache=cache)
    parts = [_train(split, host=_host(index, hosts), cache=cache) for index in range(hosts)]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert {share["tokens"].shape for share in shares} == {(10 // hosts, LENGTH + 1)}
        assert sorted(_starts([batch])) == sorted(_starts(shares))
        for share in shares:
            np.testing.assert_array_equal(share["teacher_indices"], cache.indices[_starts([share])])


def test_hosts_of_the_same_part_read_the_same(split):
    """As where the devices of two hosts hold the same rows."""
    first, second = (_train(split, host=_host(1, 2)) for _ in range(2))
    assert _starts(first) == _starts(second)


@pytest.mark.parametrize("consumed", slow_but(range(0, 11), 7))
def test_iterator_state_continues_in_the_middle_of_an_epoch(split, cache, consumed):
    whole = _train(split, cache=cache)
    with data.train_batches(split, LENGTH, 10, 0, 2, cache=cache) as interrupted:
        for _ in range(consumed):
            next(interrupted)
        state = json.loads(json.dumps(interrupted.get_state()))  # as a checkpoint keeps it
    with data.train_batches(split, LENGTH, 10, 0, 2, cache=cache) as resumed:
        resumed.set_state(state)
        rest = list(resumed)
    assert len(rest) == 10 - consumed
    for batch, expected in zip(rest, whole[consumed:], strict=True):
        assert all(np.array_equal(batch[name], expected[name]) for name in expected)


def test_iterator_state_continues_on_another_number_of_hosts(split):
    whole = _train(split)
    with data.train_batches(split, LENGTH, 10, 0, 2) as interrupted:
        for _ in range(3):
            next(interrupted)
        state = interrupted.get_state()
    parts = []
    for index in range(2):
        with data.train_batches(split, LENGTH, 10, 0, 2, host=_host(index, 2)) as resumed:
            resumed.set_state(state)
            parts.append(list(resumed))
    for batch, *shares in zip(whole[3:], *parts, strict=True):
        assert sorted(_starts([batch])) == sorted(_starts(shares))


@pytest.mark.parametrize("count", [2, LENGTH, LENGTH + 1, LENGTH + 2, 3 * LENGTH + 1, 50 * LENGTH + 4])
@pytest.mark.parametrize("batch_size", [1, 4, 50, 64])
def test_evaluation_predicts_every_token_but_the_first_once(count, batch_size):
    split = _split(count)
    batches = list(data.eval_batches(split, LENGTH, batch_size))
    assert {batch["tokens"].shape for batch in batches} == {(batch_size, LENGTH + 1)}
    assert {batch["valid"].shape for batch in batches} == {(batch_size, LENGTH)}
    assert {batch["valid"].dtype for batch in batches} == {np.dtype(bool)}
    assert _predicted(batches) == list(range(101, 100 + count))


@pytest.mark.parametrize("count", [2, 3 * LENGTH, 3 * LENGTH + 1, 50 * LENGTH + 4])
@pytest.mark.parametrize(("hosts", "batch_size"), [(2, 4), (4, 8), (3, 3)])
def test_hosts_together_predict_every_token_once(count, hosts, batch_size):
    parts = [
        list(data.eval_batches(_split(count), LENGTH, batch_size, host=_host(index, hosts))) for index in range(hosts)
    ]
    assert len({len(part) for part in parts}) == 1  # a host with fewer batches would leave the others waiting
    assert {batch["tokens"].shape[0] for part in parts for batch in part} == {batch_size // hosts}
    assert _predicted([batch for part in parts for batch in part]) == list(range(101, 100 + count))


def test_inputs_of_evaluation_are_those_before_what_is_predicted(split):
    for batch in data.eval_batches(split, LENGTH, 7):
        tokens, valid = np.asarray(batch["tokens"]), np.asarray(batch["valid"])
        np.testing.assert_array_equal(tokens[:, :-1][valid] + 1, tokens[:, 1:][valid])


@pytest.mark.parametrize(
    ("batch_size", "devices", "size"), [(6, 1, 6), (6, 4, 8), (10**6, 1, 8), (10**6, 3, 9), (1, 4, 4)]
)
def test_evaluation_needs_no_larger_batch_than_the_larger_split(batch_size, devices, size, split):
    corpus = Corpus(split, _split(2 * LENGTH), _split(7 * LENGTH + 2), "", {})
    assert data.eval_batch_size(corpus, LENGTH, batch_size, devices) == size


def test_less_text_than_a_batch(split):
    message = (
        r"batch size 51 is larger than the training split \(50 sequences of 8 tokens, of 404 tokens in all\); give a"
        r" smaller --config\.batch_size, or more text with --config\.text\.files or --config\.text\.train_tokens$"
    )
    with pytest.raises(UserError, match=message):
        _train(split, batch_size=51)
    for count in (0, 1, LENGTH):
        assert data.num_sequences(_split(count), LENGTH) == 0
        with pytest.raises(UserError, match=r"\(0 sequences of 8 tokens"):
            _train(_split(count), batch_size=1)
    assert data.num_sequences(_split(LENGTH + 1), LENGTH) == 1


def test_batch_sizes_that_hosts_cannot_share(split):
    with pytest.raises(UserError, match=r"bad --config\.batch_size=10: it must be a multiple of the 3 hosts"):
        _train(split, host=_host(0, 3))
    with pytest.raises(UserError, match=r"bad --config\.eval_batch_size=10"):
        next(data.eval_batches(split, LENGTH, 10, host=_host(0, 3)))


def test_batches_that_no_memory_holds(split, cache, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 40)  # 1,600 bytes, and 30 sequences of 8 tokens of 4 bytes
    _train(split)
    with pytest.raises(UserError, match=r"batches of 10 sequences of 8 tokens take .* a smaller --config\.batch_size"):
        _train(split, cache=cache)
    with pytest.raises(UserError, match=r"a smaller --config\.eval_batch_size"):
        next(data.eval_batches(split, LENGTH, 50))
