"""The hooks of a LightningModule around the batches of a run, in Lightning's order.

Comes from: ``LightningTask.loop``. Goes to: ``trainer.py``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from batchnorm.racing.errors import RaceError
from batchnorm.racing.lightning_trainer import StandIn, overridden
from batchnorm.racing.loop import Loop


class LightningLoop(Loop):
    """Modes are the module's own, as Lightning leaves them: what it has put into eval stays there."""

    def __init__(self, model: Any, trainer: StandIn) -> None:
        super().__init__(model)
        self.module, self.trainer = model, trainer
        self.modes: dict[nn.Module, bool] = {}  # of training, while the network is being scored
        self.started = False
        self.batch: Any = None

    def to_train(self) -> None:
        for module, training in self.modes.items():
            module.training = training
        self.modes = {}

    def to_eval(self) -> None:
        self.modes = self.modes or {module: module.training for module in self.module.modules()}
        self.module.eval()

    def before_zero_grad(self, optimizer: Optimizer) -> None:
        self.module.on_before_zero_grad(optimizer)

    def before_batch(self, batch: Any, number: int) -> Any:
        self.trainer.number = number
        if not self.started:
            self.started = True
            self.module.on_fit_start()
            self.module.on_train_start()
        if self.trainer.batch_idx == 0:
            self.module.on_train_epoch_start()
        batch = transferred(self.module, self.trainer, batch)
        self.trainer.batch = self.batch = batch
        if self.module.on_train_batch_start(batch, self.trainer.batch_idx) == -1:
            raise RaceError("on_train_batch_start returned -1, to leave out the rest of an epoch: a race does not.")
        return batch

    def before_step(self, optimizer: Optimizer) -> None:
        self.module.on_after_backward()
        self.module.on_before_optimizer_step(optimizer)

    def after_batch(self) -> None:
        trainer, output = self.trainer, self.trainer.output
        outputs = dict(output) if isinstance(output, dict) else {"loss": output}
        outputs["loss"] = outputs["loss"].detach() / trainer.accumulate_grad_batches
        trainer.output, trainer.batch, trainer.after = None, self.batch, 1
        self.module.on_train_batch_end(outputs, self.batch, trainer.batch_idx)
        trainer.batch = self.batch = None
        if trainer.is_last_batch:
            self.module.on_train_epoch_end()
            trainer.end_of(trainer.in_training)
        trainer.number, trainer.after = trainer.number + 1, 0


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
            found = self.trainer.in_validation.values()
            self.trainer.end_of(self.trainer.in_validation)
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
    """What is logged in there is of the validation."""
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
