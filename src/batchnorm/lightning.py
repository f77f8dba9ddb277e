"""A callback of Lightning: population statistics before each evaluation and in each checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.utils.data import DataLoader

from batchnorm.population.batches import call_with_inputs
from batchnorm.population.estimate import NoStatistics, Shift, check, recalibrate


class Recalibrate(Callback):
    """``batchnorm.recalibrate`` on training batches before each validation and test, each checkpoint, and at the end.

    What is evaluated is then what is saved: the population statistics of the weights as they are. They stay in the
    model, and the momentum average goes on from them: training in train mode does not read them, so that the weights
    become the same, bit for bit, as without the callback (except with ``Renorm``, which reads them). Random numbers
    (torch, numpy, Python, the loader's own) and the loader's place in the epoch are as before. The sanity check runs on
    what the model came with. With several processes (DDP) the values of all of them are pooled; modules that a strategy
    shards are not for this. Outside ``fit``, in ``trainer.validate`` and ``trainer.test``, only given ``batches`` are
    read: without them the statistics are those that training or its checkpoint left.

    With Lightning's ``WeightAveraging`` put this one behind it in the list: validations, and checkpoints right after
    them, then have the averaged weights with their own statistics. Checkpoints between validations do not.

    Lightning does not ask callbacks about checkpoints without an optimizer (``save_weights_only=True``): these have
    population statistics when they are written after a validation or an epoch, not at steps in between.

    Args:
        max_batches: read so many; default: all, up to ``limit_train_batches``. A loader without an end needs it.
        batches: what to read, anew each time: a list, a DataLoader or a CombinedLoader. Default: the trainer's training
            batches, with their shuffling and augmentation; of several loaders together, for which ``forward`` is
            needed. All go the way of a training batch: precision, the device, and the hooks
            ``on_before_batch_transfer``, ``transfer_batch_to_device``, ``on_after_batch_transfer`` of the module or
            DataModule, for which ``trainer.training`` and the modules' modes are those of training.
        forward: ``forward(module, batch)`` runs the module on such a batch, under the trainer's precision; default:
            ``module(inputs)``, the first element of a batch that is a tuple or list; a mapping as keyword arguments
            where the module's forward takes its keys (see ``batchnorm.recalibrate``).
        estimator, upstream, progress: as in ``batchnorm.recalibrate``.

    Attributes:
        report: what the last ``recalibrate`` returned; a row per layer.

    Raises:
        TypeError: ``batches`` is an iterator, which is empty after once, or is itself a batch; the trainer has several
            training loaders, or the module no forward of its own, and there is no ``forward`` (when training starts).
        ValueError: as ``recalibrate`` does. Values that are not finite only warn, since training may recover.

    Example:
        >>> import lightning, batchnorm.lightning
        >>> callback = batchnorm.lightning.Recalibrate(max_batches=200)
        >>> trainer = lightning.Trainer(callbacks=[callback], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        max_batches: int | None = None,
        batches: Iterable[Any] | None = None,
        *,
        forward: Callable[[Any, Any], Any] | None = None,
        estimator: str = "pooled",
        upstream: str = "batch",
        progress: bool = False,
    ) -> None:
        if isinstance(batches, CombinedLoader):  # an iterator that can begin anew
            batches = _Together(batches)
        if isinstance(batches, Iterator):
            raise TypeError(
                f"Recalibrate reads the batches several times, got an iterator ({type(batches).__name__}), which is "
                "empty after once: pass a list or a DataLoader."
            )
        check(() if batches is None else batches, max_batches, estimator, upstream, None)
        self.max_batches, self.batches = max_batches, batches
        self.forward = forward or call_with_inputs
        self.options: dict[str, Any] = {"estimator": estimator, "upstream": upstream, "progress": progress}
        self.report: list[Shift] = []
        self._due = False  # a batch was trained on since the last time
        self._modes: dict[nn.Module, bool] = {}  # of the modules, in training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses now what would otherwise end training at its first validation."""
        self._source(trainer)
        if type(pl_module).forward is LightningModule.forward and self.forward is call_with_inputs:
            raise TypeError(
                f"Recalibrate runs the module, and {type(pl_module).__name__} has no forward: pass forward=, a "
                "function of the module and a batch (lambda module, batch: module.net(batch[0]), say)."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The statistics are about to be of the past."""
        if not self._due:
            self._modes = {m: m.training for m in pl_module.modules()}
        self._due = True

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Not in ``on_validation_start``: averaged weights come in at this one. Nothing is due at the sanity check."""
        self._run(trainer, pl_module, self._due or trainer.state.fn != TrainerFn.FITTING)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Whatever was loaded for the test."""
        self._run(trainer, pl_module, True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """For checkpoints that ``on_save_checkpoint`` is not called for; those callbacks come after this one."""
        weights_only = any(getattr(c, "save_weights_only", False) for c in trainer.checkpoint_callbacks)
        self._run(trainer, pl_module, self._due and weights_only)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """The checkpoint's tensors are the module's own, so that it is enough to change those."""
        self._run(trainer, pl_module, self._due)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """For what the user does with the model next."""
        self._run(trainer, pl_module, self._due)
        self._modes = {}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """A checkpoint saved now is of one process, and must not wait for the others."""
        self._due, self._modes = False, {}

    def _run(self, trainer: Trainer, module: LightningModule, due: bool) -> None:
        if not due:
            return
        batches, most = self._source(trainer)
        if batches is None:
            if not self.report:
                rank_zero_warn(
                    "batchnorm: Recalibrate knows no training batches here, so that the statistics stay as they are: "
                    "pass batches=."
                )
            return

        def forward(module: nn.Module, batch: Any) -> Any:
            with _as_in_training(trainer, self._modes or {module: True}):
                batch = _prepared(trainer, batch)
            if batch is None:  # training passes over it too
                return None
            with trainer.precision_plugin.forward_context():
                return self.forward(module, batch)

        with isolate_rng(), _generators_kept(batches):
            try:
                self.report = recalibrate(
                    module,
                    batches,
                    forward=forward,
                    max_batches=most,
                    process_group=dist.group.WORLD if trainer.world_size > 1 else None,
                    **self.options,
                )
            except NoStatistics as error:
                rank_zero_warn(f"batchnorm: no population statistics at step {trainer.global_step}: {error}")
        self._due = False

    def _source(self, trainer: Trainer) -> tuple[Iterable[Any] | None, int | None]:
        """Batches, and how many of them to read."""
        loader = trainer.train_dataloader
        if self.batches is not None or loader is None:
            return self.batches, self.max_batches
        training = trainer.fit_loop._combined_loader
        if training is not None and len(training.flattened) != 1 and self.forward is call_with_inputs:
            raise TypeError(
                f"Recalibrate cannot know how the module takes batches of {len(training.flattened)} training loaders: "
                "pass forward=, a function of the module and what training_step gets, or batches= of one loader."
            )
        if training is None or loader is training.flattened[0]:
            loader = _anew(loader)
        else:
            together = CombinedLoader(loader, training._mode)
            together.flattened = [_anew(one) for one in together.flattened]
            loader = _Together(together)
        limits = [n for n in (self.max_batches, trainer.num_training_batches) if n is not None and n != float("inf")]
        return loader, min(map(int, limits), default=None)


class _Together:
    """The batches of a CombinedLoader, as ``training_step`` gets them."""

    def __init__(self, loaders: CombinedLoader) -> None:
        self.loaders = loaders

    def __iter__(self) -> Iterator[Any]:
        try:
            for batch, _, _ in self.loaders:
                yield batch
        finally:
            self.loaders.reset()


def _anew(loader: Any) -> Any:
    """With an iterator of its own, also where persistent workers keep theirs."""
    if isinstance(loader, DataLoader):
        loader = copy.copy(loader)
        loader._iterator = None
    return loader


def _prepared(trainer: Trainer, batch: Any) -> Any:
    """The way of a training batch: precision, ``on_before_batch_transfer``, to the device, ``on_after_batch_transfer``.

    Hooks of the module or the DataModule, as in Lightning's training loop.
    """
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


@contextmanager
def _as_in_training(trainer: Trainer, modes: dict[nn.Module, bool]) -> Iterator[None]:
    """Hooks ask ``trainer.training`` or ``self.training``, and augment then."""
    stage, now = trainer.state.stage, [(module, module.training) for module in modes]
    try:
        trainer.training = True
        for module, training in modes.items():
            module.training = training
        yield
    finally:
        trainer.state.stage = stage
        for module, training in now:
            module.training = training


@contextmanager
def _generators_kept(loader: Any) -> Iterator[None]:
    """A loader may have random numbers of its own, which decide the order of the next epoch."""
    loaders = loader.loaders.flattened if isinstance(loader, _Together) else [loader]
    places = [(one, getattr(one, "sampler", None), getattr(one, "batch_sampler", None)) for one in loaders]
    generators = {getattr(place, "generator", None) for three in places for place in three}
    states = [(g, g.get_state()) for g in generators if isinstance(g, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)
