"""Attributes of schedulers that count steps or hold a value per parameter group: changed in place, a row each."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType
from typing import Any

from torch import nn
from torch.optim import Optimizer, lr_scheduler

Change = Callable[[Any, float], Any]


def _shorter(steps: float, speed: float, least: int = 1) -> int:
    found = max(least, round(steps / speed))
    if not 3 / 4 * found <= steps / speed <= 4 / 3 * found:
        warnings.warn(
            f"{steps:g} cannot be made {speed:g} times shorter, it becomes {found}: let the scheduler count in steps "
            "instead of epochs.",
            stacklevel=6,
        )
    return found


class _Faster:
    """A LambdaLR's factor in faster time. Its state is the given one's, which torch saves and loads as ``__dict__``."""

    __slots__ = ("factor", "speed")

    def __init__(self, factor: Callable[[float], float], speed: float) -> None:
        self.factor, self.speed = factor, speed

    def __call__(self, step: int) -> float:
        return self.factor(round(step * self.speed))

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        return self.factor.__dict__

    def __reduce__(self) -> Any:
        return _Faster, (self.factor, self.speed)


def _faster(factors: list[Any], speed: float) -> list[Any]:
    """Functions become functions, of which torch saves nothing."""
    return [
        (lambda step, f=f: f(round(step * speed))) if isinstance(f, FunctionType) else _Faster(f, speed)
        for f in factors
    ]


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
    lr_scheduler.CyclicLR: {"total_size": lambda size, speed: size / speed},
    lr_scheduler.ReduceLROnPlateau: {
        "patience": partial(_shorter, least=0),
        "cooldown": partial(_shorter, least=0),
    },
    lr_scheduler.SequentialLR: {"_milestones": lambda at, speed: [_shorter(m, speed) for m in at]},
    lr_scheduler.ChainedScheduler: {},
}
# A scheduler's lists, one entry per group: of rates, and of what is no rate.
RATES_PER_GROUP = ("base_lrs", "_last_lr", "min_lrs", "max_lrs")
PER_GROUP = (*RATES_PER_GROUP, "lr_lambdas", "base_momentums", "max_momentums")


class _FloorPerGroup:
    """Of torch's schedulers that have one floor, ``eta_min``, for all groups: ``eta_mins`` has one for each."""

    eta_min: float
    eta_mins: list[float]

    def _each(self, rates: Callable[[], list[Any]]) -> list[Any]:
        given, found = self.eta_min, []
        for i, floor in enumerate(self.eta_mins):
            self.eta_min = floor
            found.append(rates()[i])
        self.eta_min = given
        return found

    def get_lr(self) -> list[Any]:
        return self._each(super().get_lr)  # type: ignore[misc]


class CosineAnnealingLR(_FloorPerGroup, lr_scheduler.CosineAnnealingLR):
    """Torch's, with a floor per group."""

    def _get_closed_form_lr(self) -> list[Any]:
        return self._each(super()._get_closed_form_lr)


class CosineAnnealingWarmRestarts(_FloorPerGroup, lr_scheduler.CosineAnnealingWarmRestarts):
    """Torch's, with a floor per group."""


FLOOR_PER_GROUP: dict[type, type] = {
    lr_scheduler.CosineAnnealingLR: CosineAnnealingLR,
    lr_scheduler.CosineAnnealingWarmRestarts: CosineAnnealingWarmRestarts,
}


class Schedule:
    """Schedulers as they will be, computed before anything is changed; ``change`` changes them.

    ``factors``: of the groups' rates, also of those that are cut off others, the ``origins``, and come last.
    """

    def __init__(self, schedulers: list[Any], factors: list[float], origins: list[int], speed: float) -> None:
        self.lists: dict[int, tuple[Any, Any]] = {}  # by their id, since some share one: as they are, as they become
        self.values: list[tuple[Any, str, Any]] = []  # scheduler, name, new value
        for each in schedulers:
            for name in PER_GROUP:
                if name in vars(each):
                    values = vars(each)[name]
                    longer = [*values, *(values[origin] for origin in origins)]
                    rates = name in RATES_PER_GROUP
                    new = [v * f for v, f in zip(longer, factors, strict=True)] if rates else longer
                    self.lists[id(values)] = (values, new)
        for each in schedulers:
            self.values.extend(self._floors(each, factors))
            self.values.extend(self._times(each, speed))

    def _floors(self, scheduler: Any, factors: list[float]) -> Iterator[tuple[Any, str, Any]]:
        floor = getattr(scheduler, "eta_min", 0)
        if floor and len(set(factors)) > 1:
            yield scheduler, "eta_mins", [floor * factor for factor in factors]
            yield scheduler, "__class__", FLOOR_PER_GROUP[type(scheduler)]
        elif floor:
            yield scheduler, "eta_min", floor * factors[0]

    def _times(self, scheduler: Any, speed: float) -> Iterator[tuple[Any, str, Any]]:
        for name, change in TIMES[type(scheduler)].items() if speed != 1 else ():
            now = getattr(scheduler, name)
            yield scheduler, name, change(self.lists.get(id(now), (now, now))[1], speed)

    def change(self) -> None:
        for values, scaled in self.lists.values():
            values[:] = scaled
        for each, name, value in self.values:
            setattr(each, name, value)


def family(scheduler: Any) -> list[Any]:
    """A scheduler and those that it is made of."""
    return [scheduler, *(member for part in getattr(scheduler, "_schedulers", ()) for member in family(part))]


def check_schedule(scheduler: Any, optimizer: Optimizer, speed: float) -> None:
    """Refuses what cannot be changed.

    Raises:
        TypeError: no scheduler, or none that is known.
        ValueError: it has stepped, or stands on another optimizer.
    """
    by_iterations = speed != 1 and getattr(scheduler, "scale_mode", "cycle") == "iterations"  # CyclicLR's function
    kind = f"{type(scheduler).__name__}{' scaled by iterations' * by_iterations}"
    if isinstance(scheduler, nn.Module | Optimizer | str):
        raise TypeError(
            f"apply takes a scheduler second, got a {kind}: apply(optimizer, scheduler, model); without a scheduler, "
            "apply(optimizer, model=model)."
        )
    if type(scheduler) not in TIMES or by_iterations:
        known = ", ".join(t.__name__ for t in TIMES)
        faster = f"{speed:g} times shorter" if speed > 1 else f"{1 / speed:g} times longer"
        raise TypeError(
            f"apply does not know what a {kind} counts in steps. Known: {known}. "
            + (f"Make it {faster} yourself and apply" if speed != 1 else "Apply")
            + " the recipe to the optimizer, before the scheduler is made."
        )
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ValueError(f"the {kind} stands on another optimizer.")
    if getattr(scheduler, "last_epoch", 0) > 0:
        raise ValueError(f"the {kind} has stepped already: apply a recipe before training.")
