"""racing/trainer.py: the rules that make the race fair, and resuming to the same numbers."""

import random
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import on_ranks
from racing import toy
from torch import nn

from batchnorm.population.estimate import NoStatistics
from batchnorm.racing.contenders import CONTENDERS
from batchnorm.racing.events import Diverged, Evaluation, Resumed, Run, Stopped
from batchnorm.racing.loading import load_task
from batchnorm.racing.trainer import Trainer, network_of
from batchnorm.racing.training import train


def run_of(name: str, steps: int = 60, seed: int = 0, **changes: Any) -> Run:
    return Run(replace(CONTENDERS[name], **changes), seed, 0.1, steps, 6)


def evaluations(events: list[Any]) -> list[tuple[float, ...]]:
    """Step, epochs, loss and score of each evaluation; seconds are left out."""
    return [astuple(event)[:4] for event in events if isinstance(event, Evaluation)]


@pytest.mark.parametrize("name", ["inception", "mlp", "covertype"])
def test_every_contender_is_the_baselines_network_from_the_same_weights(name: str) -> None:
    task = load_task(name)

    def weights(contender: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        model = network_of(task, CONTENDERS[contender])
        return {k: p for k, p in model.named_parameters() if p.ndim > 1}

    baseline = weights("baseline")
    assert len(baseline) > 3
    for contender in CONTENDERS:
        own = weights(contender)
        assert own.keys() == baseline.keys()
        assert all(torch.equal(own[k], baseline[k]) for k in baseline)


def test_bn_stands_before_each_nonlinearity_and_cancels_biases_and_dropout_is_gone() -> None:
    """Section 3.2: z = g(BN(Wu)), the bias is dropped."""
    model = network_of(load_task("inception"), CONTENDERS["bn-x5"])
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) > 30
    assert all(m.bias is None and isinstance(m.batch_norm, nn.BatchNorm2d) for m in convolutions)
    assert len([m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]) == len(convolutions)
    (linear,) = (m for m in model.modules() if isinstance(m, nn.Linear))  # before the softmax: left alone
    assert linear.bias is not None
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0]


def test_a_recipe_is_applied_and_the_classifier_keeps_the_baselines_rate() -> None:
    constant = replace(toy.task(), scheduler=lambda optimizer, steps: None)
    groups = {name: Trainer(constant, run_of(name)).optimizer.param_groups for name in ("baseline", "bn-x5")}
    decay = constant.weight_decay
    assert [(g["lr"], g["weight_decay"]) for g in groups["baseline"]] == [(0.1, decay), (0.1, 0)]
    found = [(g["lr"], g["weight_decay"], *{p.ndim for p in g["params"]}) for g in groups["bn-x5"]]
    assert sorted(found, reverse=True) == [
        (0.1, pytest.approx(decay / 5), 2),  # the run's rate is that of the normalized layers: 5 times the baseline's
        (0.1, 0, 1),
        (pytest.approx(0.02), pytest.approx(decay / 5), 2),
        (pytest.approx(0.02), 0, 1),
    ]
    assert not groups["bn-x5"][0]["nesterov"]
    assert Trainer(toy.task(), run_of("sgd")).optimizer.param_groups[0]["nesterov"]


def test_every_contender_sees_the_same_batches_and_each_epoch_every_example_once() -> None:
    trainers = [Trainer(toy.task(), run_of(name)) for name in ("baseline", "fast")]
    orders: list[list[int]] = [[], []]
    for order, trainer in zip(orders, trainers, strict=True):
        for _ in range(100):  # two epochs
            order.extend(trainer.order.batch(trainer.step_count).tolist())
            trainer.step_count += 1
    assert orders[0] == orders[1]
    assert sorted(orders[0][:1000]) == sorted(orders[0][1000:]) == list(range(1000))
    assert orders[0][:1000] != orders[0][1000:]  # a full reshuffle


def test_seeds_differ_in_weights_order_and_noise() -> None:
    """An interval over seeds that share the data order would be too narrow."""
    first, second = (Trainer(toy.task(), run_of("baseline", seed=seed)) for seed in (0, 1))
    assert not torch.equal(first.model[0].weight, second.model[0].weight)
    assert not torch.equal(first.order.batch(0), second.order.batch(0))
    noise = []
    for trainer, rank in ((first, 0), (second, 0), (first, 1)):
        trainer.rank, trainer.ranks = rank, 2
        trainer.seed_noise()
        noise.append(torch.rand(1).item())
    assert len(set(noise)) == 3


def rates_of(name: str, count: int, steps: int = 200) -> list[float]:
    """The learning rate of the first steps of a run, over the initial one."""
    trainer = Trainer(toy.task(), run_of(name, steps=steps))
    rates = []
    for _ in range(count):
        rates.append(trainer.optimizer.param_groups[0]["lr"] / trainer.run.learning_rate)
        trainer.step()
    return rates


def test_learning_rate_rises_for_30_percent_of_the_budget_and_falls_linearly_to_zero() -> None:
    rates = rates_of("baseline", 200)
    assert rates[:60] == pytest.approx([step / 60 for step in range(1, 61)])
    assert rates[60:] == pytest.approx([(200 - step) / 140 for step in range(60, 200)])


def test_the_learning_rate_decays_over_the_runs_own_budget() -> None:
    rates = rates_of("bn-x5", 45, steps=30)
    assert rates[29] == pytest.approx(1 / 30 / 0.7)
    assert rates[30:] == [0] * 15  # timed past its budget: never negative


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


@pytest.mark.parametrize("name", ["fast", "fast-without-bn"])
def test_a_recipes_own_optimizer_clips_as_the_recipe_says_with_bn_and_without(name: str) -> None:
    optimizer = Trainer(toy.task(), run_of(name)).optimizer
    assert [group["clip"] for group in optimizer.param_groups] == [0, CONTENDERS[name].recipe.clip] == [0, 0.02]


@pytest.mark.parametrize("name", ["baseline", "bn-x5", "sgd", "fast", "fast-without-bn"])
def test_a_run_stopped_anywhere_goes_on_to_the_same_numbers(name: str, tmp_path: Path) -> None:
    run = run_of(name)
    whole = evaluations(list(train(toy.task(), run)))
    assert len(whole) == len(run.points) == 7
    events: list[Any] = []
    tries = 0
    while len(evaluations(events)) < 7:
        events, start, tries = [], 0, tries + 1
        for event in train(toy.task(), run, tmp_path / "state.pt"):
            events.extend(event.curve if isinstance(event, Resumed) else [event])
            start = event.step if isinstance(event, Resumed) else start
            if event.step >= start + 23:  # stopped in the middle of an interval
                break
    assert tries > 1
    assert evaluations(events) == whole


def test_the_baseline_ends_where_its_patience_does_and_no_other() -> None:
    impatient = replace(toy.task(), patience=2, metric=lambda outputs, targets: 0.5)
    events = list(train(impatient, run_of("baseline")))
    assert isinstance(events[-1], Stopped)
    assert [point[0] for point in evaluations(events)] == run_of("baseline").points[:3]
    assert len(evaluations(list(train(impatient, run_of("bn"))))) == 7


def test_divergence_ends_the_run_and_says_where() -> None:
    events = list(train(toy.task(), replace(run_of("baseline", steps=200), learning_rate=1e20)))
    assert isinstance(events[-1], Diverged)
    assert 1 <= events[-1].step <= 10


@pytest.mark.parametrize("where", ["loss", "metric", "statistics"])
def test_a_training_that_raises_at_nan_has_diverged(where: str) -> None:
    """As distributions do, decompositions in optimizers, and metrics."""

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if where == "loss":
            return -torch.distributions.Categorical(logits=output).log_prob(target).mean()
        return nn.functional.cross_entropy(output, target)

    def metric(outputs: torch.Tensor, targets: torch.Tensor) -> float:
        assert outputs.isfinite().all()
        return 0.5

    task = replace(toy.task(), loss=loss, metric=metric if where == "metric" else "accuracy")
    name = "bn" if where == "statistics" else "baseline"
    events = list(train(task, Run(CONTENDERS[name], 0, 1e30, 60, 60)))
    assert isinstance(events[-1], Diverged)

    def mistake(outputs: torch.Tensor, targets: torch.Tensor) -> float:
        raise ArithmeticError("a mistake of the user's")

    with pytest.raises(ArithmeticError, match="a mistake"):
        list(train(replace(task, metric=mistake), run_of("baseline")))


def test_an_error_of_the_users_is_shown_also_where_gradients_are_sparse() -> None:
    def mistake(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        raise ArithmeticError("a mistake of the user's")

    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.later = nn.Embedding(9, 4, sparse=True), nn.LazyLinear(4)
            self.table.weight.grad = torch.sparse_coo_tensor([[0]], [[1.0] * 4], (9, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.table(x[:, 0].long() % 9)

    trainer = Trainer(toy.task(), run_of("baseline"))
    trainer.model, trainer.task = Sparse(), replace(toy.task(), loss=mistake)
    with pytest.raises(ArithmeticError, match="a mistake"):
        trainer.evaluate()


def test_a_test_loss_that_is_infinite_is_a_divergence() -> None:
    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(output, target) / (1.0 if output.requires_grad else 0.0)

    events = list(train(replace(toy.task(), loss=loss), run_of("baseline")))
    assert events == [Diverged(0, "loss")]


def test_numpys_noise_in_a_network_is_seeded_too() -> None:
    class Noisy(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + float(np.random.randn()) + random.random()

    task = replace(toy.task(), model=lambda: Noisy(8, 4))
    assert evaluations(list(train(task, run_of("baseline")))) == evaluations(list(train(task, run_of("baseline"))))


def test_mixed_precision_is_in_forwards_alone() -> None:
    """Weights, their optimizer and population statistics stay in float32; losses agree to bfloat16's digits."""
    seen: list[torch.dtype] = []
    trainers = [Trainer(replace(toy.no_dropout(), mixed_precision=mixed), run_of("bn")) for mixed in (True, False)]
    trainers[0].model[0].register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
    losses = [[trainer.step() for _ in range(10)] for trainer in trainers]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]
    scores = [trainer.evaluate() for trainer in trainers]
    assert scores[0] == pytest.approx(scores[1], abs=0.02)
    assert seen == [torch.bfloat16] * (10 + 4 + 2)  # steps, batches of statistics, batches of the test
    assert {t.dtype for t in trainers[0].model.state_dict().values()} == {torch.float32, torch.int64}
    momenta = [state["momentum_buffer"].dtype for state in trainers[0].optimizer.state.values()]
    assert set(momenta) == {torch.float32}
    norms = [trainer.model[0].batch_norm for trainer in trainers]
    torch.testing.assert_close(norms[0].running_mean, norms[1].running_mean, rtol=0, atol=0.03)


def scores_of_a_rank(rank: int, ranks: int, name: str, changes: dict[str, Any], nan: bool = False) -> Any:
    trainer = Trainer(toy.task(), run_of(name, **changes))
    for _ in range(5):
        trainer.step()
    if nan and rank == 1:
        trainer.task.train.tensors[0][::2] = float("nan")  # in what this rank alone reads
    try:
        score = trainer.evaluate()
    except NoStatistics:
        return "not finite"
    return score, trainer.evaluate(most=1), trainer.model.state_dict()


@pytest.mark.parametrize(("name", "changes"), [("baseline", {}), ("bn", {}), ("bn", {"recalibrate": 0})])
def test_ranks_score_a_share_each_and_agree(name: str, changes: dict[str, Any]) -> None:
    """With statistics of all ranks, or else with rank 0's: a checkpoint holds all that a score hangs on."""
    (score, first, state), *others = on_ranks(3, scores_of_a_rank, name, changes)
    assert all((s, f) == (score, first) for s, f, _ in others)
    assert all(torch.equal(own[key], state[key]) for _, _, own in others for key in state)
    alone = Trainer(toy.task(), run_of(name, **changes))
    alone.load_state_dict({**alone.state_dict(), "model": state})
    off = 0.0021 if alone.run.contender.recalibrate else 0  # statistics of other batches: an example of 500
    assert alone.evaluate() == pytest.approx(score, abs=off)
    assert first in (0.0, 1.0)  # of one example, which two of the ranks have nothing of
    statistics = {key: t for key, t in alone.model.state_dict().items() if "running" in key}
    assert len(statistics) == 2 * (name == "bn")
    torch.testing.assert_close(statistics, {key: state[key] for key in statistics}, rtol=1e-5, atol=1e-6)


def test_what_one_rank_finds_not_finite_all_of_them_know() -> None:
    assert on_ranks(2, scores_of_a_rank, "bn", {}, True) == ["not finite"] * 2
