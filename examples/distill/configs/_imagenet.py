"""What the ImageNet experiments of the DOT paper share."""

from ml_collections import ConfigDict

from examples.distill.configs import default, set_networks


def imagenet(teacher: str, student: str) -> ConfigDict:
    config = default()
    config.epochs = 100
    config.batch_size = 512
    config.eval_batch_size = 512
    config.checkpoint_every_steps = 500

    config.dataset.name = "imagenet2012"
    config.dataset.validation = "validation"  # the test images have no labels: followed, as published, ...
    config.dataset.test = "validation"  # ... but nothing is chosen by it
    config.dataset.image_size = 224
    config.dataset.preprocessing = "imagenet"
    config.dataset.mean = tuple(255 * mean for mean in (0.485, 0.456, 0.406))
    config.dataset.std = tuple(255 * std for std in (0.229, 0.224, 0.225))
    config.dataset.workers = 32
    config.dataset.split_sizes = ConfigDict({"train": 1_281_167, "validation": 50_000})

    config.distillation.temperature = 1.0
    config.distillation.task_weight = 0.5
    config.distillation.kd_weight = 0.5

    config.optimizer.learning_rate = 0.2
    config.optimizer.weight_decay = 1e-4
    config.optimizer.drop_epochs = (30, 60, 90)
    config.optimizer.delta = 0.09
    return set_networks(config, teacher, student)
