"""Gradients of several losses below their exact cost: each is taken only now and then, and is right on average.

    sampled_losses       a loss at every k-th step, its gradient times k; the teacher only where a loss that is due needs it
    sampled_difference   the sum of the gradients at every step, what tells them apart at every k-th
    sampled_examples     a loss at every step, on every k-th row of the batch

All are `value_and_grads` with the number of the step in front, and no optimizer needs to know of them.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dot_optax._checks import _describe, _listed
from dot_optax._containers import LossNames, PerLoss, _entries_by_key
from dot_optax._gradients import Argnums, LossFn, _differentiated, _forward, _output, _split_losses
from dot_optax._reach import _reads

Periods = Mapping[Any, int] | tuple[int, ...]
Offsets = Mapping[Any, int] | None

_LONGEST = 2**16  # steps until all periods start together again


class Sampled:
    """What the functions of this module return: call it as `value_and_grads(loss_fn)`, with the step in front."""

    # It knows whose turn it is at each step: `_periods` of everything that is not due at every step, by name, and `_kinds`,
    # the different sets of names that are due together. Its `_form` is the name of the function that returned it.
    # Its `_call` takes the step within the turn of all periods, and the arguments of `loss_fn`.

    def __init__(self, call: Any, form: str, loss_fn: LossFn, argnums: Any, has_aux: bool, periods: Any, offsets: Any):
        functools.update_wrapper(self, loss_fn, updated=())
        vars(self).pop("__wrapped__")  # by which `jax.jit` would number the arguments: those of `loss_fn` have no step
        self._call: Callable[..., Any] = functools.partial(call, self)
        self._form, self._loss_fn, self._argnums, self._has_aux = form, loss_fn, argnums, has_aux
        given = _periods_by_name(form, periods)
        self._given, self._in_order = list(given), isinstance(periods, tuple)
        self._periods = {name: int(period) for name, period in given.items() if period > 1}
        due_at = {name: i % period for i, (name, period) in enumerate(self._periods.items())}
        if not isinstance(offsets or {}, Mapping):
            raise TypeError(f"{form}: offsets must be a mapping, such as {{'kd': 1}}; got {_describe(offsets)}")
        for name, offset in (offsets or {}).items():
            if name not in given:
                raise ValueError(f"{form}: offsets has {name!r}, but periods has {_listed(given)}")
            if not isinstance(offset, (int, np.integer)) or not 0 <= offset < given[name]:
                wanted = "a whole number below the period of this loss"
                raise ValueError(f"{form}: offsets[{name!r}] must be {wanted}; got {_describe(offset)}")
            due_at[name] = int(offset)
        self._length = math.lcm(*self._periods.values())
        if self._length > _LONGEST:
            found = f"{form}: the periods {list(self._periods.values())} start together only every {self._length} steps"
            remedy = "give smaller ones, or periods with a smaller common multiple"
            raise ValueError(f"{found}: the most is {_LONGEST}; {remedy}")
        at = [tuple(n for n, k in self._periods.items() if t % k == due_at[n]) for t in range(self._length)]
        self._kinds = list(dict.fromkeys(at))
        self._kind_at = [self._kinds.index(names) for names in at]

    def __call__(self, step: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Returns `(values, grads)`, or `((values, aux), grads)`, of the step with this number, or of a random one.

        Args:
            step: a whole number, counted from 0 and possibly traced; or a key of `jax.random`, for a step at random. Under
                `shard_map` or `pmap` it must be the same on all devices. A Python number leaves no branches in the program.
            *args: the arguments of `loss_fn`.
            **kwargs: likewise.
        """
        return self._call(self._position(step), *args, **kwargs)

    def __repr__(self) -> str:
        return f"<{self._form} of {getattr(self._loss_fn, '__name__', self._loss_fn)}, periods {self._periods}>"

    def kind(self, step: int) -> int:
        """The first step at which the same is computed as at `step`: a static argument for those who compile kinds apart.

        Of `sampled_examples` every step of a turn is a kind of its own, since each takes other rows.
        """
        position = self._position(step)
        if not isinstance(position, int):
            found = "the step must be an int, and was an array or a key; give int(step)"
            raise TypeError(f"{self._form}: kind(step) is for a loop in Python: {found}")
        return position if self._form == "sampled_examples" else self._kind_at.index(self._kind_at[position])

    def due(self, step: Any) -> dict[Any, Any]:
        """Whether a loss is computed at this step, by name, for the losses that are not computed at every step."""
        kind = _at(self._kind_at, self._position(step))
        skipped = self._periods if self._form == "sampled_losses" else ()
        return {name: _at([name in names for names in self._kinds], kind) for name in skipped}

    def _position(self, step: Any) -> Any:
        """The step within the turn, for a step's number or a key."""
        dtype, shape = getattr(step, "dtype", np.dtype(object)), getattr(step, "shape", ())
        if jnp.issubdtype(dtype, jax.dtypes.prng_key) or (dtype == jnp.uint32 and shape == (2,)):
            return jax.random.randint(step, (), 0, self._length)
        if isinstance(step, (int, np.integer)) and not isinstance(step, bool):
            return int(step) % self._length
        if shape or not jnp.issubdtype(dtype, jnp.integer):
            what = f"{self._form}: the step, which comes before the arguments of loss_fn,"
            raise TypeError(f"{what} must be a whole number or a key of jax.random; got {_describe(step)}")
        return step % self._length

    def _match(self, args: Any, kwargs: Any) -> tuple[dict[Any, Any], dict[Any, int]]:
        """By the name in `periods`: the key of the loss that it stands for; and by this key the period of every loss."""
        _differentiated(self._argnums, args, self._form)
        losses = jax.eval_shape(lambda: _split_losses(self._loss_fn(*args, **kwargs), self._has_aux, self._form)[0])
        known = list(_entries_by_key(losses)[0])
        if self._in_order and len(self._given) != len(known):
            raise ValueError(f"{self._form}: periods has {len(self._given)} entries, but there are {len(known)} losses")
        keys = dict(enumerate(known)) if self._in_order else {}
        keys |= dict(zip(PerLoss._fields, known, strict=True)) if known == [0, 1] else {}
        keys |= dict(zip(known, known, strict=True))
        for name in self._given:
            if name not in keys:
                raise ValueError(f"{self._form}: periods has {name!r}, but the losses are {_listed(known)}")
        return keys, dict.fromkeys(known, 1) | {keys[name]: period for name, period in self._periods.items()}

    def _switch(self, position: Any, branch: Callable[[Sequence[Any]], Any]) -> Any:
        """Runs the branch of what is due; a step that is known in Python leaves no others in the program."""
        kind = _at(self._kind_at, position)
        if isinstance(kind, int):
            return branch(self._kinds[kind])
        return jax.lax.switch(kind, [functools.partial(branch, due) for due in self._kinds])


def _periods_by_name(form: str, periods: Any) -> Mapping[Any, Any]:
    given = periods if isinstance(periods, Mapping) else _entries_by_key(periods)[0]
    if not given:
        raise TypeError(f"{form}: periods must be a mapping, such as {{'kd': 4}}, or a tuple; got {_describe(periods)}")
    for name, period in given.items():
        what = name if name == "period" else f"periods[{name!r}]"
        if not isinstance(period, (int, np.integer)) or isinstance(period, bool) or period < 1:
            raise TypeError(f"{form}: {what} must be a whole number of steps, 1 or more; got {_describe(period)}")
    return given


def _at(table: Sequence[Any], index: Any) -> Any:
    """An entry of a table; the index may be traced."""
    return table[index] if isinstance(index, int) else jnp.array(table)[index]


def sampled_losses(
    loss_fn: LossFn, periods: Periods, *, offsets: Offsets = None, argnums: Argnums = 0, has_aux: bool = False
) -> Sampled:
    r"""`value_and_grads` that takes each loss only at every k-th step, with k times its gradient; zeros elsewhere.

    .. math::
        \hat g_i^{(t)} = \begin{cases} k_i \, \nabla_\theta \, \ell_i & t \bmod k_i = o_i \\ 0 & \text{else} \end{cases}

    Over a turn of all periods the mean of :math:`\hat g_i` is the gradient. At a step where a loss is not due neither its
    gradient is computed nor what only it needs, such as the teacher's forward pass inside `loss_fn`: the program branches
    (`jax.lax.switch`). With F and T the forward passes of student and teacher, exact DOT costs T + 5F, plain
    distillation T + 3F, `{'kd': k}` 3F + (T + 2F)/k, and the two losses in turn, `{'task': 2, 'kd': 2}`, 3F + T/2.

    The price is noise, and a bound on the learning rate. Try `{'task': 2, 'kd': 2}` first, at half the learning rate: at
    equal FLOPs it was never significantly worse than exact gradients in `benchmarks/sampled_gradients.py`; k = 4 often was.

    - **Stability.** A loss alone, of curvature :math:`\lambda`, with a momentum :math:`\beta`, is stable for
      :math:`\eta \lambda k \frac{1 - \beta^k}{1 - \beta} < 2 (1 + \beta^k)`: for k well below 1/(1-β) a learning rate
      k² times smaller than without sampling.
    - **The first step** takes every loss of a period above 1 whose offset is 0, so that its momentum starts with k
      gradients at once. On the digits it made no difference; a warm-up of the learning rate or a later offset avoids it.
    - **The last steps.** What a momentum holds is spent over later steps, at their learning rate, as without sampling:
      a drop in the middle of a period needs no care.
    - **Logs.** The value of a loss that was not computed is NaN: take means with `jnp.nanmean`.
    - **Auxiliary data** are computed at every step. With the teacher's logits among them the teacher runs at every step,
      and nothing is saved.
    - **Clipping** sees k gradients at once. It clips them sooner, and then the mean is no longer right.
    - **Adam's** second moment sees them too: its steps become smaller. `sampled_difference` leaves the sum as it is.
    - **MultiSteps.** Count calls of this function, not of the optimizer.
    - **vmap** over the step computes all branches, and saves nothing.
    - **`jax_debug_nans`** stops at the NaN of a loss that is not due.

    Args:
        loss_fn: as for `value_and_grads`. The teacher's forward pass belongs inside it.
        periods: k of each loss: a mapping, where a loss that is left out has 1, or a tuple in order.
        offsets: at which of the k steps a loss is due, by name. Default: 0, 1, 2, ... in the order of `periods` (modulo k),
            for those losses that have a period above 1; so two losses of period 2 alternate. Give losses that share a
            teacher the same offset, and it runs for all of them at once.
        argnums: as for `value_and_grads`.
        has_aux: as for `value_and_grads`. The auxiliary data, which must be arrays, come from the one forward pass of each
            step, so the statistics of BatchNorm move once a step.

    Returns:
        A function like that of `value_and_grads`, with the number of the step, or a key, before the other arguments. The
        value of a loss that was not computed is NaN: `jnp.nanmean` over the steps is the mean of those that were. The
        number is all that it remembers: restore the step, and the phase is right. With a key, one of the steps of a turn
        is drawn: the same expectation, and losses that never meet still never meet.

        `.kind(step)` is the first step at which the same losses are computed. `.due(step)` says of each loss with a period
        above 1 whether it is computed.

    Raises:
        TypeError: if a period is not a whole number above 0; when called, as `value_and_grads`, or if the step is neither a
            whole number nor a key.
        ValueError: if an offset is not below its period, or the periods meet only after more than 65,536 steps; when called,
            if a name is not that of a loss, or a tuple has more or fewer entries than there are losses.

    Example:
        The distillation loss at every second step, and what is computed at which:

        >>> import dot_optax
        >>> def loss_fn(params, x):
        ...     y = params['w'] * x
        ...     return dot_optax.PerLoss(task=(y - 1.0) ** 2, kd=(y - 2.0) ** 2)
        >>> sampled = dot_optax.sampled_losses(loss_fn, {'kd': 2})
        >>> for step in range(3):
        ...     values, grads = sampled(step, {'w': 3.0}, 1.0)
        ...     print(values.task, values.kd, grads.task['w'], grads.kd['w'])
        4.0 1.0 4.0 4.0
        4.0 nan 4.0 0.0
        4.0 1.0 4.0 4.0

        A loop in Python, with one program for each kind of step:

        >>> import jax
        >>> step_of_kind = jax.jit(sampled, static_argnums=0)
        >>> for step in range(6):
        ...     values, grads = step_of_kind(sampled.kind(step), {'w': 3.0}, 1.0)

    References:
        Ours for distillation. Bohn et al., `M-ConFIG <https://arxiv.org/abs/2408.11104>`_, 2025, take losses in turn, each
        with its own momentum.
    """

    def call(sampled: Sampled, position: Any, /, *args: Any, **kwargs: Any) -> Any:
        def branch(due: Sequence[Any]) -> Any:
            taken = {keys[name] for name in due} | {key for key, period in period_of.items() if period == 1}
            forward = _forward(loss_fn, argnums, has_aux, "sampled_losses", args, kwargs, taken)
            # The gradient of no loss is zeros.
            grads = {key: forward.gradient([key] if key in taken else [], k) for key, k in period_of.items()}
            return _output(forward, grads, has_aux)

        keys, period_of = sampled._match(args, kwargs)
        return sampled._switch(position, branch)

    return Sampled(call, "sampled_losses", loss_fn, argnums, has_aux, periods, offsets)


def sampled_difference(
    loss_fn: LossFn, period: int, *, reached: Any = None, argnums: Argnums = 0, has_aux: bool = False
) -> Sampled:
    r"""`value_and_grads` with the exact sum of the gradients at every step, and what tells them apart at every k-th.

    .. math::
        s = \sum_i \nabla_\theta \, \ell_i, \qquad
        \hat g_i^{(t)} = \frac{s}{N} +
        \begin{cases} k \, (\nabla_\theta \, \ell_i - \frac{s}{N}) & t \bmod k = 0 \\ 0 & \text{else} \end{cases}

    Only what tells the losses apart is noisy, and comes in bursts. It saves the least of the three forms: the teacher runs
    at every step. At every k-th step each loss has its backward pass, at the others the sum has one. With two losses it
    costs T + 3F + 2F/k where plain distillation costs T + 3F. The sum is exact, to rounding, so that what depends on the sum alone is as without sampling:
    Adam's second moment, plain distillation, a clipped sum. All losses are computed at every step. The first
    difference is that of step 0.

    Args:
        loss_fn: as for `value_and_grads`.
        period: k, one for all losses, without which the sum could not be exact.
        reached: which loss reaches which parameter, as for `dot`. There s/N is divided among the losses that reach a
            parameter, and a parameter that one loss alone reaches has its exact gradient at every step.
        argnums: as for `value_and_grads`.
        has_aux: as for `value_and_grads`.

    Returns:
        As `sampled_losses`; no value is NaN, and `.due` is empty.

    Raises:
        TypeError: as `sampled_losses`.
        ValueError: when called, if `reached` does not fit the losses or the parameters.

    Example:
        >>> import dot_optax
        >>> def loss_fn(params):
        ...     return dot_optax.PerLoss(task=1.0 * params['w'], kd=3.0 * params['w'])
        >>> sampled = dot_optax.sampled_difference(loss_fn, 4)
        >>> for step in range(2):
        ...     _, grads = sampled(step, {'w': 1.0})
        ...     print(grads.task['w'], grads.kd['w'])
        -2.0 6.0
        2.0 2.0

    References:
        Ours.
    """

    def spread(share: float, total: Any, own: Any = None) -> Any:
        # Zero times a gradient that overflowed would be NaN.
        mean = jnp.zeros_like(total) if share == 0 else total if share == 1 else share * total
        return mean if own is None or share in (0, 1) else mean + period * (own - mean)

    def call(sampled: Sampled, position: Any, /, *args: Any, **kwargs: Any) -> Any:
        def branch(due: Sequence[Any]) -> Any:
            forward = _forward(loss_fn, argnums, has_aux, "sampled_difference", args, kwargs)
            losses = forward.losses
            grads = {key: forward.gradient([key]) for key in losses} if due or period == 1 else {}
            if period > 1:
                total = jax.tree.map(lambda *g: sum(g), *grads.values()) if due else forward.gradient(losses)
                shares = _shares(forward.rebuild(losses), reached, total)
                own = {key: (grads[key],) if due else () for key in losses}
                grads = {key: jax.tree.map(spread, shares[key], total, *own[key]) for key in losses}
            return _output(forward, grads, has_aux)

        return sampled._switch(position, branch)

    return Sampled(call, "sampled_difference", loss_fn, argnums, has_aux, {"period": period}, None)


def sampled_examples(
    loss_fn: LossFn, periods: Periods, *, batch_argnums: Argnums, argnums: Argnums = 0, has_aux: bool = False
) -> Sampled:
    r"""`value_and_grads` that takes a loss at every step, but only on every k-th row of the batch.

    .. math::
        \hat g_i^{(t)} = \nabla_\theta \, \ell_i(x_{r}, x_{r + k}, x_{r + 2k}, \ldots), \qquad r = t \bmod k

    The k parts of a batch divide it, so for a loss that is the mean over the rows the mean over them is the exact
    gradient. There are no bursts, and so no bound that falls with k², and neither clipping nor Adam meets a gradient of
    another size. The noise alone still asks for a smaller learning rate: students of the digits fail at rates 2 to 3 times
    smaller for k = 4 (`benchmarks/sampling_noise.py`). It costs more: a loss of period k runs apart, on its rows, and has a
    student's forward pass of its own: 3F + (T + 3F)/k for `{'kd': k}`, where plain distillation costs T + 3F.

    BatchNorm normalizes each part by the part's own statistics; those that are kept come from the whole batch, or from
    the largest part where no loss has a period of 1. A mean over some rows only (`where=`, padding) is not exact on
    average unless each part has as many of them.

    Args:
        loss_fn: as for `value_and_grads`; its losses are means over the rows.
        periods: k of each loss, as for `sampled_losses`.
        batch_argnums: which arguments of `loss_fn` have the rows, all of them, counted from 0 and without the step: 1 for
            `loss_fn(params, batch)`, `(1, 2)` for `loss_fn(params, x, y)`. Give them by position. All their arrays are cut
            along the first axis. On a mesh, k must divide the rows of each device.
        argnums: as for `value_and_grads`.
        has_aux: as for `value_and_grads`.

    Returns:
        As `sampled_losses`; no value is NaN, each is that of the rows that were taken, and `.due` is empty. Each step of a
        turn is a `.kind` of its own, since it takes other rows; all cost the same, so a traced step serves better.

    Raises:
        TypeError: as `sampled_losses`.
        ValueError: as `sampled_losses`, and if k does not divide the number of rows.

    Example:
        >>> import dot_optax, jax.numpy as jnp
        >>> def loss_fn(params, x):
        ...     return dot_optax.PerLoss(task=jnp.mean(params['w'] * x), kd=jnp.mean(params['w'] * x))
        >>> sampled = dot_optax.sampled_examples(loss_fn, {'kd': 2}, batch_argnums=1)
        >>> for step in range(2):
        ...     _, grads = sampled(step, {'w': 1.0}, jnp.array([1.0, 2.0, 3.0, 4.0]))
        ...     print(grads.task['w'], grads.kd['w'])
        2.5 2.0
        2.5 3.0

    References:
        Ours.
    """
    indices = [batch_argnums] if isinstance(batch_argnums, int) else list(batch_argnums)

    def cut(args: Sequence[Any], part: Callable[[Any, str], Any]) -> list[Any]:
        def cut_argument(index: int) -> Any:
            name = f"argument {index}"
            return jax.tree.map_with_path(lambda path, x: part(x, name + jax.tree_util.keystr(path)), args[index])

        try:
            cut_indices = [range(len(args))[index] for index in indices]
        except IndexError:
            counts = "counts the arguments of loss_fn from 0, without the step and those by keyword, and there are"
            raise TypeError(f"sampled_examples: batch_argnums={batch_argnums!r} {counts} {len(args)}") from None
        both = set(cut_indices).intersection(_differentiated(argnums, args, "sampled_examples"))
        if both:
            found = f"argument {min(both)} is in batch_argnums and is differentiated"
            raise TypeError(f"sampled_examples: {found}: give one of both")
        return [cut_argument(i) if i in cut_indices else arg for i, arg in enumerate(args)]

    return _sampled_examples(loss_fn, periods, cut, argnums, has_aux)


def _sampled_examples(loss_fn: LossFn, periods: Any, cut: Callable[..., Any], argnums: Any, has_aux: bool) -> Sampled:
    """`sampled_examples`, where `cut(args, part)` applies `part(array, name)` to the arrays that have the rows."""

    def call(sampled: Sampled, position: Any, /, *args: Any, **kwargs: Any) -> Any:
        _, period_of = sampled._match(args, kwargs)
        passes = {}
        for period in sorted(set(period_of.values()), reverse=True):  # the whole batch last: its `aux` is kept
            wanted = [key for key in period_of if period_of[key] == period]
            rows = args if period == 1 else cut(args, functools.partial(_part, period, position % period))
            passes[period] = _forward(loss_fn, argnums, has_aux, "sampled_examples", rows, kwargs, wanted)
        losses = {key: passes[period].losses[key] for key, period in period_of.items()}
        grads = {key: passes[period].gradient([key]) for key, period in period_of.items()}
        return _output(passes[min(passes)]._replace(losses=losses), grads, has_aux)

    return Sampled(call, "sampled_examples", loss_fn, argnums, has_aux, periods, None)


def _part(period: int, phase: Any, x: Any, name: str) -> jax.Array:
    """Every k-th row of an array."""
    x = jnp.asarray(x)
    if not x.ndim or x.shape[0] % period:
        wanted = f"a first axis of rows that the period {period} divides"
        raise ValueError(f"sampled_examples: {name} must have {wanted}; got {_describe(x)}")
    rows = x.reshape(x.shape[0] // period, period, *x.shape[1:])
    return jax.lax.dynamic_index_in_dim(rows, phase, axis=1, keepdims=False)


def _shares(losses: Any, reached: Any, params: Any) -> dict[Any, Any]:
    """Of each loss, by key: the part of the summed gradient that it gets, a tree with a number for each parameter."""
    keys, names = list(_entries_by_key(losses)[0]), LossNames.of(losses, "losses")
    reads = _reads(names, reached, params)
    parts = [[leaf[i] / max(1, sum(leaf)) for leaf in reads] for i in range(len(keys))]
    return dict(zip(keys, map(jax.tree.structure(params).unflatten, parts), strict=True))
