"""What a LightningModule sees of its trainer in a race: a small stand-in, and what the module logs.

Comes from: ``lightning_task.py``. Goes to: the module's ``self.trainer`` and ``self.log``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.racing.errors import RaceError
from batchnorm.racing.metrics import count_of, is_object

ALONE = {
    "world_size": 1, "num_nodes": 1, "num_devices": 1, "global_rank": 0, "local_rank": 0, "node_rank": 0,
    "is_global_zero": True, "logger": None, "log_dir": None, "checkpoint_callback": None,
    "early_stopping_callback": None, "progress_bar_callback": None, "sanity_checking": False, "testing": False,
    "predicting": False, "fast_dev_run": False,
    "barebones": False, "interrupted": False, "ckpt_path": None, "min_epochs": None, "min_steps": None,
    "check_val_every_n_epoch": 1, "limit_train_batches": 1.0, "limit_val_batches": 1.0, "overfit_batches": 0.0,
    "gradient_clip_algorithm": "norm", "log_every_n_steps": 50,
}  # fmt: skip


class NoSuchAttribute(RaceError, AttributeError):
    """So that ``hasattr`` and ``getattr`` with a default are answered too."""


class Logged:
    """What is logged in an epoch: tensors averaged over batches by their size, torchmetrics as they are at its end."""

    def __init__(self) -> None:
        self.reductions: dict[str, tuple[Any, float, float]] = {}  # how, the sum (or highest, lowest), the weight
        self.metrics: dict[str, Any] = {}

    def add(self, name: str, value: Any, reduce: Any, weight: float) -> None:
        if is_object(value):
            self.metrics[name] = value
            return
        how = getattr(reduce, "__name__", reduce)
        combine = {"mean": _weighed, "sum": _summed, "max": _highest, "min": _lowest, "amax": _highest, "amin": _lowest}
        if how not in combine:
            raise RaceError(f"self.log({name!r}, reduce_fx={how}): a race knows mean, sum, max and min.")
        _, total, weights = self.reductions.get(name, (how, None, 0))
        number = float(value)
        self.reductions[name] = how, combine[how](total, number, weight), weights + weight

    def values(self) -> dict[str, Any]:
        """By name, at the epoch's end."""
        means = {name: s / w if how == "mean" else s for name, (how, s, w) in self.reductions.items()}
        return means | {name: metric.compute() for name, metric in self.metrics.items()}

    def reset(self) -> None:
        for metric in self.metrics.values():
            metric.reset()
        self.__init__()  # type: ignore[misc]


def _weighed(total: float | None, value: float, weight: float) -> float:
    return (total or 0.0) + value * weight


def _summed(total: float | None, value: float, weight: float) -> float:
    return (total or 0.0) + value


def _highest(total: float | None, value: float, weight: float) -> float:
    return value if total is None else max(total, value)


def _lowest(total: float | None, value: float, weight: float) -> float:
    return value if total is None else min(total, value)


@dataclass
class StandIn:
    """In the place of ``self.trainer``: how long the run is and where it stands; anything else is an error by name.

    ``steps``: of the optimizer, of the whole run; ``batches``: per epoch, ``number``: since the run began.
    """

    steps: int
    batches: int
    accumulate_grad_batches: int = 1
    datamodule: Any = None
    gradient_clip_val: float | None = None
    precision: str = "32-true"
    number: int = 0
    after: int = 0  # 1 when the step of that batch has been taken
    training: bool = True
    should_stop: bool = False
    optimizers: list[Any] = field(default_factory=list)
    lr_scheduler_configs: list[Any] = field(default_factory=list)
    callback_metrics: dict[str, Any] = field(default_factory=dict)
    batch: Any = None  # that the module is called with; None in hooks of a whole epoch
    output: Any = None  # of its step
    in_training: Logged = field(default_factory=Logged)
    in_validation: Logged = field(default_factory=Logged)

    def __getattr__(self, name: str) -> Any:
        if name in ALONE:
            return ALONE[name]
        if name in ("callbacks", "loggers", "checkpoint_callbacks"):
            return []
        raise NoSuchAttribute(
            f"the module asks for self.trainer.{name}, which there is not in a race. There are max_epochs, max_steps, "
            "estimated_stepping_batches, current_epoch, global_step, datamodule; one process, no logger."
        )

    def __deepcopy__(self, memo: Any) -> StandIn:
        """A copy of the module logs in the same run."""
        return self

    @property
    def validating(self) -> bool:
        return not self.training

    @property
    def evaluating(self) -> bool:
        return not self.training

    @property
    def estimated_stepping_batches(self) -> int:
        return self.steps

    @property
    def max_steps(self) -> int:
        return self.steps

    @property
    def max_epochs(self) -> int:
        return -(-self.steps * self.accumulate_grad_batches // self.batches)

    @property
    def num_training_batches(self) -> int:
        return self.batches

    @property
    def current_epoch(self) -> int:
        return self.number // self.batches

    @property
    def global_step(self) -> int:
        return (self.number + self.after) // self.accumulate_grad_batches

    @property
    def batch_idx(self) -> int:
        return self.number % self.batches

    @property
    def is_last_batch(self) -> bool:
        return self.batch_idx == self.batches - 1

    @property
    def logged_metrics(self) -> dict[str, Any]:
        return self.callback_metrics

    @property
    def strategy(self) -> Any:
        """What ``self.optimizers()`` and ``self.all_gather`` ask."""
        return SimpleNamespace(
            _lightning_optimizers=self.optimizers,
            all_gather=lambda value, **_: value,
            barrier=lambda *_: None,
            broadcast=lambda value, *_: value,
            reduce=lambda value, *_, **__: value,
        )

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: Any = "mean",
        *,
        batch_size: int | None = None,
        **_: Any,
    ) -> None:
        """In the place of the module's ``log``."""
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"self.log({name!r}, ...): the tensor must have a single element, or take its mean.")
            value = value.detach().clone()
        whole = self.batch is None  # a hook at an epoch's end
        if self.training and not (on_epoch or whole or is_object(value)):
            self.callback_metrics[name] = value
            return
        weight = 1 if whole else count_of(self.batch) if batch_size is None else batch_size
        with torch.no_grad():
            (self.in_training if self.training else self.in_validation).add(name, value, reduce_fx, weight)

    def end_of(self, logged: Logged) -> None:
        """An epoch is over: what was logged in it is known, and forgotten."""
        self.callback_metrics.update(logged.values())
        logged.reset()


def attach(module: nn.Module, trainer: StandIn) -> None:
    """The module, and LightningModules in it, have this trainer, and log to it."""
    for each in module.modules():
        if lightning_class(each) is not None:
            each._trainer = trainer  # type: ignore[assignment]
            each.log = trainer.log  # type: ignore[assignment]
    if trainer.datamodule is not None:
        trainer.datamodule.trainer = trainer


def lightning_class(module: Any) -> type | None:
    """Lightning's own class, of ``lightning`` or of ``pytorch_lightning``; None if it is another kind of thing."""
    own = ("LightningModule", "LightningDataModule")
    return next((c for c in type(module).__mro__ if c.__name__ in own and "lightning" in c.__module__), None)


def overridden(module: Any, name: str) -> bool:
    """Whether the user's class has a method of its own in the place of Lightning's."""
    own = getattr(type(module), name, None)
    return own is not None and own is not getattr(lightning_class(module), name, None)
