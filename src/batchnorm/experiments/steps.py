"""The paper's second experiment: steps to the best accuracy of the network without BN.

The race (docs/race.md) between the paper's own contenders, with its rules and its budgets: on Fashion-MNIST at 28 x 28,
the baseline for 20,000 steps of 256 images, up to its plateau (with --quick 1,200). The target is the mean over seeds
of the baseline's best test accuracy.
"""

from __future__ import annotations

from dataclasses import asdict
from statistics import mean
from typing import TYPE_CHECKING

from batchnorm.experiments import style
from batchnorm.experiments.claim import Cell, Claim, Record, Result
from batchnorm.experiments.numbers import with_interval
from batchnorm.racing.plan import make_plan
from batchnorm.racing.plots import STYLES
from batchnorm.racing.score import all_steps_to, best, target_of
from batchnorm.racing.task import load_task
from batchnorm.racing.trainer import Evaluation, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONTENDERS = ("baseline", "bn", "bn-x5", "bn-x30", "sigmoid", "bn-x5-sigmoid")
SHARE = 0.07
CLAIM = Claim(
    "steps",
    f"With batch normalization and what it allows (bn-x5), the same accuracy takes {SHARE:.0%} of the training steps.",
    "Section 4.2.2, Figures 2 and 3",
    f"bn-x5 reaches the baseline's best accuracy from every seed, in at most {SHARE:.0%} of the baseline's steps (mean "
    "over seeds)",
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
    return {"curve": [asdict(event) for event in train(task, run) if isinstance(event, Evaluation)]}


def conclude(records: list[Record]) -> Result:
    """The race's table, without its seconds."""
    runs = {name: [r for r in records if r["contender"] == name] for name in CONTENDERS}
    target = target_of(runs["baseline"])
    needed = {name: all_steps_to(name, some, target) for name, some in runs.items()}
    average = {name: None if None in all_ else mean(n for n in all_ if n) for name, all_ in needed.items()}
    shares = {name: None if steps is None else steps / (average["baseline"] or 1) for name, steps in average.items()}
    rows = [
        {
            "network": name,
            "steps to target": with_interval([n for n in needed[name] if n], "{:,.0f}") if average[name] else "-",
            "of the baseline's": _percent(shares[name]),
            "seeds that reached it": f"{sum(n is not None for n in needed[name])} of {len(some)}",
            "best accuracy": with_interval([best(r) or 0.1 for r in some]),
        }
        for name, some in runs.items()
    ]
    share = shares["bn-x5"]

    def draw(figure: Figure) -> None:
        axes = style.axes_of(
            figure, f"Steps to the accuracy of the network without BN: bn-x5 {_percent(share)}, in the paper 7%",
            "training steps", "accuracy on the test images",
        )  # fmt: skip
        for name, some in runs.items():
            points = list(zip(*(r["curve"] for r in some), strict=False))  # as far as every seed got
            color, dash = STYLES[name]
            axes.plot(
                [at[0]["step"] for at in points], [mean(p["score"] for p in at) for at in points], dash, color=color,
                label=f"{name}: {_percent(shares[name])}",
            )  # fmt: skip
        if target is not None:
            axes.axhline(target, color="black", linewidth=0.8)
            axes.set_ylim(target - 0.12, target + 0.02)
        axes.legend(frameon=False, loc="lower right", title="of the baseline's steps")

    return Result(
        share is not None and share <= SHARE,
        "Steps to the baseline's best accuracy, of the baseline's own: "
        + ", ".join(f"{name} {_percent(shares[name])}" for name in CONTENDERS if name != "baseline")
        + ".",
        rows,
        draw,
    )


def _percent(share: float | None) -> str:
    return "not reached from every seed" if share is None else f"{share:.1%}"
