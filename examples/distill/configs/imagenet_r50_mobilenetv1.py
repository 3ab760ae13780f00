"""ImageNet: ResNet50 teaches MobileNetV1.

    python -m examples.distill --config=imagenet_r50_mobilenetv1 --config.teacher.checkpoint=FOLDER

FOLDER is a teacher that was imported or trained: see examples/distill/README.md. Top-1 in the paper: KD 70.50, KD with DOT 73.09.
"""

from ml_collections import ConfigDict

from examples.distill.configs._imagenet import imagenet


def get_config() -> ConfigDict:
    config = imagenet(teacher="resnet50", student="mobilenetv1")
    config.dkd.beta = 2.0
    return config
