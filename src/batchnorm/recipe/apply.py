"""A recipe's changes to an optimizer and to the scheduler that stands on it, in place.

Comes from: ``Recipe.apply``. Goes to: the user's training loop.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer, lr_scheduler

from batchnorm.surgery.report import LEFT

if TYPE_CHECKING:
    from batchnorm.recipe.recipe import Recipe

Change = Callable[[Any, float], Any]


def _shorter(steps: float, speed: float) -> int:
    found = max(1, round(steps / speed))
    if not 3 / 4 < steps / speed / found < 4 / 3:
        warnings.warn(
            f"{steps:g} cannot be made {speed:g} times shorter, it becomes {found}: let the scheduler count in steps "
            "instead of epochs.",
            stacklevel=4,
        )
    return found


def _faster(factors: list[Callable[[int], float]], speed: float) -> list[Callable[[int], float]]:
    return [lambda step, f=f: f(round(step * speed)) for f in factors]  # type: ignore[misc]


def _phases(phases: list[dict[str, Any]], speed: float) -> list[dict[str, Any]]:
    """Of the one cycle: the last one ends with the last step."""
    steps = phases[-1]["end_step"] + 1
    share = max(1, round(steps / speed)) / steps
    return [phase | {"end_step": (phase["end_step"] + 1) * share - 1} for phase in phases]


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
    lr_scheduler.OneCycleLR: {"total_steps": _shorter, "_schedule_phases": _phases},
    lr_scheduler.ReduceLROnPlateau: {
        "patience": lambda steps, speed: round(steps / speed),
        "cooldown": lambda steps, speed: round(steps / speed),
    },
    lr_scheduler.SequentialLR: {"_milestones": lambda at, speed: [_shorter(m, speed) for m in at]},
    lr_scheduler.ChainedScheduler: {},
}
RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # of a parameter group
PER_GROUP = ("base_lrs", "_last_lr", "min_lrs", "lr_lambdas")  # a scheduler's lists, one entry per group
MARK = "recipe"  # in a parameter group: what was applied


def apply(recipe: Recipe, optimizer: Optimizer, scheduler: Any, model: nn.Module | None) -> None:
    """See ``Recipe.apply``."""
    given = scheduler if isinstance(scheduler, list | tuple) else [] if scheduler is None else [scheduler]
    schedulers = [member for each in given for member in _family(each)]
    _check(recipe, optimizer, schedulers)
    kept = set() if model is None else _not_normalized(model, optimizer)

    def kind(parameter: Tensor) -> tuple[bool, bool]:
        """(no weight decay, learning rate as it is)"""
        return recipe.only_weights and parameter.ndim <= 1, id(parameter) in kept

    origins = _split(optimizer, kind)
    factors = []
    for group in optimizer.param_groups:
        undecayed, as_it_is = kind(group["params"][0]) if group["params"] else (False, False)
        factors.append(1.0 if as_it_is else recipe.learning_rate)
        group[MARK] = recipe.name
        for key in RATES:
            if key in group:
                group[key] = group[key] * factors[-1]
        if "weight_decay" in group:
            group["weight_decay"] = 0.0 if undecayed else group["weight_decay"] * recipe.weight_decay
        if recipe.nesterov:
            group["nesterov"] = True
    lists = {id(vars(s)[name]): (name, vars(s)[name]) for s in schedulers for name in PER_GROUP if name in vars(s)}
    for name, values in lists.values():  # some share one
        values += [values[origin] for origin in origins]
        if name != "lr_lambdas":
            values[:] = [value * factor for value, factor in zip(values, factors, strict=True)]
    for each in schedulers:
        if hasattr(each, "eta_min"):
            each.eta_min *= recipe.learning_rate
        if recipe.decay_speed != 1:
            for name, change in TIMES[type(each)].items():
                setattr(each, name, change(getattr(each, name), recipe.decay_speed))


def _family(scheduler: Any) -> list[Any]:
    """A scheduler and those that it is made of."""
    return [scheduler, *(member for part in getattr(scheduler, "_schedulers", ()) for member in _family(part))]


def _check(recipe: Recipe, optimizer: Optimizer, schedulers: list[Any]) -> None:
    groups = optimizer.param_groups
    applied = [group[MARK] for group in groups if MARK in group]
    if applied:
        raise ValueError(f"recipe {applied[0]} has been applied to this optimizer: make a new one to apply another.")
    if recipe.nesterov and not all("nesterov" in g and g["momentum"] and not g["dampening"] for g in groups):
        raise ValueError(
            "the recipe asks for Nesterov's momentum: take torch.optim.SGD with a momentum, 0.9 say, and without "
            "dampening; or leave it out, dataclasses.replace(recipe, nesterov=False)."
        )
    if not schedulers and any("initial_lr" in group for group in groups):
        raise ValueError("a scheduler stands on this optimizer: pass it too, apply(optimizer, scheduler).")
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


def _not_normalized(model: nn.Module, optimizer: Optimizer) -> set[int]:
    """Parameters of the affine layers that ``insert`` left without batch normalization, by their id."""
    report = getattr(model, "batchnorm_report", None)
    mine = {id(p) for p in model.parameters()}
    if report is None or not any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            "apply takes the model that accelerate() returned, and an optimizer of its parameters: "
            "torch.optim.SGD(accelerated.parameters(), ...)."
        )
    modules = dict(model.named_modules())
    left = [modules.get(row.layer) for row in report if row.done == LEFT and "has batch normalization" not in row.why]
    return {id(p) for m in left if isinstance(m, nn.Linear | _ConvNd) for p in m.parameters(recurse=False)}


def _split(optimizer: Optimizer, kind: Callable[[Tensor], tuple[bool, bool]]) -> list[int]:
    """Groups whose parameters are all of a kind: behind the others, the parts cut off; from which group each came."""
    origins = []
    for i, group in enumerate(list(optimizer.param_groups)):
        names = group.get("param_names", [None] * len(group["params"]))
        parts: dict[tuple[bool, bool], list[tuple[Tensor, str | None]]] = {}
        for parameter, name in zip(group["params"], names, strict=True):
            parts.setdefault(kind(parameter), []).append((parameter, name))
        cut = [parts[key] for key in sorted(parts)]  # those that decay, and change their rate, first
        news = [_part(part, "param_names" in group) for part in cut]
        for new in news[1:]:
            origins.append(i)
            optimizer.param_groups.append({**group, **new})
        group |= news[0] if news else {}
    return origins


def _part(pairs: list[tuple[Tensor, str | None]], named: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"params": [p for p, _ in pairs]}
    return found | ({"param_names": [name for _, name in pairs]} if named else {})
