"""racing/lightning_inputs.py: what is taken of a LightningModule, and what is refused, by name."""

import importlib.util
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from racing import toy
from racing.lit import (
    Plain,
    cosine,
    loaders,
    run_of,
    sgd,
    task_of,
)
from torch import Tensor, nn
from torch.optim import lr_scheduler

from batchnorm.racing.contenders import Contender
from batchnorm.racing.errors import RaceError
from batchnorm.racing.plan import as_planned
from batchnorm.racing.trainer import Trainer


class Parts(Plain):
    """``training_step`` calls a part, not itself."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


class Twice(Parts):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.net(x + y)


def test_a_module_that_calls_its_parts_is_seen_by_its_example_or_its_batch() -> None:
    def with_example() -> Any:
        module = Twice()
        module.example_input_array = (torch.randn(2, 8), torch.randn(2, 8))
        module.validation_step = lambda batch, batch_idx: module.log("val_acc", 0.0)
        return module

    for factory in (Parts, with_example):
        task = task_of(factory=factory)
        trainer = Trainer(task, run_of(task, "bn-x5"))
        assert [*trainer.model.batchnorm_report.of("normalized")] == ["net.0"]


def test_the_metric_is_the_monitored_one_or_the_only_one_or_must_be_named() -> None:
    class One(Plain):
        def on_validation_epoch_end(self) -> None:
            self.log("val/rmse", 1.0)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    class Watched(Plain):
        def configure_callbacks(self) -> Any:
            return [ModelCheckpoint(monitor="val_acc")]

    assert (task_of(factory=One, metric=None).metric, task_of(factory=One, metric=None).score_falls) == (
        "val/rmse",
        True,
    )
    with pytest.warns(UserWarning, match="the race leaves out ModelCheckpoint"):
        task = task_of(factory=Watched, metric=None)
    assert (task.metric, task.score_falls, task.score_name) == ("val_acc", False, "val_acc")
    assert task_of(lower_is_better=True).score_falls
    with pytest.raises(RaceError, match=r"which metric is scored.*: val_acc, val_loss, val_whole"):
        task_of(metric=None)
    with pytest.raises(RaceError, match=r"validation logs no 'f1'\. It logs: val_acc, val_loss, val_whole"):
        task_of(metric="f1")


class Manual(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Stepping(Plain):
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        pass


class Formless(Plain):
    forward = pl.LightningModule.forward


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"factory": Manual}, "Manual has automatic_optimization = False"),
    ({"factory": Stepping}, "Stepping has its own optimizer_step, which a race does not call"),
    ({"factory": lambda: nn.Linear(2, 2)}, r"must return a LightningModule \(got a Linear\)"),
    ({"factory": pl.LightningModule}, "LightningModule has no training_step"),
    ({"factory": Plain()}, "must be a function that returns a new LightningModule"),
    ({"configure": lambda m: [sgd(m), sgd(m)]}, "returned 2 optimizers; a race is of one"),
    ({"configure": lambda m: ([sgd(m), sgd(m)], [])}, "returned 2 optimizers"),
    ({"configure": lambda m: [{"optimizer": sgd(m)}] * 2}, "returned 2 optimizers"),
    ({"configure": lambda m: None}, "configure_optimizers returned nothing"),
    ({"configure": lambda m: cosine(m, 3, interval="batch")}, r'interval of a scheduler is "step" or "epoch"'),
    ({"configure": lambda m: {"optimizer": (o := sgd(m)), "lr_scheduler": lr_scheduler.ReduceLROnPlateau(o)}},
     'what ReduceLROnPlateau looks at: "monitor"'),
    ({"max_epochs": None}, "Give steps= or max_epochs="),
    ({"max_epochs": 1.5}, "max_epochs must be a positive whole number"),
    ({"data": (loaders()[0],)}, r"data is a pair of loaders.*\(got 1\)"),
    ({"data": ([*loaders(), 1], loaders()[1])}, "gives 3 loaders; a race is of one"),
    ({"data": Plain()}, "has no train_dataloader and val_dataloader of its own"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda given: given if isinstance(given, str) else "")
def test_what_a_race_cannot_follow_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RaceError, match=message):
        task_of(**options)


def test_a_module_without_forward_is_refused_where_it_is_raced() -> None:
    def factory() -> Any:
        module = Formless()
        module.validation_step = lambda batch, batch_idx: module.log("val_acc", 0.0)
        return module

    task = task_of(factory=factory)
    with pytest.raises(RaceError, match="Formless has no forward"):
        Trainer(task, run_of(task))


def test_where_lightning_is_missing_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'batchnorm\[lightning\]'"):
        task_of(factory=lambda: nn.Linear(2, 2))


def test_every_process_of_the_command_has_the_same_task() -> None:
    """Which it makes of the plan's examples per step; a loader's batches are its own."""
    for task in (task_of(accumulate=2), replace(toy.task(), accumulate=2)):
        assert as_planned(task, task.examples_per_step, False) is task
    assert as_planned(replace(toy.task(), accumulate=2), 80, False).batch_size == 40


def test_contenders_may_set_the_modules_keywords() -> None:
    task = task_of(factory=Plain)
    run = replace(run_of(task), contender=Contender("wide", network={"normalized": True}))
    assert isinstance(Trainer(task, run).model.net[1], nn.BatchNorm1d)
