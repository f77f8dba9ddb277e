"""The paper's second experiment: steps to the best accuracy of the network without BN.

The race (docs/race.md) between the paper's own contenders, with its rules and its budgets: on Fashion-MNIST at 28 x 28,
the baseline for 5,000 steps of 256 images, up to its plateau (with --quick 700).
"""

from __future__ import annotations

from dataclasses import asdict
from math import inf
from typing import TYPE_CHECKING

from batchnorm.experiments import style
from batchnorm.experiments.claim import Cell, Claim, Record, Result
from batchnorm.experiments.numbers import with_interval
from batchnorm.racing.events import Diverged, Evaluation, Run
from batchnorm.racing.loading import load_task
from batchnorm.racing.plan import make_plan
from batchnorm.racing.plots import STYLES
from batchnorm.racing.score import curves_of
from batchnorm.racing.task import Task
from batchnorm.racing.training import train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONTENDERS = ("baseline", "bn", "bn-x5", "bn-x30", "sigmoid", "bn-x5-sigmoid")
SHARE = 0.07
CLAIM = Claim(
    "steps",
    f"With batch normalization and what it allows (bn-x5), the same accuracy takes {SHARE:.0%} of the training steps.",
    "Section 4.2.2, Figures 2 and 3",
    f"bn-x5 is at what the baseline ends at (the race's target) in at most {SHARE:.0%} of the baseline's steps to it",
)


def cells(quick: bool, seeds: int) -> list[Cell]:
    """Contenders x seeds; the longest first."""
    return [
        {"contender": name, "seed": seed, "mode": "quick" if quick else "full"}
        for name in CONTENDERS for seed in range(seeds)
    ]  # fmt: skip


def measure(contender: str, seed: int, mode: str, steps: int | None = None) -> Record:
    """The accuracies over training."""
    task = load_task("inception")
    plan = make_plan(task, spec="inception", contenders=CONTENDERS, mode=mode, seeds=seed + 1, steps=steps)  # type: ignore[arg-type]
    run = next(run for run in plan.runs() if (run.contender.name, run.seed) == (contender, seed))
    return record_of(task, run)


def record_of(task: Task, run: Run) -> Record:
    """A run's curve, and whether it diverged."""
    happened = list(train(task, run))
    status = "diverged" if isinstance(happened[-1], Diverged) else "finished"
    curve = [asdict(event) for event in happened if isinstance(event, Evaluation)]
    return {"curve": curve, "status": status, "points": run.points}


def conclude(records: list[Record]) -> Result:
    """The race's table, without its seconds."""
    runs = {name: [r for r in records if r["contender"] == name] for name in CONTENDERS}
    curves = {name: curves_of(some) for name, some in runs.items()}
    target = curves["baseline"].target()
    needed = {name: some.steps_to(target) for name, some in curves.items()}
    shares = {name: steps / needed["baseline"] if steps < inf else None for name, steps in needed.items()}
    rows = [
        {
            "network": name,
            "steps to target": f"{needed[name]:,.0f}" if shares[name] else "-",
            "of the baseline's": _percent(shares[name]),
            "accuracy at its end": with_interval(some.ends.tolist()),
        }
        for name, some in curves.items()
    ]
    share = shares["bn-x5"]

    def draw(figure: Figure) -> None:
        axes = style.axes_of(
            figure, f"Steps to the accuracy of the network without BN: bn-x5 {_percent(share)}, in the paper 7%",
            "training steps", "accuracy on the test images",
        )  # fmt: skip
        for name, some in curves.items():
            color, dash = STYLES[name]
            label = f"{name}: {_percent(shares[name])}"
            axes.plot(some.steps[1:], some.scores.mean(0)[1:], dash, color=color, label=label)
        axes.axhline(target, color="black", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_ylim(target - 0.12, target + 0.02)
        axes.legend(frameon=False, loc="lower right", title="of the baseline's steps")

    return Result(
        share is not None and share <= SHARE,
        "Steps to what the baseline ends at, of the baseline's own: "
        + ", ".join(f"{name} {_percent(shares[name])}" for name in CONTENDERS if name != "baseline")
        + ".",
        rows,
        draw,
    )


def _percent(share: float | None) -> str:
    return "not reached" if share is None else f"{share:.1%}"
