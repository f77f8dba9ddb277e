"""racing/lightning_*.py: a LightningModule races as Lightning itself would train it."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from racing import toy
from racing.lit import (
    FORMS,
    SCALED,
    Data,
    Plain,
    WithOwnData,
    evaluations_of,
    loaders,
    one_cycle,
    own_schedule,
    raced,
    run_of,
    sgd,
    task_of,
    trained,
    two_schedulers,
)
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

import batchnorm as bn
from batchnorm.racing.errors import RaceError
from batchnorm.racing.events import Evaluation
from batchnorm.racing.trainer import Trainer
from batchnorm.racing.training import train

pytestmark = pytest.mark.filterwarnings("ignore:.*(many workers|`enable_checkp|logging interval|treespec).*")


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
            assert (t.is_global_zero, t.world_size, self.logger, t.callbacks) == (True, 1, None, [])
            assert (t.num_training_batches, len(self.optimizers().param_groups)) == (10, 1)
            assert not hasattr(t, "fit_loop")
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


def test_modes_are_the_modules_own_as_in_lightning_and_hooks_left_out_are_named() -> None:
    class Frozen(Plain):
        def on_train_epoch_start(self) -> None:
            self.net[0].eval()

        def on_validation_model_train(self) -> None:
            self.trainer  # noqa: B018

        def on_train_end(self) -> None:
            self.trainer  # noqa: B018

    with pytest.warns(UserWarning, match="the race leaves out on_train_end, on_validation_model_train"):
        task = task_of(factory=Frozen)
    trainer = raced(task, run_of(task))[2]
    assert not any(module.training for module in trainer.model.modules())
    trainer.step()
    trainer.evaluate()
    again = Trainer(task, run_of(task))  # within an epoch
    again.load_state_dict(trainer.state_dict())
    for one in (trainer, again):
        one.step()
        assert [m.training for m in (one.model, one.model.net[0], one.model.net[2])] == [True, False, True]


@pytest.mark.parametrize("name", ["as-is", "fused", "paper", "without-bn", "ghost"])
def test_a_stopped_run_goes_on_to_the_same_numbers(name: str, tmp_path: Path) -> None:
    def factory() -> Any:
        return Plain(two_schedulers, normalized=True)

    shuffled = DataLoader(toy.examples(200, 0), 20, shuffle=True), loaders()[1]
    task = task_of(factory=factory, data=shuffled)
    run = run_of(task, name, 1.5, 6)
    whole = evaluations_of(task, run)
    evaluations_of(task, run, tmp_path / "state.pt", stop=13)
    assert (tmp_path / "state.pt").exists()
    assert evaluations_of(task, run, tmp_path / "state.pt") == whole
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


def test_data_comes_from_a_data_module_a_pair_or_the_module_itself(tmp_path: Path) -> None:
    expected = raced(task_of(), run_of(task_of()))[0]
    for own in (task_of(data=tuple(lambda each=each: each for each in loaders())),
                bn.Task.from_lightning(WithOwnData, max_epochs=3, metric="val_acc")):  # fmt: skip
        assert raced(own, run_of(own))[0] == expected
    of_module = task_of(data=Data())
    assert raced(of_module, run_of(of_module))[0] == trained(Plain, tmp_path, [Data()])[0].losses != expected
