"""A user's Lightning objects, checked: the module, its loaders, the metric that it logs."""

from __future__ import annotations

import importlib.util
import inspect
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from batchnorm.population.batches import placed
from batchnorm.racing.errors import RaceError
from batchnorm.racing.examples import Loader
from batchnorm.racing.lightning_loop import Validation
from batchnorm.racing.lightning_schedule import LightningSchedule
from batchnorm.racing.lightning_trainer import lightning_class, overridden

if TYPE_CHECKING:
    from batchnorm.racing.lightning_task import LightningTask

FALLS = re.compile(
    r"loss|error|perplexity|(^|[^a-z])(err|r?mse|r?msle|mae|mape|nll|bce|ppl|bpd|wer|cer|fid|ece|brier)([^a-z]|$)"
)
REFUSED = ("optimizer_step", "optimizer_zero_grad", "lr_scheduler_step", "backward", "configure_gradient_clipping")
LEFT_OUT = (
    "on_before_backward", "on_train_end", "on_fit_end", "teardown", "on_validation_model_zero_grad",
    "on_validation_model_eval", "on_validation_model_train", "transfer_batch_to_device",
)  # fmt: skip


def checked(module: Any, name: str | None) -> Any:
    """A LightningModule whose training the race can follow.

    Raises:
        RaceError: it is none, or takes its steps itself, or lacks a part.
        ModuleNotFoundError: Lightning is missing.
    """
    kind = type(module).__name__
    who = f"Task {name or kind!r}"
    if lightning_class(module) is None:
        if not any(importlib.util.find_spec(each) for each in ("lightning", "pytorch_lightning")):
            raise ModuleNotFoundError("Task.from_lightning needs Lightning: pip install 'batchnorm[lightning]'")
        raise RaceError(f"{who}: module_factory must return a LightningModule (got a {kind}).")
    if not module.automatic_optimization:
        raise RaceError(f"{who}: {kind} has automatic_optimization = False (manual); a race takes the steps itself.")
    for method in ("training_step", "validation_step", "configure_optimizers"):
        if not overridden(module, method):
            raise RaceError(f"{who}: {kind} has no {method}.")
    own = [method for method in REFUSED if overridden(module, method)]
    if own:
        instead = " Pass clip_grad_norm= instead." * (own == ["configure_gradient_clipping"])
        raise RaceError(f"{who}: {kind} has its own {', '.join(own)}, which a race does not call.{instead}")
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise RaceError(f"{who}: training_step of {kind} takes dataloader_iter; a race gives it batches.")
    return module


def loaders(who: str, data: Any, module: Any) -> tuple[Callable[[], Any], Callable[[], Any], Any]:
    """Functions that make the loaders for training and validation, and the data module if there is one."""
    if isinstance(data, tuple | list):
        if len(data) != 2:
            raise RaceError(f"{who}: data is a pair of loaders, for training and validation (got {len(data)}).")
        train, test = (each if callable(each) and not _is_loader(each) else _always(each) for each in data)
        return _one(f"{who}: train", train), _one(f"{who}: validation", test), None
    source = module if data is None else data
    names = ("train_dataloader", "val_dataloader")
    if lightning_class(source) is None or not all(overridden(source, name) for name in names):
        what = f"{type(source).__name__} has no train_dataloader and val_dataloader of its own"
        raise RaceError(f"{who}: {what}: pass a LightningDataModule, or a pair of loaders.")
    source.prepare_data()
    source.setup("fit")
    train, test = (_one(f"{who}: {name}", getattr(source, name)) for name in names)
    return train, test, data


def _is_loader(given: Any) -> bool:
    return isinstance(given, DataLoader) or hasattr(given, "__iter__")


def _always(loader: Any) -> Callable[[], Any]:
    return lambda: loader


def _one(what: str, make: Callable[[], Any]) -> Callable[[], Any]:
    """The same, of which a list of one gives that one."""

    def made() -> Any:
        found = make()
        found = found[0] if isinstance(found, list | tuple) and len(found) == 1 else found
        if found is None or isinstance(found, list | tuple | dict):
            kind = "nothing" if found is None else f"{len(found)} loaders"
            raise RaceError(f"{what} gives {kind}; a race is of one loader.")
        return found

    return made


def metric_and_direction(task: LightningTask, asked: str | None) -> tuple[str, bool]:
    """The metric, and whether it falls: a module is validated on one batch, to see what it logs.

    Raises:
        RaceError: it is not logged; several are, and nothing tells which of them it is.
    """
    who = f"Task {task.name!r}"
    assert isinstance(task.testing, Loader)
    with torch.random.fork_rng(devices=[]):
        module: Any = task.model()
        optimizer, schedule = task.make_both(module, task.steps)
        trainer = task.loop(module, optimizer, schedule, task.steps).trainer
        module.eval()
        with torch.no_grad():
            batch = placed(next(task.testing.epoch(0, 0)), "cpu")
            validation = Validation(module, trainer, [batch], "", who)
            objects = {name: entry.metric for name, entry in trainer.in_validation.entries.items()}
            logged = validation.logged()
            names = [name for name in logged if name.removesuffix("_epoch") not in logged.keys() - {name}]
    callbacks = module.configure_callbacks()
    callbacks = [*callbacks] if isinstance(callbacks, list | tuple) else [callbacks]
    _say_what_is_left_out(who, module, callbacks)
    rows = schedule.rows if isinstance(schedule, LightningSchedule) else []
    monitors = [getattr(each, "monitor", None) for each in (*callbacks, *rows)]
    found = asked or next((m for m in monitors if m in names), None) or (names[0] if len(names) == 1 else None)
    listed = ", ".join(sorted(names)) or "nothing"
    if found is None:
        raise RaceError(f"{who}: which metric is scored? metric= is one of those that validation logs: {listed}.")
    if found not in names and found.removesuffix("_epoch") not in names:
        raise RaceError(f"{who}: validation logs no {found!r}. It logs: {listed}.")
    higher = getattr(objects.get(found), "higher_is_better", None)
    return found, bool(FALLS.search(found.lower())) if higher is None else not higher


def _say_what_is_left_out(who: str, module: Any, callbacks: list[Any]) -> None:
    left = [type(each).__name__ for each in callbacks] + [name for name in LEFT_OUT if overridden(module, name)]
    if left:
        warnings.warn(f"{who}: the race leaves out {', '.join(left)}.", stacklevel=5)
