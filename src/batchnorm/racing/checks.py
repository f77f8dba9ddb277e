"""Faults that make a fraction of steps mean nothing: a line each, and no fraction is printed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from batchnorm.racing.plan import Plan
    from batchnorm.racing.score import Curves

FALLEN = 0.1  # of the highest learning rate: it has come down
STUCK = 0.1  # of what the best seed gained: a seed that has not begun to learn
COARSE = 0.5  # of the steps to the target: a gap between two evaluations that tells too little


def of_baseline(plan: Plan, records: Sequence[Mapping[str, Any]], curves: Curves | None) -> list[str]:
    """Faults of the training as it is, for which it sets no target."""
    name = plan.baseline
    diverged = [str(r["seed"]) for r in records if r["status"].startswith("diverged")]
    unscored = [r for r in records if r["status"].endswith(f"({plan.metric})")]
    if unscored:
        step = unscored[0]["status"].removeprefix("diverged at ").partition(" (")[0]
        return [
            f"{name}: {plan.metric} is not finite after {step}, from seed {', '.join(diverged)}, while the loss is: "
            "look at the metric; or where the training diverges, lower its learning rate."
        ]
    if curves is None or diverged:
        return [f"{name} diverged from seed {', '.join(diverged)}: lower its learning rate."]
    scores = curves.scores
    if not np.isfinite(scores).all():
        return [f"{name}: {plan.metric} is not finite."]
    if np.ptp(scores) == 0:
        return [f"{name}: {plan.metric} is {_shown(plan, scores.flat[0])} at every evaluation, so it tells nothing."]
    found = []
    losses = [[p["loss"] for p in r["curve"] if p["loss"] is not None] for r in records]
    if all(some and not some[-1] < some[0] for some in losses):
        first, last = (float(np.mean([some[i] for some in losses])) for i in (0, -1))
        found.append(f"{name}: its training loss does not fall ({first:.4g} at first, {last:.4g} at its end).")
    noise = (
        float(np.diff(scores[:, curves.steps >= 0.5 * curves.steps[-1]], axis=1).std()) if scores.shape[1] > 4 else 0
    )
    gain = float(curves.end() - scores[:, 0].mean())
    least = max(2 * noise / math.sqrt(len(scores)), 1e-12)
    gains = curves.ends - scores[:, 0]
    stuck = [str(r["seed"]) for r, some in zip(records, gains, strict=True) if some < STUCK * gains.max()]
    if gain > least and stuck:
        found.append(
            f"{name} learns nothing from seed {', '.join(stuck)}, and does from others, so that its mean is no target: "
            "lower its learning rate, or warm it up longer."
        )
    elif gain <= least or curves.steps_to(curves.target()) <= curves.steps[0]:
        other = f" If it did get better: lower_is_better={not plan.score_falls}." if gain < -least else ""
        found.append(
            f"{name} is no better at its end than at its beginning: {plan.metric} {_shown(plan, curves.end())}, before "
            f"the first step {_shown(plan, scores[:, 0].mean())}. Give it more steps, or another learning rate.{other}"
        )
    if not found:
        found += _unfinished(plan, records, curves) or of_contender(
            plan, name, curves, curves.steps_to(curves.target())
        )
    return found


def _unfinished(plan: Plan, records: Sequence[Mapping[str, Any]], curves: Curves) -> list[str]:
    """The learning rate is high at the end, and the score still rises: there is no plateau, whatever the target."""
    if all(_has_fallen(r["curve"][-1]) for r in records) or records[0]["status"].startswith("stopped"):
        return []
    last = curves.steps[-1]
    ends = curves.ends
    before = curves.scores[:, (curves.steps >= 0.7 * last) & (curves.steps < 0.9 * last)]
    if not before.shape[1]:
        return []
    rise = ends - before.mean(1)
    error = rise.std(ddof=1) / math.sqrt(len(rise)) if len(rise) > 1 else 0.0
    if rise.mean() <= max(2 * error, 0.002 * abs(curves.end() - curves.scores[:, 0].mean())):
        return []
    return [
        f"{plan.baseline} ends before its learning rate has come down (it is at {records[0]['curve'][-1]['rate']:.0%} "
        f"of its highest) and while its {plan.metric} still gets better: give it a scheduler that ends with the "
        "steps, or more steps."
    ]


def of_contender(plan: Plan, name: str, curves: Curves | None, steps: float) -> list[str]:
    """Faults of a number of steps."""
    if curves is None:
        return []
    if steps <= curves.steps[0]:
        return [f"{name} is at the target untrained: there are no steps to count."]
    at = int(np.searchsorted(curves.steps, steps))
    gap = float(curves.steps[at] - curves.steps[at - 1])
    if gap > COARSE * steps:
        speed = 2 * plan.steps / curves.steps[-1]
        smaller = f"a smaller budget (--contenders {plan.baseline},{name.partition('@')[0]}@{speed:.2g})"
        advice = f"race it with {smaller}, or the baseline with more steps (--steps {3 * plan.steps})"
        if name == plan.baseline:
            advice = f"give it fewer steps (--steps {max(1, plan.steps // 2)})"
        return [
            f"{name} is at the target within {steps:,.0f} steps, where it was evaluated too seldom to tell (the "
            f"nearest evaluations are {gap:,.0f} steps apart): {advice}."
        ]
    return []


def of_schedules(plan: Plan, records: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Who ends at a high learning rate where the baseline's has come down: its number counts, and could be better.

    A schedule does that which hangs on the steps in part (500 steps of warm-up, of 300), or waits for a plateau.
    """
    ends = {name: [run["curve"][-1] for run in some if run["status"] == "finished"] for name, some in records.items()}
    base = ends[plan.baseline]
    if len(base) < len(records[plan.baseline]) or not all(map(_has_fallen, base)):
        return []
    low = max(point["rate"] for point in base)
    high = {name: max(p["rate"] for p in some) for name, some in ends.items() if not all(map(_has_fallen, some))}
    return [
        f"{name} ends while its learning rate is at {rate:.0%} of its highest, that of {plan.baseline} at {low:.0%}: "
        "its schedule does not end with its steps; with one that does it would come further."
        for name, rate in high.items()
    ]


def _has_fallen(last: Mapping[str, Any]) -> bool:
    """Whether the learning rate has come down at a run's end; the last of ten steps still has 1/7 of the highest."""
    return bool(last["rate"] <= FALLEN + 2 / max(1, last["step"]))


def _shown(plan: Plan, score: float) -> str:
    return plan.shown(-score if plan.score_falls else score)
