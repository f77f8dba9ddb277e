"""A stand-in for the trainer that a LightningModule sees in a race, and the values that the module logs."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from batchnorm.racing.errors import RaceError
from batchnorm.racing.lightning_logging import Logged, on_device
from batchnorm.racing.lightning_steps import Epochs
from batchnorm.racing.metrics import count_of

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
    batch: Any = None  # that the module is called with; None in hooks of a whole epoch
    output: Any = None  # of its step
    in_training: Logged = field(default_factory=Logged)
    in_validation: Logged = field(default_factory=lambda: Logged(training=False))
    known: dict[str, Any] = field(default_factory=dict)  # the last value of all that was logged
    of_training: set[str] = field(default_factory=set)  # their names
    of_validation: set[str] = field(default_factory=set)

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
    def epochs(self) -> Epochs:
        return Epochs(self.batches, self.accumulate_grad_batches)

    @property
    def estimated_stepping_batches(self) -> int:
        return self.steps

    @property
    def max_steps(self) -> int:
        return self.steps

    @property
    def max_epochs(self) -> int:
        return -(-self.steps // self.epochs.steps)

    @property
    def num_training_batches(self) -> int:
        return self.batches

    @property
    def current_epoch(self) -> int:
        return self.number // self.batches

    @property
    def global_step(self) -> int:
        return self.epochs.steps_until(self.number + self.after)

    @property
    def batch_idx(self) -> int:
        return self.number % self.batches

    @property
    def is_last_batch(self) -> bool:
        return self.batch_idx == self.batches - 1

    @property
    def epoch_ends(self) -> bool:
        """With this batch: it is the epoch's last, or the run's."""
        return self.is_last_batch or self.epochs.batches_until(self.steps) == self.number + 1

    @property
    def callback_metrics(self) -> dict[str, Any]:
        """The last values: of this step while there is a batch, of the epoch in hooks at its end."""
        logged = self.in_training if self.training else self.in_validation
        found = logged.values(of_step=self.batch is not None)
        (self.of_training if self.training else self.of_validation).update(logged.entries, found)
        self.known.update(found)
        return self.known

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
        whole = self.batch is None  # a hook of a whole epoch
        of_step = self.training and not whole
        on_step, on_epoch = of_step if on_step is None else on_step, not of_step if on_epoch is None else on_epoch
        weight = 1 if whole else count_of(self.batch) if batch_size is None else batch_size
        logged = self.in_training if self.training else self.in_validation
        with torch.no_grad():
            logged.add(name, value, on_step, on_epoch, reduce_fx, weight)

    def end_of_batch(self) -> None:
        """Make the values that its step logged known."""
        _ = self.callback_metrics
        self.batch = None

    def end_of_epoch(self) -> dict[str, Any]:
        """Make the values logged in it known, and return them; the next epoch begins anew."""
        logged = self.in_training if self.training else self.in_validation
        found = logged.values()
        _ = self.callback_metrics
        logged.reset()
        return found

    def monitored(self, name: str, of_step: bool) -> Any:
        """The value that training logged under that name: in this step, or in this epoch until now. None: nothing."""
        return (self.in_training.values(not of_step) | self.in_training.values(of_step)).get(name)

    def state_dict(self) -> dict[str, Any]:
        names = {"of_training": sorted(self.of_training), "of_validation": sorted(self.of_validation)}
        return {"number": self.number, "known": self.known, **names, "logged": self.in_training.state_dict()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.number, self.known = state["number"], on_device(state["known"], device)
        self.of_training, self.of_validation = {*state["of_training"]}, {*state["of_validation"]}
        self.in_training.load_state_dict(state["logged"], device)


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
