"""The default optimizer of a training, and what a contender makes of the optimizer and schedule of a task."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import SGD, Optimizer

from batchnorm.racing.calls import keywords_of
from batchnorm.racing.changes import has_batch_norm
from batchnorm.racing.errors import RaceError
from batchnorm.racing.schedule import Schedule, mean_rates
from batchnorm.recipe.apply import RATES
from batchnorm.recipe.followers import normalized, parameter_groups
from batchnorm.recipe.muon import Muon
from batchnorm.recipe.recipe import MOMENTUM, Recipe
from batchnorm.recipe.schedules import TIMES, family
from batchnorm.recipe.schedules import Schedule as InTime
from batchnorm.surgery import insert
from batchnorm.surgery.report import Report

if TYPE_CHECKING:
    from batchnorm.racing.contenders import Contender
    from batchnorm.racing.task import Task


def optimizer_of(task: Task, model: nn.Module) -> Optimizer:
    """The task's own, over a network's parameters, at the learning rate that it has itself.

    Raises:
        RaceError: what it returned is no optimizer that a race can step, or it has no learning rate.
    """
    made_by, rate = task.optimizer, task.learning_rate
    if made_by is None:
        return decay_of_weights(model, rate or 0.01, task.weight_decay)
    given: dict[str, Any] = {}
    if isinstance(made_by, type):
        taken = keywords_of(made_by)
        given = {"lr": rate or 0.01, "weight_decay": task.weight_decay}
        given = {name: value for name, value in given.items() if taken is None or name in taken}
    first = next(iter(inspect.signature(made_by).parameters), None)
    made: Any = made_by(model if first == "model" else model.parameters(), **given)
    _check_optimizer(f"Task {task.name!r}: optimizer returned", made)
    return made


def _check_optimizer(who: str, made: Any) -> None:
    if not isinstance(made, Optimizer):
        raise RaceError(f"{who} a {type(made).__name__}, not an optimizer: a race has one of each training.")
    closure = inspect.signature(made.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise RaceError(f"{who} {type(made).__name__}, whose step calls the network itself: give one that does not.")
    rate = made.param_groups[0].get("lr")
    if rate is None or not 0 < float(rate) < math.inf:
        raise RaceError(f"{who} {type(made).__name__} with lr={rate}: its first group must have a positive one.")


def decay_of_weights(model: nn.Module, lr: float, weight_decay: float) -> Optimizer:
    """SGD with momentum; weight decay on weights, not on biases, gamma and beta.

    Nor on embeddings with sparse gradients, which torch cannot; nor can its fused step.
    """
    sparse = {id(p) for m in model.modules() if getattr(m, "sparse", False) for p in m.parameters(recurse=False)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    kinds = [[p for p in parameters if (p.ndim > 1 and id(p) not in sparse) is decays] for decays in (True, False)]
    groups = [
        {"params": some, "weight_decay": decay}
        for some, decay in zip(kinds, (weight_decay, 0.0), strict=True) if some
    ]  # fmt: skip
    return SGD(groups, lr, MOMENTUM, fused=not sparse)


def as_applied(recipe: Recipe, optimizer: Optimizer) -> Recipe:
    """The part of a recipe that this optimizer can have: Nesterov's momentum needs SGD, less decay needs decay."""
    groups = optimizer.param_groups
    able = all("nesterov" in g and g["momentum"] and not g["dampening"] for g in groups)
    decays = any(g.get("weight_decay") for g in groups)
    return replace(
        recipe,
        nesterov=recipe.nesterov and able,
        weight_decay=recipe.weight_decay if decays else 1,
        only_weights=recipe.only_weights and decays,
    )


def prepared(
    task: Task, contender: Contender, model: nn.Module, steps: int, learning_rate: float
) -> tuple[Optimizer, Schedule]:
    """The optimizer and schedule of one run.

    The task's own, over the contender's budget, changed by its recipe, at the run's learning rate; or those that the
    recipe brings.
    """
    recipe = contender.recipe
    if recipe.muon_lr:
        optimizer = _muon(task, contender, model, learning_rate)
        return optimizer, Schedule(recipe.scheduler(optimizer, steps))
    optimizer, schedule = task.make_both(model, steps)
    scale = learning_rate / recipe.learning_rate / task.base_rate
    scale = 1.0 if math.isclose(scale, 1, rel_tol=1e-5) else scale  # a plan has rates in six digits
    changes = replace(as_applied(recipe, optimizer), decay_speed=1.0)  # the schedule ends with the run already
    told = model if recipe.learning_rate != 1 and _tells_normalized(model) else None
    if scale == 1 and not changes.changes():
        return optimizer, schedule
    parts = [member for each in schedule.schedulers for member in family(each)]

    def change(optimizer: Optimizer, schedulers: list[Any], parts: list[Any]) -> None:
        _scale(optimizer, parts, scale)
        if changes.changes():
            changes.apply(optimizer, schedulers, told)

    strange = [type(each).__name__ for each in parts if type(each) not in TIMES]
    if strange:
        return _changed_first(task, model, steps, lambda optimizer: change(optimizer, [], []), " and ".join(strange))
    change(optimizer, schedule.schedulers, parts)
    return optimizer, schedule


def _changed_first(
    task: Task, model: nn.Module, steps: int, change: Callable[[Optimizer], None], strange: str
) -> tuple[Optimizer, Schedule]:
    """The optimizer changed before its schedulers are made, which are of strange classes: they take what they find.

    Raises:
        RaceError: they do not.
    """
    factors: dict[int, float] = {}  # by parameter

    def noted(optimizer: Optimizer) -> None:
        before = _by_parameter(optimizer)
        change(optimizer)
        factors.update({p: rate / before[p] for p, rate in _by_parameter(optimizer).items() if before[p]})

    plain, own = (mean_rates(*task.make_both(model, steps, how), steps) for how in (None, noted))
    most = max((abs(math.log(factor)) for factor in factors.values()), default=0.0)
    if most and any(not _about(own[p], plain[p] * factor, 0.2 * most) for p, factor in factors.items()):
        raise RaceError(
            f"{strange} sets learning rates whatever the optimizer's are, so this contender's cannot be set: let it "
            "multiply those that it finds when it is made, as torch's schedulers do (base_lrs)."
        )
    return task.make_both(model, steps, change)


def _tells_normalized(model: nn.Module) -> bool:
    """Whether its report tells which layers have batch normalization, as that of ``insert`` does."""
    report: Report = getattr(model, "batchnorm_report", Report())  # type: ignore[assignment]
    return bool(report.norms)


def _by_parameter(optimizer: Optimizer) -> dict[int, float]:
    return {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}


def _about(rate: float, expected: float, tolerance: float) -> bool:
    """Whether two rates are alike, but for a floor or a first rate that is not multiplied; ``tolerance``: of logs."""
    return rate == expected or (rate > 0 < expected and abs(math.log(rate / expected)) <= tolerance + 1e-6)


def _muon(task: Task, contender: Contender, model: nn.Module, learning_rate: float) -> Optimizer:
    """The recipe's own. Without batch normalization the same layers are orthogonalized: those that would have it."""
    recipe, example = contender.recipe, task.example(model)
    if _tells_normalized(model):
        layers = normalized(model)
    elif has_batch_norm(model):
        layers = normalized(model, example)
    else:
        rows = insert(model, example).batchnorm_report.of("normalized")  # type: ignore[union-attr, operator]
        layers = [model.get_submodule(name) for name in rows]
    sgd_lr = recipe.sgd_lr * recipe.learning_rate
    groups = parameter_groups(model, layers)  # at constant norm without BN too, where that is better (docs/results.md)
    return Muon(groups, lr=learning_rate, sgd_lr=sgd_lr, clip=recipe.clip)


def _scale(optimizer: Optimizer, schedulers: list[Any], factor: float) -> None:
    """Multiply all learning rates, also those that schedulers keep."""
    if factor == 1:
        return
    for group in optimizer.param_groups:
        group |= {key: group[key] * factor for key in RATES if group.get(key) is not None}
    InTime(schedulers, [factor] * len(optimizer.param_groups), [], 1.0).change()
