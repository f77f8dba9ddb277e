"""Who needed how much: from the curves of all runs to the numbers of the table.

Comes from: the records of ``pool.py`` and the times of ``timing.py``. Goes to: ``report.py`` and ``results.json``.
The rules are in docs/race.md; this is the only place that applies them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from batchnorm.racing.plan import Plan
from batchnorm.racing.timing import StepTime

REACHED = "reached the target"
Record = Mapping[str, Any]  # of one run: seed, learning_rate, status, curve


def best(record: Record) -> float | None:
    """The highest score of a run; None if it was never evaluated."""
    return max((point["score"] for point in record["curve"]), default=None)


def steps_to(record: Record, target: float) -> int | None:
    """The first evaluation at or above the target; None if there is none."""
    return next((point["step"] for point in record["curve"] if point["score"] >= target), None)


def target_of(baseline: Sequence[Record]) -> float | None:
    """The mean over seeds of the best score that the baseline reaches within its budget."""
    bests = [best(record) for record in baseline]
    return None if None in bests else mean(b for b in bests if b is not None)


def all_steps_to(name: str, records: Sequence[Record], target: float | None) -> list[int | None]:
    """Of each run, to the target; the baseline's to its own best.

    The baseline defines the target: against the mean of its bests, every run below the average would count as a miss.
    """
    goals = [best(record) if name == "baseline" else target for record in records]
    return [None if goal is None else steps_to(record, goal) for record, goal in zip(records, goals, strict=True)]


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95% confidence interval of the mean (Student's t); None for a single value."""
    if len(values) < 2:
        return None
    from scipy import stats

    low, high = stats.t.interval(0.95, len(values) - 1, loc=mean(values), scale=stats.sem(values) or 1e-300)
    return float(low), float(high)


def score(plan: Plan, records: Mapping[str, Sequence[Record]], times: Mapping[str, StepTime]) -> dict[str, Any]:
    """Every contender's row: means over seeds, None where any seed missed the target."""
    target = target_of(records["baseline"])
    rows = [
        _row(contender.name, plan, records[contender.name], target, times[contender.name])
        for contender in plan.contenders
    ]
    baseline = next(row for row in rows if row["name"] == "baseline")
    for row in rows:
        for quantity in ("steps", "seconds"):
            own, reference = row[f"{quantity}_to_target"], baseline[f"{quantity}_to_target"]
            row[f"{quantity}_fraction"] = None if own is None or not reference else own / reference
    return {"target": target, "contenders": rows}


def _row(name: str, plan: Plan, records: Sequence[Record], target: float | None, time: StepTime) -> dict[str, Any]:
    runs = []
    for record, steps in zip(records, all_steps_to(name, records, target), strict=True):
        runs.append(
            {
                "seed": record["seed"],
                "steps_to_target": steps,
                "seconds_to_target": None if steps is None else steps * time.median + time.preparation,
                "best_accuracy": best(record),
                "steps": record["curve"][-1]["step"] if record["curve"] else 0,
                "status": record["status"],
            }
        )
    bests = [run["best_accuracy"] for run in runs if run["best_accuracy"] is not None]
    reached = [run["steps_to_target"] for run in runs if run["steps_to_target"] is not None]
    complete = len(reached) == len(runs)
    steps_mean = mean(reached) if complete else None
    return {
        "name": name,
        "learning_rate": plan.learning_rates[name],
        "steps_to_target": steps_mean,
        "seconds_to_target": mean(run["seconds_to_target"] for run in runs) if complete else None,
        "steps_fraction": None,
        "seconds_fraction": None,
        "best_accuracy": mean(bests) if bests else None,
        "status": _status(runs),
        "steps_interval": interval(reached) if complete else None,
        "best_accuracy_interval": interval(bests),
        "epochs_to_target": None if steps_mean is None else steps_mean * plan.batch_size / plan.examples,
        "seconds_per_step": time.median,
        "seconds_per_step_quartiles": time.quartiles,
        "seconds_to_prepare": time.preparation,
        "runs": runs,
    }


def _status(runs: Sequence[Mapping[str, Any]]) -> str:
    parts = [f"{run['status']} (seed {run['seed']})" for run in runs if run["status"] != "finished"]
    missed = [str(run["seed"]) for run in runs if run["steps_to_target"] is None and run["status"] == "finished"]
    if len(missed) == len(runs):
        parts.append("target not reached")
    elif missed:
        parts.append(f"target not reached from seed {', '.join(missed)}")
    return "; ".join(parts) or REACHED
