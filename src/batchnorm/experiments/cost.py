"""Both measures of speed, steps and seconds, with torch's layers and with ours.

Steps: the race's baseline and its ``fast`` on Fashion-MNIST (docs/race.md), the baseline for 5,000 steps (with
--quick 700): steps until ``fast`` is as good as the baseline at its end, as a fraction of the baseline's. Seconds
per step: alone on the machine, one thread, the networks taking turns: without BN, and with BN in torch's layers, ours,
and ours fused with the nonlinearities; median of 10 turns of 10 steps (with --quick 5 of 8), one seed after the
other. The fraction of the seconds is the product.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from math import inf
from statistics import mean, median
from typing import TYPE_CHECKING

import torch
from torch import nn

from batchnorm.experiments import style
from batchnorm.experiments.claim import Cell, Claim, Record, Result
from batchnorm.experiments.numbers import with_interval
from batchnorm.experiments.steps import record_of
from batchnorm.racing.events import Run
from batchnorm.racing.loading import load_task
from batchnorm.racing.plan import make_plan
from batchnorm.racing.score import curves_of
from batchnorm.racing.trainer import Trainer
from batchnorm.surgery import from_torch, to_torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONTENDERS, SHARE = ("baseline", "fast"), 0.5
LAYERS: dict[str, Callable[[nn.Module, torch.Tensor], nn.Module]] = {
    "torch's layers": lambda model, example: to_torch(model),
    "ours": lambda model, example: model,
    "ours, fused": lambda model, example: from_torch(model, example=example),
}
CLAIM = Claim(
    "cost",
    "Speed has two measures, steps and time, and what saves steps saves time, though each step costs more.",
    "Section 4; the paper counts steps alone",
    f"what the baseline ends at (the race's target) takes at most {SHARE:.0%} of its seconds, with torch's layers, "
    "with ours and with ours fused",
)
TURNS = {"quick": (5, 8), "default": (10, 10)}


def alone(cell: Cell) -> bool:
    """Whether seconds are measured in a cell."""
    return bool(cell["what"] == "seconds")


def cells(quick: bool, seeds: int) -> list[Cell]:
    """(Contenders, and the times) x seeds."""
    mode = "quick" if quick else "default"
    return [{"what": what, "seed": s, "mode": mode} for what in (*CONTENDERS, "seconds") for s in range(seeds)]


def measure(what: str, seed: int, mode: str, steps: int | None = None) -> Record:
    """A contender's accuracies over training, or the seconds per step."""
    task = load_task("inception")
    plan = make_plan(task, spec="inception", contenders=CONTENDERS, mode=mode, seeds=seed + 1, steps=steps)  # type: ignore[arg-type]
    runs = {run.contender.name: run for run in plan.runs() if run.seed == seed}
    if what != "seconds":
        return record_of(task, runs[what])
    trainers = {"without BN": Trainer(task, runs["baseline"])}
    for name, change in LAYERS.items():
        trainers[name] = trainer_with(change, Trainer(task, runs["fast"]), runs["fast"])
    return {"seconds": seconds_per_step(trainers, *TURNS[mode])}


def trainer_with(change: Callable[[nn.Module, torch.Tensor], nn.Module], trainer: Trainer, run: Run) -> Trainer:
    """The same with other layers; they hold the same parameters, so that the optimizer stays."""
    trainer.model = change(trainer.model, trainer.task.example(trainer.model))
    trainer.network.model = trainer.model
    return trainer


def seconds_per_step(trainers: dict[str, Trainer], turns: int, steps: int) -> dict[str, float]:
    """Medians; the trainers take turns."""
    taken: dict[str, list[float]] = {name: [] for name in trainers}
    for turn in range(turns + 1):
        for name, trainer in trainers.items():
            for _ in range(steps):
                started = time.perf_counter()
                trainer.step()
                if turn:  # the first one warms up
                    taken[name].append(time.perf_counter() - started)
    return {name: median(seconds) for name, seconds in taken.items()}


def conclude(records: list[Record]) -> Result:
    """The product, for each kind of layer."""
    runs = {name: [r for r in records if r["what"] == name] for name in (*CONTENDERS, "seconds")}
    baseline, fast = (curves_of(runs[name]) for name in CONTENDERS)
    share = fast.steps_to(baseline.target()) / baseline.steps_to(baseline.target())
    steps = share if share < inf else None
    ratios = {name: [r["seconds"][name] / r["seconds"]["without BN"] for r in runs["seconds"]] for name in LAYERS}
    fractions = {name: None if steps is None else steps * mean(ratio) for name, ratio in ratios.items()}
    rows = [
        {
            "layers": name,
            "steps, of the baseline's": _percent(steps),
            "seconds per step, of the baseline's": with_interval(ratios[name], "{:.2f}"),
            "seconds, of the baseline's": _percent(fractions[name]),
        }
        for name in LAYERS
    ]

    def draw(figure: Figure) -> None:
        axes = style.axes_of(
            figure, f"To what the baseline ends at: {_percent(steps)}"
            + (f" of its steps, {_percent(fractions['ours'])} of its seconds" if steps else ""),
            "of the baseline's", "",
        )  # fmt: skip
        bars = {"steps": steps or 0.0, **{f"seconds, {name}": f or 0.0 for name, f in fractions.items()}}
        colors = [style.WITHOUT[0], style.THIRD[0], style.WITH[0], style.OTHER[0]]
        for place, ((words, value), color) in enumerate(zip(bars.items(), colors, strict=True)):
            axes.barh(words, value, color=color, height=0.5)
            axes.annotate(f" {_percent(value or None)}", (value, place), va="center")
        axes.axvline(1, color="black", linewidth=0.8)
        axes.annotate("the baseline ", (1, 1), xycoords=("data", "axes fraction"), ha="right", va="top", fontsize=9)
        axes.set_xlim(0, max(1.05, *bars.values()))
        axes.invert_yaxis()

    return Result(
        all(f is not None and f <= SHARE for f in fractions.values()),
        f"{_percent(steps)} of the steps; of the seconds "
        + ", ".join(f"{_percent(f)} with {name}" for name, f in fractions.items())
        + "."
        if steps
        else "fast did not reach what the baseline ends at.",
        rows,
        draw,
    )


def _percent(share: float | None) -> str:
    return "not reached" if share is None else f"{share:.1%}"
