"""Knowledge distillation with and without DOT, from the dataset to the picture: `python -m examples.distill`.

    README.md       the recipes of the paper's experiments
    your_own_experiment.md  how to bring your own data, network and method
    configs/        one experiment per file; start reading here
    command_line.py the program; what it shares with others is in examples/trainer
    settings.py     the values that the fields of a config may have
    experiment.py   teacher, then a student for every method, then the report
    jobs.py         the teacher and the students, as the trainer takes them
    methods.py      the methods that are compared, each an Optax transformation over per-loss gradients
    optimizers.py   what these are made of: weights, momenta, learning rates
    objectives.py   the losses that they train on: plain distillation, DKD, DeepKD, CRD
    crd.py          the projectors and the memory of CRD
    steps.py        what a train step and an evaluation step compute
    sources.py      where images come from: TFDS, arrays, Grain; datasets/ holds those of this example
    data.py         from there to batches on the devices
    images.py       decoding and augmentation, one image at a time
    synthetic.py    random images in the place of a dataset
    models/         Flax NNX modules, used as pure functions
    identity.py     which config and which teacher a working directory belongs to
    report.py       table and picture
    plot.py         a command of its own: pictures of finished runs
    arms.py         runs read from their folders; arms, which are those that differ in the seed alone
    pictures.py     what is drawn of arms
    landscapes.py   the loss around the final weights of students
    smoke_test.py   a config tried out without its data
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
