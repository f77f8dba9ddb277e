"""Who needed how much: from the curves of all runs to the numbers of the table, with their intervals.

    end      = mean score of a run in the last tenth of its steps
    target   = mean of the baseline's ends over seeds, less one standard error of that mean
    steps(a) = first crossing of a by the mean curve over seeds, made monotone (isotonic regression), linear in between

The standard error: within it of its end, a curve that flattens out is at its plateau (the one-standard-error rule,
Breiman et al. 1984); without it noise decides when the baseline has reached what it ends at. Intervals: 95%, by
resampling seeds with replacement (Efron 1979), the target computed anew each time, so that its own uncertainty is in
them; with percentiles that make up for few seeds (``tail``).

The rules are in docs/race.md; this is the only place that applies them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import mean
from typing import Any

import numpy as np

from batchnorm.racing import checks
from batchnorm.racing.contenders import Contender
from batchnorm.racing.plan import Plan
from batchnorm.racing.timing import StepTime

REACHED, UNKNOWN = "reached the target", "no target"
LAST = 0.9  # a run's end begins here, as a share of its steps
RESAMPLES = 2_000
ENOUGH = 6  # seeds for 95%: with 5 the mean lies beyond the lowest and the highest of them in 1 of 16 cases
Record = Mapping[str, Any]  # of one run: seed, learning_rate, status, curve
Array = Any  # numpy's


@dataclass(frozen=True)
class Curves:
    """The scores of a contender's runs, higher being better: ``steps`` (points,), ``scores`` (seeds, points)."""

    steps: Array
    scores: Array

    def mean(self, seeds: Array | None = None) -> Array:
        """The mean curve over (some) seeds, made monotone: what is expected after so many steps, or fewer."""
        from scipy.optimize import isotonic_regression

        some = self.scores if seeds is None else self.scores[seeds]
        return isotonic_regression(some.mean(0)).x

    def end(self) -> float:
        """The mean over seeds of the mean score in the last tenth of the steps."""
        return float(self.ends.mean())

    @property
    def ends(self) -> Array:
        """The mean score of each seed in the last tenth of the steps."""
        return self.scores[:, self.steps >= LAST * self.steps[-1]].mean(1)

    def target(self, seeds: Array | None = None) -> float:
        """The score that others are to reach: the end, less the standard error of its mean over (some) seeds."""
        ends = self.ends if seeds is None else self.ends[seeds]
        error = ends.std(ddof=1) / np.sqrt(len(ends)) if len(ends) > 1 else 0.0
        return float(ends.mean() - error)

    def steps_to(self, target: float, seeds: Array | None = None) -> float:
        """Until the mean curve first is at the target, linear between evaluations; infinite where it never is."""
        curve = self.mean(seeds)
        at = int(np.searchsorted(curve, target - 1e-12))
        if at == len(curve):
            return float("inf")
        if at == 0:
            return float(self.steps[0])
        low, high = curve[at - 1], curve[at]
        share = min(1.0, (target - low) / (high - low))
        return float(self.steps[at - 1] + share * (self.steps[at] - self.steps[at - 1]))


def curves_of(records: Sequence[Record], falls: bool = False) -> Curves:
    """A run that diverged counts with its untrained score from there on, one that stopped early with its end.

    One that diverged before it was ever scored counts with the others' worst untrained score.
    """
    sign = -1 if falls else 1
    curves = [[sign * point["score"] for point in record["curve"]] for record in records]
    points = max(([point["step"] for point in record["curve"]] for record in records), key=len)
    if any(record["status"].startswith("diverged") for record in records):
        points = records[0]["points"]  # to the end of the budget, even where none of them got there
    untrained = min(curve[0] for curve in curves if curve)
    rows = []
    for record, curve in zip(records, curves, strict=True):
        rest = curve[0] if curve else untrained
        if record["status"].startswith("stopped"):
            rest = Curves(np.array(points[: len(curve)], float), np.array([curve])).end()
        rows.append(curve + [rest] * (len(points) - len(curve)))
    return Curves(np.array(points, float), np.array(rows))


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95% confidence interval of the mean (Student's t); None for a single value."""
    if len(values) < 2:
        return None
    from scipy import stats

    low, high = stats.t.interval(0.95, len(values) - 1, loc=mean(values), scale=stats.sem(values) or 1e-300)
    return float(low), float(high)


def score(plan: Plan, records: Mapping[str, Sequence[Record]], times: Mapping[str, StepTime]) -> dict[str, Any]:
    """Every contender's row; fractions are None where they mean nothing, ``warnings`` say why."""
    curves = {
        name: curves_of(some, plan.score_falls) for name, some in records.items() if any(r["curve"] for r in some)
    }
    base = curves.get(plan.baseline)
    faults = checks.of_baseline(plan, records[plan.baseline], base)
    target = base.target() if base is not None else None
    rows = [
        _row(plan, contender, records[contender.name], curves.get(contender.name), base, target, times, bool(faults))
        for contender in plan.contenders
    ]
    sign = -1 if plan.score_falls else 1
    return {
        "target": None if target is None else sign * target,
        "metric": plan.metric,
        "lower_is_better": plan.score_falls,
        "intervals": level(plan.seeds),
        "warnings": faults + [w for row in rows for w in row["warnings"]] + checks.of_schedules(plan, records),
        "contenders": rows,
        "steps_to_each": {} if target is None else steps_to_each(plan, curves),
    }


def _row(
    plan: Plan,
    contender: Contender,
    records: Sequence[Record],
    own: Curves | None,
    base: Curves | None,
    target: float | None,
    times: Mapping[str, StepTime],
    void: bool,
) -> dict[str, Any]:
    name = contender.name
    time, sign = times[name], -1 if plan.score_falls else 1
    steps = own.steps_to(target) if own is not None and target is not None else float("inf")
    reference = base.steps_to(target) if base is not None and target is not None else float("inf")
    shares, all_steps = _resampled(own, base)
    reached = float(np.isfinite(all_steps).mean()) if len(all_steps) else None
    is_reached = bool(np.isfinite(steps))
    found = checks.of_contender(plan, name, own, steps) if is_reached and not void else []
    fraction = steps / reference if is_reached and not void and not found else None
    no_interval = fraction is None or name == plan.baseline
    per_step = time.median / times[plan.baseline].median
    seconds = steps * time.median + time.preparation if is_reached else None
    base_seconds = reference * times[plan.baseline].median + times[plan.baseline].preparation
    return {
        "name": name,
        "learning_rate": plan.learning_rates[name],
        "steps_to_target": steps if is_reached else None,
        "steps_interval": _percentiles(all_steps, plan.seeds),
        "steps_fraction": fraction,
        "steps_fraction_interval": None if no_interval else _percentiles(shares, plan.seeds),
        "seconds_to_target": seconds,
        "seconds_fraction": None if fraction is None or seconds is None else seconds / base_seconds,
        "seconds_fraction_interval": None
        if no_interval
        else _percentiles(shares * per_step + time.preparation / base_seconds, plan.seeds),
        "probability_reached": reached,
        "status": _status(records, is_reached, reached, void),
        "warnings": found,
        "end": None if own is None else sign * own.end(),
        "end_interval": None if own is None else _signed(interval(own.ends.tolist()), sign),
        "budget": plan.steps_of(contender),
        "epochs_to_target": steps * plan.batch_size / plan.examples if is_reached else None,
        "seconds_per_step": time.median,
        "seconds_per_step_quartiles": time.quartiles,
        "seconds_to_prepare": time.preparation,
        "runs": [
            {
                "seed": record["seed"],
                "status": record["status"],
                "steps": record["curve"][-1]["step"] if record["curve"] else 0,
                "end": None if own is None else sign * float(end),
            }
            for record, end in zip(records, own.ends if own is not None else [None] * len(records), strict=True)
        ],
    }


def _resampled(own: Curves | None, base: Curves | None) -> tuple[Array, Array]:
    """Shares and steps of the resamples, infinite where the target is not reached: of the baseline's seeds, and the
    same ones of the contender's, which begin with the same weights and see the same batches."""
    if own is None or base is None or len(base.scores) < 2:
        return np.empty(0), np.empty(0)
    shares, steps = [], []
    for seeds in resamples(len(base.scores)):
        target = base.target(seeds)
        steps.append(own.steps_to(target, seeds))
        reference = base.steps_to(target, seeds)  # 0 of a baseline that learns nothing, which has no fraction then
        shares.append(steps[-1] / reference if reference else float("inf"))
    return np.array(shares), np.array(steps)


def resamples(seeds: int) -> list[Array]:
    """Draws of as many seeds with replacement; where they are too few for percentiles, all that there are."""
    if seeds < ENOUGH:
        return [np.array(draw) for draw in product(range(seeds), repeat=seeds)]
    return list(np.random.default_rng(0).integers(seeds, size=(RESAMPLES, seeds)))


def tail(seeds: int) -> float:
    """The share of the resamples beyond each end of a 95% interval: Phi(-t sqrt(n / (n - 1))), 0.6% with 8 seeds.

    Resampled means spread by too little, by sqrt((n - 1) / n), and as if the spread of the seeds were known, where
    Student's t is to be used: the "expanded percentile interval" of Hesterberg 2015, "What Teachers Should Know About
    the Bootstrap". With fewer than ``ENOUGH`` seeds no percentile is far enough out.
    """
    from scipy import stats

    return float(stats.norm.cdf(-stats.t.ppf(0.975, seeds - 1) * np.sqrt(seeds / (seeds - 1))))


def level(seeds: int) -> str:
    """The name of an interval: 95%, or the number of seeds where they are too few for that."""
    return "95%" if seeds >= ENOUGH else f"{seeds} seeds" if seeds > 1 else "one seed"


def _percentiles(values: Array, seeds: int) -> tuple[float, float | None] | None:
    """``level(seeds)``. The upper end is None where the target is not reached in more resamples than lie beyond it."""
    if not len(values):
        return None
    beyond = tail(seeds) if seeds >= ENOUGH else 0.0
    low, high = np.quantile(values, [beyond, 1 - beyond], method="nearest")
    return (float(low), float(high) if np.isfinite(high) else None) if np.isfinite(low) else None


def steps_to_each(plan: Plan, curves: Mapping[str, Curves]) -> dict[str, Any]:
    """``{"scores": [...], "steps": {contender: [... or None]}}``: from where the baseline starts to where any ends."""
    base = curves[plan.baseline].mean()
    top = max(float(some.mean()[-1]) for some in curves.values())
    low = float(base[min(2, len(base) - 1)])
    goals = np.linspace(low, top, 60).tolist() if top > low else [low]
    steps = {name: [some.steps_to(goal) for goal in goals] for name, some in curves.items()}
    sign = -1 if plan.score_falls else 1
    return {
        "scores": [sign * goal for goal in goals],
        "steps": {name: [s if np.isfinite(s) else None for s in some] for name, some in steps.items()},
    }


def _signed(values: tuple[float, float] | None, sign: int) -> tuple[float, float] | None:
    if values is None:
        return None
    low, high = sorted(sign * value for value in values)
    return low, high


def _status(records: Sequence[Record], is_reached: bool, reached: float | None, void: bool) -> str:
    parts = [f"{run['status']} (seed {run['seed']})" for run in records if run["status"].startswith("diverged")]
    if void:
        return "; ".join(parts) or UNKNOWN
    sure = "" if reached is None else f" ({1 - reached:.0%} of the resamples do not reach it)"
    if not is_reached:
        return "; ".join([*parts, f"target not reached{sure}"])
    return "; ".join([*parts, REACHED]) if not reached or reached > 0.975 else "; ".join([*parts, f"{REACHED}{sure}"])
