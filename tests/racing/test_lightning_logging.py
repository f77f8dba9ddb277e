"""racing/lightning_logging.py: what a module logs is what Lightning makes of it, also in a run that was stopped."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from racing.lit import Plain, evaluations_of, loaders, raced, run_of, sgd, task_of, trained
from torch import Tensor, nn
from torch.optim import lr_scheduler

from batchnorm.racing.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*(many workers|`enable_checkp|logging interval|treespec|lr_sched).*")


class Logging(Plain):
    """Logs in every way, and notes what ``callback_metrics`` has after steps, epochs and validations."""

    def __init__(self, configure: Any = None) -> None:
        super().__init__(configure)
        self.seen = torchmetrics.classification.MulticlassAccuracy(4, average="micro")
        self.own = torchmetrics.MeanMetric()
        self.found: list[Any] = []

    def note(self, place: str, prefix: str = "") -> None:
        metrics = {name: value for name, value in self.trainer.callback_metrics.items() if name.startswith(prefix)}
        assert all(isinstance(value, Tensor) for value in metrics.values())
        self.found.append((place, {name: value.item() for name, value in metrics.items()}))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        output = self(batch[0])
        loss = nn.functional.cross_entropy(output, batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        self.log("both", loss, on_step=True, on_epoch=True)
        self.log("step", loss)
        for reduce in ("min", "max", "sum"):
            self.log(reduce, loss, on_step=False, on_epoch=True, reduce_fx=reduce)
        self.log("weighed", loss, on_epoch=True, on_step=False, batch_size=1 + batch_idx)
        self.seen(output, batch[1])
        self.log("seen", self.seen, on_step=False, on_epoch=True)
        self.own.update(loss)
        return loss

    def on_train_epoch_start(self) -> None:
        self.log("epoch", float(self.current_epoch))
        self.note("epoch start")

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.log("weight", self.net[0].weight.mean())

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.note("batch end")

    def on_train_epoch_end(self) -> None:
        self.log("mine", self.own.compute())
        self.own.reset()
        self.note("epoch end")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        output = self(batch[0])
        loss = nn.functional.cross_entropy(output, batch[1])
        self.accuracy(output, batch[1])
        self.log("val_acc", self.accuracy)
        self.log("val_loss", loss)
        self.log("val_both", loss, on_step=True, on_epoch=True)
        self.log("val_step", loss, on_step=True, on_epoch=False)

    def on_validation_epoch_end(self) -> None:
        self.note("validation end", "val")


@pytest.mark.parametrize("accumulate", [1, 4])
def test_callback_metrics_are_lightnings_whenever_they_are_asked_for(accumulate: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"limit_val_batches": 0, "accumulate_grad_batches": accumulate}
    expected = trained(Logging, tmp_path, loaders(30), **options)[1].found  # the last batch is a small one
    task = task_of(factory=Logging, data=loaders(30), accumulate=accumulate)
    found = raced(task, run_of(task))[2].model.found
    assert found[:-1] == expected
    assert {"train_loss", "both_step", "both_epoch", "seen", "mine", "epoch", "weight"} <= expected[-1][1].keys()


def test_what_validation_logged_is_lightnings_at_its_end(tmp_path: Path) -> None:
    expected = trained(Logging, tmp_path, max_epochs=1)[1].found
    task = task_of(factory=Logging, max_epochs=1, metric="val_both_epoch")
    trainer = raced(task, run_of(task))[2]
    assert trainer.model.found[-1] == next(row for row in expected if row[0] == "validation end")
    assert trainer.evaluate() == trainer.model.found[-1][1]["val_both"]


def plateau(monitor: str, patience: int = 0, threshold: float = 0.6, **config: Any) -> Any:
    def configure(module: Any) -> Any:
        optimizer = sgd(module)
        schedule = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=patience, threshold=threshold)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": monitor, **config}}

    return configure


PLATEAUS: dict[str, Any] = {
    "epoch's mean": plateau("train_loss"),
    "epoch's name": plateau("both_epoch"),
    "epoch of both": plateau("both"),
    "last step": plateau("step"),
    "a metric": plateau("seen"),
    "at an epoch's end": plateau("mine"),
    "second epochs": plateau("train_loss", threshold=0.9, frequency=2),
    "steps": plateau("step", 3, interval="step"),
    "steps of both": plateau("both", 3, interval="step", frequency=2),
}


@pytest.mark.parametrize("case", PLATEAUS)
def test_a_plateau_of_what_training_logs_is_lightnings(case: str, tmp_path: Path) -> None:
    def factory() -> Any:
        return Logging(PLATEAUS[case])

    lightning = trained(factory, tmp_path, max_epochs=6)[0]
    task = task_of(factory=factory, max_epochs=6)
    losses, rates, _ = raced(task, run_of(task))
    assert losses == lightning.losses
    assert rates == lightning.rates
    assert len(set(rates)) > 1
    scored = evaluations_of(task, run_of(task, evaluations=24))  # which are more than epochs
    assert scored[-1][3] == rates[-1] / rates[0]


def test_a_shorter_run_has_as_many_epochs_of_the_schedule() -> None:
    task = task_of(factory=lambda: Logging(plateau("train_loss", 1000)), max_epochs=6)
    for name in ("baseline", "short"):
        run = run_of(task, name, 3 if name == "short" else None)
        trainer = raced(task, run)[2]
        assert (run.steps, trainer.schedule.schedulers[0].last_epoch) == ({"baseline": 60, "short": 20}[name], 6)


@pytest.mark.parametrize("stop", [3, 13, 22])
def test_a_stopped_run_has_logged_what_a_whole_one_has(stop: int, tmp_path: Path) -> None:
    """Cut in the middle of an epoch, whose means and metrics go on from there."""

    def factory() -> Any:
        return Logging(PLATEAUS["epoch's mean"])

    task = task_of(factory=factory, metric="val_loss")
    run = run_of(task)
    whole, first, second = (Trainer(task, run) for _ in range(3))
    for _ in range(run.steps):
        whole.step()
    for _ in range(stop):
        first.step()
    first.evaluate()
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=False))
    for _ in range(run.steps - stop):
        second.step()
    found = [[row for row in each.model.found if row[0] != "validation end"] for each in (whole, first, second)]
    for row, expected in zip(found[1] + found[2], found[0], strict=True):
        own = {name: value for name, value in row[1].items() if not name.startswith("val")}
        assert (row[0], own) == expected
    assert second.schedule.schedulers[0].state_dict() == whole.schedule.schedulers[0].state_dict()


def test_a_module_keeps_what_it_likes_in_the_checkpoint(tmp_path: Path) -> None:
    class Counting(Plain):
        count = 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.count += 1
            loss = super().training_step(batch, batch_idx)["loss"]
            return loss * 0.9**self.count

        def on_save_checkpoint(self, checkpoint: Any) -> None:
            checkpoint["count"] = self.count

        def on_load_checkpoint(self, checkpoint: Any) -> None:
            self.count = checkpoint["count"]

    task = task_of(factory=Counting)
    run = run_of(task, evaluations=6)
    whole = evaluations_of(task, run)
    evaluations_of(task, run, tmp_path / "state.pt", stop=13)
    assert evaluations_of(task, run, tmp_path / "state.pt") == whole


def test_population_statistics_leave_no_trace_in_what_is_logged() -> None:
    task = task_of(factory=Logging)
    trainer = Trainer(task, run_of(task))
    trainer.step()
    before = copy.deepcopy([trainer.loop.state_dict()[part] for part in ("trainer", "metrics")])
    task.output(trainer.model, task.first_batch())
    assert repr([trainer.loop.state_dict()[part] for part in ("trainer", "metrics")]) == repr(before)
