"""Task: a training as it is: network, data, loss, metric, optimizer, schedule, batch size and budget.

A contender changes what its row says of it.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from batchnorm.common.errors import one_line
from batchnorm.population.batches import call_with_inputs
from batchnorm.racing.calls import arguments_of, target_of
from batchnorm.racing.errors import RaceError
from batchnorm.racing.examples import Examples, Loader, examples_of
from batchnorm.racing.loop import Loop
from batchnorm.racing.metrics import Metric, check_metric, logits_of, metric_of, name_of
from batchnorm.racing.optimization import optimizer_of
from batchnorm.racing.schedule import Schedule, linear, schedule_of


@dataclass(frozen=True)
class Task:
    """A training: what is trained, on what, how and for how long; what a contender changes is its own affair.

    Args:
        name: for tables and plots.
        model: ``model()`` returns a new network, with batch normalization or without. Where it takes ``activation=``,
            the contenders with ``"sigmoid"`` can run too. Random weights come from torch's generator.
        train: training examples: any map-style dataset, ``Subset``s too, a ``DataLoader`` (then its batches are the
            steps'), or a function that makes one. What examples draw at random (augmentation) is seeded by seed, epoch
            and example: the same for every contender.
        test: examples that only score, in the same form.
        loss: ``loss(output, target)``, the scalar that is minimized. Default: the output's own ``.loss`` where it has
            one, as transformers' models do, else cross-entropy.
        metric: what is scored on the test examples: ``"accuracy"``, ``"loss"``, ``metric(outputs, targets)`` of all of
            them, or a ``torchmetrics.Metric``. Default: accuracy; where ``loss`` is given, that.
        metric_name: for tables and plots. Default: the function's or the class's.
        lower_is_better: of the metric. Default: as torchmetrics says, true of losses, else false.
        batch_size: examples per step and per ``accumulate``, over all processes. A DataLoader has its own.
        steps: optimizer steps of the training as it is: the baseline's budget.
        full_steps: the same under ``--full``: up to its plateau. Default: ``steps``.
        quick_steps: the same under ``--quick``. Default: an eighth of ``steps``, but not less than 400 where there are
            as many.
        optimizer: a function of the parameters (of the model, if its argument is called ``model``), or a class, which
            gets ``lr=learning_rate`` and ``weight_decay=weight_decay``. Default: SGD with momentum 0.9, weight decay on
            weights alone.
        scheduler: ``scheduler(optimizer, steps)``, stepped after each step (``ReduceLROnPlateau``: after each
            evaluation, with the metric); a dict ``{"scheduler": ..., "interval": "epoch"}``: after each epoch. One that
            does not use ``steps`` (``T_max=30``) is as for this task's ``steps``, and a run with a sixth of them goes
            through it six times as fast. Default: 30% warm-up, then linear to zero.
        learning_rate: of the optimizer, and where that is a function a factor on all of its rates and its schedule's.
            Default: where ``optimizer`` is a function what that sets, else 0.01.
        weight_decay: of the optimizer, where ``optimizer`` is not a function.
        clip_grad_norm: as ``torch.nn.utils.clip_grad_norm_`` has it; default: none.
        accumulate: batches per step, whose gradients are averaged.
        patience: the baseline ends after so many evaluations without a better one; default: at the end of its budget.
        collate: of a list of examples their batch, as a DataLoader has it.
        forward: ``forward(model, batch)``, the output. Default: the model on the batch, or on its first part where it
            is a pair; dicts as keyword arguments where the model takes all of their keys.
        held_out: training examples that ``--tune`` sets apart to choose learning rates on. Default: one twelfth.
        device: ``"cpu"``, or ``"cuda"``: under torchrun, each process of a machine trains on a GPU of its own.
        mixed_precision: forward and loss under ``torch.autocast``: True for bfloat16, or ``torch.float16`` with its
            gradients scaled; weights, optimizer and statistics stay in float32.
        readers: processes per training process that read examples ahead of it. Default: none, examples in memory need
            none; nor are there any where the race itself trains several runs at a time.

    Outputs with ``.logits`` (or ``["logits"]``) are scored by them; targets are a batch's second part, or the first of
    its ``labels``, ``label``, ``targets``, ``target``, ``y``. Examples that are files may have
    ``part(indices, test=)``, which gives some of them without reading them (``test``: to score on, not to train on),
    indices as tensors, and ``fingerprint()``, a string that tells them from others.

    Raises:
        RaceError: (a ValueError) a field that is not what it must be, by name.

    Example:
        >>> def make():
        ...     return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x, y = torch.randn(120, 4), torch.randint(2, (120,))
        >>> train, test = torch.utils.data.random_split(torch.utils.data.TensorDataset(x, y), [100, 20])
        >>> task = Task("toy", make, train, test, optimizer=torch.optim.AdamW, learning_rate=1e-3, steps=50)
        >>> len(task.for_tuning().train), len(task.for_tuning().test)
        (92, 8)
    """

    name: str
    model: Callable[..., nn.Module]
    train: Any
    test: Any
    loss: Callable[[Any, Any], Tensor] | None = None
    metric: Any = None
    batch_size: int = 32
    steps: int = 2000
    full_steps: int | None = None
    quick_steps: int | None = None
    learning_rate: float | None = None
    weight_decay: float = 5e-4
    held_out: int | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    mixed_precision: bool | torch.dtype = False
    readers: int = 0
    optimizer: Callable[..., Optimizer] | None = None
    scheduler: Callable[[Optimizer, int], Any] | None = None
    clip_grad_norm: float | None = None
    accumulate: int = 1
    patience: int | None = None
    collate: Callable[[list[Any]], Any] | None = None
    forward: Callable[[nn.Module, Any], Any] | None = None
    metric_name: str | None = None
    lower_is_better: bool | None = None
    batch_ratio: Fraction = field(default=Fraction(1), kw_only=True, repr=False)  # to the training's: with_batch_size

    def __post_init__(self) -> None:
        who = f"Task {self.name!r}"
        for name in ("batch_size", "steps", "full_steps", "quick_steps", "held_out", "accumulate", "patience"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value > 0):
                raise RaceError(f"{who}: {name} must be a positive whole number (got {value!r}).")
        for name, lowest in (("learning_rate", 1e-30), ("weight_decay", 0.0), ("clip_grad_norm", 1e-30)):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and lowest <= value < math.inf):
                kind = "a positive number" if lowest else "0 or a positive number"
                raise RaceError(f"{who}: {name} must be {kind} (got {value!r}).")
        if not (isinstance(self.readers, int) and self.readers >= 0):
            raise RaceError(f"{who}: readers must be 0 or a positive whole number (got {self.readers!r}).")
        _check_device(who, self.device)
        if not callable(self.model) or isinstance(self.model, nn.Module):
            raise RaceError(
                f"{who}: model must be a function that returns a new network each time (got "
                f"{type(self.model).__name__ if isinstance(self.model, nn.Module) else repr(self.model)})."
            )
        for name in ("loss", "optimizer", "scheduler", "collate", "forward"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise RaceError(f"{who}: {name} must be a function (got {_shown(value)}).")
        self._check_metric(who)
        if self.mixed_precision not in (False, True, torch.bfloat16, torch.float16):
            raise RaceError(
                f"{who}: mixed_precision is True, torch.bfloat16 or torch.float16 (got {self.mixed_precision!r})."
            )
        if not isinstance(self.training, Loader) and len(self.training) < self.batch_size:
            raise RaceError(
                f"{who}: {len(self.training)} training examples are less than one batch ({self.batch_size})."
            )
        _ = self.testing

    def _check_metric(self, who: str) -> None:
        check_metric(who, self.metric)

    @staticmethod
    def from_lightning(
        module_factory: Callable[..., Any],
        data: Any = None,
        *,
        name: str | None = None,
        steps: int | None = None,
        max_epochs: int | None = None,
        metric: str | None = None,
        lower_is_better: bool | None = None,
        clip_grad_norm: float | None = None,
        accumulate: int = 1,
        mixed_precision: bool | torch.dtype = False,
        device: Literal["cpu", "cuda"] = "cpu",
        full_steps: int | None = None,
        quick_steps: int | None = None,
        patience: int | None = None,
    ) -> Task:
        """A LightningModule's training: its steps, its loaders, what ``configure_optimizers`` returns, what it logs.

        A contender with fewer steps runs through the module's schedules as many times faster, so that they end with it.
        Callbacks are left out. docs/race.md, "A Lightning module", tells what else is, and what is called when.

        Args:
            module_factory: returns a new LightningModule, with one optimizer and automatic optimization.
            data: a LightningDataModule, or a pair of loaders (or functions that make them) for training and
                validation. Default: the module's own loaders.
            name: for tables and plots. Default: the module's class.
            steps: of the optimizer, in the training as it is; the module is told them as ``self.trainer.max_steps``.
            max_epochs: instead of ``steps``.
            metric: the name under which validation logs what is scored. Default: what the module's checkpoints, early
                stopping or scheduler monitor, else the only one there is.
            lower_is_better: of the metric. Default: as a logged torchmetrics.Metric says, else by its name ("loss",
                "error", "mae", ...).
            clip_grad_norm, accumulate, mixed_precision: what the Lightning trainer would be given:
                ``gradient_clip_val``, ``accumulate_grad_batches``, ``precision``.
            device, full_steps, quick_steps, patience: as of a Task.

        Returns:
            A Task for ``race``.

        Raises:
            RaceError: (a ValueError) several optimizers, manual optimization, a metric that is not logged, ...
            ModuleNotFoundError: Lightning is missing.

        Example:
            >>> import lightning.pytorch as pl, torch, batchnorm as bn
            >>> from torch.utils.data import DataLoader, TensorDataset
            >>> class Regression(pl.LightningModule):
            ...     def __init__(self):
            ...         super().__init__()
            ...         self.net = torch.nn.Linear(4, 1)
            ...     def forward(self, x):
            ...         return self.net(x)
            ...     def training_step(self, batch, batch_idx):
            ...         return (self(batch[0]) - batch[1]).square().mean()
            ...     def validation_step(self, batch, batch_idx):
            ...         self.log("val_loss", self.training_step(batch, batch_idx))
            ...     def configure_optimizers(self):
            ...         return torch.optim.SGD(self.parameters(), lr=0.01)
            >>> data = TensorDataset(torch.randn(60, 4), torch.randn(60, 1))
            >>> loaders = DataLoader(data, 20, shuffle=True), DataLoader(data, 60)
            >>> task = bn.Task.from_lightning(Regression, loaders, max_epochs=10)
            >>> task.name, task.steps, task.metric, task.lower_is_better, task.base_rate
            ('Regression', 30, 'val_loss', True, 0.01)
        """
        from batchnorm.racing.lightning_task import from_lightning

        return from_lightning(
            module_factory, data, name=name, steps=steps, max_epochs=max_epochs, metric=metric,
            lower_is_better=lower_is_better, clip_grad_norm=clip_grad_norm, accumulate=accumulate,
            mixed_precision=mixed_precision, device=device, full_steps=full_steps, quick_steps=quick_steps,
            patience=patience,
        )  # fmt: skip

    @functools.cached_property
    def training(self) -> Examples | Loader:
        """The training examples, whatever they were given as."""
        return examples_of(f"Task {self.name!r}: train", self.train, self.collate)

    @functools.cached_property
    def testing(self) -> Examples | Loader:
        """The examples that score."""
        return examples_of(f"Task {self.name!r}: test", self.test, self.collate)

    @property
    def examples_per_step(self) -> int:
        """Over all processes."""
        size = self.training.batch_size if isinstance(self.training, Loader) else self.batch_size
        return size * self.accumulate

    def batches_until(self, step: int) -> int:
        """Batches that so many steps have taken."""
        return step * self.accumulate

    @property
    def batches_per_epoch(self) -> int:
        """Whole ones."""
        given = self.training
        return given.batches if isinstance(given, Loader) else len(given) // self.batch_size

    @property
    def scored_by(self) -> Any:
        """The metric, the default one decided."""
        return self.metric if self.metric is not None else "accuracy" if self.loss is None else "loss"

    @property
    def score_name(self) -> str:
        """The metric's name."""
        return self.metric_name or name_of(self.scored_by)

    @property
    def score_falls(self) -> bool:
        """Whether lower is better."""
        if self.lower_is_better is not None:
            return self.lower_is_better
        higher = getattr(self.scored_by, "higher_is_better", None)
        return self.scores_loss if higher is None else not higher

    @property
    def scores_percent(self) -> bool:
        """Whether scores are shares. What a function of the user's calls accuracy may be one of 100."""
        return isinstance(self.scored_by, str) and self.scored_by == "accuracy"

    @property
    def scores_loss(self) -> bool:
        """Whether the metric is the loss. (A torchmetrics object is equal to whatever it is compared with.)"""
        return isinstance(self.scored_by, str) and self.scored_by == "loss"

    def example(self, model: nn.Module) -> Any:
        """The network's arguments for two training examples, as ``insert`` wants them."""
        return arguments_of(model, lambda: self.output(model, self.first_batch()))

    def first_batch(self) -> Any:
        """Two training examples; of a DataLoader its first batch."""
        if isinstance(self.training, Loader):
            return next(self.training.epoch(0, 0))
        return self.training.batch(torch.arange(min(2, len(self.training))), (0, 0))

    def output(self, model: nn.Module, batch: Any) -> Any:
        """The network's output for a batch."""
        return self.forward(model, batch) if self.forward is not None else call_with_inputs(model, batch)

    def loss_of(self, output: Any, batch: Any) -> Tensor:
        """The loss of an output."""
        if self.loss is not None:
            return self.loss(output, target_of(batch))
        own = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
        if isinstance(own, Tensor):
            return own
        scores, target = logits_of(output), target_of(batch)
        for name, value in (("the model's output", scores), ("a batch's target", target)):
            if not isinstance(value, Tensor):
                raise RaceError(
                    f"cross-entropy, the default, is of tensors, and {name} is {_kinds(value)}: pass loss=, a function "
                    "of output and target; collate= and forward= say what a batch is and what is called with it."
                )
        return nn.functional.cross_entropy(scores, target)

    def training_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of a training batch: the forward pass and the loss function."""
        return self.loss_of(self.output(model, batch), batch)

    def make_optimizer(self, model: nn.Module) -> Optimizer:
        """The training's own, over a network's parameters."""
        return optimizer_of(self, model)

    def make_scheduler(self, optimizer: Optimizer, steps: int) -> Any:
        """The training's own, over a budget."""
        return self.scheduler(optimizer, steps) if self.scheduler is not None else linear(optimizer, steps)

    def make_both(
        self, model: nn.Module, steps: int, change: Callable[[Optimizer], None] | None = None
    ) -> tuple[Optimizer, Schedule]:
        """Optimizer and schedule over a budget; ``change(optimizer)`` is called before the scheduler is made."""
        optimizer = self.make_optimizer(model)
        if change is not None:
            change(optimizer)
        return optimizer, schedule_of(self, model, optimizer, steps)

    def loop(self, model: nn.Module, optimizer: Optimizer, schedule: Schedule, steps: int) -> Loop:
        """The steps around a run's batches."""
        return Loop(model)

    def measured(self, model: nn.Module, batches: Iterable[Any]) -> Metric:
        """The metric, updated with the batches."""
        metric, by_loss = metric_of(self.scored_by, self.loss_of), self.scores_loss
        device = next((p.device for p in model.parameters()), None)
        if isinstance(metric, nn.Module) and device is not None:  # a torchmetrics.Metric holds tensors
            metric.to(device)
        for batch in batches:
            output = self.output(model, batch)  # the loss may be its own
            metric.update(*(output, batch) if by_loss else (logits_of(output), target_of(batch)))
        return metric

    @functools.cached_property
    def base_rate(self) -> float:
        """The learning rate that the training's optimizer is made with, in its first group."""
        if self.optimizer is None or isinstance(self.optimizer, type):
            return self.learning_rate or 0.01
        with torch.random.fork_rng(devices=[]):
            try:
                return float(self.make_optimizer(self.model()).param_groups[0]["lr"])
            except RaceError:
                raise
            except Exception as error:
                raise RaceError(
                    f"Task {self.name!r}: its model and optimizer cannot be made: {one_line(error)}"
                ) from error

    @property
    def asked_rate(self) -> float:
        """The baseline's learning rate: ``learning_rate`` where that is given, in proportion to the batch.

        What it is over ``base_rate`` multiplies all rates of optimizer and schedule.
        """
        return float((self.learning_rate or self.base_rate) * self.batch_ratio)

    def for_tuning(self) -> Task:
        """The same task scored on training examples that are held out; the test examples are not looked at."""
        if isinstance(self.training, Loader):
            raise RaceError(
                f"Task {self.name!r}: --tune holds examples out, so train must be a dataset, not a DataLoader."
            )
        count = len(self.training)
        held_out = self.held_out or max(1, count // 12)
        if count - held_out < self.batch_size:
            raise RaceError(f"Task {self.name!r}: {held_out} held-out examples leave less than one batch to train on.")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        train, test = self.training.part(order[held_out:], test=False), self.training.part(order[:held_out], test=True)
        return replace(self, train=train, test=test)

    def with_batch_size(self, batch_size: int) -> Task:
        """The same task in other batches: as many examples in all, and learning rates in proportion to the batch.

        A batch k times as large takes one step where there were k, and goes as far in it: Goyal et al. 2017, "Accurate,
        Large Minibatch SGD", Section 2.1. It holds up to some batch size, which without batch normalization is smaller.
        """
        if not (isinstance(batch_size, int) and batch_size > 0):
            raise RaceError(f"--batch-size must be a whole number of at least 1 (got {batch_size!r}).")
        if isinstance(self.training, Loader):
            raise RaceError(f"Task {self.name!r}: its DataLoader has its own batch size.")
        ratio = Fraction(batch_size, self.batch_size)
        steps = {
            name: max(1, round(value / ratio))
            for name in ("steps", "full_steps", "quick_steps")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, batch_size=batch_size, batch_ratio=self.batch_ratio * ratio, **steps)

    def facts(self) -> dict[str, Any]:
        """Tells two tasks apart by what the numbers hang on: sizes, rates, and some of the data itself."""
        return {
            "training examples": len(self.training),
            "test examples": len(self.testing),
            "examples per step": self.examples_per_step,
            "weight_decay": self.weight_decay,
            "learning rate": self.asked_rate,
            "clip_grad_norm": self.clip_grad_norm,
            "accumulate": self.accumulate,
            "metric": self.score_name,
            "training data": hashlib.sha256(self.training.fingerprint().encode()).hexdigest()[:16],
            "test data": hashlib.sha256(self.testing.fingerprint().encode()).hexdigest()[:16],
        }


def _kinds(value: Any) -> str:
    """The types of its parts: tuple(Tensor, list)."""
    own = type(value).__name__
    return f"{own}({', '.join(type(part).__name__ for part in value)})" if isinstance(value, tuple) else own


def _shown(value: Any) -> str:
    """A value in one line."""
    words = repr(value)
    return type(value).__name__ if "\n" in words else words


def _check_device(what: str, device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise RaceError(f'{what}: device must be "cpu" or "cuda" (got {device!r}): torchrun tells which GPU.')
    if device == "cuda":
        processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if processes > gpus:
            raise RaceError(f"{what}: each process on this machine needs a GPU: {processes} do, and torch sees {gpus}.")
