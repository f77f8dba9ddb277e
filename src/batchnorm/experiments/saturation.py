"""Whether networks with saturating nonlinearities become trainable.

8 hidden layers of 100 sigmoid or tanh units on standardized images of Fashion-MNIST, batches of 100, 3,000 steps of
plain SGD (with --quick 600), weights normal with deviation sqrt(1 / inputs). Rates 0.1 and 1 for all; of each network
the better one counts. A unit is saturated where its derivative is below a tenth of its largest; the share of such
values is that of all hidden units over 1,000 training images.
"""

from __future__ import annotations

from statistics import mean
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from batchnorm.experiments import style
from batchnorm.experiments.claim import Cell, Claim, Record, Result
from batchnorm.experiments.numbers import with_interval
from batchnorm.experiments.training import accuracy, perceptron, train, vectors
from batchnorm.population import preserve_state

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ACTIVATIONS: dict[str, type[nn.Module]] = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh}
RATES, DEPTH, POINTS = (0.1, 1.0), 8, 10
GAIN, LEARNED = 0.02, 0.7
CLAIM = Claim(
    "saturation",
    "With batch normalization networks with saturating nonlinearities become trainable: it keeps them from getting "
    "stuck in the saturated mode.",
    "Sections 1 and 4.2.2",
    f"with BN deep sigmoid and tanh networks reach at least {LEARNED:.0%} and end at least {100 * GAIN:g} points above "
    "those without (means over seeds, each at its better rate)",
)


def cells(quick: bool, seeds: int) -> list[Cell]:
    """Nonlinearities x with and without BN x rates x seeds."""
    steps = 600 if quick else 3_000
    return [
        {"activation": name, "batch_norm": norm, "rate": rate, "seed": seed, "steps": steps}
        for name in ACTIVATIONS for norm in (False, True) for rate in RATES for seed in range(seeds)
    ]  # fmt: skip


def measure(activation: str, batch_norm: bool, rate: float, seed: int, steps: int) -> Record:
    """Final accuracy; share of saturated values over training."""
    training, test = vectors()
    network = perceptron(DEPTH, 100, ACTIVATIONS[activation], batch_norm=batch_norm, seed=seed)
    images = training.tensors[0][:1_000]
    saturated = [(0, share_saturated(network, images, activation))]

    def at(step: int) -> None:
        if step % (steps // POINTS) == 0:
            saturated.append((step, share_saturated(network, images, activation)))

    train(network, training, steps=steps, rate=rate, batch=100, seed=seed, at=at)
    return {"saturated": saturated, "accuracy": accuracy(network, training, test)}


def share_saturated(network: nn.Module, images: Tensor, activation: str) -> float:
    """Of the outputs y of all hidden units: sigmoid' = y (1 - y), at most 1/4; tanh' = 1 - y^2, at most 1."""
    shares: list[float] = []

    def note(module: nn.Module, inputs: object, y: Tensor) -> None:
        derivative = 4 * y * (1 - y) if activation == "sigmoid" else 1 - y**2
        shares.append((derivative < 0.1).float().mean().item())

    hooks = [m.register_forward_hook(note) for m in network.modules() if isinstance(m, ACTIVATIONS[activation])]
    with torch.no_grad(), preserve_state(network):
        network.train()(images)
    for hook in hooks:
        hook.remove()
    return mean(shares)


def conclude(records: list[Record]) -> Result:
    """Each network at its better rate."""

    def runs(name: str, norm: bool) -> list[Record]:
        some = [r for r in records if r["activation"] == name and r["batch_norm"] is norm]
        rates = sorted({r["rate"] for r in some})
        best = max(rates, key=lambda rate: mean(r["accuracy"] for r in some if r["rate"] == rate))
        return [r for r in some if r["rate"] == best]

    chosen = {(name, norm): runs(name, norm) for name in ACTIVATIONS for norm in (False, True)}
    score = {key: mean(r["accuracy"] for r in some) for key, some in chosen.items()}
    confirmed = all(
        score[name, True] >= LEARNED and score[name, True] - score[name, False] >= GAIN for name in ACTIVATIONS
    )
    rows = [
        {
            "network": f"{name}, {'with BN' if norm else 'without'}",
            "rate": f"{some[0]['rate']:g}",
            "accuracy": with_interval([r["accuracy"] for r in some]),
            "saturated at first": with_interval([r["saturated"][0][1] for r in some], "{:.1%}"),
            "saturated at the end": with_interval([r["saturated"][-1][1] for r in some], "{:.1%}"),
        }
        for (name, norm), some in chosen.items()
    ]

    def draw(figure: Figure) -> None:
        axes = style.axes_of(
            figure, f"Networks of {DEPTH} saturating layers: how many values are saturated, and what they learn",
            "training steps", "share of saturated values",
        )  # fmt: skip
        for (name, norm), some in chosen.items():
            color = style.WITH[0] if norm else style.WITHOUT[0]
            curve = [
                (at[0][0], mean(share for _, share in at)) for at in zip(*(r["saturated"] for r in some), strict=False)
            ]
            label = f"{name}, {'with BN' if norm else 'without'}: {score[name, norm]:.1%}"
            axes.plot(*zip(*curve, strict=True), "-" if name == "sigmoid" else "--", color=color, label=label)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, title="test accuracy")

    return Result(
        confirmed,
        "; ".join(f"{name}: {score[name, True]:.1%} with BN, {score[name, False]:.1%} without" for name in ACTIVATIONS)
        + ".",
        rows,
        draw,
    )
