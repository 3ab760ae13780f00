"""What the CIFAR-100 experiments of the DOT paper share."""

from ml_collections import ConfigDict

from examples.distill.configs import default, set_networks


def cifar100(teacher: str, student: str) -> ConfigDict:
    config = default()
    config.epochs = 240
    config.batch_size = 64
    config.eval_batch_size = 500
    config.checkpoint_every_steps = 4000

    config.dataset.name = "cifar100"
    config.dataset.validation = "test"  # there is no third split: followed, as published, but nothing is chosen by it
    config.dataset.test = "test"
    config.dataset.image_size = 32
    config.dataset.preprocessing = "cifar"
    config.dataset.mean = tuple(255 * mean for mean in (0.5071, 0.4867, 0.4408))
    config.dataset.std = tuple(255 * std for std in (0.2675, 0.2565, 0.2761))
    config.dataset.in_memory = True  # 150 MB
    config.dataset.split_sizes = ConfigDict({"train": 50_000, "test": 10_000})

    config.distillation.temperature = 4.0
    config.distillation.task_weight = 0.1
    config.distillation.kd_weight = 0.9

    config.dkd.task_weight = 1.0
    config.dkd.alpha = 1.0
    config.dkd.beta = 8.0  # but for some networks
    config.dkd.warmup_epochs = 20

    # DeepKD's paper leaves the lengths of the phases open: ours end before the learning rate drops.
    config.deepkd.task_weight = 0.1  # but for some networks
    config.deepkd.delta_task, config.deepkd.delta_target = 0.075, -0.075
    config.deepkd.delta_non_target = 0.075  # but for some networks
    config.deepkd.top_k_fraction = 0.05
    config.deepkd.top_k_phases = (0.25, 0.5)

    config.crd.task_weight, config.crd.crd_weight = 1.0, 0.8
    config.crd.dim = 128
    config.crd.negatives = 16384
    config.crd.temperature = 0.07
    config.crd.momentum = 0.5

    config.optimizer.learning_rate = 0.05
    config.optimizer.weight_decay = 5e-4
    config.optimizer.drop_epochs = (150, 180, 210)
    config.optimizer.delta = 0.075
    return set_networks(config, teacher, student)
