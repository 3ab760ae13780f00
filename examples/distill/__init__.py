"""Knowledge distillation with and without DOT, from the dataset to the picture: `python -m examples.distill`.

    README.md       the recipes of the paper's experiments
    configs/        one experiment per file; start reading here
    __main__.py     the process and its interruption
    command_line.py which config, which overrides, errors as one line
    settings.py     the fields of a config and the values that they may have
    experiment.py   teacher, then a student for every method, then the report
    methods.py      the methods that are compared, each an Optax transformation over per-loss gradients
    steps.py        the train step and the evaluation step
    parallel.py     how devices share the work of a step: jit, pmap or shard_map
    train.py        the loop over steps: metrics, checkpoints, resuming
    preemption.py   SIGTERM
    log.py          progress bar, metrics.jsonl, TensorBoard
    data.py         TFDS and Grain; datasets/ holds the TFDS builders
    images.py       decoding and augmentation, one image at a time
    synthetic.py    random images in the place of a dataset
    models/         Flax NNX modules, used as pure functions
    checkpoint.py   Orbax
    workdir.py      which config and which run a working directory belongs to
    records.py      JSON files
    report.py       table and picture
    import_teacher.py   a command of its own: makes a teacher of a PyTorch state dict

A working directory holds `config.json`, `losses.png`, and one folder for the teacher and for each method, with
`checkpoints/`, `metrics.jsonl`, event files for TensorBoard and `result.json`. To use a trained student:

    from pathlib import Path
    from flax import nnx
    from examples.distill import models
    from examples.trainer import checkpoint

    model = models.build("mlp", 10, input_shape=(8, 8, 1), hidden=(32,), rngs=nnx.Rngs(0))
    graphdef, _, _ = models.split(model)
    params, rest = checkpoint.load_variables(Path("runs/digits/dot"))  # as last trained; or with step=... the best
    logits, _ = models.apply(graphdef, params, rest, images / 16, train=False)  # normalized as in the config
"""
