"""Parts of several experiments: small networks, the images as vectors, plain SGD with measurements on the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from batchnorm.population.estimate import NoStatistics, recalibrate
from batchnorm.racing.data import load_images
from batchnorm.surgery import insert

TEST, POPULATION = 5_000, 2_000  # test images that score; training images for the population statistics


@cache
def vectors(binary: bool = False) -> tuple[TensorDataset, TensorDataset]:
    """Training and test images as (N, 784): standardized, or binary as in the paper's Section 4.1."""
    images = load_images()
    pixels = images.train_images.float()
    mean, std = pixels.mean(), pixels.std()

    def examples(x_NHW: Tensor, y_N: Tensor) -> TensorDataset:
        x = (x_NHW > 127).float() if binary else (x_NHW.float() - mean) / std
        return TensorDataset(x.flatten(1), y_N.long())

    return (
        examples(images.train_images, images.train_labels),
        examples(images.test_images[:TEST], images.test_labels[:TEST]),
    )


def perceptron(
    depth: int,
    width: int,
    activation: type[nn.Module],
    *,
    batch_norm: bool,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: int = 0,
) -> nn.Sequential:
    """``depth`` hidden layers for the images as vectors; weights normal with deviation ``scale`` * sqrt(1 / inputs).

    With ``batch_norm`` it is the same network from the same weights, given batch normalization by ``insert``.
    ``dropout``: of the hidden layers' outputs; with 0 there is no such layer.
    """
    generator = torch.Generator().manual_seed(seed)
    widths = [784, *[width] * depth]
    after = [nn.Dropout(dropout)] if dropout else []
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), activation(), *after)]
    network = nn.Sequential(*layers, nn.Linear(width, 10))
    for layer in network:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=scale * layer.in_features**-0.5, generator=generator)
            nn.init.zeros_(layer.bias)
    return insert(network, torch.zeros(2, 784)) if batch_norm else network


def train(
    network: nn.Module,
    examples: TensorDataset,
    *,
    steps: int,
    rate: float,
    batch: int,
    seed: int,
    at: Callable[[int], None] = lambda step: None,
) -> bool:
    """Plain SGD at a constant rate, reshuffled each epoch; ``at(step)`` after each; False where the loss diverged."""
    optimizer = torch.optim.SGD(network.parameters(), rate)
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(1, steps + 1):
        if len(order) < batch:
            order = torch.randperm(len(examples), generator=generator)
        (inputs, targets), order = examples[order[:batch]], order[batch:]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network.train()(inputs), targets)
        loss.backward()
        optimizer.step()
        if not math.isfinite(loss.item()):
            return False
        at(step)
    return True


def accuracy(network: nn.Module, training: TensorDataset, test: TensorDataset) -> float:
    """In eval, with population statistics; what is not finite is chance."""
    if not recalibrated(network, training.tensors[0][:POPULATION]):
        return 0.1
    return share_right(network, test)


def recalibrated(network: nn.Module, images: Tensor) -> bool:
    """Give the network population statistics; False where what its layers see is not finite."""
    try:
        recalibrate(network, images.split(250))
    except NoStatistics:
        return False
    return True


def share_right(network: nn.Module, test: TensorDataset) -> float:
    """In eval, with the statistics that it has."""
    with torch.no_grad():
        guessed = network.eval()(test.tensors[0]).argmax(1)
    return (guessed == test.tensors[1]).float().mean().item()
