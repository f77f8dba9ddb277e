"""Whether an ensemble of networks with BN does better still.

6 networks as in the paper: each is the race's bn-x30 with some of larger initial weights, dropout of 5% or 10%, and BN
per activation (a mean and a variance for each place of each map) in the last module. 1,250 steps of 256 images of
Fashion-MNIST (with --quick 200), the learning rate rising for 30% of them and then falling to zero; population
statistics over 2,000 training images. The ensemble's prediction is the mean of the networks' class probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from batchnorm.experiments import style
from batchnorm.experiments.claim import Cell, Claim, Record, Result
from batchnorm.experiments.numbers import with_interval
from batchnorm.experiments.training import recalibrated
from batchnorm.nn import BatchNorm1d
from batchnorm.racing.contenders import CONTENDERS
from batchnorm.racing.loading import load_task
from batchnorm.recipe.accelerate import accelerate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RATE, WARM_UP = 0.2, 0.3  # the baseline's rate in the race; the recipe multiplies it by 30


@dataclass(frozen=True)
class Member:
    """One network: initial weights times ``scale``; ``dropout``; BN per activation in the last module."""

    scale: float = 1.0
    dropout: float = 0.0
    per_activation: bool = False

    def __str__(self) -> str:
        parts = [f"weights x{self.scale:g}"] if self.scale != 1 else []
        parts += [f"dropout {self.dropout:.0%}"] if self.dropout else []
        parts += ["BN per activation"] if self.per_activation else []
        return ", ".join(parts) or "bn-x30"


MEMBERS = (
    Member(),
    Member(scale=2),
    Member(dropout=0.05),
    Member(dropout=0.1),
    Member(per_activation=True),
    Member(scale=2, dropout=0.05, per_activation=True),
)
CLAIM = Claim(
    "ensemble",
    "An ensemble of networks with batch normalization does better still.",
    "Section 4.2.3, Figure 4",
    "from every seed the ensemble's test accuracy is above that of the best of its networks",
)


class PerActivation(nn.Module):
    """BN with a mean and a variance for each place of each map: (N, C, p, q) as (N, C p q)."""

    def __init__(self, maps: int, p: int, q: int) -> None:
        super().__init__()
        self.norm = BatchNorm1d(maps * p * q)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(1)).unflatten(1, x.shape[1:])


def cells(quick: bool, seeds: int) -> list[Cell]:
    """One ensemble per seed."""
    return [{"seed": seed, "steps": 200 if quick else 1_250} for seed in range(seeds)]


def measure(seed: int, steps: int) -> Record:
    """Test accuracy of each network, and of the ensemble of the first 1, 2, ... of them."""
    task = load_task("inception")
    images, labels = task.test.tensors
    total = torch.zeros(len(labels), 10)
    single, together = [], []
    for number, member in enumerate(MEMBERS):
        torch.manual_seed(seed * len(MEMBERS) + number)
        network = network_of(task.model(), member, images[:2])
        optimizer = torch.optim.SGD(network.parameters(), RATE, momentum=0.9, weight_decay=task.weight_decay)
        network.batchnorm_recipe.apply(optimizer, model=network)
        train(network, optimizer, task.train, task.batch_size, steps)
        found = torch.full_like(total, 0.1)  # of a network that diverged
        if recalibrated(network, task.train.tensors[0][:2_000]):
            with torch.no_grad():
                found = torch.cat([network.eval()(x).softmax(1) for x in images.split(250)])
        total += found
        single.append(right(found, labels))
        together.append(right(total, labels))
    return {"single": single, "together": together}


def network_of(network: nn.Module, member: Member, example: Tensor) -> Any:
    """The race's bn-x30, changed as the member has it."""
    recipe = replace(CONTENDERS["bn-x30"].recipe, dropout=1.0)
    made: Any = accelerate(network, example, recipe)
    shapes: dict[nn.Module, torch.Size] = {}
    *_, last = (m for m in made if any(isinstance(part, nn.Conv2d) for part in m.modules()))
    for layer in made.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = member.dropout
        if isinstance(layer, nn.Conv2d):
            layer.weight.data.mul_(member.scale)
    if member.per_activation:
        layers = [m for m in last.modules() if isinstance(m, nn.Conv2d)]
        hooks = [m.register_forward_hook(lambda m, _, y: shapes.update({m: y.shape[1:]})) for m in layers]
        with torch.no_grad():
            made.eval()(example)
        for layer, hook in zip(layers, hooks, strict=True):
            hook.remove()
            layer.batch_norm = PerActivation(*shapes[layer])
    return made


def train(network: nn.Module, optimizer: Any, examples: TensorDataset, batch: int, steps: int) -> None:
    """SGD as the race has it; torch's generator draws the batches and the dropout."""
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (WARM_UP * steps), (1 - step / steps) / (1 - WARM_UP))
    )
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(examples))
        (inputs, targets), order = examples[order[:batch]], order[batch:]
        optimizer.zero_grad()
        nn.functional.cross_entropy(network.train()(inputs), targets).backward()
        optimizer.step()
        schedule.step()


def right(probabilities: Tensor, labels: Tensor) -> float:
    """Share of the images whose most probable class is theirs."""
    return (probabilities.argmax(1) == labels).float().mean().item()


def conclude(records: list[Record]) -> Result:
    """The ensemble beside the best of its networks."""
    gains = [r["together"][-1] - max(r["single"]) for r in records]
    average = mean(mean(r["single"]) for r in records)
    whole = mean(r["together"][-1] for r in records)
    rows = [
        {
            "network": str(member),
            "test accuracy": with_interval([r["single"][i] for r in records]),
            "ensemble up to here": with_interval([r["together"][i] for r in records]),
        }
        for i, member in enumerate(MEMBERS)
    ]

    def draw(figure: Figure) -> None:
        axes = style.axes_of(
            figure, f"{len(MEMBERS)} networks together: {whole:.1%}; one alone: {average:.1%} on average",
            "networks in the ensemble", "accuracy on the test images",
        )  # fmt: skip
        numbers = range(1, len(MEMBERS) + 1)
        together = [mean(r["together"][i] for r in records) for i in range(len(MEMBERS))]
        single = [mean(r["single"][i] for r in records) for i in range(len(MEMBERS))]
        axes.plot(numbers, together, "-o", color=style.WITH[0], label="the first so many together")
        axes.plot(numbers, single, "s", color=style.WITHOUT[0], label="each alone, in this order")
        axes.legend(frameon=False)

    return Result(
        min(gains) > 0,
        f"{len(MEMBERS)} networks together reach {whole:.2%}, alone {average:.2%} on average; the ensemble is "
        f"{100 * min(gains):+.2f} points or more from its best network.",
        rows,
        draw,
    )
