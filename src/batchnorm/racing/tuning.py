"""The sweep of learning rates on held-out training images: what was tried, and what came of it.

Comes from: the records of a race with ``--tune``. Goes to: ``tuning.json``, which ``--rates`` and ``tuned.json`` read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from rich.table import Table
from rich.text import Text

from batchnorm.racing.metrics import rounded
from batchnorm.racing.plan import Plan
from batchnorm.racing.rates import best_rate
from batchnorm.racing.score import Record, curves_of


def sweep(plan: Plan, records: Mapping[str, Sequence[Record]], task: str) -> dict[str, Any]:
    """``{task: {mode: {"command", "steps", "batch_size", "examples", "scores": {contender: {rate: [one a seed]}}}}}``.

    Each score is the mean over the run's last tenth (of a metric that falls its negative); a run that diverged has its
    untrained one: such a rate is not one to choose, however good it was before.
    """
    scores: dict[str, dict[str, list[float]]] = {}
    for name, runs in records.items():
        for run in runs:
            curve = curves_of([run], plan.score_falls)
            value = curve.end() if run["status"] == "finished" else float(curve.scores[0, 0])
            scores.setdefault(name, {}).setdefault(f"{run['learning_rate']:g}", []).append(rounded(value, 4))
    ordered = {name: dict(sorted(rates.items(), key=lambda item: float(item[0]))) for name, rates in scores.items()}
    what = {
        "command": plan.command,
        "steps": plan.steps,
        "batch_size": plan.batch_size,
        "examples": plan.examples,
        "scores": ordered,
    }
    return {task: {plan.mode: what}}


def table(scores: Mapping[str, Mapping[str, Sequence[float]]], plan: Plan) -> Table:
    """One row per contender and rate; the best is marked, and an edge of the sweep named as such."""
    view = Table(title="Learning rates, scored on held-out training examples", title_justify="left")
    for heading in ("contender", "learning rate", f"{plan.metric} at its end", ""):
        view.add_column(Text(heading), justify="right" if heading != "contender" and heading else "left")
    for name, rates in scores.items():
        chosen = best_rate(rates)
        edge = chosen in (next(iter(rates)), next(reversed(list(rates))))
        for rate, values in rates.items():
            mark = ("chosen, at the edge: sweep further" if edge else "chosen") if rate == chosen else ""
            view.add_row(Text(name), rate, plan.shown(-mean(values) if plan.score_falls else mean(values)), mark)
    return view
