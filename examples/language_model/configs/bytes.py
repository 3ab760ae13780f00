"""Python source, byte by byte: a decoder of four layers teaches one of two.

The text is the source of Python's standard library, so the run needs no download. A token is a byte.

    python -m examples.language_model

It takes under four minutes on two CPU cores, compilation included; README.md has what it printed.
"""

from ml_collections import ConfigDict

from examples.language_model import configs


def get_config() -> ConfigDict:
    """Sizes for two CPU cores and some minutes."""
    config = configs.default()
    config.epochs = 3
    config.batch_size = 8
    config.eval_batch_size = 64
    config.sequence_length = 128
    config.gradient_metrics = False
    config.checkpoint_every_steps = 1000

    config.text.train_tokens = 2**18
    config.text.eval_tokens = 2**15

    config.teacher.model = configs.model(width=128, layers=4, heads=4, kv_heads=2, head_dim=32, feed_forward=352)
    config.teacher.epochs = 3
    config.teacher.optimizer.name = "adamw"
    config.teacher.optimizer.learning_rate = 3e-3
    config.teacher.optimizer.b2 = 0.98
    config.teacher.optimizer.weight_decay = 0.1
    config.teacher.optimizer.schedule = "cosine"
    config.teacher.optimizer.warmup_epochs = 1

    config.student.model = configs.model(width=64, layers=2, heads=2, kv_heads=1, head_dim=32, feed_forward=176)

    config.distillation.loss = "top_k"
    config.distillation.k = 32
    config.distillation.cache = True
    config.distillation.task_weight = 0.5
    config.distillation.kd_weight = 0.5

    config.optimizer.update(config.teacher.optimizer)
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_epochs = 1
    config.optimizer.delta = 0.075
    return config
