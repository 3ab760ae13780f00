"""A Llama of 7 billion parameters teaches one of 1.1 billion, on a pod: a recipe that is compiled, and was not run.

    python -m examples.language_model --config=llama_pod --distributed \\
        --config.teacher.path=FOLDER --config.text.files='TEXTS/**/*.txt' --workdir=gs://BUCKET/RUN --config.text.folder=DISK

FOLDER is that of Hugging Face: config.json, safetensors, tokenizer.json; DISK is a folder that all hosts see. What a step takes on 256 TPU v5e prints

    python -m benchmarks.language_model_pod
"""

from ml_collections import ConfigDict

from examples.language_model import configs


def get_config() -> ConfigDict:
    """Sizes for 256 TPU v5e of 16 GB."""
    config = configs.default()
    config.method = "kd,dot"
    config.epochs = 1
    config.batch_size = 256
    config.eval_batch_size = 256
    config.sequence_length = 2048
    config.dtype = "bfloat16"
    config.remat = True
    config.model_devices = 4
    config.gradient_metrics = False
    config.checkpoint_every_steps = 500

    config.text.validation_percent = 0.1
    config.text.test_percent = 0.1
    config.text.eval_tokens = 2**21

    config.teacher.path = ""  # to be given

    # TinyLlama's; or set every_nth_layer = 2, for every second layer of the teacher.
    config.student.model = configs.model(
        width=2048, layers=22, heads=32, kv_heads=4, head_dim=64, feed_forward=5632, tied_embeddings=False
    )

    config.distillation.task_weight = 0.5
    config.distillation.kd_weight = 0.5

    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 3e-4
    config.optimizer.b2 = 0.95
    config.optimizer.weight_decay = 0.1
    config.optimizer.schedule = "cosine"
    config.optimizer.delta = 0.075
    return config
