"""Fashion-MNIST: a small convolutional network teaches a small vision transformer, with AdamW.

    python -m examples.distill --config=fashion_mnist_vit --config.dataset.data_dir=/usr/share/datasets/fashion-mnist

The folder holds the four IDX files; this is where Debian's package `dataset-fashion-mnist` puts them. DOT is
`dot_optax.dot_adamw` here, whose gains are 0.571 for the task gradient and 4 for the KD gradient, where AdamW has 1 and 1.
It ends with (on two cores that did other work as well)

    fashion_mnist_vit, seed 0, 4 epochs; teacher: test top-1 0.8684 ± 0.0034

                                   KD   KD, gain-matched               DOT
    train task loss            0.5346             0.4668            0.4679
    train KD loss              0.5604             0.4050            0.4144
    test top-1        0.7900 ± 0.0041    0.8182 ± 0.0039   0.8153 ± 0.0039
    test top-5        0.9950 ± 0.0007    0.9955 ± 0.0007   0.9959 ± 0.0006
    seconds                     320.0              348.2             302.5

(JAX 0.10.2.) With AdamW too, gain-matched KD does as well as DOT: what helps here are the gains.
"""

from ml_collections import ConfigDict

from examples.distill.configs._fashion_mnist import fashion_mnist


def get_config() -> ConfigDict:
    """One learning rate for every method; delta rises while the learning rate does."""
    config = fashion_mnist()
    config.epochs = 4
    config.student.model = ConfigDict({"name": "vit", "depth": 4, "width": 48, "heads": 4, "patch_size": 7})
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.05
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_epochs = 1
    config.optimizer.delta = 0.075
    config.optimizer.delta_warmup_epochs = 1
    return config
