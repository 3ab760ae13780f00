"""A small text and tiny networks for the example of language models."""

import random


def write_texts(folder):
    """Writes files of what looks like Python source, of which each split gets some."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    names = ["alpha", "beta", "gamma", "delta", "kappa", "omega"]
    for i in range(40):
        lines = [
            f"def {rng.choice(names)}_{i}({rng.choice(names)}):" if j % 4 == 0 else f"    {rng.choice(names)} = {j}"
            for j in range(24)
        ]
        (folder / f"module_{i}.py").write_text("\n".join(lines))


def tiny_language_model(texts):
    """The flags of a run of some seconds: 48 steps for each network."""
    sizes = {"width": 16, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 8, "feed_forward": 32}
    flags = {f"{section}.model.{name}": value for section in ("teacher", "student") for name, value in sizes.items()}
    flags |= {
        "text.files": texts,
        "text.validation_percent": 20,
        "text.test_percent": 20,
        "text.train_tokens": 8 * 12 * 32 + 1,
        "text.eval_tokens": 1000,
        "sequence_length": 32,
        "batch_size": 8,
        "eval_batch_size": 8,
        "epochs": 4,
        "teacher.epochs": 4,
        "optimizer.learning_rate": 1e-3,
        "teacher.optimizer.warmup_epochs": 0,
        "distillation.loss": "forward",
        "distillation.k": 0,
        "distillation.cache": False,
        "gradient_metrics": True,
        "prompt_tokens": 4,
    }
    return [f"--config.{name}={value}" for name, value in flags.items()]
