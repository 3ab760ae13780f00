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

    config.dkd.task_weight = 1.0
    config.dkd.alpha = 1.0
    config.dkd.beta = 0.5  # but for some networks
    config.dkd.warmup_epochs = 1  # so that there is none

    # As published for ResNet18; DeepKD's own runs warm the learning rate up for 20 epochs, too, and end with a cosine.
    config.deepkd.task_weight = 0.5
    config.deepkd.delta_task, config.deepkd.delta_target = 0.075, -0.075
    config.deepkd.delta_non_target = 0.075
    config.deepkd.top_k_fraction = 0.05
    config.deepkd.top_k_phases = (0.25, 0.5)

    config.optimizer.learning_rate = 0.2
    config.optimizer.weight_decay = 1e-4
    config.optimizer.drop_epochs = (30, 60, 90)
    config.optimizer.delta = 0.09
    return set_networks(config, teacher, student)
