"""racing/score.py against known answers."""

from dataclasses import replace
from typing import Any

import pytest
from racing import toy

from batchnorm.racing.plan import make_plan
from batchnorm.racing.score import interval, score
from batchnorm.racing.timing import StepTime


def record(seed: int, *scores: float, status: str = "finished") -> dict[str, Any]:
    curve = [{"step": 10 * (i + 1), "score": value} for i, value in enumerate(scores)]
    return {"seed": seed, "learning_rate": 0.1, "status": status, "curve": curve}


def scored(baseline: list[dict[str, Any]], bn: list[dict[str, Any]]) -> tuple[Any, Any, Any]:
    task = replace(toy.task(), batch_size=4, train=toy.examples(40, 0))
    plan = make_plan(task, spec="toy", contenders=["baseline", "bn"], seeds=len(baseline), steps=30)
    times = {"baseline": StepTime(0.5, (0.4, 0.6), 0.0, 9), "bn": StepTime(1.0, (0.9, 1.1), 2.0, 9)}
    results = score(plan, {"baseline": baseline, "bn": bn}, times)
    return results["target"], *results["contenders"]


def test_steps_seconds_and_fractions() -> None:
    target, baseline, bn = scored(
        [record(0, 0.5, 0.6, 0.8), record(1, 0.5, 0.7, 0.6)],
        [record(0, 0.75, 0.7, 0.9), record(1, 0.6, 0.8, 0.8)],
    )
    assert target == pytest.approx(0.75)  # the mean of 0.8 and 0.7
    assert baseline["steps_to_target"] == 25  # each run at its own best: 30 and 20
    assert baseline["steps_fraction"] == baseline["seconds_fraction"] == 1
    assert bn["steps_to_target"] == 15  # the first evaluation at or above: 10 and 20
    assert bn["seconds_to_target"] == 15 * 1.0 + 2.0
    assert bn["steps_fraction"] == pytest.approx(15 / 25)
    assert bn["seconds_fraction"] == pytest.approx(17 / 12.5)
    assert bn["best_accuracy"] == pytest.approx((0.9 + 0.8) / 2)
    assert bn["epochs_to_target"] == pytest.approx(15 * 4 / 40)
    assert bn["status"] == "reached the target"


def test_one_missed_seed_leaves_no_mean() -> None:
    _, _, bn = scored([record(0, 0.8), record(1, 0.8)], [record(0, 0.9), record(1, 0.7)])
    assert bn["steps_to_target"] is bn["seconds_to_target"] is bn["steps_fraction"] is bn["seconds_fraction"] is None
    assert [run["steps_to_target"] for run in bn["runs"]] == [10, None]
    assert bn["status"] == "target not reached from seed 1"


def test_divergence_is_reported_and_its_earlier_evaluations_count_for_best_only_as_seen() -> None:
    _, _, bn = scored([record(0, 0.8)], [record(0, 0.6, status="diverged at step 13")])
    assert bn["status"] == "diverged at step 13 (seed 0)"
    assert bn["best_accuracy"] == 0.6
    assert bn["steps_to_target"] is None


def test_baseline_that_diverged_at_once_sets_no_target() -> None:
    target, baseline, bn = scored([record(0, status="diverged at step 1")], [record(0, 0.9)])
    assert target is None
    assert baseline["best_accuracy"] is None
    assert bn["steps_to_target"] is None


def test_interval_is_students() -> None:
    low, high = interval([1.0, 2.0, 3.0]) or (0, 0)
    assert (low + high) / 2 == pytest.approx(2)
    assert (high - low) / 2 == pytest.approx(4.302653 / 3**0.5)  # t(0.975; 2) = 4.302653, s = 1
    assert interval([1.0]) is None
    assert interval([2.0, 2.0]) == pytest.approx((2.0, 2.0))
