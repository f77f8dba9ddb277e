"""A recipe's changes to an optimizer and to the scheduler that stands on it, in place.

Comes from: ``Recipe.apply``. Goes to: the user's training loop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer, lr_scheduler

if TYPE_CHECKING:
    from batchnorm.recipe.recipe import Recipe

Change = Callable[[Any, float], Any]


def _shorter(steps: float, speed: float) -> int:
    return max(1, round(steps / speed))


def _perhaps_none(steps: float, speed: float) -> int:
    return round(steps / speed)


def _faster(factors: list[Callable[[int], float]], speed: float) -> list[Callable[[int], float]]:
    return [lambda step, f=f: f(round(step * speed)) for f in factors]  # type: ignore[misc]


# What each scheduler counts in steps, and what becomes of it. A new scheduler is one row.
TIMES: dict[type, dict[str, Change]] = {
    lr_scheduler.StepLR: {"step_size": _shorter},
    lr_scheduler.MultiStepLR: {
        "milestones": lambda at, speed: sum((Counter({_shorter(m, speed): n}) for m, n in at.items()), Counter())
    },
    lr_scheduler.ExponentialLR: {"gamma": lambda gamma, speed: gamma**speed},
    lr_scheduler.CosineAnnealingLR: {"T_max": _shorter},
    lr_scheduler.CosineAnnealingWarmRestarts: {"T_0": _shorter, "T_i": _shorter},
    lr_scheduler.ConstantLR: {"total_iters": _shorter},
    lr_scheduler.LinearLR: {"total_iters": _shorter},
    lr_scheduler.PolynomialLR: {"total_iters": _shorter},
    lr_scheduler.LambdaLR: {"lr_lambdas": _faster},
    lr_scheduler.OneCycleLR: {
        "total_steps": _shorter,
        "_schedule_phases": lambda phases, speed: [p | {"end_step": (p["end_step"] + 1) / speed - 1} for p in phases],
    },
    lr_scheduler.ReduceLROnPlateau: {"patience": _perhaps_none, "cooldown": _perhaps_none},
    lr_scheduler.SequentialLR: {"_milestones": lambda at, speed: [_shorter(m, speed) for m in at]},
    lr_scheduler.ChainedScheduler: {},
}
RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # of a parameter group
PER_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs")  # a scheduler's lists, one entry per group
SCALED = ("base_lrs", "_last_lr")
MARK = "recipe"  # in a parameter group: what was applied


def apply(recipe: Recipe, optimizer: Optimizer, scheduler: Any) -> None:
    """See ``Recipe.apply``."""
    schedulers = [] if scheduler is None else _family(scheduler)
    _check(recipe, optimizer, schedulers)
    origins = _split(optimizer) if recipe.only_weights else []
    for group in optimizer.param_groups:
        group[MARK] = recipe.name
        for key in RATES:
            if key in group:
                group[key] = group[key] * recipe.learning_rate
        if "weight_decay" in group:
            group["weight_decay"] = group["weight_decay"] * recipe.weight_decay
        if recipe.nesterov and "nesterov" in group:
            group["nesterov"] = True
    for each in schedulers:
        for name in PER_GROUP:
            if name in vars(each):
                values = getattr(each, name)
                values += [values[origin] for origin in origins]
                if name in SCALED:
                    values[:] = [value * recipe.learning_rate for value in values]
        if recipe.decay_speed != 1:
            for name, change in TIMES[type(each)].items():
                setattr(each, name, change(getattr(each, name), recipe.decay_speed))


def _family(scheduler: Any) -> list[Any]:
    """A scheduler and those that it is made of."""
    return [scheduler, *(member for part in getattr(scheduler, "_schedulers", ()) for member in _family(part))]


def _check(recipe: Recipe, optimizer: Optimizer, schedulers: list[Any]) -> None:
    applied = [group[MARK] for group in optimizer.param_groups if MARK in group]
    if applied:
        raise ValueError(f"recipe {applied[0]} has been applied to this optimizer: make a new one to apply another.")
    momenta = [group["momentum"] for group in optimizer.param_groups if "nesterov" in group]
    if recipe.nesterov and not all(momenta):
        raise ValueError("the recipe asks for Nesterov's momentum: give the optimizer a momentum, 0.9 say.")
    for scheduler in schedulers:
        kind = type(scheduler).__name__
        if type(scheduler) not in TIMES:
            known = ", ".join(t.__name__ for t in TIMES)
            raise TypeError(
                f"apply does not know what a {kind} counts in steps. Known: {known}. Make it {recipe.decay_speed:g} "
                "times shorter yourself and apply the recipe to the optimizer, before the scheduler is made."
            )
        if getattr(scheduler, "optimizer", optimizer) is not optimizer:
            raise ValueError(f"the {kind} stands on another optimizer.")
        if getattr(scheduler, "last_epoch", 0) > 0:
            raise ValueError(f"the {kind} has stepped already: apply a recipe before training.")


def _split(optimizer: Optimizer) -> list[int]:
    """Gamma, beta and biases into groups of their own, without weight decay; from which group each new one came."""
    origins = []
    for i, group in enumerate(list(optimizer.param_groups)):
        if not group.get("weight_decay"):
            continue
        weights = [p for p in group["params"] if p.ndim > 1]
        others = [p for p in group["params"] if p.ndim <= 1]
        if weights and others:
            origins.append(i)
            group["params"] = weights
            optimizer.param_groups.append({**group, "params": others, "weight_decay": 0.0})
        elif others:
            group["weight_decay"] = 0.0
    return origins
