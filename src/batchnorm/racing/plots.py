"""Plots of a race: accuracy against steps and against seconds, all contenders, the target as a thin line.

Comes from: records and results of ``score.py``. Goes to: PNG files in the output directory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from batchnorm.racing.score import Record

# One color and dash per contender throughout the project; lightness and dash tell them apart in grey.
STYLES: dict[str, tuple[str, str]] = {
    "baseline": ("#444444", "-"),
    "bn": ("#7fb8e6", "-"),
    "bn-x5": ("#1f77b4", "--"),
    "bn-x30": ("#0b3c5d", "-."),
    "sigmoid": ("#b0a060", ":"),
    "bn-x5-sigmoid": ("#8c6d1f", "--"),
    "accelerated": ("#c8102e", "-"),
    "accelerated-without-bn": ("#f2a0a8", "-."),
}


def plot(results: Mapping[str, Any], records: Mapping[str, Sequence[Record]], directory: Path) -> list[Path]:
    """Write ``accuracy-steps.png`` and ``accuracy-seconds.png``."""
    steps = _figure(results, records, directory / "accuracy-steps.png", "steps", "training steps", lambda row: 1.0)
    seconds = _figure(
        results,
        records,
        directory / "accuracy-seconds.png",
        "seconds",
        "seconds of training (steps x median step time)",
        lambda row: row["seconds_per_step"],
    )
    return [steps, seconds]


def _figure(
    results: Mapping[str, Any],
    records: Mapping[str, Sequence[Record]],
    path: Path,
    quantity: str,
    label: str,
    unit: Any,
) -> Path:
    from matplotlib.figure import Figure  # without pyplot: the user's backend stays as it is
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    target, highest = results["target"], 0.0
    for row in results["contenders"]:
        color, dash = STYLES[row["name"]]
        curves = [run["curve"] for run in records[row["name"]] if run["curve"]]
        if not curves:
            continue
        points = list(zip(*curves, strict=False))  # as far as every seed got
        x = [at[0]["step"] * unit(row) for at in points]
        scores = [[point["score"] for point in at] for at in points]
        y = [mean(s) for s in scores]
        axes.plot(x, y, dash, color=color, linewidth=1.8, label=row["name"])
        axes.fill_between(x, [min(s) for s in scores], [max(s) for s in scores], color=color, alpha=0.15, linewidth=0)
        if row[f"{quantity}_to_target"] is not None and target is not None:
            axes.plot(row[f"{quantity}_to_target"], target, "o", color=color, markersize=6, zorder=3)
        highest = max(highest, *y)
    if target is not None:
        axes.axhline(target, color="black", linewidth=0.8, zorder=0)
        axes.annotate(
            f"target {target:.2%}", (1, target), xycoords=("axes fraction", "data"), xytext=(-4, 4),
            textcoords="offset points", ha="right", va="bottom", fontsize=9,
        )  # fmt: skip
        axes.set_ylim(max(0.0, target - 0.12), min(1.0, max(highest, target) + 0.015))
    axes.set_xlim(left=0)
    axes.set_xlabel(label)
    axes.set_ylabel("accuracy on the test examples")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    axes.set_title(_message(results, quantity), loc="left", fontsize=12)
    figure.savefig(path, dpi=150)
    return path


def _message(results: Mapping[str, Any], quantity: str) -> str:
    key = f"{quantity}_fraction"
    rows = [row for row in results["contenders"] if row["name"] != "baseline" and row[key] is not None]
    if not rows:
        return "No contender reached the baseline's best accuracy from every seed"
    first = min(rows, key=lambda row: row[key])
    return f"{first['name']}: the baseline's best accuracy in {first[key]:.0%} of the {quantity}"
