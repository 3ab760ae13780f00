"""The training methods that the example compares; each is one Optax transformation over per-loss gradients.

Here are the methods, and what makes them known and checks them; what they are made of is in optimizers.py.

Every method is fed the gradients of the *unweighted* losses of its objective (objectives.py), mostly
`PerLoss(task, kd)`, and begins by weighting them: weighting a gradient is weighting its loss. So one train step serves
all methods, and the losses that it reports mean the same in all of them. `register` adds a method of your own.
"""

import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

import dot_optax
from dot_optax import weightings
from dot_optax.diagnostics import effective_learning_rate
from examples.distill import objectives, optimizers, registry
from examples.distill.objectives import Objective
from examples.distill.optimizers import Recipe as Recipe
from examples.distill.optimizers import betas as betas
from examples.distill.optimizers import learning_rate_schedule as learning_rate_schedule
from examples.distill.optimizers import weight_losses as weight_losses
from examples.distill.optimizers import why_not_longer as why_not_longer
from examples.trainer.diagnostics import Diagnostics
from examples.trainer.errors import UserError, one_line
from examples.trainer.sampling import EXACT, Sampling

# Okabe and Ito's colors, which the color-blind can tell apart; without the yellow, which is faint on white.
_COLORS = ("#7f7f7f", "#0072b2", "#009e73", "#d55e00", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


class Style(NamedTuple):
    """How table and picture show a method."""

    label: str
    color: str


class Traits(NamedTuple):
    """What the trainer must know of a method besides its optimizer."""

    objective: str  # what it trains on, a name in `objectives.OBJECTIVES`
    linear: bool  # whether the updates are linear in the gradients
    compares: bool  # whether it compares the gradients of a step with one another
    weighted: bool  # whether it begins with the weights of its objective
    momenta: Callable[[Recipe], Any] | None  # the momentum of each loss, in the objective's container, for diagnostics


Make = Callable[[Recipe], optax.GradientTransformation]

METHODS: dict[str, Make] = {}
STYLES: dict[str, Style] = {}
TRAITS: dict[str, Traits] = {}


def register(
    name: str,
    *,
    label: str | None = None,
    color: str | None = None,
    objective: str = "kd",
    linear: bool = False,
    compares: bool = False,
    weighted: bool = True,
    momenta: Callable[[Recipe], Any] | None = None,
) -> Callable[[Make], Make]:
    """Makes a function known as the method `name`, which `--config.method=name` then trains.

    The function is given a `Recipe` and returns an Optax transformation from `PerLoss(task, kd)`, the gradients of the
    two unweighted losses, to one tree of updates. The first line of its docstring is shown by `--help`:

        @methods.register("dot_clipped", label="DOT, clipped")
        def dot_clipped(recipe: methods.Recipe) -> optax.GradientTransformation:
            '''DOT with both gradients clipped to a norm of 1 together.'''
            return optax.chain(
                methods.weight_losses(recipe.weights),
                dot_optax.joint(optax.clip_by_global_norm(1.0)),
                dot_optax.dot(recipe.learning_rate, *methods.betas(recipe.config)),
            )

    Args:
        name: letters, digits and underscores; the student is kept in `WORKDIR/name`.
        label: what table and picture call it; default: the name.
        color: of its lines, as Matplotlib names colors; default: of eight that the color-blind can tell apart, the one
            that the fewest methods have. Line styles and marks are given out in each picture, see `report.look`.
        objective: what it trains on, a name in `objectives.OBJECTIVES`; its gradients come in the objective's container.
        linear: whether the updates are linear in the gradients, as those of momenta are and those of Adam or clipping
            are not. Only then does `--config.parallel=shard_map`, which averages updates, compute the same.
        compares: whether it compares the gradients of a step with one another, as `dot_optax.aggregate` does. Then each
            step must have all of them, which most forms of `--config.sampling` spare.
        weighted: whether it begins with the weights of its objective, for the shares that `--config.diagnostics` logs.
        momenta: from the recipe to the momentum of each loss, numbers or schedules in the objective's container, for the
            effective learning rates that `--config.diagnostics` logs; without it, there are none in the log.

    Raises:
        UserError: if the name, the label, the color or the objective cannot be used, or if there is a method of this
            name. The same lines may run again.
    """
    registry.claim("method", name, METHODS)
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,63}", name) or name == "teacher":
        raise UserError(
            f"bad name {name!r} of a method: give at most 64 letters, digits and underscores, a letter first, and not"
            " 'teacher'"
        )
    label = name if label is None else label
    if not label.isprintable() or not label.strip():
        raise UserError(f"bad label {label!r} of method {name!r}: give a line of text")
    if color is not None:
        from matplotlib.colors import is_color_like  # Takes long to import, and few need it.

        if not is_color_like(color):
            raise UserError(f"bad color {color!r} of method {name!r}: give one of Matplotlib's, such as '#cc79a7'")
    if objective not in objectives.OBJECTIVES:
        raise UserError(
            f"bad objective {objective!r} of method {name!r}: give one of {', '.join(objectives.OBJECTIVES)}"
        )
    color = _free_color(name) if color is None else color

    def add(make: Make) -> Make:
        METHODS[name], STYLES[name] = make, Style(label, color)
        TRAITS[name] = Traits(objective, linear, compares, weighted, momenta)
        return make

    return add


def _free_color(name: str) -> str:
    """The first of the colors that the fewest other methods have."""
    taken = [style.color for other, style in STYLES.items() if other != name]
    return min(_COLORS, key=taken.count)


@register("ce", label="CE", linear=True, momenta=optimizers.one_momentum)
def ce(recipe: Recipe) -> optax.GradientTransformation:
    """Cross-entropy alone, with weight 1. The teacher is trained like this."""
    only_task = dot_optax.per_loss(optax.identity(), optax.set_to_zero())
    return optax.chain(only_task, dot_optax.sum_losses(), *optimizers.optimize_the_sum(recipe))


@register("kd", label="KD", linear=True, momenta=optimizers.one_momentum)
def kd(recipe: Recipe) -> optax.GradientTransformation:
    """Plain knowledge distillation: SGD with momentum, AdamW or Muon on the weighted sum."""
    return optax.chain(weight_losses(recipe.weights), dot_optax.sum_losses(), *optimizers.optimize_the_sum(recipe))


@register("kd_gain_matched", label="KD, gain-matched", linear=True, momenta=optimizers.scheduled_betas)
def kd_gain_matched(recipe: Recipe) -> optax.GradientTransformation:
    """Plain knowledge distillation with DOT's gains, but not its two momenta: it tells the two apart.

    Under steady gradients its updates become those of `dot`, with SGD and with AdamW. While `delta` warms up, the gains
    are those that the momenta of each step would have in the long run; DOT's own follow them some 1 / (1 - beta) steps
    later.
    """
    config, momenta = recipe.config, optimizers.scheduled_betas(recipe)
    mask, gains = optimizers.decay_mask(recipe), optimizers.relative_gains(momenta)
    if config.name == "adamw":
        matched = optax.chain(
            optimizers.scale_by_gain_matched_adam(gains, config.momentum, config.b2, config.eps),
            optax.add_decayed_weights(config.weight_decay, mask),
            optax.scale_by_learning_rate(recipe.learning_rate),
        )
    elif config.name == "muon":  # which looks at directions alone: of the gains their ratio is left
        amplified = dot_optax.per_loss(*map(optax.scale_by_schedule, gains))
        matched = optax.chain(amplified, dot_optax.sum_losses(), optimizers.muon(recipe, config.momentum))
    elif config.delta_warmup_epochs:
        matched = optax.chain(
            dot_optax.per_loss(optax.add_decayed_weights(config.weight_decay, mask), optax.identity()),
            dot_optax.per_loss(*map(optax.scale_by_schedule, gains)),
            dot_optax.sum_losses(),
            optax.sgd(recipe.learning_rate, momentum=config.momentum),
        )
    else:
        matched = dot_optax.gain_matched_sgd(
            recipe.learning_rate, *momenta, weight_decay=config.weight_decay, mask=mask
        )
    return optax.chain(weight_losses(recipe.weights), matched)


@register("dot", label="DOT", linear=True, momenta=optimizers.scheduled_betas)
def dot(recipe: Recipe) -> optax.GradientTransformation:
    """The Distillation-Oriented Trainer: a momentum for each of the two weighted losses."""
    config, momenta = recipe.config, optimizers.scheduled_betas(recipe)
    options = {"weight_decay": config.weight_decay, "mask": optimizers.decay_mask(recipe), "reached": recipe.reached}
    if config.name == "adamw":
        optimizer = dot_optax.dot_adamw(recipe.learning_rate, *momenta, config.b2, config.eps, **options)
    elif config.name == "muon":
        momenta_first = dot_optax.scale_by_dot(*momenta, reached=recipe.reached)
        optimizer = optax.chain(momenta_first, optimizers.muon(recipe, momentum=0.0))
    else:
        optimizer = dot_optax.dot(recipe.learning_rate, *momenta, **options)
    return optax.chain(weight_losses(recipe.weights), optimizer)


@register("dkd", label="DKD", objective="dkd", linear=True, momenta=optimizers.one_momentum)
def dkd(recipe: Recipe) -> optax.GradientTransformation:
    """Decoupled knowledge distillation, with one momentum, or AdamW: `kd` on the losses of DKD."""
    return kd(recipe)


@register("dkd_dot", label="DKD + DOT", objective="dkd", linear=True, momenta=optimizers.scheduled_betas)
def dkd_dot(recipe: Recipe) -> optax.GradientTransformation:
    """Decoupled knowledge distillation with DOT's two momenta: `dot` on the losses of DKD."""
    return dot(recipe)


@register("deepkd", label="DeepKD", objective="deepkd", linear=True, momenta=optimizers.momenta_of)
def deepkd(recipe: Recipe) -> optax.GradientTransformation:
    """DeepKD: a momentum each for the task and for both parts of the distillation loss."""
    config, mask = recipe.config, optimizers.decay_mask(recipe)
    momenta = optimizers.momenta_of(recipe)
    if config.name == "muon":
        raise UserError("method 'deepkd' has no Muon: give --config.optimizer.name=sgd or adamw")
    if config.name == "adamw":
        return optax.chain(
            weight_losses(recipe.weights),
            dot_optax.scale_by_adam_momenta(momenta, config.b2, config.eps),
            optax.add_decayed_weights(config.weight_decay, mask),
            optax.scale_by_learning_rate(recipe.learning_rate),
        )
    betas = {f"beta_{name}": beta for name, beta in momenta._asdict().items()}
    optimizer = dot_optax.deepkd(recipe.learning_rate, **betas, weight_decay=config.weight_decay, mask=mask)
    return optax.chain(weight_losses(recipe.weights), optimizer)


@register("crd", label="CRD", objective="crd", linear=True, momenta=optimizers.one_momentum)
def crd(recipe: Recipe) -> optax.GradientTransformation:
    """Contrastive representation distillation, with one momentum, or AdamW: `kd` on the losses of CRD."""
    return kd(recipe)


@register("crd_dot", label="CRD + DOT", objective="crd", linear=True, momenta=optimizers.scheduled_betas)
def crd_dot(recipe: Recipe) -> optax.GradientTransformation:
    """CRD with DOT's two momenta: the head and the projectors, which only one loss reaches, have their mean."""
    return dot(recipe)


class _Aggregation(NamedTuple):
    """A weighting for `dot_optax.aggregate`, as a method."""

    weighting: Callable[[], dot_optax.weightings.Weighting]
    # Whether both gradients are weighted by `config.distillation` before. Not where the update is as long as the shorter
    # or the first of them: a weight of 0.1 would make it ten times shorter.
    weighted: bool
    what: str  # it makes of both gradients


_AGGREGATIONS = {
    "projected": _Aggregation(weightings.projected, True, "each without its part against the other (PCGrad)"),
    "min_norm": _Aggregation(weightings.min_norm, False, "their shortest convex combination (MGDA)"),
    "bisector": _Aggregation(weightings.bisector, True, "the direction with the same angle to both (ConFIG)"),
    "conflict_averse": _Aggregation(
        weightings.conflict_averse, True, "their mean, moved to the worse-off loss (CAGrad)"
    ),
    "aligned": _Aggregation(weightings.aligned, False, "both made orthogonal and equally long (Aligned-MTL)"),
    "priority": _Aggregation(weightings.priority, False, "the task's, as far as the other gets its share (PCD)"),
}


def _momentum_behind(aggregation: _Aggregation) -> Make:
    """Aggregates the gradients, before the one momentum."""

    def make(recipe: Recipe) -> optax.GradientTransformation:
        first = [weight_losses(recipe.weights)] if aggregation.weighted else []
        return optax.chain(*first, dot_optax.aggregate(aggregation.weighting()), *optimizers.optimize_the_sum(recipe))

    make.__doc__ = f"Both gradients, aggregated: {aggregation.what}; then as `kd`."
    return make


def _momenta_before(name: str, aggregation: _Aggregation) -> Make:
    """Aggregates DOT's momenta."""

    def make(recipe: Recipe) -> optax.GradientTransformation:
        config = recipe.config
        if config.name != "sgd":
            raise UserError(
                f"method 'dot_{name}' has no {config.name}, which is made for one gradient: give"
                f" --config.optimizer.name=sgd, or --config.method=kd_{name}"
            )
        first = [weight_losses(recipe.weights)] if aggregation.weighted else []
        return optax.chain(
            *first,
            dot_optax.per_loss(
                optax.add_decayed_weights(config.weight_decay, optimizers.decay_mask(recipe)), optax.identity()
            ),
            dot_optax.per_loss(*map(optimizers.trace, optimizers.scheduled_betas(recipe))),
            dot_optax.aggregate(aggregation.weighting()),
            optax.scale_by_learning_rate(recipe.learning_rate),
        )

    make.__doc__ = f"DOT's two momenta, aggregated: {aggregation.what}."
    return make


for (_name, _aggregation), _color in zip(_AGGREGATIONS.items(), _COLORS[1:], strict=False):
    _behind, _before = _momentum_behind(_aggregation), _momenta_before(_name, _aggregation)
    _label = _name.replace("_", "-")
    _traits = {"color": _color, "compares": True, "weighted": _aggregation.weighted}
    register(f"kd_{_name}", label=f"KD, {_label}", momenta=optimizers.one_momentum, **_traits)(_behind)
    register(f"dot_{_name}", label=f"DOT, {_label}", momenta=optimizers.scheduled_betas, **_traits)(_before)


@register(
    "dto_kd",
    label="DTO-KD",
    color=_COLORS[7],
    compares=True,
    weighted=False,
    momenta=optimizers.one_momentum,
)
def dto_kd(recipe: Recipe) -> optax.GradientTransformation:
    """DTO-KD: the shortest convex combination of the gradients of the logarithms of both losses; then as `kd`."""
    aggregate = dot_optax.aggregate(weightings.min_norm(log=True))
    return optax.chain(aggregate, *optimizers.optimize_the_sum(recipe))


def weights_of_the_sum(method: str, weights: Any) -> Any:
    """The weights of a method that sees the weighted sum of the losses alone; None of one that sees more, or may.

    Given the gradient of that sum and zeros, and weights of 1, it makes the same updates. A weight that changes from step
    to step is the method's own.
    """
    return weights if method in ("kd", "dkd", "crd") and not any(map(callable, weights)) else None


def summary(name: str) -> str:
    """The first line of a method's docstring, which `--help` shows."""
    return next(iter((METHODS[name].__doc__ or "").strip().splitlines()), "")


def parse(method: str, known: Collection[str] | None = None) -> list[str]:
    """Splits the comma-separated `config.method` into names, each once, which must be `known`; default: `METHODS`."""
    known = METHODS if known is None else known
    names = list(dict.fromkeys(name.strip() for name in method.split(",") if name.strip()))
    if not names or not set(names) <= set(known):
        raise UserError(f"bad --config.method={method!r}: give one or more of {', '.join(known)}, separated by commas")
    return names


def check(config: ConfigDict, wanted: list[str]) -> None:
    """Raises if the `wanted` methods and their optimizers cannot be used as a config has them."""
    for name in wanted:
        objective = objective_of(name, config, objectives.Length(config.epochs, steps_per_epoch=1))
        if objective.own and config.parallel != "jit":
            raise UserError(
                f"--config.parallel={config.parallel} would give each device a memory of its own, and {name!r} has one of"
                " all images: give --config.parallel=jit"
            )
        if objective.own and Sampling.from_config(config.sampling) != EXACT:
            raise UserError(
                f"--config.sampling.form={config.sampling.form} leaves out losses or images, and the memory of {name!r}"
                " moves with all of them at every step: give --config.sampling.form=none"
            )
    check_optimizers(config, wanted, trains_teacher=config.teacher.train and not config.teacher.checkpoint)


def check_optimizers(config: ConfigDict, wanted: list[str], *, trains_teacher: bool) -> None:
    """Raises if the optimizers of a config cannot be had, or not with its form of parallelism or its sampling."""
    if config.diagnostics and not config.gradient_metrics:
        raise UserError(
            "--config.diagnostics=True looks at the gradient of each loss, and --config.gradient_metrics=False spares them:"
            " leave one of the two out"
        )
    if config.diagnostics_by == "layer" and not config.diagnostics:
        raise UserError("--config.diagnostics_by=layer says what --config.diagnostics=True logs: give both")
    for section, optimizer, epochs in (
        ("optimizer", config.optimizer, config.epochs),
        ("teacher.optimizer", config.teacher.optimizer, config.teacher.epochs),
    ):
        if optimizer.name not in optimizers.NAMES:
            raise UserError(
                f"bad --config.{section}.name={optimizer.name!r}: give one of {', '.join(optimizers.NAMES)}"
            )
        if optimizer.schedule == "cosine" and epochs is not None and optimizer.warmup_epochs >= epochs:
            raise UserError(
                f"bad --config.{section}.warmup_epochs={optimizer.warmup_epochs}: of {epochs} epochs at least the last"
                f" must follow the warm-up; give {f'{epochs - 1} or fewer' if epochs > 1 else '0'}, or more epochs"
            )
        used = section == "optimizer" or trains_teacher
        if config.parallel == "shard_map" and used and optimizer.name != "sgd":
            raise UserError(
                f"--config.parallel=shard_map averages updates, which is right for momenta but not for {optimizer.name}: give"
                f" --config.parallel=jit, or --config.{section}.name=sgd"
            )
    if config.sampling.form in ("losses", "alternating", "difference") and config.sampling.period > 1:
        compare = [name for name in wanted if TRAITS[name].compares]
        if compare:
            raise UserError(
                f"--config.sampling.form={config.sampling.form} does not take all gradients at every step, and"
                f" {compare[0]!r} compares them with one another: give --config.sampling.form=examples or none"
            )
    unknown = [name for name in wanted if not TRAITS[name].linear]
    if config.parallel == "shard_map" and unknown:
        raise UserError(
            f"--config.parallel=shard_map averages updates, which is right for methods that are linear in the gradients,"
            f" and {unknown[0]!r} was not registered as one: give --config.parallel=jit"
        )


def objective_of(method: str, config: ConfigDict, length: objectives.Length) -> Objective:
    """What a method trains on; `config` is a whole one. Raises if the momenta of its losses cannot be used."""
    objective = objectives.build(TRAITS[method].objective, config, length)
    for name, delta in zip(objective.names, objective.deltas or (), strict=False):
        if not 0 <= np.float32(config.optimizer.momentum + delta) < 1:
            raise UserError(
                f"bad --config.{TRAITS[method].objective}.delta_{name}={delta}: with a momentum of"
                f" {config.optimizer.momentum} it makes one of {config.optimizer.momentum + delta:g}, which must be at least"
                " 0 and below 1"
            )
    return objective


def state_metrics(method: str) -> tuple[str, ...]:
    """The metrics that `read_state` gives, by name."""
    return ("task_weight", "kd_weight") if method in TRAITS and TRAITS[method].compares else ()


def read_state(method: str, opt_state: Any) -> dict[str, jax.Array]:
    """What the log says of the state of a method's optimizer: of one that aggregates, the weights of the last step."""
    if not state_metrics(method):
        return {}
    weights = optax.tree.get(opt_state, "weights", filtering=_is_of_aggregate)  # [groups, losses]
    return {} if weights is None else dict(zip(state_metrics(method), weights[0], strict=True))


def _is_of_aggregate(path: Any, value: Any) -> bool:
    del value
    return getattr(path[-1], "tuple_name", None) == "AggregateState"


def _at(step: Any, value: Any) -> Any:
    """A number, or what a schedule has at this step."""
    return value(step) if callable(value) else value


def diagnostics(
    method: str, config: ConfigDict, objective: Objective, steps_per_epoch: int, epochs: int
) -> Diagnostics:
    """What `--config.diagnostics` adds to the log of a method; `config` is the section `optimizer` of a config."""
    traits, learning_rate = TRAITS[method], learning_rate_schedule(config, steps_per_epoch, epochs)
    recipe = Recipe(config, objective.weights, learning_rate, steps_per_epoch, objective.deltas)
    betas = objective.container(*traits.momenta(recipe)) if traits.momenta else None
    weights = objective.weights
    if method == "ce":
        weights = dot_optax.PerLoss(task=1.0, kd=0.0)
    elif not traits.weighted:
        weights = objective.container(*[1.0] * len(objective.names))

    def gains(step: Any) -> Any:
        found, now = effective_learning_rate(1.0, betas, step), [_at(step, beta) for beta in betas]
        # The gains of Adam's momenta are relative, and so are those in front of Muon.
        factor = 1.0 if config.name == "sgd" else 1 - sum(now) / len(now)
        # A loss of weight 0 is not trained on, and has no gain.
        trained = [jnp.where(jnp.asarray(_at(step, weight)) == 0, jnp.nan, factor) for weight in weights]
        return objective.container(*(gain * scale for gain, scale in zip(found, trained, strict=True)))

    def scales(opt_state: Any) -> Any:
        return list(read_state(method, opt_state).values()) or None

    return Diagnostics(
        objective.names,
        objective.container,
        weights,
        learning_rate,
        gains if betas else None,
        scales,
    )


def build(
    method: str,
    config: ConfigDict,
    weights: Any,
    steps_per_epoch: int,
    epochs: int | None = None,
    deltas: Any = None,
    reached: Any = None,
    matrices: Any = None,
) -> optax.GradientTransformation:
    """Returns the optimizer of `method`.

    Args:
        method: its name.
        config: the section `optimizer` of a config.
        weights: of the losses of its objective, in their container.
        steps_per_epoch: in how many steps an epoch is trained.
        epochs: how many are trained; a cosine schedule needs to know.
        deltas: those of its objective, if it has any.
        reached: which loss reaches which parameter, if not all reach all; in their container.
        matrices: which parameters are matrices for Muon, see `Recipe`.
    """
    learning_rate = learning_rate_schedule(config, steps_per_epoch, epochs)
    try:
        optimizer = METHODS[method](Recipe(config, weights, learning_rate, steps_per_epoch, deltas, reached, matrices))
    except UserError:
        raise
    except Exception as error:  # The function may be a user's.
        raise UserError(f"cannot build method {method!r}: {type(error).__name__}: {one_line(error, 200)}") from error
    if not isinstance(optimizer, optax.GradientTransformation):
        raise UserError(
            f"cannot build method {method!r}: its function returned a {type(optimizer).__name__}, not an Optax"
            " transformation"
        )
    return optimizer


def check_updates(
    method: str,
    optimizer: optax.GradientTransformation,
    params: Any,
    container: Any = dot_optax.PerLoss,
) -> None:
    """Raises if the optimizer of a method does not make updates like `params` of a container of gradients."""
    tx = optax.with_extra_args_support(optimizer)

    def update(params: Any) -> Any:
        grads, losses = (container(*[value] * len(container._fields)) for value in (params, jnp.ones(())))
        return tx.update(grads, tx.init(params), params, losses=losses)[0]

    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    try:
        updates = jax.eval_shape(update, like)
    except Exception as error:  # The function may be a user's.
        raise UserError(f"cannot use method {method!r}: {type(error).__name__}: {one_line(error, 200)}") from error
    if updates != like:
        raise UserError(
            f"cannot use method {method!r}: of the gradients {container.__name__}({', '.join(container._fields)}) it does not"
            " make one tree of updates like the parameters; `dot_optax.dot` and `dot_optax.sum_losses` make one of two"
        )
