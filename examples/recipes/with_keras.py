"""Keras 3 on its JAX backend: `compile` takes an Optax optimizer, and `fit` trains with one gradient per loss.

`Optax` keeps the optimizer's state in Keras's own optimizer variables, so that saved weights include the momenta.
`Distiller` overrides `train_step`: one stateless call, whose updated BatchNorm statistics and Dropout seeds are
auxiliary data, and one gradient for each loss. Keras chooses its backend when it is imported; this module sets it.

    python -m examples.recipes.with_keras
"""

import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import keras
import numpy as np
import optax

import dot_optax
from examples.recipes import numpy_reference
from examples.recipes.problem import BATCH, CLASSES, FEATURES, HIDDEN, LEARNING_RATE, batches, losses


class Optax(keras.optimizers.Optimizer):
    """An Optax optimizer for `keras.Model.compile`. Its learning rate is Optax's, not Keras's."""

    def __init__(self, tx: optax.GradientTransformation, **kwargs):
        super().__init__(learning_rate=1.0, **kwargs)
        self.tx = tx

    def build(self, variables):
        """Makes a Keras variable for each array of the optimizer's state."""
        super().build(variables)
        leaves, self.structure = jax.tree.flatten(self.tx.init([v.value for v in variables]))
        for leaf in leaves:
            self.add_variable(leaf.shape, dtype=leaf.dtype, name="state").assign(leaf)

    def stateless_apply(self, optimizer_variables, grads, trainable_variables):
        """The new parameters and optimizer variables; `grads` is a container with one list of arrays per loss."""
        first = len(optimizer_variables) - self.structure.num_leaves  # before them: Keras's iteration, learning rate
        iteration, *own = optimizer_variables[:first]
        state = jax.tree.unflatten(self.structure, optimizer_variables[first:])
        updates, state = self.tx.update(grads, state, trainable_variables)
        trainable_variables = optax.apply_updates(trainable_variables, updates)
        return trainable_variables, [iteration + 1, *own, *jax.tree.leaves(state)]


class Distiller(keras.Model):
    """A model whose targets are a dict of labels and teacher logits."""

    def train_step(self, state, data):
        """Keras's JAX train step, with one gradient per loss."""
        trainable, non_trainable, optimizer_variables, metrics = state
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)

        def loss_fn(trainable):
            logits, updated = self.stateless_call(trainable, non_trainable, x, training=True)
            return losses(logits, y["labels"], y["teacher_logits"]), updated

        (values, non_trainable), grads = dot_optax.value_and_grads(loss_fn, has_aux=True)(trainable)
        trainable, optimizer_variables = self.optimizer.stateless_apply(optimizer_variables, grads, trainable)
        return values._asdict(), (trainable, non_trainable, optimizer_variables, metrics)


def make(rate: float = 0.5) -> Distiller:
    """A compiled student with BatchNorm and Dropout."""
    keras.utils.set_random_seed(0)
    x = keras.Input((FEATURES,))
    h = keras.layers.BatchNormalization(epsilon=1e-5)(keras.layers.Dense(HIDDEN)(x))
    h = keras.layers.Dropout(rate, seed=1)(keras.layers.ReLU()(h))
    model = Distiller(x, keras.layers.Dense(CLASSES)(h))
    model.compile(optimizer=Optax(dot_optax.dot(LEARNING_RATE)))
    return model


def fit(model: Distiller, steps: int) -> dict[str, list[float]]:
    """One epoch of as many steps; the losses of the last one."""
    x, labels, teacher_logits = (np.concatenate(arrays) for arrays in zip(*batches(steps), strict=True))
    y = {"labels": labels, "teacher_logits": teacher_logits}
    return model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0).history


def masks(steps: int, rate: float = 0.5) -> list[np.ndarray]:
    """What Dropout multiplies by at each step: what a layer with the same seed makes of ones."""
    layer = keras.layers.Dropout(rate, seed=1)
    return [np.asarray(layer(np.ones((BATCH, HIDDEN), np.float32), training=True)) for _ in range(steps)]


def arrays(model: Distiller) -> dict[str, np.ndarray]:
    """The parameters under the names of `numpy_reference`."""
    names = ("w1", "b1", "scale", "bias", "w2", "b2")
    return dict(zip(names, map(np.asarray, model.trainable_variables), strict=True))


def main() -> None:
    """Trains, and compares with NumPy under the same Dropout masks."""
    model = make()
    expected = numpy_reference.train(arrays(model), batches(20), kept=masks(20))
    history = fit(model, 20)
    off = numpy_reference.deviation(arrays(model), expected)
    print(f"task {history['task'][-1]:.4f}, kd {history['kd'][-1]:.4f}, largest deviation from NumPy {off:.1e}")
    print(f"optimizer variables: {len(model.optimizer.variables)}, iterations {int(model.optimizer.iterations)}")


if __name__ == "__main__":
    main()
