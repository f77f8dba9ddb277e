"""Training to the end of a budget, at its best learning rate: small networks, four optimizers, a rule for the rates.

Images of 14 x 14 as vectors: training, held out of training (which choose rates) and test images.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import TensorDataset

from batchnorm.experiments.training import POPULATION, recalibrated, share_right
from batchnorm.racing.data import load_images
from batchnorm.recipe.followers import parameter_groups
from batchnorm.recipe.muon import Muon
from batchnorm.recipe.warm_up import UpAndDown
from batchnorm.surgery import insert

WIDTH, PIXELS, CLASSES, HELD_OUT = 64, 14 * 14, 10, 5_000
CHANCE = 0.1
WARM_UP = 0.05  # share of the steps in which the rate rises; from there it falls to zero
ENDS = (0.9, 0.95, 1.0)  # a run's end is the mean of its accuracies here, as shares of its steps
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
EXTENSIONS, FINALISTS, OTHER_SEEDS = 2, 2, 1_000  # rates are chosen with seeds from OTHER_SEEDS on


@dataclass(frozen=True)
class Kind:
    """An optimizer: ``make(network, rate, batch_norm)``; ``rates``: the grid that both sides begin with."""

    make: Callable[[nn.Module, float, bool], Optimizer]
    rates: tuple[float, ...]


def _muon(network: nn.Module, rate: float, batch_norm: bool) -> Optimizer:
    """All weights but the last layer's orthogonalized, which are those that BN follows where there is BN."""
    layers = [m for m in network.modules() if isinstance(m, nn.Linear)][:-1]
    return Muon(parameter_groups(network, layers, keep_norm=batch_norm), lr=rate, sgd_lr=SGD_PER_MUON * rate, clip=0)


def _soap(network: nn.Module, rate: float, batch_norm: bool) -> Optimizer:
    try:
        from pytorch_optimizer import SOAP
    except ImportError:
        raise ImportError("SOAP is in pytorch_optimizer: pip install 'batchnorm[experiments]'.") from None
    made: Optimizer = SOAP(network.parameters(), lr=rate)
    return made


SGD_PER_MUON = 3.0  # of 3 and 50 / 3 (the recipe "fast") the better one on both sides: 12 layers, held-out images
OPTIMIZERS = {
    "SGD": Kind(lambda n, rate, _: torch.optim.SGD(n.parameters(), rate, momentum=0.9), (0.003, 0.01, 0.03, 0.1)),
    "AdamW": Kind(lambda n, rate, _: torch.optim.AdamW(n.parameters(), rate, fused=True), (0.001, 0.003, 0.01, 0.03)),
    "Muon": Kind(_muon, (0.003, 0.01, 0.03, 0.1)),
    "SOAP": Kind(_soap, (0.001, 0.003, 0.01, 0.03)),
}


@cache
def examples() -> dict[str, TensorDataset]:
    """Standardized images, pooled to (N, 196): "training", "held out" (of the training images), "test"."""
    images = load_images()
    pixels = images.train_images.float()
    center, spread = pixels.mean(), pixels.std()

    def pooled(x_NHW: Tensor, y_N: Tensor) -> TensorDataset:
        x = (x_NHW.float() - center) / spread
        return TensorDataset(nn.functional.avg_pool2d(x.unsqueeze(1), 2).flatten(1), y_N.long())

    return {
        "training": pooled(images.train_images[:-HELD_OUT], images.train_labels[:-HELD_OUT]),
        "held out": pooled(images.train_images[-HELD_OUT:], images.train_labels[-HELD_OUT:]),
        "test": pooled(images.test_images, images.test_labels),
    }


class Block(nn.Module):
    """act(x + f(x)), f two layers: the residual block of He et al. 2015."""

    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.act1, self.act2 = activation(), activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.act2(x + self.second(self.act1(self.first(x))))


def network_of(depth: int, skips: bool, activation: str, *, batch_norm: bool, seed: int) -> nn.Module:
    """``depth`` layers, the input's and the output's among them; with BN the same from the same weights, by ``insert``.

    Weights normal: He's deviation for ReLU, Glorot's otherwise. With skips the second layer of each block is smaller
    by the square root of their number, so that the scale stays without BN, too; BN(aWu) = BN(Wu) does not see it.
    """
    act = ACTIVATIONS[activation]
    blocks = [Block(act) for _ in range((depth - 2) // 2)]
    plain = [m for _ in range(depth - 2) for m in (nn.Linear(WIDTH, WIDTH), act())]
    hidden: list[nn.Module] = [*blocks] if skips else plain
    network = nn.Sequential(nn.Linear(PIXELS, WIDTH), act(), *hidden, nn.Linear(WIDTH, CLASSES))
    generator = torch.Generator().manual_seed(seed)
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            inputs = layer.in_features if activation == "relu" else (layer.in_features + layer.out_features) / 2
            gain = 2 if activation == "relu" else 1
            nn.init.normal_(layer.weight, std=math.sqrt(gain / inputs), generator=generator)
            nn.init.zeros_(layer.bias)
    for block in hidden:
        if isinstance(block, Block):
            block.second.weight.data.div_(math.sqrt(len(blocks)))
    return insert(network, torch.zeros(2, PIXELS)) if batch_norm else network


def annealed(
    network: nn.Module, optimizer: Optimizer, *, steps: int, batch: int, seed: int, score: tuple[str, ...]
) -> dict[str, float]:
    """Train for ``steps``, the rate rising, then falling to zero; mean accuracy at ``ENDS``, chance if it diverged."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, UpAndDown(steps, WARM_UP))
    images, labels = examples()["training"].tensors
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    ends = [max(1, round(share * steps)) for share in ENDS]
    found: dict[str, list[float]] = {name: [] for name in score}
    for step in range(1, steps + 1):
        if len(order) < batch:
            order = torch.randperm(len(images), generator=generator)
        now, order = order[:batch], order[batch:]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network.train()(images[now]), labels[now])
        if not math.isfinite(loss.item()):
            return dict.fromkeys(score, CHANCE)
        loss.backward()
        try:
            optimizer.step()
        except torch.linalg.LinAlgError:  # SOAP, of gradients that are not finite
            return dict.fromkeys(score, CHANCE)
        schedule.step()
        for _ in range(ends.count(step)):
            finite = recalibrated(network, images[:POPULATION])
            for name in score:
                found[name].append(share_right(network, examples()[name]) if finite else CHANCE)
    return {name: mean(values) for name, values in found.items()}


def chosen(score: Callable[[float, int], float], rates: tuple[float, ...]) -> dict[str, Any]:
    """The best rate: each of the grid once, one more beyond an edge that is best, then the best two once more.

    Returns: ``rate``; ``tried``: [rate, scores] each; ``at_edge``: whether it is at the edge of all that was tried.
    """
    tried = {rate: [score(rate, OTHER_SEEDS)] for rate in rates}
    for _ in range(EXTENSIONS):
        low, *_, high = sorted(tried)
        best = max(tried, key=lambda rate: tried[rate][0])
        if best not in (low, high):
            break
        ratio = sorted(tried)[1] / low if best == low else high / sorted(tried)[-2]
        beyond = float(f"{low / ratio if best == low else high * ratio:.2g}")
        tried[beyond] = [score(beyond, OTHER_SEEDS)]
    finalists = sorted(tried, key=lambda rate: tried[rate][0])[-FINALISTS:]
    for rate in finalists:
        tried[rate].append(score(rate, OTHER_SEEDS + 1))
    rate = max(finalists, key=lambda rate: mean(tried[rate]))
    return {"rate": rate, "tried": sorted(tried.items()), "at_edge": rate in (min(tried), max(tried))}
