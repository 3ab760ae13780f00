"""Fashion-MNIST: a small convolutional network with BatchNorm teaches a smaller one, with SGD.

    python -m examples.distill --config=fashion_mnist_cnn --config.dataset.data_dir=/usr/share/datasets/fashion-mnist

The folder holds the four IDX files; this is where Debian's package `dataset-fashion-mnist` puts them.
"""

from ml_collections import ConfigDict

from examples.distill.configs._fashion_mnist import fashion_mnist


def get_config() -> ConfigDict:
    """The setting of the paper, scaled down: one learning rate for every method."""
    config = fashion_mnist()
    config.epochs = 8
    config.student.model = ConfigDict({"name": "fashion_cnn", "widths": (8, 16)})
    config.optimizer.learning_rate = 0.02
    config.optimizer.weight_decay = 5e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_epochs = 1
    config.optimizer.delta = 0.075
    return config
