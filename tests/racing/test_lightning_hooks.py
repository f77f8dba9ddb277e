"""racing/lightning_loop.py, lightning_steps.py: hooks, gradients and steps come as Lightning's Trainer has them."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from racing.lit import Plain, cosine, evaluations_of, raced, run_of, sgd, task_of, trained
from torch import nn
from torch.optim import SGD, lr_scheduler

from batchnorm.racing.lightning_steps import Epochs
from batchnorm.racing.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*(many workers|`enable_checkp|logging interval|treespec|lr_sched).*")

HOOKS = (
    "setup", "configure_model", "configure_optimizers", "on_fit_start", "on_train_start", "on_train_epoch_start",
    "on_before_batch_transfer", "on_after_batch_transfer", "on_train_batch_start", "training_step",
    "on_before_zero_grad", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end", "on_train_epoch_end",
    "on_validation_start", "on_validation_epoch_start", "on_validation_batch_start", "validation_step",
    "on_validation_batch_end", "on_validation_epoch_end", "on_validation_end",
)  # fmt: skip


class Telling(Plain):
    """Notes every hook: when it was called, and what it saw of gradients, weights and learning rate."""


def _telling(name: str) -> Any:
    def method(self: Any, *args: Any, **keywords: Any) -> Any:
        weight, rate = self.net[0].weight, self.optimizer.param_groups[0]["lr"] if hasattr(self, "optimizer") else None
        gradient = None if weight.grad is None else weight.grad.sum().item()
        seen = (self.global_step, self.current_epoch, gradient, weight.sum().item(), rate)
        self.called.append((name, self.training, *seen))
        found = getattr(Plain, name)(self, *args, **keywords)
        if name == "configure_optimizers":
            self.optimizer = found["optimizer"]
        return found

    return method


for _name in HOOKS:
    setattr(Telling, _name, _telling(_name))


def by_steps(module: Any) -> Any:
    return cosine(module, 30, interval="step")


@pytest.mark.parametrize(("accumulate", "steps", "batches"), [(1, 20, 20), (2, 10, 20), (4, 6, 20), (4, 4, 14)])
def test_every_hook_is_called_when_lightning_calls_it_and_sees_the_same(
    accumulate: int, steps: int, batches: int, tmp_path: Path
) -> None:
    def factory() -> Any:
        return Telling(by_steps)

    options: dict[str, Any] = {"max_epochs": 2, "accumulate_grad_batches": accumulate, "limit_val_batches": 0}
    expected = trained(factory, tmp_path, max_steps=steps, **options)[1].called
    task = task_of(factory=factory, accumulate=accumulate, steps=steps)
    called = [row for row in raced(task, run_of(task))[2].model.called if row[1]]  # [1]: not of the evaluation
    assert called == expected
    names = [row[0] for row in called]
    assert names.count("on_after_backward") == batches
    assert names.count("on_before_zero_grad") == names.count("on_before_optimizer_step") == steps
    assert names[-1] == "on_train_epoch_end"


def test_hooks_of_a_validation_are_lightnings_and_the_training_has_begun_before_the_first(tmp_path: Path) -> None:
    expected = trained(lambda: Telling(by_steps), tmp_path, max_epochs=1)[1].called
    task = task_of(factory=lambda: Telling(by_steps), max_epochs=1)
    trainer = Trainer(task, run_of(task))
    trainer.evaluate()
    called = trainer.model.called
    assert [row[0] for row in called if not row[1]] == [row[0] for row in expected if not row[1]]
    assert "on_train_start" in [row[0] for row in called[: [row[1] for row in called].index(False)]]


class Averaged(Plain):
    """Scored by an average of its weights, made when the fit starts, updated before gradients are cleared."""

    def on_fit_start(self) -> None:
        self.average = copy.deepcopy(self.net)

    def on_before_zero_grad(self, optimizer: Any) -> None:
        for mine, now in zip(self.average.parameters(), self.net.parameters(), strict=True):
            mine.data.lerp_(now.data, 0.1)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.average(batch[0]), batch[1]))


def test_an_average_of_weights_is_lightnings_and_a_resumed_run_goes_on_with_it(tmp_path: Path) -> None:
    _, module, logged = trained(Averaged, tmp_path)
    task = task_of(factory=Averaged, metric="val_loss")
    trainer = raced(task, run_of(task))[2]
    assert trainer.evaluate() == logged["val_loss"]
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), module.parameters(), strict=True))
    whole = evaluations_of(task, run_of(task, evaluations=6))
    evaluations_of(task, run_of(task, evaluations=6), tmp_path / "state.pt", stop=13)
    assert evaluations_of(task, run_of(task, evaluations=6), tmp_path / "state.pt") == whole


def test_in_float16_a_hook_sees_the_gradients_without_the_scalers_factor(tmp_path: Path) -> None:
    class Norms(Plain):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.rates.append(sum(p.grad.square().sum().item() for p in self.parameters()) ** 0.5)

    def plugin() -> Any:
        return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))

    for clip in (None, 0.1):
        module = trained(Norms, tmp_path, plugins=[plugin()], gradient_clip_val=clip)[1]
        task = task_of(factory=Norms, mixed_precision=torch.float16, clip_grad_norm=clip)
        trainer = raced(task, run_of(task))[2]
        assert trainer.model.rates == pytest.approx(module.rates, rel=1e-3)
        assert 0.1 < max(module.rates) < 10
        torch.testing.assert_close([*trainer.model.parameters()], [*module.parameters()], rtol=1e-3, atol=1e-4)


def test_what_the_optimizer_does_not_train_is_not_clipped(tmp_path: Path) -> None:
    def configure(module: Any) -> Any:
        return SGD(module.net[3].parameters(), lr=0.1)

    lightning = trained(lambda: Plain(configure), tmp_path, gradient_clip_val=0.3)[0]
    task = task_of(configure, clip_grad_norm=0.3)
    assert raced(task, run_of(task))[0] == lightning.losses


def by_epochs(module: Any) -> Any:
    optimizer = sgd(module)
    return [optimizer], [lr_scheduler.ExponentialLR(optimizer, 0.5)]


def asking(module: Any) -> Any:
    optimizer = SGD(module.parameters(), lr=0.01)
    steps = module.trainer.estimated_stepping_batches
    schedule = lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


UNEVEN: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "asks": (asking, {"max_epochs": 2}, {}),
    "epochs": (by_epochs, {"max_epochs": 2}, {}),
    "frequency 4": (lambda m: cosine(m, 4, interval="step", frequency=4), {"max_epochs": 2}, {}),
    "frequency 5": (lambda m: cosine(m, 2, interval="step", frequency=5), {"max_epochs": 2}, {}),
    "max_steps": (by_epochs, {"steps": 5}, {"max_steps": 5, "max_epochs": -1}),
}


@pytest.mark.parametrize("case", UNEVEN)
def test_a_step_ends_with_its_epoch(case: str, tmp_path: Path) -> None:
    """10 batches in steps of 4, 4 and 2, whose losses are divided by 4 all the same."""
    configure, given, options = UNEVEN[case]

    lightning, module, _ = trained(lambda: Plain(configure), tmp_path, accumulate_grad_batches=4, **(options or given))
    task = task_of(configure, accumulate=4, **given)
    assert task.steps == given.get("steps", 6)
    losses, rates, trainer = raced(task, run_of(task))
    taken = [range(*pair) for pair in ((0, 4), (4, 8), (8, 10), (10, 14), (14, 18), (18, 20))][: task.steps]
    means = [4 * sum(lightning.losses[k] for k in batches) / len(batches) for batches in taken]
    assert losses == pytest.approx(means)
    assert rates == lightning.rates
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), module.parameters(), strict=True))
    assert trainer.epochs == len(lightning.losses) / 10


def test_steps_and_batches_are_counted_alike() -> None:
    for batches, accumulate in ((10, 4), (10, 1), (10, 5), (3, 4), (1, 1)):
        epochs, numbers = Epochs(batches, accumulate), range(1, 4 * batches + 1)
        ends = [n for n in numbers if (n - 1) % batches % accumulate == accumulate - 1 or n % batches == 0]
        assert [epochs.batches_until(step + 1) for step in range(len(ends))] == ends
        assert [epochs.steps_until(n) for n in numbers] == [sum(end <= n for end in ends) for n in numbers]
        for every in (1, 2, 3, 4, 5, 7):
            often = [sum(((end - 1) % batches + 1) % every == 0 for end in ends[:k]) for k in range(len(ends) + 1)]
            assert [epochs.stepped(k, every) for k in range(len(ends) + 1)] == often


def test_a_run_that_was_stopped_in_an_uneven_epoch_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    task = task_of(asking, accumulate=4, max_epochs=4)
    run = run_of(task, evaluations=6)
    whole = evaluations_of(task, run)
    evaluations_of(task, run, tmp_path / "state.pt", stop=5)
    assert evaluations_of(task, run, tmp_path / "state.pt") == whole
