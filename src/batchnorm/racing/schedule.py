"""The schedule of a run: the task's own, which ends with the run's steps, whatever numbers are written in it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from batchnorm.racing.errors import RaceError
from batchnorm.recipe.warm_up import UpAndDown

if TYPE_CHECKING:
    from batchnorm.racing.task import Task

WARM_UP = 0.3  # of a run's budget: where its learning rate has risen linearly to the initial one


def linear(optimizer: Optimizer, steps: int, warm_up: float = WARM_UP) -> LambdaLR:
    """The learning rate rises linearly over a share of the steps, and falls linearly to zero at their end."""
    return LambdaLR(optimizer, UpAndDown(steps, warm_up))


@dataclass
class Schedule:
    """A scheduler of the user's, stepped when it wants to be: after each step, epoch or evaluation.

    ``pace``: how often it is stepped per step of the run.
    """

    scheduler: Any
    interval: str = "step"
    pace: Fraction = Fraction(1)

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

    def after_step(self, step: int) -> None:
        """``step``: of the run, from 1 on."""
        if self.scheduler is None or isinstance(self.scheduler, ReduceLROnPlateau):
            return
        for _ in range(math.floor(step * self.pace) - math.floor((step - 1) * self.pace)):
            self.scheduler.step()

    def after_evaluation(self, score: float) -> None:
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(score)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.scheduler is None else self.scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state)


def schedule_of(task: Task, model: nn.Module, optimizer: Optimizer, steps: int) -> Schedule:
    """The task's own over a run: made for the run's steps, which it ends with.

    One with fixed numbers, which does not hang on the steps that it is given, is made for the whole training and goes
    by the run's clock: in a sixth of the steps each step is six of its, and a sixth of an epoch one of its epochs.
    """
    whole = round(task.steps * task.batch_ratio)  # in batches of the size that the numbers are for
    other = whole if whole != steps else 2 * steps
    faster = Fraction(task.steps, steps)
    as_it_is = task.scheduler is None or faster == task.batch_ratio == 1 or _hangs_on_steps(task, model, steps, other)
    own = Schedule.of(task.make_scheduler(optimizer, steps if as_it_is else whole))
    by_epochs = own.interval == "epoch"
    pace = Fraction(task.accumulate, task.batches_per_epoch) if by_epochs else Fraction(1)
    return replace(own, pace=pace if as_it_is else pace * faster * (1 if by_epochs else task.batch_ratio))


def _hangs_on_steps(task: Task, model: nn.Module, steps: int, other: int) -> bool:
    """Whether the learning rates over a run are others where the scheduler is told another number of steps."""
    courses = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a scheduler that steps without its optimizer
        try:
            for told in (steps, other):
                optimizer = task.make_optimizer(model)
                scheduler = Schedule.of(task.make_scheduler(optimizer, told)).scheduler
                if scheduler is None or isinstance(scheduler, ReduceLROnPlateau):  # evaluations are its clock
                    return True
                courses.append(course(optimizer, Schedule(scheduler), steps))
        except Exception:  # said where it is made for the run
            return True
        return any(own != others for own, others in zip_longest(*courses))


def course(optimizer: Optimizer, schedule: Schedule, steps: int) -> Iterator[list[float]]:
    """The groups' learning rates before each of so many steps, up to where the scheduler refuses; nothing is trained.

    Optimizer and schedule are used up.
    """
    for step in range(1, steps + 1):
        yield [float(group["lr"]) for group in optimizer.param_groups]  # of tensors too
        try:
            schedule.after_step(step)
        except Exception:
            return


def mean_rates(optimizer: Optimizer, schedule: Schedule, steps: int) -> dict[int, float]:
    """By parameter; optimizer and schedule are used up."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a scheduler that steps without its optimizer
        rates = [*course(optimizer, schedule, steps)]
    means = [sum(column) / len(rates) for column in zip(*rates, strict=True)]
    return {id(p): mean for group, mean in zip(optimizer.param_groups, means, strict=True) for p in group["params"]}
