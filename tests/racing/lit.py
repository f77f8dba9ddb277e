"""A LightningModule of milliseconds, trained by the race and by Lightning, in every form of configure_optimizers."""

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torchmetrics
from lightning.pytorch.callbacks import Callback
from racing import toy
from torch import Tensor, nn
from torch.optim import SGD, AdamW, lr_scheduler
from torch.utils.data import DataLoader

import batchnorm as bn
from batchnorm.racing.contenders import CONTENDERS
from batchnorm.racing.events import Evaluation, Resumed, Run
from batchnorm.racing.trainer import Trainer
from batchnorm.racing.training import train


class Plain(pl.LightningModule):
    """Ten batches an epoch; its configuration is a function of itself."""

    def __init__(self, configure: Any = None, normalized: bool = False) -> None:
        super().__init__()
        norm = nn.BatchNorm1d(16) if normalized else nn.Identity()
        self.net = nn.Sequential(nn.Linear(8, 16), norm, nn.ReLU(), nn.Linear(16, 4))
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(4, average="micro")
        self.configure = configure or (lambda module: SGD(module.parameters(), lr=0.1))
        self.called: list[str] = []
        self.rates: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, prog_bar=True)
        return {"loss": loss, "index": batch_idx}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        output = self(batch[0])
        self.accuracy(output, batch[1])
        self.log("val_acc", self.accuracy)
        self.log_dict({"val_loss": nn.functional.cross_entropy(output, batch[1])})

    def on_validation_epoch_end(self) -> None:
        self.log("val_whole", 1.0)

    def configure_optimizers(self) -> Any:
        return self.configure(self)


def loaders(batch: int = 20) -> tuple[DataLoader[Any], DataLoader[Any]]:
    return DataLoader(toy.examples(200, 0), batch), DataLoader(toy.examples(110, 1), 50)  # a small last batch


def task_of(configure: Any = None, factory: Any = None, data: Any = None, **options: Any) -> Any:
    options = {"max_epochs": 3, "metric": "val_acc"} | options
    if "steps" in options:
        options.pop("max_epochs")
    return bn.Task.from_lightning(factory or (lambda: Plain(configure)), data or loaders(), **options)


def run_of(task: Any, name: str = "baseline", speed: float | None = None, evaluations: int = 3) -> Run:
    contender = CONTENDERS[name].at_speed(speed)
    steps = max(1, round(task.steps * contender.budget))
    return Run(contender, 0, task.base_rate * contender.recipe.learning_rate, steps, evaluations)


def raced(task: Any, run: Run) -> tuple[list[float], list[float], Trainer]:
    """Loss and learning rate of each step; without any warning."""
    losses, rates = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = Trainer(task, run)
        for _ in range(run.steps):
            losses.append(trainer.step())
            rates.append(trainer.last_rate)
        trainer.evaluate()
    return losses, rates, trainer


def evaluations_of(task: Any, run: Run, checkpoint: Path | None = None, stop: int = 10**9) -> list[Any]:
    """Step, loss, score and rate of each, those before a checkpoint too; the run is cut after so many steps."""
    found: list[Any] = []
    for event in train(task, run, checkpoint):
        found += [e for e in (event.curve if isinstance(event, Resumed) else [event]) if isinstance(e, Evaluation)]
        if event.step > stop:
            break
    return [(e.step, e.loss, e.score, e.rate) for e in found]


class Noting(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))


def trained(factory: Any, folder: Path, data: Any = None, **options: Any) -> tuple[Noting, Any, dict[str, float]]:
    """By Lightning, from the race's seed 0."""
    noting = Noting()
    trainer = pl.Trainer(
        **{"max_epochs": 3} | options, callbacks=[noting], accelerator="cpu", logger=False, default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0,
    )  # fmt: skip
    torch.manual_seed(0)
    module = factory()
    trainer.fit(module, *(data or loaders()))
    return noting, module, {name: float(value) for name, value in trainer.callback_metrics.items()}


class Data(pl.LightningDataModule):
    def setup(self, stage: str) -> None:
        assert stage == "fit"
        self.both = loaders()

    def train_dataloader(self) -> Any:
        return self.both[0]

    def val_dataloader(self) -> Any:
        return [self.both[1]]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] * 2, batch[1]


class WithOwnData(Plain):
    train_dataloader, val_dataloader, setup = Data.train_dataloader, Data.val_dataloader, Data.setup


def sgd(module: Any) -> Any:
    return SGD(module.parameters(), lr=0.1, momentum=0.9)


def cosine(module: Any, steps: int, **config: Any) -> Any:
    optimizer = sgd(module)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": lr_scheduler.CosineAnnealingLR(optimizer, steps), **config},
    }


def two_lists(module: Any) -> Any:
    optimizer = sgd(module)
    return [optimizer], [lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


def two_schedulers(module: Any) -> Any:
    optimizer = sgd(module)
    warm_up = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)
    return [optimizer], [{"scheduler": warm_up, "interval": "step"}, lr_scheduler.ExponentialLR(optimizer, 0.5)]


def one_cycle(module: Any) -> Any:
    optimizer = AdamW(module.parameters(), lr=0.01)
    schedule = lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=module.trainer.estimated_stepping_batches)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def plain_dict(module: Any) -> Any:
    optimizer = sgd(module)
    return {"optimizer": optimizer, "lr_scheduler": lr_scheduler.ExponentialLR(optimizer, 0.5)}


FORMS: dict[str, Any] = {
    "optimizer": sgd,
    "list of one": lambda module: [sgd(module)],
    "dict without a scheduler": lambda module: {"optimizer": sgd(module)},
    "dict with a scheduler": plain_dict,
    "list of a dict": lambda module: [plain_dict(module)],
    "two lists": two_lists,
    "two schedulers": two_schedulers,
    "steps": lambda module: cosine(module, 30, interval="step"),
    "every third step": lambda module: cosine(module, 9, interval="step", frequency=3),
    "every seventh step": lambda module: cosine(module, 3, interval="step", frequency=7),
    "every second epoch": lambda module: cosine(module, 2, interval="epoch", frequency=2),
    "one cycle that asks the trainer": one_cycle,
    "epochs that ask the trainer": lambda module: cosine(module, module.trainer.max_epochs),
}


class OwnSchedule(lr_scheduler.LRScheduler):
    """Of a class that nobody knows: a triangle over 30 steps."""

    def get_lr(self) -> list[float]:
        return [rate * (1 - abs(self.last_epoch - 10) / 30) for rate in self.base_lrs]


def own_schedule(module: Any) -> Any:
    optimizer = sgd(module)
    return [optimizer], [{"scheduler": OwnSchedule(optimizer), "interval": "step"}]


SCALED = ["steps", "one cycle that asks the trainer", "epochs that ask the trainer", "two schedulers", "own"]
