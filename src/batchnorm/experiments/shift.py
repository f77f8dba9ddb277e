"""Whether the inputs of a late nonlinearity stay steadier (internal covariate shift), by two definitions.

The network of the paper's first experiment (3 hidden layers of 100 sigmoid units, binary images of Fashion-MNIST,
batches of 60, plain SGD at rate 0.1, 50,000 steps, with --quick 3,000). Over training, 25 times: the inputs of the last
hidden layer's sigmoids on 1,000 test images, as training sees them (batch statistics), their {15, 50, 85}th
percentiles. A unit's drift is the path length of its three percentiles over training (mean of the three), divided by
the mean distance between the 15th and the 85th; the layer's drift is the mean over its units. Beside it the definition
of Santurkar et al. 2018: the gradient of the last hidden layer's weights on a batch of 1,000 training images, before
and after the layers below take their step of SGD on it: the distance of the two, relative to the first, mean over
training.
"""

from __future__ import annotations

import copy
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from batchnorm.experiments import style
from batchnorm.experiments.claim import Cell, Claim, Record, Result
from batchnorm.experiments.numbers import with_interval
from batchnorm.experiments.training import perceptron, train, vectors
from batchnorm.population import preserve_state

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RATE, POINTS, SHARE = 0.1, 25, 0.5
PERCENTILES = torch.tensor([0.15, 0.5, 0.85])
LAST = 4  # the last hidden layer in the network's Sequential; 5 is its sigmoid
CLAIM = Claim(
    "shift",
    "With batch normalization the distribution of the inputs of a late sigmoid stays much steadier over training.",
    "Section 4.1, Figure 1 (b, c)",
    f"with BN the last hidden layer's drift is at most {SHARE:g} times that without (means over seeds)",
)


def cells(quick: bool, seeds: int) -> list[Cell]:
    """With and without BN x seeds."""
    steps = 3_000 if quick else 50_000
    return [{"batch_norm": norm, "seed": s, "steps": steps} for norm in (False, True) for s in range(seeds)]


def measure(batch_norm: bool, seed: int, steps: int) -> Record:
    """Drift, the percentiles of the first unit, and the change of the gradient."""
    training, test = vectors(binary=True)
    network = perceptron(3, 100, nn.Sigmoid, batch_norm=batch_norm, seed=seed)
    seen, (images, labels) = test.tensors[0][:1_000], training[:1_000]
    at_step, percentiles, changes = [0], [percentiles_of(network, seen)], [gradient_change(network, images, labels)]

    def at(step: int) -> None:
        if step % (steps // POINTS) == 0:
            at_step.append(step)
            percentiles.append(percentiles_of(network, seen))
            changes.append(gradient_change(network, images, labels))

    train(network, training, steps=steps, rate=RATE, batch=60, seed=seed, at=at)
    over_time = torch.stack(percentiles)  # (times, percentiles, units)
    return {
        "drift": drift(over_time),
        "steps": at_step,
        "unit": over_time[:, :, 0].tolist(),
        "gradient_change": mean(changes),
    }


def percentiles_of(network: nn.Module, images: Tensor) -> Tensor:
    """(percentiles, units): of the inputs of the last hidden layer's sigmoids, in train mode."""
    found: list[Tensor] = []
    hook = network.get_submodule(str(LAST + 1)).register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    with torch.no_grad(), preserve_state(network):
        network.train()(images)
    hook.remove()
    return torch.quantile(found[0], PERCENTILES, dim=0)


def drift(percentiles_TPU: Tensor) -> float:
    """Mean over units of the percentiles' path lengths, in units of the mean distance between the outer two."""
    path = percentiles_TPU.diff(dim=0).abs().sum(0).mean(0)
    spread = (percentiles_TPU[:, -1] - percentiles_TPU[:, 0]).mean(0)
    return (path / spread).mean().item()


def gradient_change(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """|G - G'| / |G| of the last hidden layer's weights: G' after the layers below took a step of SGD on the batch."""
    stepped = copy.deepcopy(network).train()
    weight: Any = stepped.get_submodule(str(LAST)).weight
    below = list(stepped[:LAST].parameters())  # type: ignore[index]

    def gradients(of: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(nn.functional.cross_entropy(stepped(images), labels), of)

    before, *steps = gradients([weight, *below])
    with torch.no_grad():
        for parameter, step in zip(below, steps, strict=True):
            parameter.sub_(step, alpha=RATE)
    return ((gradients([weight])[0] - before).norm() / before.norm()).item()


def conclude(records: list[Record]) -> Result:
    """Both numbers, with and without."""
    runs = {norm: [r for r in records if r["batch_norm"] is norm] for norm in (False, True)}
    drifts, changes = (
        {norm: mean(r[key] for r in some) for norm, some in runs.items()} for key in ("drift", "gradient_change")
    )
    rows = [
        {
            "network": "with BN" if norm else "without",
            "drift of the sigmoids' inputs": with_interval([r["drift"] for r in some], "{:.2f}"),
            "change of the gradient": with_interval([r["gradient_change"] for r in some], "{:.1%}"),
        }
        for norm, some in runs.items()
    ]

    def draw(figure: Figure) -> None:
        axes = style.axes_of(
            figure, f"Inputs of a sigmoid of the last hidden layer; the layer's drift is {drifts[True]:.1f} with BN, "
            f"{drifts[False]:.1f} without", "training steps", "input of the sigmoid",
        )  # fmt: skip
        for norm, (color, dash) in ((False, style.WITHOUT), (True, style.WITH)):
            low, middle, high = zip(*runs[norm][0]["unit"], strict=True)
            steps = runs[norm][0]["steps"]
            axes.plot(steps, middle, dash, color=color, label=f"{'with BN' if norm else 'without'}: median")
            axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0, label="15th to 85th percentile")
        style.legend_beside(axes)

    return Result(
        drifts[True] <= SHARE * drifts[False],
        f"The percentiles of the last layer's inputs move {drifts[True]:.1f} times their spread with BN, "
        f"{drifts[False]:.1f} times without. When the layers below take a step, the layer's gradient changes by "
        f"{changes[True]:.1%} of its length with BN, by {changes[False]:.1%} without.",
        rows,
        draw,
        [
            "By the later definition the shift is "
            + ("smaller" if changes[True] < changes[False] else "not smaller")
            + " with BN: steadier inputs and a steadier gradient are two things, and only the first is the paper's."
        ],
    )
