"""racing/score.py and racing/checks.py against known answers."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from racing import toy

from batchnorm.racing import checks, tuning
from batchnorm.racing import score as rules
from batchnorm.racing.errors import RaceError
from batchnorm.racing.plan import Plan, make_plan
from batchnorm.racing.score import Curves, curves_of, interval, score
from batchnorm.racing.timing import StepTime

FRESH = 0.1  # the untrained score


def record(seed: int, *scores: float, status: str = "finished", rate: float = 0.0) -> dict[str, Any]:
    """Evaluated before the first step and after each ten."""
    points = [
        {"step": 10 * i, "score": value, "loss": None if not i else 1 / i, "rate": rate}
        for i, value in enumerate((FRESH, *scores))
    ]
    steps = [10 * i for i in range(max(4, len(points)))]
    return {"seed": seed, "learning_rate": 0.1, "status": status, "points": steps, "curve": points}


def plan_of(seeds: int, **changes: Any) -> Plan:
    task = replace(toy.task(), batch_size=4, train=toy.examples(40, 0), **changes)
    return make_plan(task, spec="toy", contenders=["baseline", "bn"], seeds=seeds, steps=30)


def scored(baseline: list[dict[str, Any]], bn: list[dict[str, Any]], **changes: Any) -> tuple[Any, Any, Any]:
    times = {"baseline": StepTime(0.5, (0.4, 0.6), 0.0, 9), "bn": StepTime(1.0, (0.9, 1.1), 2.0, 9)}
    results = score(plan_of(len(baseline), **changes), {"baseline": baseline, "bn": bn}, times)
    return results, *results["contenders"]


def test_steps_seconds_and_fractions() -> None:
    results, baseline, bn = scored(
        [record(0, 0.5, 0.6, 0.7, 0.8, 0.9), record(1, 0.5, 0.6, 0.7, 0.8, 0.9)],
        [record(0, 0.5, 0.9, 1.0, 1.0, 1.0), record(1, 0.7, 0.9, 1.0, 1.0, 1.0)],
    )
    assert results["target"] == pytest.approx(0.9)  # what the baseline ends at; both seeds alike, so no error
    assert baseline["steps_to_target"] == pytest.approx(50)
    assert baseline["steps_fraction"] == baseline["seconds_fraction"] == 1
    assert bn["steps_to_target"] == pytest.approx(20)
    assert bn["seconds_to_target"] == pytest.approx(20 * 1.0 + 2.0)
    assert bn["steps_fraction"] == pytest.approx(20 / 50)
    assert bn["seconds_fraction"] == pytest.approx(22 / 25)
    assert bn["epochs_to_target"] == pytest.approx(20 * 4 / 40)
    assert bn["status"] == "reached the target"
    assert bn["end"] == pytest.approx(1.0)


def test_who_ends_at_a_high_rate_where_the_baseline_does_not_is_told() -> None:
    """A schedule that does not end with a contender's steps: its number stays, as it can only be better."""
    baseline = [record(0, 0.5, 0.6, 0.9, rate=0.067)]
    for rate, status, told in ((1.0, "finished", True), (0.1, "finished", False), (1.0, "diverged at step 30", False)):
        results, _, bn = scored(baseline, [record(0, 0.5, 0.9, 0.9, rate=rate, status=status)])
        assert bn["steps_fraction"] is not None
        said = [
            "bn ends while its learning rate is at 100% of its highest, that of baseline at 7%: its schedule does not "
            "end with its steps; with one that does it would come further."
        ]
        assert results["warnings"] == said * told
    few = [record(0, 0.5, 0.9, 0.9, rate=0.25)]  # of 30 steps here; of 5 that is what the last has
    few[0]["curve"][-1]["step"] = 5
    assert checks.of_schedules(plan_of(1), {"baseline": baseline, "bn": few}) == []
    high = [record(0, 0.5, 0.9, 0.9, rate=1.0)]
    assert scored(high, high)[0]["warnings"] == []


def test_steps_are_interpolated_on_the_mean_curve_made_monotone() -> None:
    curves = Curves(np.array([0.0, 10, 20, 30, 40]), np.array([[0.0, 0.4, 0.6, 0.4, 1.0], [0.0, 0.4, 0.8, 0.4, 1.0]]))
    assert curves.mean().tolist() == pytest.approx([0, 0.4, 0.55, 0.55, 1.0])  # 0.7 and 0.4 pooled
    assert curves.steps_to(0.2) == pytest.approx(5)
    assert curves.steps_to(0.55) == pytest.approx(20)
    assert curves.steps_to(0.775) == pytest.approx(35)
    assert curves.steps_to(1.01) == float("inf")
    assert curves.steps_to(0.0) == 0


def test_a_run_is_judged_by_the_last_tenth_of_its_steps_and_not_by_its_best() -> None:
    scores = [0.99] + [0.5] * 17 + [0.6, 0.8]
    curves = curves_of([record(0, *scores)])
    assert curves.steps[-1] == 200
    assert curves.ends.tolist() == pytest.approx([(0.5 + 0.6 + 0.8) / 3])  # after 180, 190 and 200 steps


def test_target_is_the_mean_end_less_its_standard_error_so_the_baseline_always_reaches_it() -> None:
    ends = np.array([0.90, 0.91, 0.93])
    curves = Curves(np.array([0.0, 10, 100]), np.stack([np.zeros(3), ends / 2, ends], 1))
    assert curves.target() == pytest.approx(ends.mean() - ends.std(ddof=1) / 3**0.5)
    generator = np.random.default_rng(0)
    for _ in range(200):  # noisy, falling, flat
        noisy = Curves(np.arange(30.0), generator.normal(size=(4, 30)) + generator.normal() * np.arange(30) / 30)
        assert noisy.steps_to(noisy.target()) < float("inf")
        assert noisy.steps_to(noisy.ends.mean()) < float("inf")


def test_intervals_hold_the_truth_as_often_as_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of races with a known fraction, 95%: with plain percentiles of eight seeds 89%."""
    monkeypatch.setattr(rules, "RESAMPLES", 400)
    steps, hits, races = np.linspace(0, 100, 26), 0, 60
    generator = np.random.default_rng(1)

    def runs(speed: float, most: float) -> list[dict[str, Any]]:
        curve = np.minimum(0.9 * steps * speed / 80, most)
        noisy = (
            curve + generator.normal(0, 0.01, (8, 1)) * (steps > 0) + generator.normal(0, 0.005, (8, 26)) * (steps > 0)
        )
        return [record(seed, *row[1:].tolist()) for seed, row in enumerate(noisy)]

    for _ in range(races):
        _, baseline, bn = scored(runs(1.0, 0.9), runs(2.0, 1.0))
        low, high = bn["steps_fraction_interval"]
        assert low <= bn["steps_fraction"] <= high
        hits += low <= 0.5 <= high
        assert baseline["steps_fraction"] == 1
    assert hits / races >= 0.92


def test_not_reached_comes_with_how_sure_that_is() -> None:
    _, _, bn = scored(
        [record(seed, 0.5, 0.8, 0.9 + 0.001 * seed) for seed in range(4)],
        [record(seed, 0.5, 0.5, 0.6) for seed in range(4)],
    )
    assert bn["steps_to_target"] is bn["seconds_to_target"] is bn["steps_fraction"] is bn["seconds_fraction"] is None
    assert bn["probability_reached"] == 0
    assert bn["status"] == "target not reached (100% of the resamples do not reach it)"
    _, _, bn = scored(
        [record(seed, 0.5, 0.8, 0.9) for seed in range(4)],
        [record(seed, 0.7, 0.8, end) for seed, end in enumerate((0.8, 0.9, 0.93, 0.99))],
    )
    assert 0.5 < bn["probability_reached"] < 0.9
    assert bn["steps_fraction_interval"][1] is None
    assert bn["status"].startswith("reached the target (")


def test_a_baseline_that_is_at_chance_from_several_seeds_is_said_and_nothing_is_divided_by_its_steps() -> None:
    chance = [record(seed, *(FRESH - 0.01 - 0.001 * seed for _ in range(5))) for seed in range(3)]
    results, baseline, bn = scored(chance, [record(seed, *GOOD[:5]) for seed in range(3)])
    assert "baseline is no better at its end than at its beginning" in results["warnings"][0]
    assert baseline["steps_fraction"] is bn["steps_fraction"] is None


def test_a_run_that_diverged_counts_with_its_untrained_score_from_there_on() -> None:
    curves = curves_of([record(0, 0.5, 0.8, 0.9), record(1, 0.6, status="diverged at step 13")])
    assert curves.scores.tolist() == [[FRESH, 0.5, 0.8, 0.9], [FRESH, 0.6, FRESH, FRESH]]
    assert curves_of([record(0, 0.5, 0.8, 0.9), record(1, 0.6, status="stopped at step 10")]).scores[1, -1] == 0.6
    _, _, bn = scored([record(0, 0.5, 0.8)], [record(0, 0.6, status="diverged at step 13")])
    assert bn["status"] == "diverged at step 13 (seed 0); target not reached"


def test_lower_is_better_where_the_task_says_so() -> None:
    losses = [record(s, 0.08, 0.06, 0.05, 0.04, 0.02) for s in range(2)]
    results, baseline, bn = scored(losses, [record(s, 0.06, 0.02, 0.01, 0.01, 0.01) for s in range(2)], metric="loss")
    assert results["target"] == pytest.approx(0.02)
    assert baseline["end"] == pytest.approx(0.02)
    assert bn["steps_fraction"] == pytest.approx(20 / 50)
    assert results["steps_to_each"]["scores"][0] > results["steps_to_each"]["scores"][-1] == pytest.approx(0.01)


GOOD = (0.5, 0.7, 0.8, 0.9, 0.9, 0.9)


@pytest.mark.parametrize(
    ("baseline", "bn", "said"),
    [
        ([record(0, 0.5, status="diverged at step 13")], GOOD, "baseline diverged from seed 0"),
        ([record(0, status="diverged at step 1")], GOOD, "baseline diverged from seed 0"),
        ([record(0, 0.1, 0.1, 0.1, 0.1)], GOOD, "accuracy is 10.00% at every evaluation"),
        ([record(0, 0.12, 0.09, 0.11, 0.09, 0.12, 0.1)], GOOD, "baseline is no better at its end"),
        ([record(0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, rate=1.0)], GOOD, "before its learning rate"),
        ([record(0, *[0.5 + 0.01 * i for i in range(40)])], (0.9, 0.9, 0.9), "evaluated too seldom to tell"),
        ([record(0, 0.9, 0.9, 0.9, 0.9)], (0.2, 0.3, 0.4, 0.9), "baseline is at the target within 10 steps"),
        ([record(0, 0.09, 0.06, 0.03, 0.01, 0.01)], GOOD, "If it did get better: lower_is_better=True."),
        (
            [record(0, 0.5, 0.6, status="diverged at step 30 (accuracy)")],
            GOOD,
            "accuracy is not finite after step 30, from seed 0, while",
        ),
    ],
)
def test_no_fraction_where_it_would_mean_nothing(baseline: Any, bn: Any, said: str) -> None:
    results, _, row = scored(baseline, [record(0, *bn)])
    assert [said in warning for warning in results["warnings"]] == [True]
    assert row["steps_fraction"] is row["seconds_fraction"] is None


def test_a_baseline_that_is_at_chance_from_some_seeds_sets_no_target() -> None:
    stuck = record(1, 0.11, 0.1, 0.12, 0.1, 0.11, 0.1)
    results, _, row = scored([record(0, *GOOD), stuck], [record(0, *GOOD), record(1, *GOOD)])
    assert results["warnings"] == [
        "baseline learns nothing from seed 1, and does from others, so that its mean is no target: lower its learning "
        "rate, or warm it up longer."
    ]
    assert row["steps_fraction"] is None


def test_a_constant_learning_rate_is_fine_at_a_plateau_and_a_loss_that_does_not_fall_is_not() -> None:
    flat = (0.5, 0.8, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9)
    assert scored([record(0, *flat, rate=1.0)], [record(0, *GOOD)])[0]["warnings"] == []
    rising = record(0, *flat)
    for i, point in enumerate(rising["curve"][1:]):
        point["loss"] = 1.0 + i
    assert (
        "training loss does not fall (1 at first, 11 at its end)"
        in scored([rising], [record(0, *GOOD)])[0]["warnings"][0]
    )


def test_a_target_below_the_untrained_score_is_none() -> None:
    """Of two seeds that differ much the standard error is large: a contender that begins lower would race to it."""
    apart = [record(0, 0.5, 0.5, 0.5, 0.5, 0.5), record(1, 0.1, 0.1, 0.0, 0.0, 0.0)]
    lower = [record(seed, -0.1, 0.2, 0.5) for seed in range(2)]
    for run in lower:
        run["curve"][0]["score"] = -0.2
    results, baseline, bn = scored(apart, lower)
    assert results["target"] < FRESH
    assert len(results["warnings"]) == 1
    assert "baseline learns nothing from seed 1" in results["warnings"][0]
    assert baseline["steps_fraction"] is bn["steps_fraction"] is None


def test_a_run_that_was_never_scored_counts_as_untrained() -> None:
    never = {**record(1, status="diverged at step 0"), "curve": []}
    assert curves_of([record(0, 0.5, 0.8, 0.9), never]).scores.tolist() == [[FRESH, 0.5, 0.8, 0.9], [FRESH] * 4]
    _, _, bn = scored([record(seed, *GOOD) for seed in range(2)], [record(0, 0.5, 0.9, 0.95), never])
    assert bn["steps_to_target"] is None
    assert bn["status"].startswith("diverged at step 0 (seed 1); target not reached")


def test_a_contender_that_is_there_untrained_has_no_share() -> None:
    there = record(0, 0.95, 0.96)
    there["curve"][0]["score"] = 0.95
    results, _, bn = scored([record(0, *GOOD)], [there])
    assert bn["steps_fraction"] is None
    assert results["warnings"] == ["bn is at the target untrained: there are no steps to count."]


def test_interval_is_students() -> None:
    low, high = interval([1.0, 2.0, 3.0]) or (0, 0)
    assert (low + high) / 2 == pytest.approx(2)
    assert (high - low) / 2 == pytest.approx(4.302653 / 3**0.5)  # t(0.975; 2) = 4.302653, s = 1
    assert interval([1.0]) is None
    assert interval([2.0, 2.0]) == pytest.approx((2.0, 2.0))


def test_a_sweep_tells_small_losses_apart_and_shows_scores_with_their_sign() -> None:
    plan = make_plan(toy.task(), spec="toy", contenders=["baseline"], seeds=1, steps=30, tune=True)
    plan = replace(plan, score_falls=True, metric="loss", percent=False)
    runs = [{**record(0, rate * 1e-6), "learning_rate": rate} for rate in (0.5, 0.25, 1.0)]
    found = tuning.sweep(plan, {"baseline": runs}, "toy")["toy"]["default"]["scores"]
    assert found["baseline"] == {"0.25": [-2.5e-07], "0.5": [-5e-07], "1": [-1e-06]}
    shown = tuning.table({"baseline": {"0.5": [3.5]}}, plan)  # a loss of -3.5, as a likelihood's may be
    assert [*shown.columns[2].cells] == ["-3.5"]


def test_the_fewer_seeds_the_further_out_an_interval_ends() -> None:
    assert rules.tail(8) == pytest.approx(0.0057, abs=1e-4)  # Phi(-2.364624 * sqrt(8 / 7))
    assert rules.tail(10_000) == pytest.approx(0.025, abs=1e-4)
    assert [rules.level(n) for n in (2, 5, 6, 8)] == ["2 seeds", "5 seeds", "95%", "95%"]
    two = [record(0, 0.5, 0.6, 0.9), record(1, 0.5, 0.6, 0.9)]
    _, _, bn = scored(two, [record(0, 0.5, 0.95, 0.95), record(1, 0.9, 0.95, 0.95)])
    assert bn["steps_interval"] == pytest.approx([10, 10 + 10 * 0.4 / 0.45])  # of each seed alone


def test_the_range_of_few_seeds_is_that_of_all_resamples_there_are() -> None:
    draws = rules.resamples(5)
    assert len({tuple(draw) for draw in draws}) == 5**5
    assert len(rules.resamples(rules.ENOUGH)) == rules.RESAMPLES


def test_a_contender_of_which_no_run_got_to_its_end_has_not_reached_what_it_was_at_before() -> None:
    gone = [record(seed, 0.9, status="diverged at step 15") for seed in range(2)]
    _, _, bn = scored([record(seed, 0.3, 0.5, 0.6) for seed in range(2)], gone)
    assert bn["steps_to_target"] is None
    assert bn["end"] == FRESH


def test_a_run_that_stopped_early_counts_with_its_end() -> None:
    early = [record(0, *[0.5] * 9, 0.9, 0.7, status="stopped at step 110"), record(1, *[0.5] * 20)]
    assert curves_of(early).scores[0, 12:].tolist() == pytest.approx([0.8] * 9)  # after 100 and 110 steps


def test_a_sweep_takes_a_run_that_stopped_early_for_what_it_is_and_one_without_any_score_for_untrained() -> None:
    plan = make_plan(toy.task(), spec="toy", contenders=["baseline"], seeds=1, steps=30, tune=True)
    runs = [
        {**record(0, 0.8, 0.9, status="stopped at step 20"), "learning_rate": 0.1},
        {**record(0, status="diverged at step 0"), "curve": [], "learning_rate": 0.4},
        {**record(0, 0.8, 0.8, 0.8), "learning_rate": 0.2},
    ]
    assert tuning.scores(plan, runs) == {"0.1": [0.9], "0.2": [0.8], "0.4": [FRESH]}
    with pytest.raises(RaceError, match="accuracy is not finite, not even before the first step"):
        tuning.scores(plan, runs[1:2])


def test_a_sweep_goes_on_while_its_best_rate_is_at_an_edge() -> None:
    plan = make_plan(toy.task(), spec="toy", contenders=["baseline", "sgd"], seeds=2, steps=30, tune=True)

    def at(best: float, rates: list[float]) -> list[dict[str, Any]]:
        return [{**record(s, *[1 / (1 + abs(r - best))] * 3), "learning_rate": r} for r in rates for s in range(2)]

    rates = [0.1, 0.2, 0.4]
    found = tuning.beyond(plan, {"baseline": at(0.4, rates), "sgd": at(0.2, rates)})
    assert [(run.contender.name, run.seed, run.learning_rate) for run in found] == [
        ("baseline", 0, 0.8),
        ("baseline", 1, 0.8),
    ]
    (low, _) = tuning.beyond(plan, {"baseline": at(0.0, rates), "sgd": at(0.2, rates)})
    assert low.learning_rate == 0.05
    many = [0.1 * 2**i for i in range(9)]
    assert not tuning.beyond(plan, {"baseline": at(0.0, many), "sgd": at(99.0, many)})
