"""The sweep of learning rates on held-out training images: what was tried, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from rich.table import Table
from rich.text import Text

from batchnorm.racing.errors import RaceError
from batchnorm.racing.events import Run
from batchnorm.racing.metrics import rounded
from batchnorm.racing.plan import Plan
from batchnorm.racing.rates import best_rate
from batchnorm.racing.score import Record, curves_of

MOST_RATES = 9  # of a contender: those of the grid, and further ones while the best is at the edge


def sweep(plan: Plan, records: Mapping[str, Sequence[Record]], task: str) -> dict[str, Any]:
    """``{task: {mode: {"command", "steps", "batch_size", "examples", "scores": {contender: {rate: [a seed's]}}}}}``."""
    what = {
        "command": plan.command,
        "steps": plan.steps,
        "batch_size": plan.batch_size,
        "examples": plan.examples,
        "scores": {name: scores(plan, runs) for name, runs in records.items()},
    }
    return {task: {plan.mode: what}}


def scores(plan: Plan, runs: Sequence[Record]) -> dict[str, list[float]]:
    """Of each rate, from the lowest, one score a seed: that of its end, of a metric that falls its negative.

    A run that diverged has its untrained one: such a rate is not one to choose, however good it was before.

    Raises:
        RaceError: no run has a score, not even an untrained one.
    """
    if not any(run["curve"] for run in runs):
        raise RaceError(f"{plan.metric} is not finite, not even before the first step: no learning rate can be chosen.")
    runs = sorted(runs, key=lambda run: run["learning_rate"])
    curves, found = curves_of(runs, plan.score_falls), dict[str, list[float]]()
    for run, untrained, end in zip(runs, curves.scores[:, 0], curves.ends, strict=True):
        value = untrained if run["status"].startswith("diverged") else end
        found.setdefault(f"{run['learning_rate']:g}", []).append(rounded(float(value), 4))
    return found


def beyond(plan: Plan, records: Mapping[str, Sequence[Record]]) -> list[Run]:
    """Of each contender whose best rate is the lowest or the highest tried, the runs at the next one out there."""
    found: list[Run] = []
    for contender in plan.contenders:
        tried = scores(plan, records[contender.name])
        rates = [float(rate) for rate in tried]
        edges = {rates[0]: rates[1], rates[-1]: rates[-2]} if 1 < len(rates) < MOST_RATES else {}
        best = float(best_rate(tried))
        if best in edges:
            found += plan.runs_at(contender, float(f"{best * best / edges[best]:.3g}"))
    return found


def table(swept: Mapping[str, Mapping[str, Sequence[float]]], plan: Plan) -> Table:
    """One row per contender and rate; the best is marked, and an edge of the sweep named as such."""
    view = Table(title="Learning rates, scored on held-out training examples", title_justify="left")
    for heading in ("contender", "learning rate", f"{plan.metric} at its end", ""):
        view.add_column(Text(heading), justify="right" if heading != "contender" and heading else "left")
    for name, rates in swept.items():
        chosen = best_rate(rates)
        edge = chosen in (next(iter(rates)), next(reversed(list(rates))))
        for rate, values in rates.items():
            mark = ("chosen, at the edge: sweep further" if edge else "chosen") if rate == chosen else ""
            view.add_row(Text(name), rate, plan.shown(-mean(values) if plan.score_falls else mean(values)), mark)
    return view
