"""Inference with population statistics: one output per image, one affine map.

The race's Inception network with BN on Fashion-MNIST, batches of 256, SGD with momentum 0.9 at rate 0.2, 1,000 steps
(with --quick 200). After training, in float64: outputs of 200 test images one by one beside those in one batch,
relative to the largest; the same with batch statistics (in batches of 10 beside one batch); and the network folded
(``batchnorm.fold``) beside itself. Over training, 10 times: accuracy on 2,000 test images in three ways: with the
moving averages that training keeps (momentum 0.1), with population statistics over 2,000 training images (Algorithm 2),
and with the statistics of test batches of 100.
"""

from __future__ import annotations

import copy
from statistics import mean
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from batchnorm.experiments import style
from batchnorm.experiments.claim import Cell, Claim, Record, Result
from batchnorm.experiments.numbers import with_interval
from batchnorm.population import preserve_state, recalibrate
from batchnorm.racing.loading import load_task
from batchnorm.surgery import fold, insert

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LIMIT, POINTS = 1e-9, 10
CLAIM = Claim(
    "inference",
    "With population statistics an example's output depends on it alone, and each normalization is an affine map that "
    "the layer before it can take in.",
    "Section 3.1, Algorithm 2",
    f"outputs one by one and of the folded network are those of the whole batch, to {LIMIT:g} of the largest (float64)",
)
WAYS = {"moving": "moving average", "population": "population statistics", "batch": "statistics of test batches"}


def cells(quick: bool, seeds: int) -> list[Cell]:
    """One per seed."""
    return [{"seed": seed, "steps": 200 if quick else 1_000} for seed in range(seeds)]


def measure(seed: int, steps: int) -> Record:
    """The errors, and the accuracies over training."""
    torch.manual_seed(seed)
    task = load_task("inception")
    images = task.train[:2_000][0]
    test, labels = task.test[:2_000]
    network = insert(task.model(), images[:2])
    optimizer = torch.optim.SGD(network.parameters(), 0.2, momentum=0.9)
    generator, curve = torch.Generator().manual_seed(seed), []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        inputs, targets = task.train[torch.randint(len(task.train), (task.batch_size,), generator=generator)]
        task.training_loss(network.train(), (inputs, targets)).backward()
        optimizer.step()
        if step % (steps // POINTS) == 0:
            curve.append((step, *accuracies(network, images, test, labels)))
    recalibrate(network, images.split(250))
    exact = network.double().eval()
    some = test[:200].double()
    together = outputs(exact, some, 200)
    errors = {
        "alone": outputs(exact, some, 1),
        "folded": outputs(fold(exact, some), some, 200),
    }
    record: Record = {key: off(found, together) for key, found in errors.items()}
    with preserve_state(exact):
        for layer in exact.train().modules():
            layer.train(not isinstance(layer, nn.Dropout))
        record["batch_statistics"] = off(outputs(exact, some, 10), outputs(exact, some, 200))
    return record | {"curve": curve}


def outputs(network: nn.Module, images: Tensor, batch: int) -> Tensor:
    """In batches of so many."""
    with torch.no_grad():
        return torch.cat([network(x) for x in images.split(batch)])


def off(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def accuracies(network: nn.Module, images: Tensor, test: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """With moving averages, population statistics and the statistics of test batches."""

    def right(network: nn.Module) -> float:
        return (outputs(network, test, 100).argmax(1) == labels).float().mean().item()

    population, batch = copy.deepcopy(network), copy.deepcopy(network)
    recalibrate(population, images.split(250))
    for layer in batch.modules():
        if isinstance(layer, nn.modules.batchnorm._NormBase):
            layer.running_mean = layer.running_var = None
    return right(network.eval()), right(population.eval()), right(batch.eval())


def conclude(records: list[Record]) -> Result:
    """The errors decide; the accuracies are findings."""
    alone, folded = (max(r[key] for r in records) for key in ("alone", "folded"))
    changed = min(r["batch_statistics"] for r in records)
    first, last = ({way: [r["curve"][at][i] for r in records] for i, way in enumerate(WAYS, 1)} for at in (0, -1))
    rows = [
        {
            "statistics": words,
            f"accuracy after {records[0]['curve'][0][0]} steps": with_interval(first[way]),
            f"after {records[0]['curve'][-1][0]:,}": with_interval(last[way]),
        }
        for way, words in WAYS.items()
    ]

    def draw(figure: Figure) -> None:
        axes = style.axes_of(
            figure, f"After {records[0]['curve'][0][0]} steps: {mean(first['moving']):.1%} with moving averages, "
            f"{mean(first['population']):.1%} with population statistics", "training steps", "accuracy on test images",
        )  # fmt: skip
        for i, (words, (color, dash)) in enumerate(
            zip(WAYS.values(), (style.OTHER, style.WITH, style.WITHOUT), strict=True), 1
        ):
            points = list(zip(*(r["curve"] for r in records), strict=True))
            axes.plot(
                [at[0][0] for at in points], [mean(p[i] for p in at) for at in points], dash, color=color, label=words
            )
        axes.legend(frameon=False, loc="lower right")

    return Result(
        max(alone, folded) <= LIMIT,
        f"One by one the outputs are {alone:.1e} of the largest off, folded {folded:.1e}; with batch statistics "
        f"another batch moves them by {changed:.0%} or more.",
        rows,
        draw,
    )
