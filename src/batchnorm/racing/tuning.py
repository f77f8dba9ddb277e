"""The sweep of learning rates on held-out training images: what was tried, and what came of it.

Comes from: the records of a race with ``--tune``. Goes to: ``tuning.json``, which ``--rates`` and ``tuned.json`` read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from rich.table import Table

from batchnorm.racing.plan import Plan, best_rate
from batchnorm.racing.score import Record, best


def sweep(plan: Plan, records: Mapping[str, Sequence[Record]], task: str) -> dict[str, Any]:
    """``{task: {mode: {"command", "steps", "batch_size", "examples", "scores": {contender: {rate: [one a seed]}}}}}``.

    A run that diverged scores 0: such a rate is not one to choose, however good it was before.
    """
    scores: dict[str, dict[str, list[float]]] = {}
    for name, runs in records.items():
        for run in runs:
            value = best(run) if run["status"] == "finished" else 0.0
            scores.setdefault(name, {}).setdefault(f"{run['learning_rate']:g}", []).append(round(value or 0.0, 4))
    ordered = {name: dict(sorted(rates.items(), key=lambda item: float(item[0]))) for name, rates in scores.items()}
    what = {
        "command": plan.command,
        "steps": plan.steps,
        "batch_size": plan.batch_size,
        "examples": plan.examples,
        "scores": ordered,
    }
    return {task: {plan.mode: what}}


def table(scores: Mapping[str, Mapping[str, Sequence[float]]]) -> Table:
    """One row per contender and rate; the best is marked, and an edge of the sweep named as such."""
    view = Table(title="Learning rates, scored on held-out training examples", title_justify="left")
    for heading in ("contender", "learning rate", "best accuracy", ""):
        view.add_column(heading, justify="right" if heading in ("learning rate", "best accuracy") else "left")
    for name, rates in scores.items():
        chosen = best_rate(rates)
        edge = chosen in (next(iter(rates)), next(reversed(list(rates))))
        for rate, values in rates.items():
            mark = ("chosen, at the edge: sweep further" if edge else "chosen") if rate == chosen else ""
            view.add_row(name, rate, f"{mean(values):.2%}", mark)
    return view
