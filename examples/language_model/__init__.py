"""Distillation of language models with and without DOT: `python -m examples.language_model`.

    README.md       what it does, how to bring your own text and teacher, and what came out
    configs/        one experiment per file; start reading here
    command_line.py the program; what it shares with others is in examples/trainer
    settings.py     the values that the fields of a config may have
    experiment.py   text, teacher, its cached predictions, then a student for every method, then the report
    jobs.py         the teacher and the students, as the trainer takes them
    steps.py        what a train step and an evaluation step compute
    losses.py       the losses of distillation by name
    model.py        a decoder of the Llama type in Flax NNX, used as pure functions, and how a mesh of devices holds it
    pretrained.py   networks in Hugging Face folders and GGUF files
    tokenizer.py    bytes, tokenizer.json, GGUF
    corpus.py       from text files to tokens in memory-mapped files
    data.py         from there to batches on the devices
    teacher_logits.py   the teacher's likeliest tokens, cached on disk
    trained.py      networks that this program has trained
    generate.py     text that a network continues
    identity.py     which config, text and teacher a working directory belongs to
    report.py       table, texts and picture

The methods, their optimizers and the drawing are those of `examples.distill`. A working directory holds `config.json`,
`losses.png`, `text/` with the tokens and the teacher's cached ones, and one folder for the teacher and for each method, with
`checkpoints/`, `metrics.jsonl`, event files for TensorBoard and `result.json`. To use a trained student:

    from etils import epath
    from examples.language_model import generate, tokenizer, trained

    graphdef, params = trained.load(epath.Path("runs/bytes/dot"))
    print(generate.continue_text(graphdef, params, tokenizer.of_bytes(), ["import "], num_tokens=40))
"""
