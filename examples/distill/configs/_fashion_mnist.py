"""What the Fashion-MNIST experiments share: the data, and a convolutional teacher that is trained first."""

from ml_collections import ConfigDict

from examples.distill.configs import default


def fashion_mnist() -> ConfigDict:
    config = default()
    config.method = "kd,kd_gain_matched,dot"
    config.batch_size = 128
    config.eval_batch_size = 500
    config.checkpoint_every_steps = 400

    config.dataset.name = "fashion_mnist_idx"
    config.dataset.train = "train[:55000]"
    config.dataset.validation = "train[55000:]"
    config.dataset.test = "test"
    config.dataset.image_size = 28
    config.dataset.preprocessing = "fashion_mnist"
    # python -c "from examples.distill.datasets.fashion_mnist_idx import fashion_mnist_idx as f; x, _ = f(None)['train'];
    # print(x.mean(), x.std())" prints 72.94035223214286 90.02118235130519
    config.dataset.mean = (72.94,)
    config.dataset.std = (90.02,)
    config.dataset.in_memory = True  # 55 MB
    config.dataset.split_sizes = ConfigDict({"train": 60_000, "test": 10_000})

    config.teacher.model = ConfigDict({"name": "fashion_cnn", "widths": (32, 64)})
    config.teacher.train = True
    config.teacher.epochs = 5
    config.teacher.optimizer.learning_rate = 0.05
    config.teacher.optimizer.weight_decay = 5e-4
    config.teacher.optimizer.schedule = "cosine"
    config.teacher.optimizer.warmup_epochs = 1

    config.distillation.temperature = 4.0
    config.distillation.task_weight = 0.1
    config.distillation.kd_weight = 0.9
    return config
