"""What the Tiny-ImageNet experiments of the DOT paper share."""

from ml_collections import ConfigDict

from examples.distill.configs import default, set_networks


def tiny_imagenet(student: str) -> ConfigDict:
    config = default()
    config.epochs = 200
    config.batch_size = 256
    config.eval_batch_size = 500
    config.checkpoint_every_steps = 500

    config.dataset.name = "tiny_imagenet"
    config.dataset.validation = "validation"  # the test images have no labels: followed, as published, ...
    config.dataset.test = "validation"  # ... but nothing is chosen by it
    config.dataset.image_size = 64
    config.dataset.preprocessing = "tiny_imagenet"
    config.dataset.mean = tuple(255 * mean for mean in (0.4802, 0.4481, 0.3975))
    config.dataset.std = tuple(255 * std for std in (0.2302, 0.2265, 0.2262))
    config.dataset.workers = 8
    config.dataset.split_sizes = ConfigDict({"train": 100_000, "validation": 10_000})

    config.distillation.temperature = 4.0
    config.distillation.task_weight = 0.1
    config.distillation.kd_weight = 0.9

    # For DKD and DeepKD none are published: those of CIFAR-100. The classes are all compared before the second drop.
    config.dkd.task_weight = 1.0
    config.dkd.alpha = 1.0
    config.dkd.beta = 8.0
    config.dkd.warmup_epochs = 20

    config.deepkd.task_weight = 0.1
    config.deepkd.delta_task, config.deepkd.delta_target = 0.075, -0.075
    config.deepkd.delta_non_target = 0.075
    config.deepkd.top_k_fraction = 0.05
    config.deepkd.top_k_phases = (0.25, 0.5)

    config.optimizer.learning_rate = 0.2
    config.optimizer.weight_decay = 5e-4
    config.optimizer.drop_epochs = (60, 120, 160)
    config.optimizer.delta = 0.075
    return set_networks(config, "resnet18_small", student)
