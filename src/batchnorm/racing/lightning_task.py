"""A LightningModule as a task of the race: its own steps, data, optimizer, schedules and logged metric.

Lightning's trainer is not there; what a module may ask of it is in ``lightning_trainer.py``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from batchnorm.population.batches import placed
from batchnorm.racing.calls import NotCalled, arguments_of
from batchnorm.racing.errors import RaceError
from batchnorm.racing.examples import Loader
from batchnorm.racing.lightning_inputs import checked, loaders, metric_and_direction
from batchnorm.racing.lightning_logging import Logged, see_again, seen_by_metrics
from batchnorm.racing.lightning_loop import LightningLoop, Validation, called, transferred
from batchnorm.racing.lightning_schedule import LightningSchedule, Row, changed_first, configured
from batchnorm.racing.lightning_steps import Epochs
from batchnorm.racing.lightning_trainer import StandIn, attach, overridden
from batchnorm.racing.metrics import Metric
from batchnorm.racing.optimization import Schedule
from batchnorm.racing.task import Task
from batchnorm.surgery.copies import copied


@dataclass(frozen=True)
class LightningTask(Task):
    """See ``Task.from_lightning``. ``metric``: the name under which the module logs it."""

    datamodule: Any = None

    def _check_metric(self, who: str) -> None:
        if not isinstance(self.metric, str):
            raise RaceError(f"{who}: metric is the name under which validation_step logs it (got {self.metric!r}).")

    @property
    def scores_percent(self) -> bool:
        """Never: a name says nothing of what is logged under it."""
        return False

    @property
    def _who(self) -> str:
        return f"Task {self.name!r}"

    def stand_in(self, steps: int) -> StandIn:
        """A new one, for a run of so many steps."""
        assert isinstance(self.training, Loader)
        return _stand_in(self, self.training.batches, steps, self.datamodule)

    @functools.cached_property
    def base_rate(self) -> float:
        with torch.random.fork_rng(devices=[]):
            group = self.make_both(self.model(), self.steps)[0].param_groups[0]
        return float(group.get("max_lr", group.get("initial_lr", group["lr"])))

    def make_both(
        self, model: nn.Module, steps: int, change: Callable[[Optimizer], None] | None = None
    ) -> tuple[Optimizer, Schedule]:
        """As for the whole training: the module is told of all its steps, and the schedule's clock does the rest."""
        trainer = self.stand_in(self.steps)
        attach(model, trainer)
        optimizer, rows = configured(model.configure_optimizers(), self._who)  # type: ignore[operator]
        if change is not None:
            changed_first(optimizer, [row.scheduler for row in rows], change, self._who)
        return optimizer, LightningSchedule(rows, self.steps, steps, trainer)

    def loop(self, model: nn.Module, optimizer: Optimizer, schedule: Schedule, steps: int) -> LightningLoop:
        trainer = self.stand_in(steps)
        trainer.optimizers = [optimizer]
        trainer.lr_scheduler_configs = [Row(each) for each in schedule.schedulers]
        if isinstance(schedule, LightningSchedule):
            schedule.trainer, trainer.lr_scheduler_configs = trainer, schedule.rows
        attach(model, trainer)
        return LightningLoop(model, trainer, schedule if isinstance(schedule, LightningSchedule) else None)

    def batches_until(self, step: int) -> int:
        """A step ends with its epoch."""
        assert isinstance(self.training, Loader)
        return Epochs(self.training.batches, self.accumulate).batches_until(step)

    def training_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """What ``training_step`` returns, or the ``"loss"`` in it."""
        module: Any = model
        trainer: StandIn = module.trainer
        trainer.output = called(module.training_step, batch, trainer.batch_idx)
        loss = trainer.output.get("loss") if isinstance(trainer.output, dict) else trainer.output
        if not isinstance(loss, Tensor):
            raise RaceError(
                f"{self._who}: training_step must return the loss, a tensor, or a dict with 'loss' (got "
                f"{type(trainer.output).__name__})."
            )
        return loss

    def output(self, model: nn.Module, batch: Any) -> Any:
        """A training step's forward pass, for the population statistics: nothing is logged."""
        trainer: StandIn = model.trainer  # type: ignore[assignment]
        seen, kept = seen_by_metrics(model), (trainer.in_training, trainer.known, trainer.of_training)
        trainer.in_training, trainer.known, trainer.of_training = Logged(), {}, set()
        try:
            trainer.batch = transferred(model, trainer, batch)
            return self.training_loss(model, trainer.batch)
        finally:
            trainer.batch = None
            trainer.in_training, trainer.known, trainer.of_training = kept
            see_again(model, seen)

    def example(self, model: nn.Module) -> Any:
        """What ``training_step`` calls the module with; else its ``example_input_array``, else a batch's first part."""
        who = type(model).__name__
        if not overridden(model, "forward"):
            raise RaceError(
                f"{self._who}: {who} has no forward, by which contenders see its network: give it one, and let "
                "training_step call self(x)."
            )
        batch = placed(self.first_batch(), "cpu")
        with torch.random.fork_rng(devices=[]):
            twin = copied(model)
            loop = self.loop(twin, *self.make_both(twin, self.steps), self.steps)  # training_step may ask for all of it
            batch_of_its_own = loop.before_batch(batch, 0)
            with contextlib.suppress(NotCalled):
                return arguments_of(twin, lambda: self.training_loss(twin, batch_of_its_own))
        given = model.example_input_array
        if given is not None:
            return given
        first = batch[0] if isinstance(batch, tuple | list) else batch
        if isinstance(first, Tensor):
            return first
        raise RaceError(
            f"{self._who}: training_step does not call self(...), and a batch does not begin with a tensor: set "
            f"self.example_input_array of {who} to what its forward takes."
        )

    def measured(self, model: nn.Module, batches: Iterable[Any]) -> Metric:
        trainer: StandIn = model.trainer  # type: ignore[assignment]
        return Validation(model, trainer, batches, self.metric, self._who)


def from_lightning(
    module_factory: Callable[..., Any],
    data: Any,
    *,
    name: str | None,
    steps: int | None,
    max_epochs: int | None,
    metric: str | None,
    lower_is_better: bool | None,
    **fields: Any,
) -> LightningTask:
    """See ``Task.from_lightning``."""
    if not callable(module_factory) or isinstance(module_factory, nn.Module):
        raise RaceError("from_lightning: module_factory must be a function that returns a new LightningModule.")
    if (steps is None) == (max_epochs is None):
        raise RaceError("from_lightning: how long is the training? Give steps= or max_epochs=, one of them.")
    with torch.random.fork_rng(devices=[]):
        module = checked(module_factory(), name)
    name = name or type(module).__name__
    who = f"Task {name!r}"
    train, test, datamodule = loaders(who, data, module)
    batches, accumulate = Loader(f"{who}: train", train).batches, fields["accumulate"]
    if steps is None:
        if not (isinstance(max_epochs, int) and max_epochs > 0):
            raise RaceError(f"{who}: max_epochs must be a positive whole number (got {max_epochs!r}).")
        steps = max_epochs * Epochs(batches, accumulate).steps

    def make(**changes: Any) -> Any:
        made = checked(module_factory(**changes), name)
        attach(made, _stand_in(task, batches, task.steps, datamodule))
        made.setup("fit")
        made.configure_model()
        return made

    make.__wrapped__ = module_factory  # type: ignore[attr-defined]  # whose keywords the contenders may set
    task = LightningTask(name, make, train, test, metric=metric or "", steps=steps, datamodule=datamodule, **fields)
    found, falls = metric_and_direction(task, metric)
    task = replace(task, metric=found, lower_is_better=falls if lower_is_better is None else lower_is_better)
    return task


def _stand_in(task: LightningTask, batches: int, steps: int, datamodule: Any) -> StandIn:
    precision = {False: "32-true", torch.float16: "16-mixed"}.get(task.mixed_precision, "bf16-mixed")
    return StandIn(steps, batches, task.accumulate, datamodule, task.clip_grad_norm, precision)
