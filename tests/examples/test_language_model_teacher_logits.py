"""The cache of a teacher's likeliest tokens: the same bytes however often a run ends, and never those of another one."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

import dot_optax
from examples.language_model import data, teacher_logits
from examples.language_model.corpus import Split
from examples.trainer import lock
from examples.trainer.errors import UserError
from examples.trainer.preemption import Preempted
from tests.tiers import slow_but

LENGTH, VOCABULARY, K, SEQUENCES = 8, 64, 5, 20
_TOKENS = np.random.default_rng(0).integers(1, VOCABULARY, SEQUENCES * LENGTH + 3).astype(np.uint16)
TEACHER = {"weights": 12345, "architecture": "abc", "dtype": "float32"}
SPLIT = Split(_TOKENS, len(_TOKENS), 1, "abc")
_LOGITS = 3 * jax.random.normal(jax.random.key(0), (VOCABULARY, VOCABULARY))


@jax.jit
def _predict(tokens):
    return jax.lax.top_k(jax.nn.log_softmax(_LOGITS[tokens]), K)


def _never(tokens):
    raise AssertionError("the teacher is asked again")


def _open(folder, **changes):
    options = {
        "split": SPLIT,
        "length": LENGTH,
        "sequences": SEQUENCES,
        "vocabulary": VOCABULARY,
        "k": K,
        "temperature": 1.0,
        "teacher": TEACHER,
        "predict": _predict,
        "batch_size": 3,
    }
    return teacher_logits.open_cache(folder, **options | changes)


def _bits(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _finished(folder):
    return json.loads((folder / "teacher_logits.json").read_text())["finished"]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """A finished cache; read it, do not write to it."""
    folder = tmp_path_factory.mktemp("complete") / "cache"
    _open(folder)
    return folder


@pytest.fixture
def copy(complete, folder):
    shutil.copytree(complete, folder)
    return folder


def test_every_sequence_and_position_has_the_likeliest_tokens(folder):
    cache = _open(folder)
    inputs = _TOKENS[: SEQUENCES * LENGTH].reshape(SEQUENCES, LENGTH)
    log_probs, indices = _predict(inputs.astype(np.int32))
    np.testing.assert_array_equal(cache.log_probs, np.asarray(log_probs).astype(np.float16))
    np.testing.assert_array_equal(cache.indices, indices)
    assert all(isinstance(array, np.memmap) and not array.flags.writeable for array in cache)
    assert (cache.log_probs.dtype, cache.indices.dtype) == (np.float16, np.uint16)
    assert sum(path.stat().st_size for path in folder.glob("*.bin")) == SEQUENCES * (LENGTH * K * 4 + 4)


def test_training_reads_it(complete):
    cache = _open(complete, predict=_never)
    with data.train_batches(SPLIT, LENGTH, 4, 0, 1, cache=cache) as batches:
        for batch in batches:
            log_probs, indices = _predict(batch["tokens"][:, :-1])
            np.testing.assert_array_equal(batch["teacher_log_probs"], log_probs.astype(jnp.float16))
            np.testing.assert_array_equal(batch["teacher_indices"], indices)


def test_evaluation_reads_it(folder):
    """Of a split whose last sequence is shorter."""
    count = data.num_predicted(SPLIT, LENGTH)
    assert count == SEQUENCES + 1
    cache = _open(folder, sequences=count)
    for batch in data.eval_batches(SPLIT, LENGTH, 4, cache=cache):
        log_probs, indices = _predict(batch["tokens"][:, :-1])
        np.testing.assert_array_equal(batch["teacher_log_probs"], log_probs.astype(jnp.float16))
        np.testing.assert_array_equal(batch["teacher_indices"], indices)


def test_large_vocabularies_have_larger_indices(folder):
    def predict(tokens):
        return jnp.zeros((*tokens.shape, 1)), jnp.full((*tokens.shape, 1), 2**16)

    cache = _open(folder, vocabulary=2**16 + 1, k=1, predict=predict)
    assert cache.indices.dtype == np.uint32
    assert np.all(cache.indices == 2**16)


def test_it_is_computed_once(complete):
    before = _bits(complete)
    _open(complete, predict=_never)
    assert _bits(complete) == before


@pytest.mark.parametrize("batch_size", slow_but([1, 2, 7, 20, 32], 7))
def test_the_size_of_batches_changes_nothing(batch_size, folder, complete):
    shapes = set()

    def predict(tokens):
        shapes.add(tokens.shape)
        return _predict(tokens)

    _open(folder, batch_size=batch_size, predict=predict)
    assert shapes == {(batch_size, LENGTH)}  # One program is compiled, also for the last batch.
    assert _bits(folder) == _bits(complete)


@pytest.mark.parametrize("saved_every", [0.0, 1e9])
def test_what_kill_leaves_is_gone_on_from(saved_every, folder, complete, tmp_path, monkeypatch):
    """`kill -9` leaves the files as they are at that moment, without what still waits to be written."""
    monkeypatch.setattr(teacher_logits, "_SAVED_EVERY", saved_every)
    left = []

    def put(batch):
        left.append(tmp_path / f"left{len(left)}")
        shutil.copytree(folder, left[-1])
        return jax.device_put(batch)

    _open(folder, put=put)
    assert len(left) == 7
    for i, killed in enumerate(left):
        # Some batches are in the devices' hands, and what was not saved counts for nothing.
        before = _finished(killed)
        assert before == (max(0, 3 * (i - 2)) if saved_every == 0 else 0)
        asked = []
        _open(killed, put=lambda batch, asked=asked: asked.extend(batch["index"]) or jax.device_put(batch))
        assert sorted(set(asked)) == list(range(before, SEQUENCES))
        assert _bits(killed) == _bits(complete)


@pytest.mark.parametrize("end", [KeyboardInterrupt, RuntimeError, Preempted])
def test_what_is_computed_is_saved_when_a_run_ends(end, folder, complete, monkeypatch):
    monkeypatch.setattr(teacher_logits, "_SAVED_EVERY", 1e9)
    calls = []

    def preempted():
        calls.append(1)
        if len(calls) == 6 and end is not Preempted:
            raise end
        return len(calls) == 6

    with pytest.raises(end, match="the same command goes on" if end is Preempted else None):
        _open(folder, preempted=preempted)
    assert _finished(folder) == (15 if end is Preempted else 9)  # When preempted, what the devices have in hand, too.
    _open(folder)
    assert _bits(folder) == _bits(complete)


def test_what_was_not_on_the_disk_when_the_power_failed(copy, complete):
    """The record counts what is there; of all else the disk may hold anything."""
    record = json.loads((copy / "teacher_logits.json").read_text()) | {"finished": 11}
    (copy / "teacher_logits.json").write_text(json.dumps(record, indent=2) + "\n")
    for path in copy.glob("*.bin"):
        size = path.stat().st_size // SEQUENCES
        path.write_bytes(path.read_bytes()[: 11 * size] + os.urandom(2 * size + 1))
    _open(copy)
    assert _bits(copy) == _bits(complete)


def _flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["log_probs.bin", "indices.bin", "checksums.bin"])
@pytest.mark.parametrize("sequence", slow_but([0, 7, SEQUENCES - 1], 7))
def test_a_damaged_sequence_alone_is_computed_anew(name, sequence, copy, complete, capsys, tmp_path):
    size = (copy / name).stat().st_size // SEQUENCES
    _flip(copy / name, sequence * size + size // 2)
    asked = []

    def put(batch):
        shutil.copytree(copy, tmp_path / "left")
        asked.extend(batch["index"])
        return jax.device_put(batch)

    _open(copy, put=put)
    assert set(asked) == {sequence}
    assert _bits(copy) == _bits(complete)
    assert capsys.readouterr().err == (
        f"warning: 1 of 20 sequences of the teacher's logits in {copy} are damaged, and computed anew\n"
    )
    assert _finished(tmp_path / "left") == SEQUENCES  # What is intact stays counted when this is interrupted.
    _open(tmp_path / "left")
    assert _bits(tmp_path / "left") == _bits(complete)


@pytest.mark.parametrize("name", ["log_probs.bin", "indices.bin", "checksums.bin"])
@pytest.mark.parametrize("size", slow_but([None, 0, 0.5], None, 0.5))
def test_files_that_are_cut_or_gone(name, size, copy, complete, capsys):
    if size is None:
        (copy / name).unlink()
    else:
        os.truncate(copy / name, int(size * (copy / name).stat().st_size) + 1)
    _open(copy)
    assert _bits(copy) == _bits(complete)
    assert capsys.readouterr().err.count(" of 20 sequences of the teacher's logits in ") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"teacher": TEACHER | {"weights": 6}},
            "else: the checksum of the teacher's weights is 12345 there and 6 here; put --config.teacher right, give another",
        ),
        (
            {"teacher": TEACHER | {"weights": 6, "architecture": "x"}},
            "the hash of the teacher's architecture is abc there and x here; put --config.teacher right, give another",
        ),
        (
            {"teacher": TEACHER | {"dtype": "bfloat16"}},
            "else: the teacher's dtype is float32 there and bfloat16 here; put --config.dtype right, give another",
        ),
        (
            {"split": SPLIT._replace(fingerprint="x" * 64)},
            "the hash of the text is abc there and xxxxxxxxxxxxxxxx here; put --config.text right, give",
        ),
        (
            {"k": 4},
            "k is 5 there and 4 here; put --config.distillation.k right, give another --config.text.folder",
        ),
        (
            {"temperature": 2.0},
            "temperature is 1.0 there and 2.0 here; put --config.distillation.temperature right, give",
        ),
        ({"length": 4}, "length is 8 there and 4 here; put --config.sequence_length right, give another --config.text"),
        (
            {"k": 4, "temperature": 2.0},
            "k is 5 there and 4 here; temperature is 1.0 there and 2.0 here; put --config.dist",
        ),
        (
            {"vocabulary": 2**17},
            "else: dtype is uint16 there and uint32 here; give another --config.text.folder, or delete that",
        ),
    ],
)
@pytest.mark.parametrize("finished", slow_but([SEQUENCES, 1], SEQUENCES))
def test_a_cache_of_something_else_is_never_used(change, message, finished, copy):
    record = json.loads((copy / "teacher_logits.json").read_text()) | {"finished": finished}
    (copy / "teacher_logits.json").write_text(json.dumps(record))
    before = _bits(copy)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        _open(copy, predict=_never, **change)
    assert str(error.value).startswith(f"the teacher's logits in {copy} are of something else: ")
    assert _bits(copy) == before


def test_a_folder_where_nothing_was_computed_is_free(folder, complete):
    with pytest.raises(Preempted):
        _open(folder, teacher={"weights": 6}, k=9, preempted=lambda: True)
    assert _finished(folder) == 0
    _open(folder)
    assert _bits(folder) == _bits(complete)


@pytest.mark.parametrize(
    "text",
    slow_but(
        ["", "[]", "{}", '{"finished": "x"}', '{"finished": 3', '{"finished": Infinity}'],
        *("", '{"finished": 3', '{"finished": Infinity}'),
    ),
)
def test_a_damaged_record(text, copy):
    (copy / "teacher_logits.json").write_text(text)
    with pytest.raises(
        UserError, match=r"teacher_logits\.json is damaged; restore it, or delete .*cache to compute all"
    ):
        _open(copy)


def test_a_record_that_counts_too_many(copy, complete, monkeypatch):
    record = json.loads((copy / "teacher_logits.json").read_text()) | {"finished": 10**12}
    (copy / "teacher_logits.json").write_text(json.dumps(record))

    def bar(sequences, **options):
        assert len(sequences) <= SEQUENCES
        return sequences

    monkeypatch.setattr(teacher_logits, "tqdm", bar)
    cache = _open(copy, predict=_never)
    np.testing.assert_array_equal(cache.indices, _open(complete, predict=_never).indices)


def test_a_disk_that_is_too_small(folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3000))
    message = (
        r"the teacher's logits take 3\.28e-06 GB \(k=5 for 160 tokens\), and .*cache has room for 3e-06 GB; give a smaller"
        r" --config\.distillation\.k, fewer --config\.text\.train_tokens, or another --config\.text\.folder$"
    )
    with pytest.raises(UserError, match=message):
        _open(folder, predict=_never)
    monkeypatch.undo()
    with pytest.raises(Preempted):
        _open(folder, preempted=iter([False] * 4 + [True]).__next__)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3280 - 12 * 164))
    _open(folder)  # What is there needs no room any more.


@pytest.mark.parametrize("limit", slow_but([100, 1000, 1500], 1000))
def test_a_disk_that_is_full_in_the_middle(limit, folder, complete):
    _predict(jnp.zeros((3, LENGTH), jnp.int32))  # Compiled, it writes nothing.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .* \(File too large\); put this right, and the same"):
            _open(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    _open(folder)
    assert _bits(folder) == _bits(complete)


def test_two_runs_do_not_write_to_one_folder(folder, complete):
    def put(batch):
        with pytest.raises(
            UserError, match=r"another run writes the teacher's logits in .*cache; wait for it, or end it"
        ):
            _open(folder)
        return jax.device_put(batch)

    _open(folder, put=put, batch_size=SEQUENCES)
    assert _bits(folder) == _bits(complete)
    with lock.hold(folder / ".lock"):
        _open(folder, predict=_never)  # Any number may read what is finished.


def test_folders_that_cannot_hold_it(tmp_path):
    with pytest.raises(
        UserError, match=r"a teacher's logits cannot be in gs://bucket/x: .* machine with --config\.text\.folder$"
    ):
        _open(epath.Path("gs://bucket/x"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot (write|read) .*/file"):
        _open(tmp_path / "file")


def test_log_probabilities_that_are_not_numbers(folder):
    def predict(tokens):
        log_probs, indices = _predict(tokens)
        return jnp.where((tokens == int(_TOKENS[9 * LENGTH]))[..., None], jnp.nan, log_probs), indices

    with pytest.raises(UserError, match=r"are not numbers in the batch of sequence \d+; use another teacher, or"):
        _open(folder, predict=predict)


def test_tokens_that_are_impossible(folder):
    def predict(tokens):
        log_probs, indices = _predict(tokens)
        return log_probs.at[..., 3].set(-1e5).at[..., 4].set(-jnp.inf), indices

    cache = _open(folder, predict=predict)
    assert np.all(np.isneginf(cache.log_probs[..., 3:]))
    assert np.all(np.isfinite(cache.log_probs[..., :3]))


@pytest.mark.parametrize("hosts", [2, 3])
def test_each_host_computes_its_part(hosts, folder):
    """Whose sequences come back out of order, as the devices of a mesh may have them."""
    batches = [[] for _ in range(hosts)]
    for index in range(hosts):
        host = grain.sharding.ShardOptions(shard_index=index, shard_count=hosts)
        state = [*range(SEQUENCES)][3:]
        found = teacher_logits._predictions(SPLIT, LENGTH, state, _predict, 6, jax.device_put, host, lambda: False)
        batches[index] = list(found)
    for parts in zip(*batches, strict=True):
        assert len({tuple(part.sequences) for part in parts}) == hosts
    seen = np.concatenate([part.sequences for parts in batches for part in parts])
    assert set(seen) == set(range(3, SEQUENCES))


def test_results_that_come_back_in_another_order(folder, complete):
    def put(batch):
        return jax.device_put({name: value[::-1] for name, value in batch.items()})

    _open(folder, put=put)
    assert _bits(folder) == _bits(complete)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_with_all_tokens_it_is_the_teacher_but_for_float16(temperature, folder):
    """The probabilities are off by 2^-11 |log q| and the loss, whose derivative in q is log(q / p) + 1, accordingly."""

    def predict(tokens):
        return jax.lax.top_k(jax.nn.log_softmax(_LOGITS[tokens] / temperature), VOCABULARY)

    cache = _open(folder, k=VOCABULARY, temperature=temperature, predict=predict)
    inputs = _TOKENS[: SEQUENCES * LENGTH].reshape(SEQUENCES, LENGTH).astype(np.int32)
    teacher = _LOGITS[inputs]
    student = jax.random.normal(jax.random.key(1), teacher.shape)
    of_cache = jax.jit(dot_optax.losses.top_k_kd_loss, static_argnums=3)
    loss = of_cache(student, cache.log_probs, cache.indices.astype(np.int32), temperature)
    exact = jax.jit(dot_optax.losses.kd_loss, static_argnums=2)(student, teacher, temperature)
    log_q, log_p = (jax.nn.log_softmax(logits / temperature) for logits in (teacher, student))
    change = jnp.sum(jnp.exp(log_q) * jnp.abs(log_q) * (jnp.abs(log_q - log_p) + 1), -1) * 2.0**-11
    bound = temperature**2 * (2 * change + 1e-5)  # Scaling to a sum of 1 changes q as much again; 1e-5 is float32's.
    assert jnp.all(jnp.abs(loss - exact) <= bound)
    assert jnp.max(jnp.abs(loss - exact)) > 1e-5  # It is float16 that is seen here.
    probabilities = np.exp(cache.log_probs.astype(np.float64))
    exact_q = np.take_along_axis(np.exp(np.asarray(log_q, np.float64)), cache.indices.astype(int), -1)
    # The first order of the bound, and 1e-6 for the second and the teacher's float32.
    allowed = exact_q * (2.0**-11 * -np.log(exact_q) + 1e-5)
    assert np.all(np.abs(probabilities - exact_q) <= allowed)


_PROCESS = """
    import sys
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh

    port, process, folder = sys.argv[1:]
    jax.distributed.initialize(f"localhost:{port}", 2, int(process))
    from ml_collections import ConfigDict

    from examples.language_model import corpus, data, teacher_logits
    from examples.trainer import parallel
    from examples.trainer.errors import UserError
    from tests.examples.test_language_model_corpus import BYTES, UNUSED

    mesh = Mesh(np.array(jax.devices()), ("data",))
    text = ConfigDict({
        "files": f"{folder}/texts/*", "validation_percent": 20.0, "test_percent": 20.0, "train_tokens": 0, "eval_tokens": 0
    })
    loaded = corpus.load(text, f"{folder}/tokens", UNUSED if process == "1" else BYTES)

    @jax.jit
    def predict(tokens):
        logits = jnp.sin(tokens[..., None] * (1.0 + jnp.arange(256)[None, None]))
        return jax.lax.top_k(jax.nn.log_softmax(logits), 4)

    cache = teacher_logits.open_cache(
        f"{folder}/cache", split=loaded.train, length=8, vocabulary=256, k=4, temperature=1.0, teacher={"weights": 1}, sequences=data.num_sequences(loaded.train, 8),
        predict=predict, batch_size=12,
        put=lambda batch: parallel.divide(mesh, batch),
    )
    tokens = np.stack([data.sequence(loaded.train, 8, i)[:-1] for i in range(len(cache.log_probs))])
    with jax.default_device(jax.local_devices()[0]):
        log_probs, indices = jax.jit(lambda tokens: predict(tokens))(tokens)
    np.testing.assert_array_equal(cache.indices, indices)
    np.testing.assert_array_equal(cache.log_probs, np.asarray(log_probs).astype(np.float16))
    try:
        text.files = f"{folder}/nothing/*"
        corpus.load(text, f"{folder}/tokens", BYTES)
    except UserError as error:
        print(f"error: {error}")
    print(len(loaded.train.tokens), len(cache.log_probs), "done")
"""


@pytest.mark.slow
def test_two_hosts(tmp_path):
    """The first tokenizes and writes, both compute, and what one cannot do the other says, too."""
    (tmp_path / "texts").mkdir()
    for i in range(40):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"text {i}\n" * (1 + i % 5))
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    script = textwrap.dedent(_PROCESS)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(port), str(i), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    (first, second), errors = zip(*outputs, strict=True)
    assert "error: no file matches" in first, errors
    assert "error: the first host cannot tokenize the text; see what it says" in second, errors
    assert first.splitlines()[-1] == second.splitlines()[-1]
    assert first.endswith("done\n")


@pytest.mark.slow
def test_a_process_that_is_killed(folder, complete):
    """At its fourth batch, with nothing saved since it began but what waits for no one."""
    script = f"""
        import os
        import signal
        from tests.examples import test_language_model_teacher_logits as here

        calls = []

        def preempted():
            calls.append(1)
            if len(calls) == 6:
                os.kill(os.getpid(), signal.SIGKILL)
            return False

        here.teacher_logits._SAVED_EVERY = 0.0
        here._open({str(folder)!r}, preempted=preempted)
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environment, timeout=240)
    assert process.returncode == -signal.SIGKILL
    assert _finished(folder) == 9
    _open(folder)
    assert _bits(folder) == _bits(complete)
