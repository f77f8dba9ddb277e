"""The hooks of a LightningModule around the batches of a run, in Lightning's order."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from batchnorm.racing.errors import RaceError
from batchnorm.racing.lightning_logging import see_again, seen_by_metrics
from batchnorm.racing.lightning_schedule import LightningSchedule
from batchnorm.racing.lightning_trainer import StandIn, overridden
from batchnorm.racing.loop import Loop


class LightningLoop(Loop):
    """Modes are the module's own, as Lightning leaves them: what it has put into eval stays there.

    Args:
        model: the module, which has this trainer; its hooks at the training's start are called.
        trainer: where the run stands.
        schedule: whose schedulers on a plateau look at what training logs; None: there are no such.
    """

    def __init__(self, model: Any, trainer: StandIn, schedule: LightningSchedule | None) -> None:
        super().__init__(model)
        self.module, self.trainer, self.schedule = model, trainer, schedule
        self.modes: dict[nn.Module, bool] = {}  # of training, while the network is being scored
        self.module.on_fit_start()
        self.module.on_train_start()

    def to_train(self) -> None:
        for module, training in self.modes.items():
            module.training = training
        self.modes = {}

    def to_eval(self) -> None:
        self.modes = self.modes or self._modes()
        self.module.eval()

    def _modes(self) -> dict[nn.Module, bool]:
        return {module: module.training for module in self.module.modules()}

    def before_forward(self, optimizer: Optimizer) -> None:
        """The last step's gradients are there until ``before_backward``."""

    def before_batch(self, batch: Any, number: int) -> Any:
        trainer = self.trainer
        trainer.number = number
        if trainer.batch_idx == 0:
            self.module.on_train_epoch_start()
        trainer.batch = batch = transferred(self.module, trainer, batch)
        if self.module.on_train_batch_start(batch, trainer.batch_idx) == -1:
            raise RaceError("on_train_batch_start returned -1, to leave out the rest of an epoch: a race does not.")
        return batch

    def before_backward(self, optimizer: Optimizer) -> None:
        self.module.on_before_zero_grad(optimizer)
        optimizer.zero_grad()

    def after_backward(self) -> None:
        self.module.on_after_backward()

    def to_clip(self, optimizer: Optimizer) -> Iterable[nn.Parameter]:
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def before_step(self, optimizer: Optimizer) -> None:
        self.module.on_before_optimizer_step(optimizer)

    def after_batch(self) -> None:
        trainer, output = self.trainer, self.trainer.output
        outputs = dict(output) if isinstance(output, dict) else {"loss": output}
        outputs["loss"] = outputs["loss"].detach() / trainer.accumulate_grad_batches
        trainer.output, trainer.after = None, 1
        self.module.on_train_batch_end(outputs, trainer.batch, trainer.batch_idx)
        trainer.end_of_batch()
        self._on_plateau("step")
        ends = trainer.epoch_ends
        if ends:
            self.module.on_train_epoch_end()
            trainer.end_of_epoch()
        self._on_plateau("epoch", ends)
        trainer.number, trainer.after = trainer.number + 1, 0

    def _on_plateau(self, interval: str, epoch_is_over: bool = False) -> None:
        if self.schedule is not None:
            self.schedule.after_training(interval, epoch_is_over)

    def state_dict(self) -> dict[str, Any]:
        """The logged values, the metrics' states, the parts in training mode, and what the module adds itself."""
        modes = self.modes or self._modes()
        own = {"epoch": self.trainer.current_epoch, "global_step": self.trainer.global_step}
        own["state_dict"] = self.module.state_dict()
        self.module.on_save_checkpoint(own)
        return {
            "trainer": self.trainer.state_dict(),
            "metrics": seen_by_metrics(self.module),
            "modes": {name: modes[module] for name, module in self.module.named_modules() if module in modes},
            "own": own,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.on_load_checkpoint(state["own"])
        self.trainer.load_state_dict(state["trainer"], self.module.device)
        see_again(self.module, state["metrics"])
        for name, module in self.module.named_modules():
            module.training = state["modes"].get(name, module.training)


class Validation:
    """A validation epoch, then what was logged in it."""

    def __init__(self, module: Any, trainer: StandIn, batches: Iterable[Any], metric: str, who: str) -> None:
        self.module, self.trainer, self.metric, self.who = module, trainer, metric, who
        with _validating(trainer):
            module.on_validation_start()
            module.on_validation_epoch_start()
            for number, batch in enumerate(batches):
                batch = transferred(module, trainer, batch)
                trainer.batch = batch
                module.on_validation_batch_start(batch, number)
                output = called(module.validation_step, batch, number)
                module.on_validation_batch_end(output, batch, number)
                trainer.batch = None

    def update(self, output: Any, target: Any) -> None:
        raise NotImplementedError("the module has seen the batches")

    def logged(self) -> dict[str, Any]:
        """By name."""
        with _validating(self.trainer), torch.no_grad():
            self.module.on_validation_epoch_end()
            found = self.trainer.end_of_epoch()
            self.module.on_validation_end()
        return found

    def compute(self) -> float:
        logged = self.logged()
        value = logged.get(self.metric, logged.get(self.metric.removesuffix("_epoch")))
        if value is None:
            names = ", ".join(logged) or "nothing"
            raise RaceError(f"{self.who}: validation logs no {self.metric!r}. It logs: {names}.")
        return float(value)


@contextmanager
def _validating(trainer: StandIn) -> Iterator[None]:
    """Count the values logged inside as the validation's."""
    trainer.training = False
    try:
        yield
    finally:
        trainer.training, trainer.batch = True, None


def called(step: Callable[..., Any], batch: Any, number: int) -> Any:
    """A step of the module, which takes its batch's number or does not."""
    parameters = inspect.signature(step).parameters.values()
    several = len([p for p in parameters if p.kind is not p.KEYWORD_ONLY]) > 1
    return step(batch, number) if several or any(p.kind is p.VAR_POSITIONAL for p in parameters) else step(batch)


def transferred(module: Any, trainer: StandIn, batch: Any) -> Any:
    """Through the transfer hooks, the data module's where it has its own; the batch is on its device already."""
    for hook in ("on_before_batch_transfer", "on_after_batch_transfer"):
        holder = trainer.datamodule if overridden(trainer.datamodule, hook) else module
        batch = getattr(holder, hook)(batch, 0)
    return batch
