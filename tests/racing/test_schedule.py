"""racing/schedule.py: a schedule ends with the run, whatever numbers are written in it; and rates that are asked for
reach it, or are refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from racing import toy
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    LambdaLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

import batchnorm as bn
from batchnorm.racing.contenders import CONTENDERS, Contender
from batchnorm.racing.errors import RaceError
from batchnorm.racing.events import Run
from batchnorm.racing.optimization import prepared
from batchnorm.racing.plan import as_planned, make_plan
from batchnorm.racing.trainer import Trainer
from batchnorm.racing.trial import try_contenders

BASELINE, SHORT = CONTENDERS["baseline"], CONTENDERS["short"]
TIMES_4 = Contender("x4", "with-bn", recipe=bn.Recipe(learning_rate=4))
STEPS = 300  # six epochs of 50 batches


def adamw(parameters: Any) -> Optimizer:
    return AdamW(parameters, lr=0.01)


def task(scheduler: Any, **changes: Any) -> bn.Task:
    return replace(toy.no_dropout(), **{"steps": STEPS, "optimizer": adamw, "scheduler": scheduler} | changes)


def rates(of: bn.Task, contender: Contender = BASELINE, steps: int = STEPS, rate: float | None = None) -> Tensor:
    """The learning rates of all groups before each step of a run: (steps, groups)."""
    rate = of.asked_rate * contender.recipe.learning_rate if rate is None else rate
    model = toy.model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what is tried beforehand is not the user's to hear of
        optimizer, schedule = prepared(of, contender, model, steps, rate)
    return toy.rates(optimizer, schedule, steps)


class Absolute(LRScheduler):
    """The user's own: it knows its rates."""

    def get_lr(self) -> list[Any]:
        return [0.02 * (1 - self.last_epoch / STEPS) for _ in self.base_lrs]


class WithFloor(LRScheduler):
    """The user's own: what it finds, between a warm-up and a floor that are numbers."""

    def get_lr(self) -> list[Any]:
        if self.last_epoch == 0:
            return [1e-5 for _ in self.base_lrs]
        return [max(1e-4, base * (1 - self.last_epoch / STEPS)) for base in self.base_lrs]


FIXED: dict[str, Any] = {
    "cosine of epochs": lambda o, n: {"scheduler": CosineAnnealingLR(o, T_max=6), "interval": "epoch"},
    "steps of epochs": lambda o, n: {"scheduler": StepLR(o, 1, gamma=0.5), "interval": "epoch"},
    "steps": lambda o, n: StepLR(o, 30, gamma=0.5),
    "milestones": lambda o, n: MultiStepLR(o, [150, 240]),
    "one cycle": lambda o, n: OneCycleLR(o, 0.01, total_steps=STEPS),
    "one cycle of epochs": lambda o, n: {"scheduler": OneCycleLR(o, 0.01, total_steps=6), "interval": "epoch"},
    "restarts": lambda o, n: CosineAnnealingWarmRestarts(o, 100),
    "the user's": lambda o, n: WithFloor(o),
    "a function": lambda o, n: LambdaLR(o, lambda step: 1 - step / STEPS),
}


@pytest.mark.parametrize("name", FIXED)
def test_a_sixth_of_the_steps_goes_through_a_schedule_of_fixed_numbers_six_times_as_fast(name: str) -> None:
    of = task(FIXED[name])
    whole = rates(of)
    torch.testing.assert_close(rates(of, SHORT, STEPS // 6), whole[::6], rtol=0, atol=0)
    torch.testing.assert_close(
        rates(of, steps=2 * STEPS)[::2], whole, rtol=0, atol=0
    )  # in twice the steps half as fast
    assert len(whole.unique()) > 2


ASKING: dict[str, Any] = {
    "cosine": lambda o, n: CosineAnnealingLR(o, n),
    "cosine of epochs": lambda o, n: {"scheduler": CosineAnnealingLR(o, max(1, n // 50)), "interval": "epoch"},
    "one cycle": lambda o, n: OneCycleLR(o, 0.01, total_steps=n),
    "at the very end": lambda o, n: MultiStepLR(o, [n - 1]),
    "a warm-up of fixed steps": lambda o, n: SequentialLR(
        o, [ConstantLR(o, 0.1, 20), CosineAnnealingLR(o, n - 20)], [20]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ASKING)
@pytest.mark.parametrize("steps", [50, STEPS, 600])
def test_a_schedule_that_asks_for_the_steps_is_stepped_as_it_says(name: str, steps: int) -> None:
    of = task(ASKING[name])
    optimizer = adamw(toy.model().parameters())
    made = ASKING[name](optimizer, steps)
    scheduler, every = (made["scheduler"], 50) if isinstance(made, dict) else (made, 1)
    found = []
    for step in range(1, steps + 1):
        found.append([optimizer.param_groups[0]["lr"]])
        optimizer.step()
        if step % every == 0:
            scheduler.step()
    assert torch.equal(rates(of, steps=steps), torch.tensor(found, dtype=torch.float64))


def test_a_plateau_is_made_for_the_runs_own_steps() -> None:
    told: list[int] = []

    def plateau(optimizer: Optimizer, steps: int) -> Any:
        told.append(steps)
        return ReduceLROnPlateau(optimizer, patience=steps)

    assert len(rates(task(plateau), SHORT, 50).unique()) == 1
    assert told[-1] == 50


def test_a_run_in_the_middle_of_a_schedule_of_fixed_numbers_is_resumed() -> None:
    run = Run(SHORT, 0, 0.01, 50, 5)
    whole, stopped, resumed = (Trainer(task(FIXED["steps"]), run) for _ in range(3))
    for _ in range(20):
        whole.step()
        stopped.step()
    resumed.load_state_dict(stopped.state_dict())
    for _ in range(30):
        assert whole.step() == resumed.step()
        assert whole.last_rate == resumed.last_rate
    assert whole.last_rate == 0.01 * 0.5**9


def test_rates_of_cyclic_are_multiplied_though_it_sets_them() -> None:
    of = task(lambda o, n: CyclicLR(o, 1e-3, 1e-2, n // 4, cycle_momentum=True))
    plain = rates(of)
    assert (plain.min().item(), plain.max().item()) == pytest.approx((1e-3, 1e-2))
    torch.testing.assert_close(rates(of, rate=0.03), 3 * plain)
    run = Trainer(of, Run(TIMES_4, 0, 0.04, STEPS, 2))
    for _ in range(3):
        run.step()
    raised, kept = run.optimizer.param_groups  # the classifier's
    assert (raised["lr"], kept["lr"]) == pytest.approx((4 * plain[3].item(), plain[3].item()))
    assert raised["betas"] == kept["betas"] != (0.9, 0.999)


@pytest.mark.parametrize("contender", [BASELINE, TIMES_4], ids=lambda each: each.name)
def test_a_scheduler_that_would_not_be_multiplied_is_refused_by_name(contender: Contender) -> None:
    of = task(lambda o, n: Absolute(o))
    assert rates(of).max() == 0.02
    with pytest.raises(RaceError, match=r"^Absolute sets learning rates whatever the optimizer's are") as error:
        rates(of, contender, rate=0.04)
    assert "\n" not in str(error.value)


def test_a_scheduler_with_a_floor_of_its_own_is_multiplied() -> None:
    of = task(lambda o, n: WithFloor(o))
    found, plain = rates(of, rate=0.05), rates(of)
    torch.testing.assert_close(found[1:250], 5 * plain[1:250])
    assert found[0] == plain[0] == 1e-5


@pytest.mark.parametrize("options", [{"contenders": ["baseline", "bn-x5"]}, {"contenders": ["baseline"], "tune": True}])
def test_the_trial_refuses_it_before_any_long_work(options: Any) -> None:
    of = task(lambda o, n: Absolute(o))
    with pytest.raises(RaceError, match=r"does not run as contender '.*': Absolute sets learning rates"):
        try_contenders(of, make_plan(of, spec="toy", **options))


def one_cycle(optimizer: Optimizer, steps: int) -> Any:
    return OneCycleLR(optimizer, max_lr=0.01, total_steps=steps)


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "a function": {"optimizer": lambda p: AdamW(p, lr=1e-3)},
    "a class": {"optimizer": AdamW, "learning_rate": 1e-3},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("scheduler", [one_cycle, lambda o, n: CyclicLR(o, 1e-3, 1e-2, n // 2), None])
def test_larger_batches_multiply_what_the_schedule_sets_too(name: str, scheduler: Any) -> None:
    of = task(scheduler, **OPTIMIZERS[name])
    larger = of.with_batch_size(80)
    assert (larger.base_rate, larger.asked_rate, larger.steps) == (1e-3, 4e-3, 75)
    assert make_plan(larger, spec="toy", contenders=["baseline"]).learning_rates == {"baseline": 4e-3}
    torch.testing.assert_close(rates(larger, steps=75).max(), 4 * rates(of).max(), rtol=0.02, atol=0)
    assert larger.with_batch_size(20).asked_rate == 1e-3


def test_a_rate_that_is_asked_for_beside_a_function_multiplies_the_schedule() -> None:
    of = task(one_cycle, optimizer=lambda p: SGD(p, lr=0.05), learning_rate=0.1)
    assert (of.base_rate, of.asked_rate) == (0.05, 0.1)
    assert rates(of).max() == pytest.approx(0.02)


@pytest.mark.parametrize("name", [name for name in FIXED if "epoch" in name or name in ("steps", "milestones")])
def test_larger_batches_go_through_fixed_numbers_as_the_training_does(name: str) -> None:
    """Twice as large: each step is two of the schedule's, and epochs are what they were."""
    of = task(FIXED[name])
    torch.testing.assert_close(rates(of.with_batch_size(40), steps=150), 2 * rates(of)[::2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [3, 102])
def test_batches_that_do_not_divide_among_those_of_a_step_are_refused(size: int) -> None:
    with pytest.raises(RaceError, match=f"--batch-size {size} does not divide among the 4 batches that a step acc"):
        as_planned(replace(toy.task(), accumulate=4), size, tune=False)


class Stateless:
    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        pass


class Unpicklable(Stateless):
    def state_dict(self) -> Any:
        return {"function": lambda: None}


class Forgetful(Stateless):
    def state_dict(self) -> Any:
        return {}


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (Stateless, "AttributeError: 'Stateless' object has no attribute 'state_dict'"),
        (Unpicklable, ".*pickle.*"),
        (Forgetful, "AttributeError: 'Forgetful' object has no attribute 'load_state_dict'"),
    ],
)
def test_what_only_a_checkpoint_needs_is_missed_before_any_long_work(
    kind: Callable[[Optimizer], Any], what: str, tmp_path: Path
) -> None:
    with pytest.raises(RaceError, match=rf"'baseline': its state cannot be saved and read again, .* \({what}\)") as e:
        bn.race(task(lambda o, n: kind(o)), ["baseline"], seeds=1, steps=10, out=tmp_path / "out")
    assert "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()


def test_the_default_optimizer_takes_sparse_gradients() -> None:
    def model() -> nn.Module:
        return nn.Sequential(
            nn.Embedding(10, 8, sparse=True), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2)
        )

    x = torch.randint(10, (60, 2))
    data = torch.utils.data.TensorDataset(x, x[:, 0] % 2)
    of = bn.Task("sparse", model, data, data, batch_size=20, steps=12)
    for name in ("baseline", "sgd"):
        trainer = Trainer(of, Run(CONTENDERS[name], 0, 0.01, 6, 2))
        assert all(trainer.step() > 0 for _ in range(3))
