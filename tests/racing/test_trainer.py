"""racing/trainer.py: the rules that make the race fair, and resuming to the same numbers."""

import itertools
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from racing import toy
from torch import nn

from batchnorm.racing import zoo
from batchnorm.racing.contenders import CONTENDERS
from batchnorm.racing.trainer import SCHEDULES, Diverged, Evaluation, Resumed, Run, Trainer, train


def run_of(name: str, steps: int = 60, interval: int = 10, seed: int = 0, **changes: Any) -> Run:
    return Run(replace(CONTENDERS[name], **changes), seed, 0.1, steps, interval)


def evaluations(events: list[Any]) -> list[tuple[float, ...]]:
    """Step, epochs, loss and score of each evaluation; seconds are left out."""
    return [astuple(event)[:4] for event in events if isinstance(event, Evaluation)]


@pytest.mark.parametrize("model", [zoo.inception, zoo.mlp])
def test_variants_start_from_the_same_weights(model: Any) -> None:
    """Same initialization for all contenders: a layer without bias must not shift the random numbers."""

    def weights(**keywords: Any) -> list[torch.Tensor]:
        torch.manual_seed(3)
        return [layer.weight for layer in model(**keywords).modules() if isinstance(layer, nn.Conv2d | nn.Linear)]

    plain, normalized = weights(), weights(batch_norm=True, dropout=False)
    assert len(plain) > 3
    assert all(torch.equal(a, b) for a, b in zip(plain, normalized, strict=True))


def test_bn_stands_before_each_nonlinearity_and_cancels_biases() -> None:
    """Section 3.2: z = g(BN(Wu)), the bias is dropped."""
    layers = [m for m in zoo.inception(batch_norm=True).modules() if not list(m.children())]
    for before, norm, after in zip(layers, layers[1:], layers[2:], strict=False):
        if isinstance(norm, nn.BatchNorm2d):
            assert isinstance(before, nn.Conv2d)
            assert before.bias is None
            assert isinstance(after, nn.ReLU)
    convolutions = sum(isinstance(m, nn.Conv2d) for m in layers)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in layers) == convolutions > 30
    assert sum(isinstance(m, nn.Linear) for m in layers) == 1  # no fully connected layer but the softmax's


def test_every_contender_sees_the_same_batches_and_each_epoch_every_example_once() -> None:
    trainers = [Trainer(toy.task(), run_of(name)) for name in ("baseline", "accelerated")]
    orders: list[list[int]] = [[], []]
    for order, trainer in zip(orders, trainers, strict=True):
        for _ in range(100):  # two epochs
            order.extend(trainer._batch().tolist())
            trainer.step_count += 1
    assert orders[0] == orders[1]
    assert sorted(orders[0][:1000]) == sorted(orders[0][1000:]) == list(range(1000))
    assert orders[0][:1000] != orders[0][1000:]  # a full reshuffle


def test_seeds_differ_in_weights_order_and_noise() -> None:
    """An interval over seeds that share the data order would be too narrow."""
    first, second = (Trainer(toy.task(), run_of("baseline", seed=seed)) for seed in (0, 1))
    assert not torch.equal(first.model[0].weight, second.model[0].weight)
    assert not torch.equal(first._batch(), second._batch())
    noise = []
    for trainer, rank in ((first, 0), (second, 0), (first, 1)):
        trainer.rank, trainer.ranks = rank, 2
        trainer.seed_noise()
        noise.append(torch.rand(1).item())
    assert len(set(noise)) == 3


def rates_of(name: str, count: int) -> list[float]:
    """The learning rate of the first steps of a run, over the initial one; the baseline has 200."""
    trainer = Trainer(toy.task(), run_of(name, steps=200))
    rates = []
    for _ in range(count):
        trainer.step()
        rates.append(trainer.optimizer.param_groups[0]["lr"] / trainer.run.learning_rate)
    return rates


def test_learning_rate_rises_for_30_percent_of_the_budget_and_falls_linearly_to_zero() -> None:
    rates = rates_of("baseline", 200)
    assert rates[:60] == pytest.approx([step / 60 for step in range(1, 61)])
    assert rates[60:] == pytest.approx([(200 - step) / 140 for step in range(60, 200)])


def test_the_papers_contenders_decay_six_times_faster() -> None:
    rates = rates_of("bn-x5", 45)
    own = run_of("bn-x5", steps=200).steps
    assert own == 30  # a sixth, in whole intervals of 10
    assert rates[own - 1] == pytest.approx(1 / own / 0.7)
    assert rates[own:] == [0] * (45 - own)  # timed past its budget: never negative


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_goes_on_from_the_warm_up_and_never_rises(name: str) -> None:
    rates = [SCHEDULES[name](done / 100) for done in range(30, 101)]
    assert 0.3 < rates[0] <= 1
    assert all(0 <= after <= before for before, after in itertools.pairwise(rates))


def test_averaged_weights_and_their_statistics_are_what_is_scored() -> None:
    trainer = Trainer(toy.task(), run_of("accelerated", average=0.9))
    for _ in range(20):
        trainer.step()
    trainer.evaluate()
    assert trainer.average is not None
    average, norm = trainer.average.module, trainer.average.module[1]
    with torch.no_grad():
        hidden = average[0](trainer.task.train[trainer._epoch(0)[:2000]][0])
    torch.testing.assert_close(norm.running_mean, hidden.mean(0), rtol=1e-4, atol=1e-5)
    assert not torch.equal(average[0].weight, trainer.model[0].weight)


def test_evaluation_leaves_training_as_it_was() -> None:
    """However often a contender is evaluated, its weights go the same way."""
    often, never = (Trainer(toy.task(), run_of("bn")) for _ in range(2))
    for trainer in (often, never):
        for step in range(20):
            trainer.seed_noise()
            trainer.step()
            if trainer is often and step % 3 == 0:
                trainer.evaluate()
    assert all(torch.equal(a, b) for a, b in zip(often.model.parameters(), never.model.parameters(), strict=True))


@pytest.mark.parametrize(("name", "average"), [("baseline", 0.0), ("bn-x5", 0.0), ("accelerated", 0.9)])
def test_a_run_stopped_anywhere_goes_on_to_the_same_numbers(name: str, average: float, tmp_path: Path) -> None:
    run = run_of(name, budget=1.0, average=average)
    whole = evaluations(list(train(toy.task(), run)))
    assert len(whole) == 6
    events: list[Any] = []
    tries = 0
    while len(evaluations(events)) < 6:
        events, start, tries = [], 0, tries + 1
        for event in train(toy.task(), run, tmp_path / "state.pt"):
            events.extend(event.curve if isinstance(event, Resumed) else [event])
            start = event.step if isinstance(event, Resumed) else start
            if event.step >= start + 13:  # stopped in the middle of an interval, one further each time
                break
    assert tries == 6
    assert evaluations(events) == whole


def test_divergence_ends_the_run_and_says_where() -> None:
    events = list(train(toy.task(), replace(run_of("baseline", steps=200), learning_rate=1e20)))
    assert isinstance(events[-1], Diverged)
    assert 1 <= events[-1].step <= 10
