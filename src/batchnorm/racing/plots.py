"""Plots of a race: score against steps and seconds, all contenders, the target as a thin line; steps to each score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchnorm.racing.plan import Plan
from batchnorm.racing.report import answers, others, share
from batchnorm.racing.score import Record, curves_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One color and dash per contender throughout the project; lightness and dash tell them apart in grey.
STYLES: dict[str, tuple[str, str]] = {
    "baseline": ("#444444", "-"),
    "short": ("#999999", ":"),
    "bn": ("#7fb8e6", "-"),
    "bn-x5": ("#1f77b4", "--"),
    "bn-x30": ("#0b3c5d", "-."),
    "sigmoid": ("#b0a060", ":"),
    "bn-x5-sigmoid": ("#8c6d1f", "--"),
    "sgd": ("#2a9d55", "-"),
    "fast": ("#c8102e", "-"),
    "fast-without-bn": ("#f2a0a8", "-."),
    "muon-without-bn": ("#d87f3a", ":"),
    "as-is": ("#444444", "-"),
    "without-bn": ("#999999", ":"),
    "paper": ("#1f77b4", "--"),
    "ghost": ("#7a5ea8", "-."),
    "renorm": ("#a98fd0", ":"),
    "group-norm": ("#8c6d1f", "--"),
    "layer-norm": ("#b0a060", "-."),
    "fused": ("#2a9d55", "--"),
}
OTHERS = ("#e377c2", "#17becf", "#bcbd22", "#9467bd", "#8c564b")  # for contenders of users


def styles(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Color and dash of each contender."""
    own = [name for name in names if name not in STYLES]
    return STYLES | {name: (OTHERS[i % len(OTHERS)], "-") for i, name in enumerate(own)}


def plot(
    results: Mapping[str, Any], records: Mapping[str, Sequence[Record]], plan: Plan, directory: Path
) -> list[Path]:
    """Write ``score-steps.png``, ``score-seconds.png`` and ``steps-to-each.png``."""
    from matplotlib.figure import Figure  # without pyplot: the user's backend stays as it is

    written = []
    for name, draw in (("score-steps", _curves), ("score-seconds", _curves), ("steps-to-each", _steps_to_each)):
        figure = Figure(figsize=(8, 4.8), layout="constrained")
        draw(figure, results, records, plan, name.rpartition("-")[2])
        written.append(directory / f"{name}.png")
        figure.savefig(written[-1], dpi=150)
    return written


def _axes(figure: Figure, title: str, x: str, y: str) -> Axes:
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=12)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _curves(
    figure: Figure, results: Mapping[str, Any], records: Mapping[str, Sequence[Record]], plan: Plan, quantity: str
) -> None:
    """The mean over seeds, lowest to highest as a band; a dot where the target is reached."""
    label = "training steps" if quantity == "steps" else "seconds of training (steps x median step time)"
    axes = _axes(
        figure, _message(results, plan, quantity), f"{label}, log scale", f"{plan.metric} on the test examples"
    )
    target, sign = results["target"], -1 if plan.score_falls else 1
    ends = []
    for row in results["contenders"]:
        some = records[row["name"]]
        if not any(len(record["curve"]) > 1 for record in some):  # none was scored after a step
            continue
        color, dash = styles(list(records))[row["name"]]
        curves, unit = curves_of(some, plan.score_falls), 1.0 if quantity == "steps" else row["seconds_per_step"]
        x, scores = curves.steps[1:] * unit, sign * curves.scores[:, 1:]
        axes.plot(x, scores.mean(0), dash, color=color, linewidth=1.8, label=row["name"])
        axes.fill_between(x, scores.min(0), scores.max(0), color=color, alpha=0.13, linewidth=0)
        if row["steps_to_target"] is not None and target is not None:
            axes.plot(row["steps_to_target"] * unit, target, "o", color=color, markersize=6, zorder=3)
        ends.append(scores.mean(0)[-1])
    _log(axes, "x")
    if target is not None:
        axes.axhline(target, color="black", linewidth=0.8, zorder=0)
        axes.annotate(
            f"target {plan.shown(target)}", (0, target), xycoords=("axes fraction", "data"), xytext=(4, 4),
            textcoords="offset points", ha="left", va="bottom", fontsize=9,
        )  # fmt: skip
    if target is not None and plan.percent:
        axes.set_ylim(max(0.0, target - 0.12), min(1.0, max(*ends, target) + 0.015))
    _as_percent(axes.yaxis, plan)
    axes.legend(loc="upper right" if plan.score_falls else "lower right", frameon=False, fontsize=9)


def _steps_to_each(
    figure: Figure, results: Mapping[str, Any], records: Mapping[str, Sequence[Record]], plan: Plan, quantity: str
) -> None:
    """How the advantage grows, or shrinks, with what is to be reached."""
    axes = _axes(
        figure, f"Steps to each {plan.metric}", f"{plan.metric} to reach", "training steps to it, log scale"
    )  # fmt: skip
    each = results["steps_to_each"]
    for name, steps in each.get("steps", {}).items():
        color, dash = styles(list(records))[name]
        known = [(score, count) for score, count in zip(each["scores"], steps, strict=True) if count]
        if known:
            axes.plot(*zip(*known, strict=True), dash, color=color, linewidth=1.8, label=name)
    _log(axes, "y")
    if results["target"] is not None:
        axes.axvline(results["target"], color="black", linewidth=0.8, zorder=0)
        axes.annotate(
            f" target {plan.shown(results['target'])}", (results["target"], 0.02), xycoords=("data", "axes fraction"),
            ha="right", va="bottom", fontsize=9, rotation=90,
        )  # fmt: skip
    if plan.score_falls:
        axes.invert_xaxis()
    _as_percent(axes.xaxis, plan)
    if axes.get_legend_handles_labels()[0]:  # nobody gets anywhere where the score is constant
        axes.legend(loc="upper left", frameon=False, fontsize=9)


def _log(axes: Axes, name: str) -> None:
    """In numbers that people write: 1, 2, 5, 10, ..."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis = axes.xaxis if name == "x" else axes.yaxis
    axes.set(**{f"{name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axis.set_minor_formatter(NullFormatter())


def _as_percent(axis: Any, plan: Plan) -> None:
    if plan.percent:
        from matplotlib.ticker import PercentFormatter

        axis.set_major_formatter(PercentFormatter(1))


def _message(results: Mapping[str, Any], plan: Plan, quantity: str) -> str:
    key = f"{quantity}_fraction"
    if not any(row[key] for row in others(results, plan)):
        return f"No contender reached what {plan.baseline} ends at"
    first, _ = answers(results, plan, quantity)
    return f"{first['name']}: the {plan.metric} of {plan.baseline} in {share(first, quantity, plan)} of its {quantity}"
