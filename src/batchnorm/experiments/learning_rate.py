"""How high learning rates can be, and how smooth the loss is along the gradient.

6 hidden layers of 100 ReLU units on standardized images of Fashion-MNIST, weights normal with deviation sqrt(2 /
inputs), batches of 100, 1,500 steps of plain SGD (with --quick 300) at rates from 0.001 to 10. A rate is stable where
the accuracy is within 5 points of the network's own best. Smoothness is that of Santurkar et al. 2018: at ten times
over a run at rate 0.1, on one batch, the range (largest minus smallest) of the loss at points along the gradient from
1/2 to 4 steps away, and how far the gradient there is from the one at the start, relative to its length, at most.
"""

from __future__ import annotations

import copy
import math
from statistics import mean
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from batchnorm.experiments import style
from batchnorm.experiments.claim import Cell, Claim, Record, Result
from batchnorm.experiments.numbers import with_interval
from batchnorm.experiments.training import accuracy, perceptron, train, vectors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RATES = tuple(float(f"{10 ** (i / 2):.3g}") for i in range(-6, 3))
WITHIN, TIMES, SMOOTHNESS_AT, POINTS = 0.05, 5, 0.1, 10
CLAIM = Claim(
    "learning-rate",
    "With batch normalization much higher learning rates are stable.",
    "Sections 3.3 and 4.2.1",
    f"the largest stable rate is at least {TIMES} times that without BN, as the paper's bn-x5 has it",
)


def cells(quick: bool, seeds: int) -> list[Cell]:
    """With and without BN x rates x seeds."""
    steps = 300 if quick else 1_500
    return [
        {"batch_norm": norm, "rate": rate, "seed": seed, "steps": steps}
        for norm in (False, True) for rate in RATES for seed in range(seeds)
    ]  # fmt: skip


def measure(batch_norm: bool, rate: float, seed: int, steps: int) -> Record:
    """Test accuracy, chance where training diverged; at one rate the smoothness too."""
    training, test = vectors()
    network = perceptron(6, 100, nn.ReLU, batch_norm=batch_norm, scale=math.sqrt(2), seed=seed)
    images, labels = training[:100]
    smooth: list[tuple[float, float]] = []

    def at(step: int) -> None:
        if rate == SMOOTHNESS_AT and step % (steps // POINTS) == 0:
            smooth.append(smoothness(network, images, labels, rate))

    stable = train(network, training, steps=steps, rate=rate, batch=100, seed=seed, at=at)
    loss_range, gradient_change = zip(*smooth, strict=True) if smooth else ((), ())
    return {
        "accuracy": accuracy(network, training, test) if stable else 0.1,
        "loss_range": mean(loss_range) if smooth else None,
        "gradient_change": mean(gradient_change) if smooth else None,
    }


def smoothness(network: nn.Module, images: Tensor, labels: Tensor, rate: float) -> tuple[float, float]:
    """The range of the loss, and the largest relative change of the gradient, 1/2 to 4 steps along the gradient."""
    moved = copy.deepcopy(network).train()
    parameters = list(moved.parameters())

    def there() -> tuple[float, Tensor, tuple[Tensor, ...]]:
        loss = nn.functional.cross_entropy(moved(images), labels)
        gradients = torch.autograd.grad(loss, parameters)
        return loss.item(), torch.cat([g.flatten() for g in gradients]), gradients

    _, start, direction = there()
    losses, changes, gone = [], [], 0.0
    for steps in (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0):
        with torch.no_grad():
            for parameter, gradient in zip(parameters, direction, strict=True):
                parameter.sub_(gradient, alpha=rate * (steps - gone))
        gone = steps
        loss, gradient, _ = there()
        losses.append(loss)
        changes.append(((gradient - start).norm() / start.norm()).item())
    return max(losses) - min(losses), max(changes)


def conclude(records: list[Record]) -> Result:
    """The largest stable rate of each."""
    scores = {
        norm: [mean(r["accuracy"] for r in records if (r["batch_norm"], r["rate"]) == (norm, rate)) for rate in RATES]
        for norm in (False, True)
    }
    largest = {
        norm: max(rate for rate, s in zip(RATES, some, strict=True) if s >= max(some) - WITHIN)
        for norm, some in scores.items()
    }
    smooth = {
        (norm, key): [r[key] for r in records if (r["batch_norm"], r["rate"]) == (norm, SMOOTHNESS_AT) and r[key]]
        for norm in (False, True) for key in ("loss_range", "gradient_change")
    }  # fmt: skip
    rows = [
        {"rate": f"{rate:g}", "without": f"{scores[False][i]:.1%}", "with BN": f"{scores[True][i]:.1%}"}
        for i, rate in enumerate(RATES)
    ]

    def draw(figure: Figure) -> None:
        axes = style.axes_of(
            figure, f"The largest stable learning rate is {largest[True]:g} with BN, {largest[False]:g} without",
            "learning rate", "accuracy on the test images",
        )  # fmt: skip
        for norm, (color, dash) in ((False, style.WITHOUT), (True, style.WITH)):
            axes.plot(RATES, scores[norm], dash, marker="o", color=color, label="with BN" if norm else "without")
            axes.axvline(largest[norm], color=color, linewidth=0.8, linestyle=dash)
        axes.set_xscale("log")
        axes.legend(frameon=False, loc="lower left")

    def both(key: str, form: str) -> str:
        found = {norm: with_interval(smooth[norm, key], form) if smooth[norm, key] else "diverged" for norm in scores}
        return f"{found[True]} with BN, {found[False]} without"

    return Result(
        largest[True] >= TIMES * largest[False],
        f"The largest stable rate is {largest[True]:g} with BN, {largest[False]:g} without.",
        rows,
        draw,
        [
            f"Along the gradient, 1/2 to 4 steps of rate {SMOOTHNESS_AT:g}: range of the loss "
            f"{both('loss_range', '{:.3f}')}; change of the gradient {both('gradient_change', '{:.0%}')}."
        ],
    )
