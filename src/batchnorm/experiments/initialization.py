"""How much care the initial scale of the weights takes.

6 hidden layers of 100 ReLU units on standardized images of Fashion-MNIST, weights normal with deviation a * sqrt(2 /
inputs) for a from 0.01 to 100, batches of 100, 1,500 steps of plain SGD (with --quick 300) at rates 0.01 and 0.1, of
which the better one counts. A scale works where the accuracy is within 5 points of the best that any scale gives, with
or without BN.
"""

from __future__ import annotations

import math
from statistics import mean
from typing import TYPE_CHECKING

from torch import nn

from batchnorm.experiments import style
from batchnorm.experiments.claim import Cell, Claim, Record, Result
from batchnorm.experiments.training import accuracy, perceptron, train, vectors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCALES = tuple(10 ** (i / 2) for i in range(-4, 5))
RATES, WITHIN, WIDER = (0.01, 0.1), 0.05, 1.0
CLAIM = Claim(
    "initialization",
    "With batch normalization the initialization takes less care.",
    "Abstract, Section 3.3",
    f"with BN the range of initial scales that work is at least {WIDER:g} decade wider",
)


def cells(quick: bool, seeds: int) -> list[Cell]:
    """With and without BN x scales x rates x seeds."""
    steps = 300 if quick else 1_500
    return [
        {"batch_norm": norm, "scale": scale, "rate": rate, "seed": seed, "steps": steps}
        for norm in (False, True) for scale in SCALES for rate in RATES for seed in range(seeds)
    ]  # fmt: skip


def measure(batch_norm: bool, scale: float, rate: float, seed: int, steps: int) -> Record:
    """Test accuracy; chance where training diverged."""
    training, test = vectors()
    network = perceptron(6, 100, nn.ReLU, batch_norm=batch_norm, scale=scale * math.sqrt(2), seed=seed)
    stable = train(network, training, steps=steps, rate=rate, batch=100, seed=seed)
    return {"accuracy": accuracy(network, training, test) if stable else 0.1}


def conclude(records: list[Record]) -> Result:
    """The decades between the smallest and the largest scale that work."""

    def score(norm: bool, scale: float) -> float:
        some = [r for r in records if r["batch_norm"] is norm and r["scale"] == scale]
        return max(mean(r["accuracy"] for r in some if r["rate"] == rate) for rate in RATES)

    scores = {norm: [score(norm, scale) for scale in SCALES] for norm in (False, True)}
    least = max(max(s) for s in scores.values()) - WITHIN
    working = {norm: [a for a, s in zip(SCALES, scores[norm], strict=True) if s >= least] for norm in scores}
    decades = {norm: math.log10(max(some) / min(some)) if some else 0.0 for norm, some in working.items()}

    def draw(figure: Figure) -> None:
        axes = style.axes_of(
            figure, f"Initial scales that work: {decades[True]:g} decades with BN, {decades[False]:g} without",
            "initial deviation of the weights, times that of He et al.", "accuracy on the test images",
        )  # fmt: skip
        for norm, (color, dash) in ((False, style.WITHOUT), (True, style.WITH)):
            axes.plot(SCALES, scores[norm], dash, marker="o", color=color, label="with BN" if norm else "without")
        axes.axhline(least, color="black", linewidth=0.8)
        axes.annotate(f"works: at least {least:.0%}", (SCALES[0], least), va="bottom", fontsize=9)
        axes.set_xscale("log")
        axes.legend(frameon=False)

    rows = [
        {"scale": f"{a:.3g}", "without": f"{scores[False][i]:.1%}", "with BN": f"{scores[True][i]:.1%}"}
        for i, a in enumerate(SCALES)
    ]
    return Result(
        decades[True] - decades[False] >= WIDER,
        f"Initial scales work over {decades[True]:g} decades with BN, over {decades[False]:g} without.",
        rows,
        draw,
    )
