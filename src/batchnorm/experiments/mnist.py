"""The paper's first experiment: a small sigmoid network, with and without BN, on binary images.

3 hidden layers of 100 sigmoid units, weights normal with deviation sqrt(1 / inputs), batches of 60, 50,000 steps of
plain SGD at a constant rate (with --quick 3,000), binary images of Fashion-MNIST, test accuracy with population
statistics. Both networks at each of four rates: the same rate for both is 0.1; each one's own best is that of the
highest final accuracy, mean over seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING

from torch import nn

from batchnorm.experiments import style
from batchnorm.experiments.claim import Cell, Claim, Record, Result
from batchnorm.experiments.numbers import with_interval
from batchnorm.experiments.training import accuracy, perceptron, train, vectors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RATES, SAME, POINTS = (0.03, 0.1, 0.3, 1.0), 0.1, 25
CLAIM = Claim(
    "mnist",
    "The network with batch normalization trains faster and ends at a higher test accuracy.",
    "Section 4.1, Figure 1 (a)",
    "at the same rate and each at its own best, with BN it reaches the accuracy that the other network ends at in at "
    "most half of the steps that the other takes to it, and ends higher (means over seeds)",
)


def cells(quick: bool, seeds: int) -> list[Cell]:
    """With and without BN x rates x seeds."""
    steps = 3_000 if quick else 50_000
    return [
        {"batch_norm": norm, "rate": rate, "seed": seed, "steps": steps}
        for norm in (False, True) for rate in RATES for seed in range(seeds)
    ]  # fmt: skip


def measure(batch_norm: bool, rate: float, seed: int, steps: int) -> Record:
    """Test accuracy over training."""
    training, test = vectors(binary=True)
    network = perceptron(3, 100, nn.Sigmoid, batch_norm=batch_norm, seed=seed)
    curve: list[tuple[int, float]] = []

    def at(step: int) -> None:
        if step % (steps // POINTS) == 0:
            curve.append((step, accuracy(network, training, test)))

    train(network, training, steps=steps, rate=rate, batch=60, seed=seed, at=at)
    return {"curve": curve}


def conclude(records: list[Record]) -> Result:
    """Final accuracies and the steps to the other's, at the same rate and at each one's best."""

    def runs(norm: bool, rate: float) -> list[Record]:
        return [r for r in records if r["batch_norm"] is norm and r["rate"] == rate]

    def final(norm: bool, rate: float) -> float:
        return mean(r["curve"][-1][1] if r["curve"] else 0.1 for r in runs(norm, rate))

    best = {norm: max(RATES, key=lambda rate: final(norm, rate)) for norm in (False, True)}
    compared = {"the same rate": (SAME, SAME), "each its best": (best[False], best[True])}
    rows, shares, ends = [], {}, {}
    for words, rates in compared.items():
        target = final(False, rates[0])
        steps = {norm: _steps(_mean_curve(runs(norm, rate)), target) for norm, rate in zip(best, rates, strict=True)}
        with_bn, without = steps[True], steps[False]
        shares[words] = with_bn / without if with_bn and without else None
        ends[words] = final(True, rates[1]) - target
        for norm, rate in zip((False, True), rates, strict=True):
            rows.append(
                {
                    "network": "with BN" if norm else "without",
                    "rate": f"{rate:g} ({words})",
                    "final accuracy": with_interval(
                        [r["curve"][-1][1] if r["curve"] else 0.1 for r in runs(norm, rate)]
                    ),
                    "steps to the accuracy without BN": f"{steps[norm]:,}" if steps[norm] else "never",
                }
            )
    confirmed = all(share is not None and share <= 0.5 for share in shares.values()) and min(ends.values()) > 0

    def draw(figure: Figure) -> None:
        axes = style.axes_of(
            figure, "The other network's accuracy takes, with BN, "
            f"{_in_words(shares['the same rate'])} of its steps at the same rate",
            "training steps", "accuracy on the test images",
        )  # fmt: skip
        for norm, (color, _) in ((False, style.WITHOUT), (True, style.WITH)):
            for rate, dash in ((SAME, "--"), (best[norm], "-")):
                curve = _mean_curve(runs(norm, rate))
                label = f"{'with BN' if norm else 'without'}, rate {rate:g}"
                axes.plot([s for s, _ in curve], [a for _, a in curve], dash, color=color, label=label)
        axes.legend(frameon=False, loc="lower right")

    return Result(
        confirmed,
        "With BN the accuracy that the other network ends at takes, of the other's steps to it, "
        + " and ".join(f"{_in_words(share)} ({words})" for words, share in shares.items())
        + "; it ends "
        + " and ".join(f"{100 * end:+.2f} points" for end in ends.values())
        + ".",
        rows,
        draw,
    )


def _mean_curve(runs: Sequence[Record]) -> list[tuple[int, float]]:
    return [(at[0][0], mean(accuracy for _, accuracy in at)) for at in zip(*(r["curve"] for r in runs), strict=False)]


def _steps(curve: Sequence[tuple[int, float]], target: float) -> int | None:
    """Until the target first; None where it is not reached."""
    return next((step for step, score in curve if score >= target), None)


def _in_words(share: float | None) -> str:
    return "never" if share is None else f"{share:.0%}"
