"""A recipe's changes to an optimizer and to the scheduler that stands on it, in place.

Comes from: ``Recipe.apply``. Goes to: the user's training loop.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from numbers import Real
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from batchnorm.surgery.affine import affine_of, looks_affine
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
            stacklevel=5,
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
    """See ``Recipe.apply``. All is computed before anything is changed: what is refused changes nothing."""
    given = scheduler if isinstance(scheduler, list | tuple) else [] if scheduler is None else [scheduler]
    schedulers = [member for each in given for member in _family(each)]
    _check(recipe, optimizer, schedulers)
    kept = set() if model is None else _not_normalized(model, optimizer)

    def kind(parameter: Tensor) -> tuple[bool, bool]:
        """(no weight decay, learning rate as it is)"""
        return recipe.only_weights and parameter.ndim <= 1, id(parameter) in kept

    groups = optimizer.param_groups
    parts = [_parts(group, kind) for group in groups]
    _check_one_group(optimizer, [part for cut in parts for part in cut[1:]])
    origins = [i for i, cut in enumerate(parts) for _ in cut[1:]]
    factors, changed = [], []
    for new in (*(cut[0] for cut in parts), *(part for cut in parts for part in cut[1:])):
        undecayed, as_it_is = kind(new["params"][0]) if new["params"] else (False, False)
        factors.append(1.0 if as_it_is else recipe.learning_rate)
        rates = {key: new[key] * factors[-1] for key in RATES if new.get(key) is not None}
        if new.get("weight_decay") is not None:
            rates["weight_decay"] = 0.0 if undecayed else new["weight_decay"] * recipe.weight_decay
        nesterov = {"nesterov": True} if recipe.nesterov else {}
        changed.append(new | rates | nesterov | {MARK: recipe.name})
    lists = {}  # of schedulers, by their id, since some share one: as they are, and as they become
    for each in schedulers:
        for name in PER_GROUP:
            if name in vars(each):
                values = vars(each)[name]
                longer = [*values, *(values[origin] for origin in origins)]
                numbers = name != "lr_lambdas"
                scaled = [v * f for v, f in zip(longer, factors, strict=True)] if numbers else longer
                lists[id(values)] = (values, scaled)
    times: list[tuple[Any, str, Any]] = []
    for each in schedulers:
        times.extend(_times(recipe, each, lists))
    for group, new in zip(list(groups), changed, strict=False):
        group.update(new)
    groups.extend(changed[len(groups) :])
    for values, scaled in lists.values():
        values[:] = scaled
    for each, name, value in times:
        setattr(each, name, value)


def _times(recipe: Recipe, scheduler: Any, lists: dict[int, tuple[Any, Any]]) -> Iterator[tuple[Any, str, Any]]:
    """What a scheduler counts in steps, and its floor: (scheduler, name, new value)."""
    if hasattr(scheduler, "eta_min"):
        yield scheduler, "eta_min", scheduler.eta_min * recipe.learning_rate
    for name, change in TIMES[type(scheduler)].items() if recipe.decay_speed != 1 else ():
        now = getattr(scheduler, name)
        yield scheduler, name, change(lists.get(id(now), (now, now))[1], recipe.decay_speed)


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
    multiplied = (*RATES * (recipe.learning_rate != 1), *("weight_decay",) * (recipe.weight_decay != 1))
    for group in groups:
        for key in multiplied:
            if not isinstance(group.get(key, 0), Real | Tensor):
                raise ValueError(
                    f"{type(optimizer).__name__} has {key}={group[key]!r}, which a recipe cannot multiply: give it a "
                    "number, lr=0.001 say (Adafactor of transformers: with relative_step=False)."
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
    layers = [m for m in left if m is not None and (affine_of(m) is not None or looks_affine(m))]
    return {id(p) for layer in layers for p in layer.parameters(recurse=False)}


def _parts(group: dict[str, Any], kind: Callable[[Tensor], tuple[bool, bool]]) -> list[dict[str, Any]]:
    """The group in pieces whose parameters are all of a kind: those that decay, and change their rate, first."""
    names = group.get("param_names", [None] * len(group["params"]))
    parts: dict[tuple[bool, bool], list[tuple[Tensor, str | None]]] = {}
    for parameter, name in zip(group["params"], names, strict=True):
        parts.setdefault(kind(parameter), []).append((parameter, name))
    if len(parts) < 2:
        return [{**group}]
    return [{**group, **_part(parts[key], "param_names" in group)} for key in sorted(parts)]


def _part(pairs: list[tuple[Tensor, str | None]], named: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"params": [p for p, _ in pairs]}
    return found | ({"param_names": [name for _, name in pairs]} if named else {})


def _check_one_group(optimizer: Optimizer, cut_off: list[dict[str, Any]]) -> None:
    """An optimizer that keeps a group's parameters elsewhere too, as LBFGS does, would not know of its pieces."""
    if not cut_off:
        return
    kind = type(optimizer).__name__
    lists = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    for name, value in vars(optimizer).items():
        if isinstance(value, list | tuple) and [id(v) for v in value] in lists and value:
            raise ValueError(
                f"the recipe cuts the parameters of {kind} into {len(lists) + len(cut_off)} groups (weights, those "
                f"that do not decay, layers without batch normalization), and {kind} takes one ({name}): use SGD "
                "or AdamW, say, or apply dataclasses.replace(recipe, only_weights=False) without model=."
            )
