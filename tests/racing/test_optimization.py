"""racing/optimization.py: a training's own optimizer, schedule, clipping, accumulation and precision, bit for bit as in
a loop of the user's; and what a contender makes of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from racing import toy
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer, Rprop
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

import batchnorm as bn
from batchnorm.racing.contenders import CONTENDERS, Contender
from batchnorm.racing.errors import RaceError
from batchnorm.racing.events import Evaluation, Resumed, Run, Stopped
from batchnorm.racing.optimization import prepared
from batchnorm.racing.trainer import Trainer
from batchnorm.racing.training import train

BASELINE = CONTENDERS["baseline"]
TIMES_4 = Contender("x4", "with-bn", recipe=bn.Recipe(learning_rate=4))
FEWER = Contender("fewer", recipe=bn.Recipe(decay_speed=2))


def task(**changes: Any) -> bn.Task:
    """Without dropout, so that a loop written by hand draws nothing else."""
    return replace(toy.no_dropout(), **{"steps": 20} | changes)


class Halving(LRScheduler):
    """A class that nobody here knows: the rate halves with each step."""

    def get_lr(self) -> list[float]:
        return [base * 0.5**self.last_epoch for base in self.base_lrs]


class NotTorchs:
    """A scheduler that is no LRScheduler: it sets what it finds."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.taken = optimizer, 0
        self.first = [group["lr"] for group in optimizer.param_groups]

    def step(self) -> None:
        self.taken += 1
        for group, first in zip(self.optimizer.param_groups, self.first, strict=True):
            group["lr"] = first / (1 + self.taken)

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]


SCHEDULERS: dict[str, Callable[[Optimizer, int], Any]] = {
    "one cycle": lambda o, n: OneCycleLR(o, max_lr=0.01, total_steps=n),
    "one cycle, per group": lambda o, n: OneCycleLR(o, max_lr=[g["lr"] for g in o.param_groups], total_steps=n),
    "cosine with a floor": lambda o, n: CosineAnnealingLR(o, n, eta_min=1e-3),
    "lambda": lambda o, n: LambdaLR(o, lambda step: 1 - step / n),
    "warm-up, then cosine": lambda o, n: SequentialLR(
        o, [LinearLR(o, 0.1, total_iters=n // 5), CosineAnnealingLR(o, n - n // 5)], [n // 5]
    ),
    "a class of the user's": lambda o, n: Halving(o),
    "not one of torch's": lambda o, n: NotTorchs(o),
    "none": lambda o, n: None,
}  # fmt: skip


def rates(made: tuple[Optimizer, Any], steps: int) -> Tensor:
    """The learning rates of all groups before each step: (steps, groups)."""
    return toy.rates(*made, steps)


def by_hand(task: bn.Task, model: nn.Module, steps: int) -> Tensor:
    optimizer = task.make_optimizer(model)
    scheduler = task.make_scheduler(optimizer, steps)
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_baselines_rates_are_those_of_a_loop_by_hand(name: str) -> None:
    of = task(optimizer=lambda p: AdamW(p, lr=0.01), scheduler=SCHEDULERS[name])
    own = rates(prepared(of, BASELINE, toy.model(), 20, of.base_rate), 20)
    assert torch.equal(own, by_hand(of, toy.model(), 20))


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "one cycle"])
def test_another_rate_of_the_baseline_is_a_factor_on_all_of_the_schedule(name: str) -> None:
    """As ``--tune`` tries them."""
    of = task(optimizer=lambda p: AdamW(p, lr=0.01), scheduler=SCHEDULERS[name])
    own = rates(prepared(of, BASELINE, toy.model(), 20, 0.04), 20)
    torch.testing.assert_close(own, 4 * by_hand(of, toy.model(), 20))


def test_the_highest_rate_of_one_cycle_is_scaled_though_the_optimizer_does_not_tell_it() -> None:
    """AdamW's own rate is what a OneCycleLR overwrites with ``max_lr / 25``."""
    of = task(optimizer=AdamW, learning_rate=1e-3, scheduler=lambda o, n: OneCycleLR(o, max_lr=0.02, total_steps=n))
    baseline = rates(prepared(of, BASELINE, toy.model(), 40, 1e-3), 40)
    assert baseline.max() == pytest.approx(0.02)
    torch.testing.assert_close(rates(prepared(of, BASELINE, toy.model(), 40, 2e-3), 40), 2 * baseline)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_contenders_factor_is_on_normalized_layers_alone_all_the_way(name: str) -> None:
    of = task(optimizer=lambda p: AdamW(p, lr=0.01), scheduler=SCHEDULERS[name])
    trainer = Trainer(of, Run(TIMES_4, 0, 0.04, 20, 2))
    optimizer, schedule = trainer.optimizer, trainer.schedule
    classifier = {id(p) for p in trainer.model[-1].parameters()}
    kinds = [{id(p) in classifier for p in group["params"]} for group in optimizer.param_groups]
    assert kinds == [{False}, {True}]
    own, plain = rates((optimizer, schedule), 20), by_hand(of, toy.model(), 20)
    torch.testing.assert_close(own, torch.cat([4 * plain, plain], dim=1))


def inserted(model: nn.Module, example: Any) -> nn.Module:
    return bn.insert(model, example)


@pytest.mark.parametrize("change", ["with-bn", inserted, lambda m, x: bn.accelerate(m, x)])
def test_a_change_that_is_a_function_has_the_same_recipe_as_one_by_name(change: Any) -> None:
    """The classifier, which has no batch normalization, keeps its rate, whoever put batch normalization in."""
    of = task(scheduler=SCHEDULERS["none"])
    trainer = Trainer(of, Run(Contender("own", change, recipe=bn.RECIPES["paper"]), 0, 0.05, 20, 2))
    rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert [rates[id(layer.weight)] for layer in (trainer.model[0], trainer.model[-1])] == pytest.approx([0.05, 0.01])


def test_a_network_that_has_batch_normalization_keeps_its_classifiers_rate_too() -> None:
    of = replace(toy.normalized(), scheduler=SCHEDULERS["none"])
    trainer = Trainer(of, Run(CONTENDERS["paper"], 0, 0.05, 20, 2))
    rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert [rates[id(layer.weight)] for layer in (trainer.model[0], trainer.model[-1])] == pytest.approx([0.05, 0.01])


def test_without_a_report_of_who_is_normalized_a_recipe_is_on_all_layers() -> None:
    of = task(scheduler=SCHEDULERS["none"])
    trainer = Trainer(of, Run(Contender("own", lambda m, x: m, recipe=bn.RECIPES["paper"]), 0, 0.05, 20, 2))
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {0.05}


@pytest.mark.parametrize(
    "name", [name for name in SCHEDULERS if name not in ("a class of the user's", "not one of torch's", "none")]
)
def test_a_shorter_budget_has_the_whole_schedule(name: str) -> None:
    of = task(optimizer=lambda p: AdamW(p, lr=0.01), scheduler=SCHEDULERS[name])
    own = rates(prepared(of, FEWER, toy.model(), 10, 0.01), 10)
    assert torch.equal(own, by_hand(of, toy.model(), 10))


def test_gamma_beta_and_biases_do_not_decay_and_momentum_is_nesterovs_where_the_optimizer_has_it() -> None:
    sgd = Trainer(task(), Run(CONTENDERS["sgd"], 0, 0.05, 20, 2)).optimizer
    assert all(group["nesterov"] for group in sgd.param_groups)
    adam = Trainer(
        task(optimizer=lambda p: AdamW(p, lr=0.01, weight_decay=0.1)), Run(CONTENDERS["sgd"], 0, 0.05, 20, 2)
    )
    assert {round(group["weight_decay"], 6) for group in adam.optimizer.param_groups} == {0.0, 0.1}
    for group in adam.optimizer.param_groups:
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_run_is_timed_beyond_its_end(name: str) -> None:
    """Where OneCycleLR refuses to step."""
    trainer = Trainer(task(scheduler=SCHEDULERS[name]), Run(BASELINE, 0, 0.01, 3, 2))
    for _ in range(6):
        trainer.step()
    assert trainer.step_count == 6


def test_parameter_groups_of_the_users_keep_their_proportions() -> None:
    def groups(model: nn.Module) -> Optimizer:
        first, *_, last = model.children()
        return SGD([{"params": first.parameters(), "lr": 0.1}, {"params": last.parameters(), "lr": 0.02}], lr=1.0)

    of = task(optimizer=groups, scheduler=lambda o, n: LambdaLR(o, lambda step: 1.0))
    assert of.base_rate == 0.1
    optimizer, _ = prepared(of, BASELINE, toy.model(), 20, 0.3)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.3, 0.06])


def test_plateau_is_stepped_with_each_evaluation_and_its_metric() -> None:
    seen: list[float] = []

    class Watched(ReduceLROnPlateau):
        def step(self, metrics: Any, epoch: Any = None) -> None:
            seen.append(metrics)
            super().step(metrics)

    def never_better(optimizer: Optimizer, steps: int) -> Any:
        return ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=0, threshold=10.0, threshold_mode="abs")

    run = Run(BASELINE, 0, 0.01, 60, 5)
    curve = list(train(task(optimizer=lambda p: AdamW(p, lr=0.01), scheduler=lambda o, n: Watched(o)), run))
    assert seen == [e.score for e in curve if isinstance(e, Evaluation) and e.step]  # not of the untrained network
    halved = list(train(task(optimizer=lambda p: SGD(p, lr=0.01), scheduler=never_better), run))
    shares = [e.rate for e in halved if isinstance(e, Evaluation)]
    assert shares == pytest.approx([0.0, 1, 1, 1 / 2, 1 / 4, 1 / 8])  # the first one is the best


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_schedule_by_epochs_is_stepped_after_each_pass_over_the_examples(accumulate: int) -> None:
    def steps(optimizer: Optimizer, steps: int) -> Any:
        return {"scheduler": StepLR(optimizer, 1, gamma=0.1), "interval": "epoch"}

    data = toy.examples(120, 0)  # 6 batches
    trainer = Trainer(
        task(train=data, optimizer=lambda p: SGD(p, lr=1.0), scheduler=steps, accumulate=accumulate, steps=12),
        Run(BASELINE, 0, 1.0, 12, 2),
    )
    seen = []
    for _ in range(12):
        trainer.step()
        seen.append(round(-torch.tensor(trainer.optimizer.param_groups[0]["lr"]).log10().item()))
    assert seen == [step * accumulate // 6 for step in range(1, 13)]


def loop(of: bn.Task, steps: int, clip: float | None = None) -> nn.Module:
    """What a user writes."""
    torch.manual_seed(0)
    model = of.model()
    optimizer, run = of.make_optimizer(model), Trainer(of, Run(BASELINE, 0, of.base_rate, steps, 2))
    scheduler = of.make_scheduler(optimizer, steps)
    for _ in range(steps):
        x, y = next(run.stream)
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
            assert norm > clip
        optimizer.step()
        scheduler.step()
    return model


def trained(of: bn.Task, steps: int) -> Trainer:
    trainer = Trainer(of, Run(BASELINE, 0, of.base_rate, steps, 2))
    for _ in range(steps):
        trainer.step()
    return trainer


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: Adam(p, lr=0.01),
    "AdamW": lambda p: AdamW(p, lr=0.01),
}


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_baseline_is_a_loop_by_hand_bit_for_bit(name: str, clip: float | None) -> None:
    of = task(optimizer=OPTIMIZERS[name], scheduler=SCHEDULERS["one cycle"], clip_grad_norm=clip)
    own, other = trained(of, 15).model, loop(of, 15, clip)
    assert all(torch.equal(p, q) for p, q in zip(own.parameters(), other.parameters(), strict=True))


def test_clipping_changes_the_training() -> None:
    clipped, free = (trained(task(optimizer=OPTIMIZERS["SGD"], clip_grad_norm=c), 10).model for c in (0.05, None))
    assert not torch.equal(clipped[0].weight, free[0].weight)


def test_batches_that_are_accumulated_are_one_large_one() -> None:
    """Without batch normalization, whose batches stay small: that is what accumulation cannot do."""
    parts = trained(task(optimizer=OPTIMIZERS["SGD"], batch_size=20, accumulate=4), 10)
    whole = trained(task(optimizer=OPTIMIZERS["SGD"], batch_size=80), 10)
    assert parts.task.examples_per_step == whole.task.examples_per_step == 80
    torch.testing.assert_close(parts.model.state_dict(), whole.model.state_dict(), rtol=1e-5, atol=1e-6)


def test_the_loss_of_accumulated_batches_is_their_mean_and_epochs_count_batches() -> None:
    run = Run(BASELINE, 0, 0.1, 25, 1)
    events = [e for e in train(task(accumulate=4), run) if isinstance(e, Evaluation)]
    assert [e.epochs for e in events] == [0, 2]  # 100 batches of 20 in 1,000 examples
    own = Trainer(task(accumulate=4), run)
    batches = [next(own.stream) for _ in range(4)]
    expected = sum(nn.functional.cross_entropy(own.model(x), y).item() for x, y in batches) / 4
    assert Trainer(task(accumulate=4), run).step() == pytest.approx(expected, rel=1e-6)


def test_clipping_is_of_the_accumulated_gradient_once() -> None:
    trainer = Trainer(
        task(optimizer=lambda p: SGD(p, lr=1.0), scheduler=lambda o, n: None, accumulate=4, clip_grad_norm=0.01),
        Run(BASELINE, 0, 1.0, 10, 2),
    )
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.step()
    moved = [(p - q).norm() for p, q in zip(trainer.model.parameters(), before, strict=True)]
    assert torch.stack(moved).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_float16_scales_its_gradients_and_trains_as_float32_does() -> None:
    """On a CPU too, where torch's autocast has float16."""
    of = task(optimizer=OPTIMIZERS["SGD"])
    half, single = trained(replace(of, mixed_precision=torch.float16), 30), trained(of, 30)
    assert half.scaler.is_enabled()
    assert half.scaler.get_scale() >= 1024
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    assert half.evaluate() == pytest.approx(single.evaluate(), abs=0.03)
    torch.testing.assert_close(half.model[0].weight, single.model[0].weight, rtol=0, atol=0.05)


def test_float16_leaves_out_a_step_whose_gradients_overflow() -> None:
    trainer = Trainer(task(optimizer=OPTIMIZERS["SGD"], mixed_precision=torch.float16), Run(BASELINE, 0, 0.1, 10, 2))
    trainer.step()
    before, scale = trainer.model[0].weight.detach().clone(), trainer.scaler.get_scale()
    trainer.scaler.update(2.0**60)
    trainer.step()
    assert torch.equal(trainer.model[0].weight, before)
    assert trainer.scaler.get_scale() == 2.0**59 > scale
    assert trainer.step_count == 2


@pytest.mark.parametrize("name", [*(name for name in SCHEDULERS if name != "none"), "plateau", "by epochs", "float16"])
def test_a_run_stopped_anywhere_goes_on_to_the_same_numbers(name: str, tmp_path: Path) -> None:
    more: dict[str, Any] = {
        "plateau": {"scheduler": lambda o, n: ReduceLROnPlateau(o, mode="max", patience=0)},
        "by epochs": {"scheduler": lambda o, n: {"scheduler": StepLR(o, 1, 0.5), "interval": "epoch"}, "accumulate": 2},
        "float16": {"mixed_precision": torch.float16},
    }
    of = task(optimizer=OPTIMIZERS["AdamW"], **more.get(name, {"scheduler": SCHEDULERS.get(name)}))
    run = Run(BASELINE, 0, 0.01, 60, 5)

    def curve(events: list[Any]) -> list[Any]:
        every = itertools.chain.from_iterable(e.curve if isinstance(e, Resumed) else [e] for e in events)
        return [(e.step, e.epochs, e.loss, e.score, e.rate) for e in every if isinstance(e, Evaluation)]

    whole = curve(list(train(of, run)))
    assert len(whole) == 6
    for event in train(of, run, tmp_path / "state.pt"):
        if event.step > 40:
            break
    assert curve(list(train(of, run, tmp_path / "state.pt"))) == whole


def test_a_rate_that_is_a_tensor_is_told_as_a_number_and_resumed(tmp_path: Path) -> None:
    """Schedulers change such a rate in place."""
    of = task(optimizer=lambda p: AdamW(p, lr=torch.tensor(0.01)), scheduler=SCHEDULERS["lambda"])
    run = Run(BASELINE, 0, 0.01, 20, 4)
    rates = [e.rate for e in train(of, run) if isinstance(e, Evaluation)]
    assert all(type(rate) is float for rate in rates)
    assert rates[-1] == pytest.approx(1 / 20)
    next(e for e in train(of, run, tmp_path / "state.pt") if e.step > 12)
    resumed = [e for e in train(of, run, tmp_path / "state.pt") if isinstance(e, Evaluation)]
    assert [e.rate for e in resumed] == rates[-len(resumed) :]


def test_a_baseline_out_of_patience_stays_so_when_it_was_stopped_before_it_was_said(tmp_path: Path) -> None:
    of = task(patience=1, metric=lambda outputs, targets: 0.5)
    run = Run(BASELINE, 0, 0.01, 20, 4)
    whole = list(train(of, run))
    stopped = next(e for e in whole if isinstance(e, Stopped))
    for event in train(of, run, tmp_path / "state.pt"):
        if isinstance(event, Evaluation) and event.step == stopped.step:
            break
    assert [type(e) for e in train(of, run, tmp_path / "state.pt")] == [Resumed, Stopped]


def test_a_class_gets_the_keywords_that_it_takes() -> None:
    assert task(optimizer=Rprop, learning_rate=0.02).make_optimizer(toy.model()).param_groups[0]["lr"] == 0.02


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": lambda p: LBFGS(p)}, "optimizer returned LBFGS, whose step calls the network itself"),
        ({"optimizer": lambda p: [SGD(p, lr=1.0)]}, "optimizer returned a list, not an optimizer"),
        (
            {"optimizer": lambda p: SGD(p, lr=0.0)},
            r"returned SGD with lr=0\.0: its first group must have a positive one",
        ),
        ({"optimizer": lambda net: SGD(net.parameters(), lr=1.0)}, "its model and optimizer cannot be made: Attribute"),
        ({"scheduler": lambda o, n: [StepLR(o, 1)]}, r"must give one scheduler or None \(got a list\)"),
        ({"scheduler": lambda o, n: {"scheduler": StepLR(o, 1), "interval": "epochs"}}, '"interval": "epoch"'),
        ({"scheduler": lambda o, n: {"scheduler": StepLR(o, 1), "frequency": 2}}, '"interval": "epoch"'),
    ],
)
def test_what_a_race_cannot_do_is_refused_in_one_line(changes: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(RaceError, match=message) as error:
        bn.race(task(**changes), ["baseline"], seeds=1, steps=3, out=tmp_path / "o")
    assert "\n" not in str(error.value)


def test_a_step_that_accumulates_several_epochs_steps_a_schedule_of_epochs_as_often() -> None:
    """1,000 examples in batches of 20: an epoch of 50 batches, in steps of 120."""
    of = task(
        scheduler=lambda o, n: {"scheduler": StepLR(o, 1, gamma=0.5), "interval": "epoch"}, accumulate=120, steps=5
    )
    trainer = Trainer(of, Run(BASELINE, 0, 0.1, 5, 2))
    found = []
    for _ in range(3):
        trainer.step()
        found.append(trainer.optimizer.param_groups[0]["lr"])
    assert found == pytest.approx([0.1 * 0.5**epochs for epochs in (2, 4, 7)])
    trainer.close()
