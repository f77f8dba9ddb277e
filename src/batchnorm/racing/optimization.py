"""The optimizer and schedule that a training has unless its task brings others, and what a contender makes of them.

Comes from: ``Task.optimizer``, ``Task.scheduler``, a contender's recipe. Goes to: ``trainer.py``.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from batchnorm.racing.calls import keywords_of
from batchnorm.racing.changes import has_batch_norm
from batchnorm.racing.errors import RaceError
from batchnorm.recipe.apply import RATES
from batchnorm.recipe.muon import Muon
from batchnorm.recipe.normalized import normalized, parameter_groups
from batchnorm.recipe.schedules import TIMES, family
from batchnorm.recipe.schedules import Schedule as InTime
from batchnorm.recipe.warm_up import UpAndDown
from batchnorm.surgery import insert

if TYPE_CHECKING:
    from batchnorm.racing.contenders import Contender
    from batchnorm.racing.task import Task

MOMENTUM = 0.9
WARM_UP = 0.3  # of a run's budget: where its learning rate has risen linearly to the initial one


def optimizer_of(task: Task, model: nn.Module) -> Optimizer:
    """The task's own, over a network's parameters, at the task's learning rate.

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
    factor = 1.0 if rate is None or given else rate / made.param_groups[0]["lr"]
    for group in made.param_groups if factor != 1 else ():
        group["lr"] *= factor
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
    """SGD with momentum; weight decay on weights, not on biases, gamma and beta."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    kinds = [[p for p in parameters if (p.ndim > 1) is weight] for weight in (True, False)]
    groups = [
        {"params": some, "weight_decay": decay}
        for some, decay in zip(kinds, (weight_decay, 0.0), strict=True) if some
    ]  # fmt: skip
    return SGD(groups, lr, MOMENTUM, fused=True)


def linear(optimizer: Optimizer, steps: int, warm_up: float = WARM_UP) -> LambdaLR:
    """The learning rate rises linearly over a share of the steps, and falls linearly to zero at their end."""
    return LambdaLR(optimizer, UpAndDown(steps, warm_up))


@dataclass
class Schedule:
    """A scheduler of the user's, stepped when it wants to be: after each step, epoch or evaluation."""

    scheduler: Any
    interval: str = "step"

    @classmethod
    def of(cls, made: Any) -> Schedule:
        """Of what ``Task.scheduler`` returned.

        Raises:
            RaceError: it is no scheduler, nor a dict of one and its interval.
        """
        row = made if isinstance(made, dict) else {"scheduler": made}
        own = cls(row.get("scheduler"), row.get("interval", "step"))
        if (
            "scheduler" not in row
            or not row.keys() <= {"scheduler", "interval"}
            or own.interval not in ("step", "epoch")
        ):
            raise RaceError(f'scheduler= gives a scheduler, or {{"scheduler": ..., "interval": "epoch"}} (got {made}).')
        if own.scheduler is not None and not callable(getattr(own.scheduler, "step", None)):
            raise RaceError(f"scheduler= must give one scheduler or None (got a {type(own.scheduler).__name__}).")
        return own

    @property
    def schedulers(self) -> list[Any]:
        """Torch's, none or several."""
        return [] if self.scheduler is None else [self.scheduler]

    def after_step(self, epochs_ended: int) -> None:
        """``epochs_ended``: by this step; more than one where a step accumulates several."""
        if self.scheduler is None or isinstance(self.scheduler, ReduceLROnPlateau):
            return
        for _ in range(1 if self.interval == "step" else epochs_ended):
            self.scheduler.step()

    def after_evaluation(self, score: float) -> None:
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(score)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.scheduler is None else self.scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state)


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
    able = all("nesterov" in g and g["momentum"] and not g["dampening"] for g in optimizer.param_groups)
    # The schedule is made over the contender's own budget; Nesterov's momentum is what only SGD has.
    changes = replace(recipe, decay_speed=1.0, nesterov=recipe.nesterov and able)
    told = model if contender.normalizes and recipe.learning_rate != 1 else None
    if scale == 1 and not changes.changes():
        return optimizer, schedule
    parts = [member for each in schedule.schedulers for member in family(each)]
    if not all(type(each) in TIMES for each in parts):  # of a class of the user's: it takes the rates that it finds

        def change(optimizer: Optimizer) -> None:
            _scale(optimizer, [], scale)
            if changes.changes():
                changes.apply(optimizer, model=told)

        return task.make_both(model, steps, change)
    _scale(optimizer, parts, scale)
    if changes.changes():
        changes.apply(optimizer, schedule.schedulers, told)
    return optimizer, schedule


def _muon(task: Task, contender: Contender, model: nn.Module, learning_rate: float) -> Optimizer:
    """The recipe's own. Without batch normalization the same layers are orthogonalized: those that would have it."""
    recipe, example = contender.recipe, task.example(model)
    if contender.normalizes:
        layers = normalized(model)
    elif has_batch_norm(model):
        layers = normalized(model, example)
    else:
        rows = insert(model, example).batchnorm_report.of("normalized")  # type: ignore[union-attr, operator]
        layers = [model.get_submodule(name) for name in rows]
    sgd_lr = recipe.sgd_lr * recipe.learning_rate
    groups = parameter_groups(model, layers, keep_norm=has_batch_norm(model))  # else it means something
    return Muon(groups, lr=learning_rate, sgd_lr=sgd_lr, clip=recipe.clip)


def _scale(optimizer: Optimizer, schedulers: list[Any], factor: float) -> None:
    """Multiply all learning rates, also those that schedulers keep."""
    if factor == 1:
        return
    for group in optimizer.param_groups:
        group |= {key: group[key] * factor for key in RATES if group.get(key) is not None}
    InTime(schedulers, [factor] * len(optimizer.param_groups), [], 1.0).change()
