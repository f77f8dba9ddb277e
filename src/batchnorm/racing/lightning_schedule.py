"""What ``configure_optimizers`` returns, in all its forms; its schedules run faster in a shorter run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import optim
from torch.optim import Optimizer

from batchnorm.racing.errors import RaceError
from batchnorm.racing.lightning_trainer import StandIn
from batchnorm.racing.optimization import Schedule
from batchnorm.recipe.schedules import TIMES, family

FORMS = 'an optimizer, ([optimizer], [scheduler]) or {"optimizer": ..., "lr_scheduler": ...}'


@dataclass
class Row:
    """A scheduler as Lightning's ``lr_scheduler`` dict has it; ``done``: how often it has been stepped."""

    scheduler: Any
    interval: str = "epoch"
    frequency: int = 1
    monitor: str | None = None
    strict: bool = True
    on_plateau: bool = False
    done: int = 0


def configured(made: Any, who: str) -> tuple[Optimizer, list[Row]]:
    """The optimizer and the schedulers that ``configure_optimizers`` returned.

    Raises:
        RaceError: several optimizers, none, or no form that Lightning documents.
    """
    monitor = None
    schedulers: Any = []
    if isinstance(made, list | tuple) and len(made) == 1 and isinstance(made[0], dict):
        made = made[0]
    if isinstance(made, dict) and "optimizer" in made:
        optimizers, monitor = [made["optimizer"]], made.get("monitor")
        schedulers = [made["lr_scheduler"]] if made.get("lr_scheduler") is not None else []
    elif isinstance(made, list | tuple) and len(made) == 2 and isinstance(made[0], list):
        optimizers, schedulers = made[0], made[1] if isinstance(made[1], list | tuple) else [made[1]]
    else:
        optimizers = [*made] if isinstance(made, list | tuple) else [made]
    if len(optimizers) > 1:
        raise RaceError(f"{who}: configure_optimizers returned {len(optimizers)} optimizers; a race is of one.")
    if not optimizers or not isinstance(optimizers[0], Optimizer):
        kind = "nothing" if made is None else f"a {type(made).__name__}"
        raise RaceError(f"{who}: configure_optimizers returned {kind}; it must be {FORMS}.")
    return optimizers[0], [_row(each, monitor, who) for each in schedulers]


def _row(given: Any, monitor: str | None, who: str) -> Row:
    config = dict(given) if isinstance(given, Mapping) else {"scheduler": given}
    if config.get("scheduler") is None:
        raise RaceError(f'{who}: an "lr_scheduler" dict of configure_optimizers has no "scheduler".')
    row = Row(
        config["scheduler"],
        config.get("interval", "epoch"),
        config.get("frequency", 1),
        config.get("monitor", monitor),
        config.get("strict", True),
        config.get("reduce_on_plateau", isinstance(config["scheduler"], optim.lr_scheduler.ReduceLROnPlateau)),
    )
    if row.interval not in ("step", "epoch") or not (isinstance(row.frequency, int) and row.frequency > 0):
        raise RaceError(
            f'{who}: the interval of a scheduler is "step" or "epoch" and its frequency a positive whole number (got '
            f"{row.interval!r} and {row.frequency!r})."
        )
    if row.on_plateau and row.monitor is None:
        kind = type(row.scheduler).__name__
        raise RaceError(f'{who}: configure_optimizers must say what {kind} looks at: "monitor".')
    return row


class LightningSchedule(Schedule):
    """Schedulers as the module made them for its whole training, stepped so that they end with the run.

    Of a run with a sixth of the training's steps each step is six of the schedule's, a sixth of an epoch is one of its.
    So what has fixed numbers (``T_max=100``) and what asks the trainer end alike, whatever the scheduler's class.

    Args:
        rows: schedulers.
        whole: steps of the training that they are made for.
        steps: of the run.
        trainer: has the batches per epoch, and what was logged.
    """

    def __init__(self, rows: list[Row], whole: int, steps: int, trainer: StandIn) -> None:
        super().__init__([row.scheduler for row in rows])
        self.rows, self.whole, self.steps, self.trainer = rows, whole, steps, trainer
        self.step = self.evaluations = 0

    @property
    def schedulers(self) -> list[Any]:
        return list(self.scheduler)

    def after_step(self, epochs_ended: int) -> None:
        self.step += 1
        for row in self.rows:
            while not row.on_plateau and row.done < self._due(row):
                row.scheduler.step()
                row.done += 1

    def _due(self, row: Row) -> int:
        """How often it is stepped until now. Lightning's frequency of steps counts batches, from each epoch's first."""
        epochs = self.trainer.epochs
        time = min(self.step, self.steps) * self.whole // self.steps
        if row.interval == "epoch":
            return time // epochs.steps // row.frequency
        return epochs.stepped(time, row.frequency)

    def after_training(self, interval: str, epoch_is_over: bool) -> None:
        """Those on a plateau of what training logs: as often as others, but once where a short run owes several.

        In the middle of an epoch of the run, where a shorter one has an epoch of the schedule, they look at what the
        run's epoch comes to until now.
        """
        for row in self.rows:
            if not row.on_plateau or row.interval != interval or row.monitor in self.trainer.of_validation:
                continue
            assert row.monitor is not None
            due, known = self._due(row), self.trainer.known if epoch_is_over else {}
            value = known.get(row.monitor, self.trainer.monitored(row.monitor, interval == "step"))
            if due > row.done and value is not None:
                row.scheduler.step(value)
                row.done = due

    def after_evaluation(self, score: float) -> None:
        """Those on a plateau of what validation logs."""
        self.evaluations += 1
        trainer = self.trainer
        an_epoch_is_over = self.step >= min(trainer.epochs.steps, self.steps)  # until then its values are not known
        for row in self.rows:
            if not row.on_plateau or row.monitor in trainer.of_training - trainer.of_validation:
                continue
            if row.monitor in trainer.of_validation:
                if self.evaluations % row.frequency == 0:
                    row.scheduler.step(trainer.known[row.monitor])
            elif row.strict and an_epoch_is_over:
                raise RaceError(
                    f"{type(row.scheduler).__name__} looks at {row.monitor!r}, which the module does not log. It logs: "
                    f"{', '.join(sorted(trainer.known)) or 'nothing'}."
                )

    def state_dict(self) -> dict[str, Any]:
        rows = [{"done": row.done, "state": row.scheduler.state_dict()} for row in self.rows]
        return {"step": self.step, "evaluations": self.evaluations, "rows": rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.evaluations = state["step"], state["evaluations"]
        for row, stored in zip(self.rows, state["rows"], strict=True):
            row.done = stored["done"]
            row.scheduler.load_state_dict(stored["state"])


def changed_first(optimizer: Optimizer, schedulers: list[Any], change: Callable[[Optimizer], None], who: str) -> None:
    """The optimizer changed as if before its schedulers, of classes of the user's, were made.

    Raises:
        RaceError: schedulers that do not keep their rates in ``base_lrs``, as torch's do, or are made of others.
    """
    for each in schedulers:
        if not hasattr(each, "base_lrs") or len(family(each)) > 1 or type(each) in TIMES:
            raise RaceError(
                f"{who}: it is not known how a {type(each).__name__} beside others keeps its learning rates, which "
                "this contender changes. A subclass of torch's LRScheduler that computes them from base_lrs will do."
            )
    for group in optimizer.param_groups:
        group["lr"] = group.pop("initial_lr", group["lr"])
    change(optimizer)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    for each in schedulers:
        each.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        each.last_epoch, each._step_count = -1, 0
        each.step()  # as each does when it is made
