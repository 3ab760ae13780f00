"""Text files become tokens once, and the same ones whatever happens to the files of tokens."""

import hashlib
import json
import os
import resource
import sysconfig
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from examples.language_model import corpus
from examples.trainer import hosts, lock
from examples.trainer.errors import UserError
from examples.trainer.preemption import Preempted
from tests.tiers import slow_but


def _encode_bytes(texts):
    return [np.frombuffer(text, np.uint8).astype(np.uint16) for text in texts]


def _decode_bytes(ids):
    return bytes(np.asarray(ids, np.uint8))


BYTES = SimpleNamespace(
    vocabulary=256, separator=0, fingerprint="bytes", encode=_encode_bytes, decode=_decode_bytes
)  # what `tokenizer.py` calls the tokenizer of bytes


def _encode_pairs(texts):
    padded = [np.frombuffer(text + b"\0" * (len(text) % 2), np.uint8).astype(np.uint32) for text in texts]
    return [text[::2] * 256 + text[1::2] + 1 for text in padded]


def _decode_pairs(ids):
    return b"".join(int(i - 1).to_bytes(2, "big") for i in ids).rstrip(b"\0")


PAIRS = SimpleNamespace(  # Two bytes make a token; the ids need more than 16 bits.
    vocabulary=2**16 + 1, separator=0, fingerprint="pairs", encode=_encode_pairs, decode=_decode_pairs
)


def _never(texts):
    raise AssertionError("the text is tokenized again")


UNUSED = SimpleNamespace(**vars(BYTES) | {"encode": _never})


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i}.txt").write_text(f"text {i}\n" + "é€😀\n" * (i % 7))
    return folder


@pytest.fixture
def config(texts):
    return _config(texts / "*.txt")


def _config(files):
    return ConfigDict(
        {
            "files": str(files),
            "validation_percent": 25.0,
            "test_percent": 25.0,
            "train_tokens": 0,
            "eval_tokens": 0,
        }
    )


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "tokens"


def _documents(split, tokenizer=BYTES):
    """The texts of a split, in order; the last may be cut."""
    ends = np.flatnonzero(split.tokens == tokenizer.separator)
    starts = [0, *(ends + 1)]
    parts = [split.tokens[a:b] for a, b in zip(starts, [*ends, len(split.tokens)], strict=True)]
    return [tokenizer.decode(part) for part in parts if len(part)]


def _all_documents(loaded):
    return {name: _documents(getattr(loaded, name)) for name in corpus.SPLITS}


def _bits(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_document_once_and_a_separator_behind_it(config, folder, texts):
    loaded = corpus.load(config, folder, BYTES)
    found = _all_documents(loaded)
    assert sorted(text for part in found.values() for text in part) == sorted(
        path.read_bytes() for path in texts.iterdir()
    )
    for name in corpus.SPLITS:
        split = getattr(loaded, name)
        assert isinstance(split.tokens, np.memmap)
        assert not split.tokens.flags.writeable
        assert split.tokens.dtype == np.uint16
        assert split.tokens[-1] == BYTES.separator
        assert split.num_documents == len(found[name]) == np.sum(split.tokens == BYTES.separator) > 5
        assert split.num_bytes == sum(map(len, found[name])) == len(split.tokens) - split.num_documents
    assert sorted(os.listdir(folder)) == [".lock", "corpus.json", "test.bin", "train.bin", "validation.bin"]


def test_more_tokens_than_16_bits_can_tell_apart(config, folder):
    loaded = corpus.load(config, folder, PAIRS)
    assert loaded.train.tokens.dtype == np.uint32
    assert loaded.train.tokens.max() > 2**15
    assert sorted(_documents(loaded.train, PAIRS)) == sorted(_documents(corpus.load(config, folder, BYTES).train))


def test_a_new_file_moves_no_other(config, folder, texts):
    before = _all_documents(corpus.load(config, folder, BYTES))
    (texts / "new.txt").write_text("something else\n")
    (texts / "3.txt").rename(texts / "another_name.txt")
    after = _all_documents(corpus.load(config, folder, BYTES))
    assert sum(len(part) for part in after.values()) == 61
    for name, part in after.items():
        assert [text for text in part if text != b"something else\n"] == before[name]


def test_equal_texts_count_once(folder, texts, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    for i in range(30):
        (few / f"{i}.txt").write_bytes(b"first %d\nsecond\n" % i)
    once = corpus.load(_config(few / "**"), folder, BYTES)
    (few / "a.txt").write_bytes(b"first 0\r\nsecond\r\n")
    (few / "b.txt").write_bytes(b"first 0  \nsecond\t\n\n \n")
    (few / "c.txt").write_bytes(b"\xef\xbb\xbffirst 0\rsecond")
    (few / "empty.txt").write_bytes(b" \n")
    (few / "link.txt").symlink_to(few / "1.txt")
    again = corpus.load(_config(few / "**"), folder, UNUSED)
    assert again.fingerprint == once.fingerprint
    assert _all_documents(again) == _all_documents(once)


def test_what_is_no_text_is_left_out_and_said_once(config, folder, texts, capsys):
    expected = _all_documents(corpus.load(config, folder, BYTES))
    for name, content in {"a": b"\xff\xfe", "b": b"caf\xe9", "c": b"a\0b", "d": b"", "e": b"\n \n"}.items():
        (texts / f"{name}.txt").write_bytes(content)
    os.mkfifo(texts / "f.txt")
    (texts / "g.txt").symlink_to(texts / "nothing")
    (texts / "h.txt").mkdir()
    assert _all_documents(corpus.load(config, folder, UNUSED)) == expected
    assert capsys.readouterr() == ("", "")  # The texts are the same as before.
    config.eval_tokens = 10**6
    corpus.load(config, folder, BYTES)
    assert capsys.readouterr().err == (
        f"warning: of 65 text files some were left out: 2 (not UTF-8), such as {texts}/a.txt; 1 (with NUL bytes), such as"
        f" {texts}/c.txt\n"
    )


def test_files_that_cannot_be_read_are_left_out(config, folder, texts, monkeypatch, capsys):
    def open_most(path, *args):
        if str(path).endswith("/7.txt"):
            raise PermissionError(13, "Permission denied", path)
        return open(path, *args)

    monkeypatch.setattr(corpus, "open", open_most, raising=False)
    loaded = corpus.load(config, folder, BYTES)
    assert sum(len(part) for part in _all_documents(loaded).values()) == 59
    assert f"1 (Permission denied), such as {texts}/7.txt" in capsys.readouterr().err


def test_patterns(tmp_path, monkeypatch):
    for name in ("a.txt", "b.py", "in/c.txt", "in/deep/d.txt", "in/.hidden/e.txt", ".f.txt", "in/[g].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for i in range(2):  # Who follows them never ends.
        (tmp_path / "in" / f"loop{i}").symlink_to(tmp_path)
    outside = tmp_path.parent / f"{tmp_path.name}_outside"
    outside.mkdir()
    (outside / "h.txt").write_text("h")
    (tmp_path / "in" / "linked.txt").symlink_to(outside / "h.txt")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "in")

    def found(pattern):
        return [os.path.relpath(path, tmp_path) for path in corpus._find(pattern)]

    assert found(f"{tmp_path}/*.txt") == ["a.txt"]
    everything = ["a.txt", "in/[g].txt", "in/c.txt", "in/deep/d.txt", "in/linked.txt"]
    assert found(f"{tmp_path}/**/*.txt") == found("~/**/*.txt") == everything
    assert found(f"{tmp_path}/**") == sorted([*everything, "b.py"])
    assert found("c.txt") == found("./c.*") == ["in/c.txt"]
    assert found("../in/**/d.txt") == found("**/deep/*") == ["in/deep/d.txt"]
    assert found("[[]g].txt") == ["in/[g].txt"]
    assert found("~/in/.hidden/*") == ["in/.hidden/e.txt"]
    assert found("~/**/.f*") == [".f.txt"]
    assert found("loop0/*.txt") == ["in/loop0/a.txt"]  # Named, it is followed.


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("{}/*.md", r"no file matches --config\.text\.files=.*/\*\.md$"),
        ("{}", r"no file matches .*; a folder's files are --config\.text\.files='.*/texts/\*\*/\*'$"),
        ("{}/nothing/**/*", r"no file matches"),
        ("{}/1.txt/*", r"no file matches"),
        ("gs://bucket/*.txt", r"bad --config\.text\.files=gs://bucket/\*\.txt: copy the texts to a folder of this"),
        ("http://host/a.txt", r"bad --config\.text\.files=http://host/a\.txt: "),
        ("a\0b", r"bad --config\.text\.files="),
        ("~nobody_here/*", r"bad --config\.text\.files=~nobody_here/\*: there is no such user"),
    ],
)
def test_patterns_without_a_file(files, message, texts):
    with pytest.raises(UserError, match=message):
        corpus._find(files.format(texts))


def test_the_default_is_the_source_of_the_standard_library():
    library = sysconfig.get_path("stdlib")
    found = [os.path.relpath(path, library) for path in corpus._find("")]
    assert {"glob.py", "json/decoder.py"} <= set(found)
    assert not [
        path
        for path in found
        if {"site-packages", "dist-packages", "test", "tests", "idle_test"} & set(path.split(os.sep))
    ]
    assert all(path.endswith(".py") for path in found)


def test_a_split_is_cut_at_a_number_of_tokens(config, folder):
    whole = corpus.load(config, folder, BYTES)
    documents = _all_documents(whole)
    for limit in (2, 5, 40, 10**6, *(len(documents["train"][0]) + i for i in (0, 1, 2))):
        config.train_tokens, config.eval_tokens = limit, 40
        loaded = corpus.load(config, folder, BYTES)
        assert len(loaded.train.tokens) == min(limit, len(whole.train.tokens))
        np.testing.assert_array_equal(loaded.train.tokens, whole.train.tokens[:limit])
        assert loaded.train.num_bytes == sum(map(len, _documents(loaded.train)))
        assert loaded.train.num_documents == len(_documents(loaded.train))
        assert len(loaded.test.tokens) == len(loaded.validation.tokens) == 40


def test_no_letter_is_cut(folder, texts, tmp_path):
    """A tokenizer that returns whole letters gives back others for half of one."""

    def decode(ids):
        return _decode_bytes(ids).decode(errors="replace").encode()

    for path in texts.iterdir():
        path.write_text(f"{path.stem:0>2}" + "😀" * 50)
    careful = SimpleNamespace(**vars(BYTES) | {"decode": decode})
    config = _config(texts / "*")
    config.train_tokens = 100  # of which the first document has 2 and 24 letters of 4 and a half
    loaded = corpus.load(config, folder, careful)
    assert (len(loaded.train.tokens), loaded.train.num_bytes) == (98, 98)
    assert bytes(loaded.train.tokens.astype(np.uint8))[2:].decode() == "😀" * 24


def test_a_tokenizer_that_gives_back_other_bytes(config, folder):
    other = SimpleNamespace(**vars(BYTES) | {"decode": lambda ids: b" " + _decode_bytes(ids)})
    whole = corpus.load(config, folder, BYTES)
    config.train_tokens = 100
    loaded = corpus.load(config, folder, other)
    assert loaded.train.tokens[-1] == BYTES.separator  # Of whole documents the bytes are known.
    assert 50 < len(loaded.train.tokens) < 100
    np.testing.assert_array_equal(loaded.train.tokens, whole.train.tokens[: len(loaded.train.tokens)])
    config.train_tokens = 3
    with pytest.raises(UserError, match=r"train split has more than 3 tokens, .* --config\.text\.train_tokens$"):
        corpus.load(config, folder, other)
    config.update(train_tokens=0, eval_tokens=3)
    with pytest.raises(UserError, match=r"validation split has more than 3 tokens, .* --config\.text\.eval_tokens$"):
        corpus.load(config, folder, other)


def test_text_is_tokenized_in_batches(config, folder, tmp_path, monkeypatch):
    whole = corpus.load(config, folder, BYTES)
    sizes = []

    def encode(texts):
        sizes.append(sum(map(len, texts)))
        return _encode_bytes(texts)

    monkeypatch.setattr(corpus, "_BATCH", 100)
    again = corpus.load(config, tmp_path / "again", SimpleNamespace(**vars(BYTES) | {"encode": encode}))
    np.testing.assert_array_equal(again.train.tokens, whole.train.tokens)
    assert len(sizes) > 5
    assert max(sizes) < 200  # The longest text has 68 bytes.


def test_tokens_are_made_once(config, folder, capsys):
    first = corpus.load(config, folder, BYTES)
    assert capsys.readouterr() == ("", "")
    bits = _bits(folder)
    again = corpus.load(config, folder, UNUSED)
    assert again.fingerprint == first.fingerprint
    assert [(split.num_bytes, split.num_documents) for split in again[:3]] == [
        (split.num_bytes, split.num_documents) for split in first[:3]
    ]
    assert _bits(folder) == bits


@pytest.mark.parametrize(
    "field", slow_but(["validation_percent", "test_percent", "train_tokens", "eval_tokens"], "test_percent")
)
def test_other_fields_make_other_tokens(field, config, folder):
    first = corpus.load(config, folder, BYTES)
    config[field] += 10
    second = corpus.load(config, folder, BYTES)
    assert second.fingerprint != first.fingerprint
    same_tokens = np.array_equal(second.train.tokens, first.train.tokens)
    assert same_tokens == (field == "eval_tokens") == (second.train.fingerprint == first.train.fingerprint)
    config[field] -= 10
    assert corpus.load(config, folder, BYTES).fingerprint == first.fingerprint


def test_other_texts_and_tokenizers_make_other_tokens(config, folder, texts):
    first = corpus.load(config, folder, BYTES)
    before = first.train.tokens.copy()
    other = corpus.load(config, folder, SimpleNamespace(**vars(BYTES) | {"fingerprint": "other"}))
    (texts / "0.txt").write_text("text x\n")  # as long as it was
    changed = corpus.load(config, folder, BYTES)
    assert len({first.fingerprint, other.fingerprint, changed.fingerprint}) == 3
    assert first.train.fingerprint != other.train.fingerprint
    assert b"text x\n" in [text for part in _all_documents(changed).values() for text in part]
    np.testing.assert_array_equal(first.train.tokens, before)  # Files that are in use are not written to.


def test_where_texts_lie_does_not_matter(config, folder, texts, tmp_path):
    first = corpus.load(config, folder, BYTES)
    texts.rename(tmp_path / "moved")
    assert corpus.load(_config(tmp_path / "moved" / "**"), folder, UNUSED).fingerprint == first.fingerprint


_DAMAGES = {
    "a bit": lambda folder: _flip(folder / "train.bin"),
    "cut": lambda folder: os.truncate(folder / "test.bin", 10),
    "empty": lambda folder: os.truncate(folder / "test.bin", 0),
    "longer": lambda folder: os.truncate(folder / "test.bin", 10**5),
    "gone": lambda folder: (folder / "validation.bin").unlink(),
    "a folder": lambda folder: [(folder / "train.bin").unlink(), (folder / "train.bin").mkdir()],
    "half a record": lambda folder: os.truncate(folder / "corpus.json", 100),
    "a poor record": lambda folder: (folder / "corpus.json").write_text('{"fingerprint": 3}'),
}


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", slow_but(_DAMAGES, "a bit", "cut", "gone", "half a record"))
def test_damaged_files_are_written_anew(damage, config, folder, capsys):
    corpus.load(config, folder, BYTES)
    bits = _bits(folder)
    _DAMAGES[damage](folder)
    if damage == "a folder":
        with pytest.raises(UserError, match=r"cannot write .*train\.bin \(Is a directory\)"):
            corpus.load(config, folder, BYTES)
        return
    corpus.load(config, folder, BYTES)
    assert _bits(folder) == bits
    said = capsys.readouterr().err
    assert said.endswith("; the text is tokenized again\n") == (damage != "a poor record"), said
    assert said.count("\n") <= 1


@pytest.mark.parametrize("moment", slow_but(range(6), 1, 4))
def test_interrupted_writing_leaves_nothing_half_used(moment, config, folder, monkeypatch):
    """Before the unfinished record is renamed, the three files, and the record; or while the first file is written."""
    corpus.load(config, folder, BYTES)
    expected, old = _bits(folder), config.copy_and_resolve_references()
    old.validation_percent = 5.0
    corpus.load(old, folder, BYTES)
    replace, calls = os.replace, []

    def interrupted(source, target):
        calls.append(target)
        if len(calls) == moment + 1:
            raise KeyboardInterrupt
        replace(source, target)

    def encode(texts):
        if moment == 5:
            raise KeyboardInterrupt
        return _encode_bytes(texts)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        corpus.load(config, folder, SimpleNamespace(**vars(BYTES) | {"encode": encode}))
    monkeypatch.undo()
    splits = json.loads((folder / "corpus.json").read_text())["splits"]
    assert list(splits) == (list(corpus.SPLITS) if moment == 0 else [])
    assert not list(folder.glob("*.tmp"))
    (folder / "train.tmp").write_text("left by a process that was killed")
    corpus.load(config, folder, BYTES)
    assert _bits(folder) == expected


def test_texts_that_change_while_they_are_read(config, folder, texts, monkeypatch):
    documents = corpus._documents

    def change(files):
        found = documents(files)
        (texts / "5.txt").write_text("changed")
        return found

    monkeypatch.setattr(corpus, "_documents", change)
    with pytest.raises(UserError, match=r"/5\.txt changed while it was read; the same command begins with it again$"):
        corpus.load(config, folder, BYTES)
    monkeypatch.undo()
    corpus.load(config, folder, BYTES)


def test_a_full_disk(config, folder):
    folder.mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*/train\.tmp \(File too large\); put this right") as error:
            corpus.load(config, folder, BYTES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert sorted(os.listdir(folder)) == [".lock", "corpus.json"]
    corpus.load(config, folder, BYTES)


def test_folders_that_cannot_hold_tokens(config, tmp_path):
    with pytest.raises(
        UserError, match=r"tokens cannot be in gs://bucket/tokens: .* of this machine with --config\.text\.folder$"
    ):
        corpus.load(config, epath.Path("gs://bucket/tokens"), BYTES)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot (write|read) .*/file"):
        corpus.load(config, tmp_path / "file", BYTES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"validation_percent": 0.0},
            r"60 different texts none came into the validation split; give a higher --config\.",
        ),
        ({"test_percent": 0.0}, r"none came into the test split; give a higher --config\.text\.test_percent, or more"),
        (
            {"validation_percent": 60.0, "test_percent": 40.0},
            r"bad --config\.text\.validation_percent=60\.0 and .*=40\.0",
        ),
        (
            {"validation_percent": 50.0, "test_percent": 49.999},
            r"into the train split; give a lower --config\.text\.val",
        ),
    ],
)
def test_empty_splits(change, message, config, folder):
    config.update(change)
    with pytest.raises(UserError, match=message):
        corpus.load(config, folder, BYTES)
    assert not folder.exists()


def test_files_without_text(tmp_path, folder):
    (tmp_path / "a.bin").write_bytes(b"\0")
    (tmp_path / "b.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"no file of --config\.text\.files=.*\*\.bin has text in UTF-8; 2 match$"):
        corpus.load(_config(tmp_path / "*.bin"), folder, BYTES)


@pytest.mark.parametrize("ids", [[], [1, 0, 2], [256]])
def test_tokenizers_that_would_mislead(ids, config, folder):
    wrong = SimpleNamespace(**vars(BYTES) | {"encode": lambda texts: [np.array(ids, np.uint16) for _ in texts]})
    with pytest.raises(UserError, match=r"the tokenizer makes of .*\.txt no tokens, .* or the separator of documents"):
        corpus.load(config, folder, wrong)


def test_texts_that_no_memory_holds(config, folder, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 1)
    with pytest.raises(UserError, match=r"the text of .*txt, .* give it in several files$"):
        corpus.load(config, folder, BYTES)


@pytest.mark.parametrize(("vocabulary", "needed"), [(256, 8 * 68), (2**10, 130 * 68)])
def test_tokenizers_that_no_memory_holds(vocabulary, needed, config, folder, monkeypatch):
    """The longest text has 68 bytes; reading it takes less."""
    tokenizer = SimpleNamespace(**vars(BYTES) | {"vocabulary": vocabulary})
    memory = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": needed - 1}
    monkeypatch.setattr(os, "sysconf", memory.__getitem__)
    with pytest.raises(UserError, match=r"the tokens of .*\.txt, as they are made, take .* give it in several files$"):
        corpus.load(config, folder, tokenizer)
    assert not folder.exists()
    memory["SC_PHYS_PAGES"] = needed
    corpus.load(config, folder, tokenizer)
    memory["SC_PHYS_PAGES"] = 8 * 68 - 1
    corpus.load(config, folder, tokenizer)  # What is tokenized already takes no more than to be read.


_FOREIGN = {
    "tokens": lambda folder: (folder / "train.bin").write_bytes(b"abc"),
    "unfinished tokens": lambda folder: (folder / "validation.tmp").write_bytes(b"abc"),
    "a link": lambda folder: (folder / "test.bin").symlink_to("nothing"),
    "a record": lambda folder: (folder / "corpus.json").write_text("[3]"),
    "a record and tokens": lambda folder: [
        (folder / "corpus.json").write_text('{"text": "a"}'),
        (folder / "train.bin").write_bytes(b"abc"),
    ],
}


@pytest.mark.parametrize("kind", _FOREIGN)
def test_files_of_another_program_stay(kind, config, folder):
    """Others call their tokens `train.bin`, too."""
    folder.mkdir()
    _FOREIGN[kind](folder)
    before = {path.name: path.is_symlink() or path.read_bytes() for path in folder.iterdir()}
    message = (
        f"tokens has files that this program did not write, .*: {', '.join(sorted(before))}; give another --config"
    )
    with pytest.raises(UserError, match=message) as error:
        corpus.load(config, folder, UNUSED)
    assert "\n" not in str(error.value)
    assert {path.name: path.is_symlink() or path.read_bytes() for path in folder.iterdir()} == before


def test_two_runs_do_not_write_to_one_folder(config, folder):
    def encode(texts):
        with pytest.raises(UserError, match=r"another run writes tokens in .*/tokens; wait for it, or end it$"):
            corpus.load(config, folder, UNUSED)
        return _encode_bytes(texts)

    first = corpus.load(config, folder, SimpleNamespace(**vars(BYTES) | {"encode": encode}))
    with lock.hold(folder / ".lock"):  # Any number may read.
        assert corpus.load(config, folder, UNUSED).fingerprint == first.fingerprint


def test_what_another_run_wrote_before_this_one_had_the_lock(config, folder):
    found = corpus.load(config, folder, UNUSED, accept=lambda identity: corpus.load(config, folder, BYTES))
    assert _all_documents(found) == _all_documents(corpus.load(config, folder, UNUSED))


@pytest.mark.parametrize("size", [2, -2])
def test_tokens_that_another_run_replaced(size, config, folder, monkeypatch):
    corpus.load(config, folder, BYTES)
    intact = corpus._intact

    def replaced(*args):
        record = intact(*args)
        os.truncate(folder / "test.bin", (folder / "test.bin").stat().st_size + size)
        return record

    monkeypatch.setattr(corpus, "_intact", replaced)
    with pytest.raises(UserError, match=r"test\.bin has \d+ tokens instead of \d+: .* with --config\.text\.folder$"):
        corpus.load(config, folder, BYTES)


@pytest.mark.parametrize("field", ["train_tokens", "eval_tokens"])
def test_a_token_alone_is_no_split(field, config, folder):
    config[field] = 1
    with pytest.raises(UserError, match=rf"bad --config\.text\.{field}=1: a split needs 2 tokens or more"):
        corpus.load(config, folder, UNUSED)
    assert not folder.exists()


def test_a_tokenizer_that_can_cut_a_token_alone(config, folder):
    other = SimpleNamespace(**vars(BYTES) | {"decode": lambda ids: b"t" if len(ids) == 1 else b"x"})
    config.eval_tokens = 3
    with pytest.raises(UserError, match=r"validation split has more than 3 tokens, .* --config\.text\.eval_tokens$"):
        corpus.load(config, folder, other)


def test_tokenizing_ends_early(config, folder, monkeypatch):
    monkeypatch.setattr(corpus, "_BATCH", 100)
    texts = []

    def encode(batch):
        texts.extend(batch)
        return _encode_bytes(batch)

    tokenizer = SimpleNamespace(**vars(BYTES) | {"encode": encode})
    asked = iter([False, False, True])
    with pytest.raises(Preempted, match="the same command tokenizes the text from its beginning"):
        corpus.load(config, folder, tokenizer, preempted=asked.__next__)
    assert 0 < len(texts) < 30
    corpus.load(config, folder, BYTES)
    corpus.load(config, folder, UNUSED, preempted=asked.__next__)  # It is not asked where nothing is done.


def test_one_of_several_hosts_does_not_ask(config, folder, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "by_first", lambda work, what: work())
    corpus.load(config, folder, BYTES, preempted=lambda: pytest.fail("asked"))


def test_what_a_working_directory_knows_the_text_by(config, folder, texts):
    accepted = []
    first = corpus.load(config, folder, BYTES, accept=accepted.append)
    assert accepted == [first.identity]
    assert corpus.load(config, folder, UNUSED, accept=accepted.append).identity == first.identity
    assert len(accepted) == 1
    digests = sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in texts.iterdir())
    of_texts = hashlib.sha256("".join(digests).encode()).hexdigest()
    assert first.identity == {"text.files": of_texts[:12], "text.tokenizer": "bytes"}
    long = SimpleNamespace(**vars(BYTES) | {"fingerprint": "0123456789abcdef"})
    assert corpus.load(config, folder, long).identity == first.identity | {"text.tokenizer": "0123456789ab"}
    (texts / "0.txt").write_text("another\n")
    changed = corpus.load(config, folder, BYTES).identity
    assert [name for name in changed if changed[name] != first.identity[name]] == ["text.files"]
