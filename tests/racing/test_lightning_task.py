"""racing/lightning_*.py: a LightningModule races as Lightning itself would train it."""

import importlib.util
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from racing import toy
from torch import Tensor, nn
from torch.optim import SGD, AdamW, lr_scheduler
from torch.utils.data import DataLoader

import batchnorm as bn
from batchnorm.racing.contenders import CONTENDERS, Contender
from batchnorm.racing.errors import RaceError
from batchnorm.racing.events import Evaluation, Resumed, Run
from batchnorm.racing.trainer import Trainer, train

pytestmark = pytest.mark.filterwarnings("ignore:.*(many workers|`enable_checkp|logging interval|treespec).*")


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


def sgd(module: Any) -> Any:
    return SGD(module.parameters(), lr=0.1, momentum=0.9)


def cosine(module: Any, steps: int, **config: Any) -> Any:
    optimizer = sgd(module)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": lr_scheduler.CosineAnnealingLR(optimizer, steps), **config}}


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


@pytest.mark.parametrize("form", FORMS)
def test_the_baseline_is_what_lightning_trains_step_by_step(form: str, tmp_path: Path) -> None:
    lightning, module, logged = trained(lambda: Plain(FORMS[form]), tmp_path)
    task = task_of(FORMS[form])
    losses, rates, trainer = raced(task, run_of(task))
    assert losses == lightning.losses
    assert rates == lightning.rates
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), module.parameters(), strict=True))
    assert trainer.evaluate() == pytest.approx(logged["val_acc"])
    trainer.task = replace(task, metric="val_loss")
    assert trainer.evaluate() == pytest.approx(logged["val_loss"])


def test_clipping_and_accumulated_gradients_are_lightnings(tmp_path: Path) -> None:
    options = {"gradient_clip_val": 0.3, "accumulate_grad_batches": 2}
    lightning, module, _ = trained(lambda: Plain(one_cycle, normalized=True), tmp_path, **options)
    task = task_of(factory=lambda: Plain(one_cycle, normalized=True), clip_grad_norm=0.3, accumulate=2)
    assert task.steps == 15
    losses, rates, trainer = raced(task, run_of(task, "as-is"))
    assert rates == [*dict.fromkeys(lightning.rates)]
    assert losses == pytest.approx([a + b for a, b in zip(lightning.losses[::2], lightning.losses[1::2], strict=True)])
    torch.testing.assert_close(dict(trainer.model.named_buffers()), dict(module.named_buffers()))
    torch.testing.assert_close([*trainer.model.parameters()], [*module.parameters()])


class OwnSchedule(lr_scheduler.LRScheduler):
    """Of a class that nobody knows: a triangle over 30 steps."""

    def get_lr(self) -> list[float]:
        return [rate * (1 - abs(self.last_epoch - 10) / 30) for rate in self.base_lrs]


def own_schedule(module: Any) -> Any:
    optimizer = sgd(module)
    return [optimizer], [{"scheduler": OwnSchedule(optimizer), "interval": "step"}]


SCALED = ["steps", "one cycle that asks the trainer", "epochs that ask the trainer", "two schedulers", "own"]


@pytest.mark.parametrize("form", SCALED)
def test_a_schedule_ends_with_the_contenders_steps_whether_it_asks_or_not(form: str) -> None:
    """Once, not twice: every rate is that of the same share of the baseline's training."""
    task = task_of(FORMS.get(form, own_schedule))
    whole = raced(task, run_of(task))[1]
    assert raced(task, run_of(task, "short", 3))[1] == pytest.approx(whole[::3])
    fast = raced(task, run_of(task, "bn-x5", 3))
    assert fast[1] == pytest.approx([5 * rate for rate in whole[::3]])
    if form == "own":
        unnormalized = min(group["lr"] for group in fast[2].optimizer.param_groups)
        assert unnormalized == pytest.approx(max(group["lr"] for group in fast[2].optimizer.param_groups) / 5)


def test_a_module_is_told_of_its_own_run_and_of_nothing_else() -> None:
    seen: list[Any] = []

    class Asks(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            t = self.trainer
            seen.append((t.estimated_stepping_batches, t.max_epochs, self.global_step, self.current_epoch, batch_idx))
            assert t.is_global_zero and t.world_size == 1 and self.logger is None and t.callbacks == []
            assert t.num_training_batches == 10 and self.optimizers().param_groups and not hasattr(t, "fit_loop")
            return super().training_step(batch, batch_idx)

    task = task_of(factory=Asks)
    seen.clear()
    raced(task, run_of(task, "short", 2))
    assert [row for row in seen if row[0] == 15] == [(15, 2, n, n // 10, n % 10) for n in range(15)]

    class AsksMore(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.trainer.fit_loop

    with pytest.raises(RaceError, match=r"self\.trainer\.fit_loop, which there is not in a race"):
        raced(task_of(factory=AsksMore), run_of(task))


def test_hooks_and_modes_come_as_in_lightning(tmp_path: Path) -> None:
    names = ("on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_before_zero_grad",
             "on_after_backward", "on_before_optimizer_step", "on_train_batch_end", "on_train_epoch_end",
             "on_after_batch_transfer")  # fmt: skip
    lists: list[list[Any]] = []

    def hook(name: str) -> Any:
        def method(self: Any, *args: Any) -> Any:
            self.called.append((name, self.global_step, self.current_epoch, self.net[0].training, self.training))
            if name == "on_train_epoch_start":
                self.net[0].eval()  # a frozen part
            return args[0] if name == "on_after_batch_transfer" else None

        return method

    class Hooked(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.called = []
            lists.append(self.called)

        def on_validation_model_train(self) -> None:
            self.trainer  # noqa: B018

    for name in names:
        setattr(Hooked, name, hook(name))
    trained(Hooked, tmp_path, limit_val_batches=0)
    expected = lists[-1]
    with pytest.warns(UserWarning, match="the race leaves out on_validation_model_train"):
        task = task_of(factory=Hooked)
    trainer = raced(task, run_of(task))[2]
    called = [row for row in trainer.model.called if row[-1]]  # not of the evaluation
    zero_grads = [[row for row in rows if row[0] == "on_before_zero_grad"] for rows in (called, expected)]
    assert [row for row in called if row not in zero_grads[0]] == [row for row in expected if row not in zero_grads[1]]
    assert len(zero_grads[0]) == len(zero_grads[1])  # Lightning has them between forward and backward
    assert not any(module.training for module in trainer.model.modules())
    trainer.step()
    assert trainer.model.training and trainer.model.net[2].training


@pytest.mark.parametrize("name", ["as-is", "fused", "paper", "without-bn", "ghost"])
def test_a_stopped_run_goes_on_to_the_same_numbers(name: str, tmp_path: Path) -> None:
    def factory() -> Any:
        return Plain(two_schedulers, normalized=True)

    def scores(checkpoint: Path | None, stop: int = 10**9) -> list[Any]:
        found: list[Any] = []
        for event in train(task, run_of(task, name, 1.5, 6), checkpoint):
            found += [e for e in (event.curve if isinstance(event, Resumed) else [event]) if isinstance(e, Evaluation)]
            if event.step > stop:
                break
        return [(e.step, e.loss, e.score, e.rate) for e in found]

    shuffled = DataLoader(toy.examples(200, 0), 20, shuffle=True), loaders()[1]
    task = task_of(factory=factory, data=shuffled)
    whole = scores(None)
    scores(tmp_path / "state.pt", stop=13)
    assert (tmp_path / "state.pt").exists()
    assert scores(tmp_path / "state.pt") == whole
    assert whole[-1][2] > whole[0][2]


def test_a_plateau_looks_at_what_it_monitors_after_each_evaluation_and_is_resumed(tmp_path: Path) -> None:
    def configure(module: Any) -> Any:
        optimizer = sgd(module)
        plateau = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0, threshold=10.0, min_lr=1e-3)
        return {"optimizer": optimizer, "lr_scheduler": plateau, "monitor": "val_loss"}

    task = task_of(configure, metric=None)
    assert (task.metric, task.score_falls) == ("val_loss", True)
    events = [e for e in train(task, run_of(task, evaluations=4), tmp_path / "s.pt") if isinstance(e, Evaluation)]
    assert [e.rate for e in events] == pytest.approx([0.0, 1.0, 0.1, 0.01, 0.01])
    elsewhere = task_of(lambda module: configure(module) | {"monitor": "nowhere"})
    with pytest.raises(RaceError, match="ReduceLROnPlateau looks at 'nowhere', which the module does not log"):
        list(train(elsewhere, run_of(elsewhere)))


def test_as_is_against_fused_in_a_whole_race(tmp_path: Path) -> None:
    pytest.importorskip("rich")
    warnings.simplefilter("ignore")
    task = task_of(one_cycle, factory=lambda: Plain(one_cycle, normalized=True), max_epochs=6)
    results = bn.race(task, ["as-is", "fused", "paper"], seeds=2, out=tmp_path / "out")
    assert results["target"] > 0.7
    curves = [
        [point["loss"] for point in json.loads(file.read_text())["curve"][1:]]
        for name in ("as-is", "fused")
        for file in (tmp_path / "out/runs").glob(f"{name}-*-seed1.json")
    ]
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)
    assert curves[0][-1] < curves[0][0]


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


def test_data_comes_from_a_data_module_a_pair_or_the_module_itself(tmp_path: Path) -> None:
    expected = raced(task_of(), run_of(task_of()))[0]
    for own in (task_of(data=tuple(lambda each=each: each for each in loaders())),
                bn.Task.from_lightning(WithOwnData, max_epochs=3, metric="val_acc")):  # fmt: skip
        assert raced(own, run_of(own))[0] == expected
    of_module = task_of(data=Data())
    assert raced(of_module, run_of(of_module))[0] == trained(Plain, tmp_path, [Data()])[0].losses != expected


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

    assert (task_of(factory=One, metric=None).metric, task_of(factory=One, metric=None).score_falls) == ("val/rmse", True)
    with pytest.warns(UserWarning, match="the race leaves out ModelCheckpoint"):
        task = task_of(factory=Watched, metric=None)
    assert (task.metric, task.score_falls, task.score_name) == ("val_acc", False, "val_acc")
    assert task_of(lower_is_better=True).score_falls
    with pytest.raises(RaceError, match="which metric is scored.*: val_acc, val_loss, val_whole"):
        task_of(metric=None)
    with pytest.raises(RaceError, match="validation logs no 'f1'. It logs: val_acc, val_loss, val_whole"):
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


def test_contenders_may_set_the_modules_keywords() -> None:
    task = task_of(factory=Plain)
    run = replace(run_of(task), contender=Contender("wide", network={"normalized": True}))
    assert isinstance(Trainer(task, run).model.net[1], nn.BatchNorm1d)
