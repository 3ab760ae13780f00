"""Fashion-MNIST: a small convolutional network with BatchNorm teaches a smaller one, with SGD.

    python -m examples.distill --config=fashion_mnist_cnn --config.dataset.data_dir=/usr/share/datasets/fashion-mnist

The folder holds the four IDX files; this is where Debian's package `dataset-fashion-mnist` puts them. It takes 20 minutes
of one CPU core's time, on two cores that did other work as well 40 minutes, and ends with

    fashion_mnist_cnn, seed 0, 8 epochs; teacher: test top-1 0.8684 ± 0.0034

                                   KD   KD, gain-matched               DOT
    train task loss            0.4236             0.4026            0.4037
    train KD loss              0.2456             0.1994            0.2120
    test top-1        0.8302 ± 0.0038    0.8410 ± 0.0037   0.8396 ± 0.0037
    test top-5        0.9967 ± 0.0006    0.9960 ± 0.0006   0.9960 ± 0.0006
    seconds                     648.3              631.0             383.0

(JAX 0.10.2.) Here too, gain-matched KD does as well as DOT.
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
