"""Distances between the features of student and teacher.

The contrastive one, `crd_loss`, has a memory, which is a state that is passed on.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dot_optax._checks import _check_scalar, _describe, _kind
from dot_optax.losses._logits import Array, _check_temperature, _dtypes, _unit


def feature_loss(student_features: Array, teacher_features: Array, *, axis: Any = -1, where: Any = None) -> jax.Array:
    r"""How far the student's features are from the teacher's: the hint loss of FitNets.

    .. math::
        \frac{1}{C} \sum_c (s_c - t_c)^2

    Where the student is narrower than the teacher, it needs a projector: parameters that only this loss reaches, which
    are thrown away after training. `dot` gives them the mean momentum when it is told so with `reached`. Features of less
    than 32 bits are promoted to float32 inside; the result has the dtype of the features. Gradients flow into both
    arguments: use `jax.lax.stop_gradient` on a teacher that is part of the parameters.

    Args:
        student_features: of shape `[..., C]`.
        teacher_features: of the same shape.
        axis: the axis, or axes, of the features that are averaged. With -1, feature maps of shape
            `[batch, height, width, channels]` get one value for each position, and those of a sequence one for each
            token; `axis=(1, 2, 3)` gives one for each example. Their mean is the same.
        where: which features to include, bools of a shape that broadcasts to that of the features. What is left out has
            no influence on value or gradient, NaNs included; where all is left out, the loss is 0.

    Returns:
        The loss of each example, of shape `[...]`.

    Raises:
        ValueError: if the shapes differ, or `where` is not of bools or does not fit them.
        TypeError: if the features are not arrays of real floating point numbers.

    Example:
        A student of width 2, a teacher of width 3, and a linear projector, which the task does not reach:

        >>> import jax, jax.numpy as jnp, dot_optax
        >>> def loss_fn(params, x, teacher_features):
        ...     features = x @ params['body']
        ...     hint = dot_optax.losses.feature_loss(features @ params['projector'], teacher_features)
        ...     return dot_optax.PerLoss(task=jnp.mean((features @ params['head'] - 1.0) ** 2), kd=hint.mean())
        >>> params = {'body': jnp.eye(2), 'head': jnp.ones((2, 1)), 'projector': jnp.ones((2, 3))}
        >>> batch = (jnp.array([[1.0, 0.0], [1.0, 1.0]]), jnp.array([[1.0, 1.0, 1.0], [2.0, 2.0, 5.0]]))
        >>> print(loss_fn(params, *batch))
        PerLoss(task=Array(0.5, dtype=float32), kd=Array(1.5, dtype=float32))
        >>> reached = dot_optax.reached(loss_fn, params, *batch)
        >>> print(reached.kd)
        {'body': True, 'head': False, 'projector': True}
        >>> optimizer = dot_optax.dot(0.05, reached=reached)  # one momentum for head and projector, two for the body

    References:
        Romero et al., `FitNets: Hints for Thin Deep Nets <https://arxiv.org/abs/1412.6550>`_, 2015.
    """
    student, teacher, dtype = _widened(student_features, teacher_features, slice(None))
    where = jnp.broadcast_to(True if where is None else where, student.shape)
    # Selected before it is squared: the gradient of the square of a NaN is NaN, even times zero.
    squares = jnp.square(jnp.where(where, student - teacher, 0.0))
    return (jnp.sum(squares, axis, where=where) / jnp.maximum(jnp.sum(where, axis, squares.dtype), 1)).astype(dtype)


def attention_transfer_loss(student_features: Array, teacher_features: Array) -> jax.Array:
    r"""How far the places that the student looks at are from those that the teacher looks at.

    .. math::
        \frac{1}{HW} \Big\| \frac{a(s)}{\|a(s)\|_2} - \frac{a(t)}{\|a(t)\|_2} \Big\|_2^2, \qquad
        a(x)_{hw} = \frac{1}{C} \sum_c x_{hwc}^2

    It compares no channels, so the two may have different numbers of them, and their scales do not matter. Feature maps
    that are zero throughout have attention zero, and get no gradient. Features of less than 32 bits are promoted to
    float32 inside; the result has the dtype of the features. Gradients flow into both arguments.

    Args:
        student_features: feature maps of shape `[..., H, W, C]`: height, width, channels.
        teacher_features: the teacher's, of the same shape but for the channels.

    Returns:
        The loss of each example, of shape `[...]`. It is summed over the layers that are compared; mean squares of
        unit vectors are small, and published weights accordingly large (1000 in the experiments that DOT extends).

    Raises:
        ValueError: if the maps have fewer than three axes, or other shapes than each other's but for the channels.
        TypeError: if the features are not arrays of real floating point numbers.

    Example:
        The student looks at one of two places, the teacher at both:

        >>> import jax.numpy as jnp, dot_optax
        >>> student = jnp.array([[[[3.0], [0.0]]]])  # one example, 1 x 2 places, 1 channel
        >>> teacher = jnp.array([[[[1.0, 1.0], [1.0, -1.0]]]])
        >>> print(dot_optax.losses.attention_transfer_loss(student, teacher).round(4))
        [0.2929]

    References:
        Zagoruyko & Komodakis, `Paying More Attention to Attention <https://arxiv.org/abs/1612.03928>`_, 2017; the mean
        over places, instead of the norm in the paper's formula, is that of the published code.
    """
    student, teacher, dtype = _widened(student_features, teacher_features, slice(-1))

    def attention(features: jax.Array) -> jax.Array:
        # The scale of the features is taken out first: the fourth powers of large ones would overflow.
        return _unit(jnp.mean(jnp.square(_unit(features, (-3, -2, -1))), axis=-1), (-2, -1))

    return jnp.mean(jnp.square(attention(student) - attention(teacher)), axis=(-2, -1)).astype(dtype)


def similarity_loss(student_features: Array, teacher_features: Array, *, where: Any = None) -> jax.Array:
    r"""How far the student is from finding the same examples of a batch alike as the teacher does.

    .. math::
        \ell_i = \frac{1}{B} \sum_j \Big( \frac{G(s)_{ij}}{\|G(s)_i\|_2} - \frac{G(t)_{ij}}{\|G(t)_i\|_2} \Big)^2,
        \qquad G(x)_{ij} = \langle x_i, x_j \rangle

    The mean over the batch is the published loss. It compares examples with each other and no features, so the two may
    have different shapes but for the batch, and their scales do not matter. An example whose features are zero is like
    no other, and its row has no gradient. Features of less than 32 bits are promoted to float32 inside; the result has
    the dtype of the features. Gradients flow into both arguments.

    In a `jax.jit` over a mesh the batch is the global one; in `jax.shard_map` and `jax.pmap` it is that of a device.

    Args:
        student_features: of shape `[batch, ...]`.
        teacher_features: the teacher's features of the same examples, of shape `[batch, ...]`.
        where: which examples to include, bools of shape `[batch]`. Those that are left out, such as the padding of the
            last batch, have loss 0 and no influence on value or gradient, NaNs included. Average with
            `jnp.mean(loss, where=where)`.

    Returns:
        The loss of each example, of shape `[batch]`.

    Raises:
        ValueError: if the numbers of examples differ, or `where` is not of bools or does not fit them.
        TypeError: if the features are not arrays of real floating point numbers.

    Example:
        The teacher finds the first two examples alike, the student no two:

        >>> import jax.numpy as jnp, dot_optax
        >>> student = jnp.eye(3)
        >>> teacher = jnp.array([[5.0, 0.0], [5.0, 0.0], [0.0, 5.0]])
        >>> print(dot_optax.losses.similarity_loss(student, teacher).round(4))
        [0.1953 0.1953 0.    ]

    References:
        Tung & Mori, `Similarity-Preserving Knowledge Distillation <https://arxiv.org/abs/1907.09682>`_, 2019.
    """
    student, teacher, dtype = _widened(student_features, teacher_features, slice(1))
    where = jnp.broadcast_to(True if where is None else where, student.shape[:1])

    def similarities(features: jax.Array) -> jax.Array:
        rows = _unit(jnp.where(where[:, None], features.reshape(len(features), -1), 0.0), None)
        return _unit(jnp.matmul(rows, rows.T, precision="highest"), -1)

    squares = jnp.square(similarities(student) - similarities(teacher))
    return (jnp.sum(squares, -1, where=where[None]) / jnp.maximum(jnp.sum(where, None, squares.dtype), 1)).astype(dtype)


class CRDState(NamedTuple):
    r"""What `crd_loss` remembers of the student, in the first entry of both arrays, and of the teacher, in the second.

    Attributes:
        memory: an embedding of each example, of shape `[2, num_examples, dim]`.
        log_z: :math:`\log Z` of the other side's scores against this memory, of shape `[2]`; minus infinity before the
            first batch, which sets it.
    """

    memory: jax.Array
    log_z: jax.Array


def crd_init(key: jax.Array, num_examples: int, dim: int) -> CRDState:
    r"""The memory of `crd_loss` before the first batch: uniform in :math:`\pm \sqrt{3 / dim}`, rows of norm about 1.

    Args:
        key: a key of `jax.random`.
        num_examples: the number of examples in the training set.
        dim: the width of the embeddings (128 in the paper).

    Returns:
        A `CRDState` in float32. It takes `8 * num_examples * dim` bytes: keep it on the device and donate it.

    Example:
        >>> import jax, dot_optax
        >>> state = dot_optax.losses.crd_init(jax.random.key(0), num_examples=1000, dim=128)
        >>> print(state.memory.shape, state.log_z)
        (2, 1000, 128) [-inf -inf]

    References:
        Tian et al., `Contrastive Representation Distillation <https://arxiv.org/abs/1910.10699>`_, 2020.
    """
    memory = (3 / dim) ** 0.5 * jax.random.uniform(key, (2, num_examples, dim), jnp.float32, -1.0, 1.0)
    return CRDState(memory, jnp.full(2, -jnp.inf, jnp.float32))


def crd_negatives(key: jax.Array, labels: Array, all_labels: Array, k: int) -> jax.Array:
    """Draws k examples of other classes for each example of a batch, every one with the same probability.

    Without replacement, as published; with replacement where fewer than k examples are of other classes. The draw
    sorts a random number of 32 bits for each pair of an example of the batch and one of the training set. Call it inside
    the training step, so that it runs on the device.

    Args:
        key: a key of `jax.random`, another one in each step.
        labels: the classes of the batch, of shape `[batch]`.
        all_labels: those of the training set, of shape `[num_examples]`, in the order of the indices of `crd_loss`.
        k: how many (16384 in the paper, of the 50,000 examples of CIFAR-100).

    Returns:
        Indices of shape `[batch, k]`. Where there is no other class, they are `num_examples`, which is out of range: the
        loss is then NaN.

    Raises:
        TypeError: by JAX, if the labels are not arrays with one axis.

    Example:
        >>> import jax, jax.numpy as jnp, dot_optax
        >>> all_labels = jnp.array([0, 0, 1, 1, 2, 2])
        >>> negatives = dot_optax.losses.crd_negatives(jax.random.key(0), all_labels[:2], all_labels, k=4)
        >>> print(jnp.sort(negatives))
        [[2 3 4 5]
         [2 3 4 5]]

    References:
        Tian et al., `Contrastive Representation Distillation <https://arxiv.org/abs/1910.10699>`_, 2020.
    """
    labels, all_labels = jnp.asarray(labels), jnp.asarray(all_labels)

    def draw(key: jax.Array, label: jax.Array) -> jax.Array:
        other, (order_key, slot_key) = all_labels != label, jax.random.split(key)
        # The examples of other classes in random order, then those of the same class, whose number is the largest. (Not
        # by jax.lax.top_k, which takes as long, and which a mesh does not compute for each part of the batch by itself.)
        numbers = ~jnp.where(other, jnp.maximum(jax.random.bits(order_key, other.shape), 1), 0)
        order, count = jnp.argsort(numbers)[:k], jnp.sum(other)
        slots = jnp.where(count < k, jax.random.randint(slot_key, (k,), 0, count), jnp.arange(k))
        return jnp.where(count > 0, order[slots], len(other))

    return jax.vmap(draw)(jax.random.split(key, len(labels)), labels)


def crd_loss(
    student_embeddings: Array, teacher_embeddings: Array, indices: jax.Array, negatives: jax.Array, state: CRDState, *,
    temperature: Array = 0.07, momentum: Array = 0.5
) -> tuple[jax.Array, CRDState]:  # fmt: skip
    r"""Contrastive representation distillation: tell the teacher's embedding of an example from those of k others.

    With embeddings :math:`s, t` of an example, made unit vectors here, the memory :math:`w_0` of the other side for this
    example and :math:`w_1, \ldots, w_k` for the negatives, the student's half of the loss is (the teacher's likewise)

    .. math::
        -\log D_0 - \sum_{j=1}^k \log(1 - D_j), \qquad
        D_j = \frac{x_j}{x_j + k / n} = \sigma(\log x_j - \log \tfrac{k}{n}), \qquad
        x_j = \frac{e^{\langle s, w_j \rangle / T}}{Z}

    where :math:`n` is the number of examples, and :math:`Z = n \cdot \mathrm{mean}(e^{\langle s, w_j \rangle / T})`
    over the first batch, fixed from then on. After the loss, the rows of the batch move:
    :math:`w \leftarrow m w + (1 - m) s`, made unit vectors again. No gradient flows into memory and normalisers.

    The published code adds 1e-7 to the denominators, which adds up to 1e-7 n to either half (0.005 on CIFAR-100). Here
    logarithms of sigmoids are taken, which need no such number. Embeddings of less than 32 bits are promoted to float32 inside; the
    loss has the dtype of the embeddings and the state keeps its own.

    Both embeddings are projections to the same width. The parameters of both projections, also of the teacher's, are
    trained, and only this loss reaches them. Published weights are 1 for the cross-entropy and 0.8 for the mean of this loss.

    Args:
        student_embeddings: of shape `[batch, dim]`.
        teacher_embeddings: of the same shape.
        indices: which examples of the training set these are, integers of shape `[batch]` without repetition.
        negatives: from `crd_negatives`, of shape `[batch, k]`.
        state: from `crd_init` or the last call.
        temperature: :math:`T > 0`.
        momentum: how much of the memory stays, :math:`0 \le m < 1`.

    Returns:
        The loss of each example, of shape `[batch]`, and the new state. With `value_and_grads` the state is auxiliary
        data. In a `jax.jit` over a mesh, the batch may be sharded and the state replicated; in `jax.shard_map` and
        `jax.pmap` each device would have a memory of its own. An index out of range makes the loss NaN. A batch with
        embeddings that are not finite leaves the state as it is.

    Raises:
        ValueError: if the shapes do not fit each other, or a Python number is outside its range.
        TypeError: if the embeddings are not arrays of real floating point numbers.

    Example:
        DOT + CRD: the task alone reaches the head, CRD alone both projectors, and both reach the body, which alone gets
        two momenta.

        >>> import jax, jax.numpy as jnp, optax, dot_optax
        >>> from dot_optax import losses
        >>> keys = jax.random.split(jax.random.key(0), 4)
        >>> x, labels = jax.random.normal(keys[0], (32, 4)), jnp.arange(32) % 4
        >>> teacher_features = jnp.tanh(x @ jax.random.normal(keys[1], (4, 8)))
        >>> shapes = {'body': (4, 6), 'head': (6, 4), 'student_projector': (6, 5), 'teacher_projector': (8, 5)}
        >>> params = optax.tree.random_like(keys[2], {name: jnp.zeros(shape) for name, shape in shapes.items()})
        >>> memory = losses.crd_init(keys[3], num_examples=32, dim=5)
        >>> def loss_fn(params, memory, key, indices):
        ...     features = jnp.tanh(x[indices] @ params['body'])
        ...     logits, y = features @ params['head'], labels[indices]
        ...     task = optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        ...     student = features @ params['student_projector']
        ...     teacher = teacher_features[indices] @ params['teacher_projector']
        ...     negatives = losses.crd_negatives(key, y, labels, k=16)
        ...     crd, memory = losses.crd_loss(student, teacher, indices, negatives, memory)
        ...     return dot_optax.PerLoss(task=task, kd=0.8 * crd.mean()), memory
        >>> reached = dot_optax.reached(loss_fn, params, memory, keys[0], jnp.arange(8), has_aux=True)
        >>> optimizer = dot_optax.dot(0.05, reached=reached)
        >>> @jax.jit
        ... def step(params, opt_state, memory, key, indices):
        ...     (values, memory), grads = dot_optax.value_and_grads(loss_fn, has_aux=True)(params, memory, key, indices)
        ...     updates, opt_state = optimizer.update(grads, opt_state, params)
        ...     return optax.apply_updates(params, updates), opt_state, memory, values
        >>> opt_state, history = optimizer.init(params), []
        >>> for i, key in enumerate(jax.random.split(keys[0], 40)):
        ...     indices = (8 * i + jnp.arange(8)) % 32
        ...     params, opt_state, memory, values = step(params, opt_state, memory, key, indices)
        ...     history.append(values.kd)
        >>> print(bool(history[-1] < history[0]))
        True

    References:
        Tian et al., `Contrastive Representation Distillation <https://arxiv.org/abs/1910.10699>`_, 2020.
    """
    student, teacher, dtype = _widened(student_embeddings, teacher_embeddings, slice(None))
    n, k = state.memory.shape[1], negatives.shape[-1]
    found = student.shape, indices.shape, negatives.shape, state.memory.shape
    if (*indices.shape, state.memory.shape[2]) != student.shape or negatives.shape[:-1] != indices.shape or k < 1:
        raise ValueError(f"embeddings [b, dim], indices [b], negatives [b, k], memory [2, n, dim] do not fit: {found}")
    _check_temperature(temperature)
    _check_scalar("momentum", momentum, 0.0, 1.0)
    embeddings = _unit(jnp.stack([student, teacher]), -1)
    indices, negatives = (jnp.where(i < 0, n, i) for i in (indices, negatives))  # JAX would count those from the end
    memory, log_z = (leaf.astype(embeddings.dtype) for leaf in jax.lax.stop_gradient(state))
    # All scores of one side against the other's memory, of which each example picks its own: n columns take less memory
    # and time than k + 1 rows of the memory for each example, 64 * 16385 * 128 numbers on CIFAR-100.
    scores = jnp.einsum("sbd,snd->sbn", embeddings[::-1], memory, precision="highest") / temperature
    scores = jnp.take_along_axis(scores, jnp.concatenate([indices[:, None], negatives], axis=1)[None], axis=2)
    first = jax.lax.stop_gradient(jax.nn.logsumexp(scores, axis=(1, 2))) + jnp.log(n / scores[0].size)
    log_z = jnp.where(log_z == -jnp.inf, first, log_z)
    logits = scores - log_z[:, None, None] - jnp.log(k / n)
    loss = jax.nn.softplus(-logits[:, :, 0]) + jnp.sum(jax.nn.softplus(logits[:, :, 1:]), axis=2)
    rows = momentum * memory[:, indices] + (1 - momentum) * jax.lax.stop_gradient(embeddings)
    moved = CRDState(memory.at[:, indices].set(_unit(rows, -1)), log_z)
    # One number that is not finite would stay in the memory, and reach the gradients of all batches to come.
    finite = jnp.isfinite(rows).all() & jnp.isfinite(log_z).all()
    state = jax.tree.map(lambda new, old: jnp.where(finite, new.astype(old.dtype), old), moved, state)
    return jnp.sum(loss, axis=0).astype(dtype), state


def _widened(student: Any, teacher: Any, alike: slice) -> tuple[jax.Array, jax.Array, Any]:
    """Both in 32 bits or more, and the dtype of the result. The axes `alike` must have the same sizes."""
    student, teacher = jnp.asarray(student), jnp.asarray(teacher)
    if not _kind(student) is _kind(teacher) is jnp.floating:
        raise TypeError(f"features must be real floating point, got {_describe(student)} and {_describe(teacher)}")
    if student.shape[alike] != teacher.shape[alike]:
        found = f"student of shape {student.shape}, teacher of shape {teacher.shape}"
        raise ValueError(f"features do not fit: {found}; project the student's features first, or resize them")
    dtype, wide = _dtypes(student, teacher)
    return student.astype(wide), teacher.astype(wide), dtype
