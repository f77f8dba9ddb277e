"""Whether a batch of m examples is cheaper than m examples alone.

A training step (forward, backward, plain SGD) of the race's Inception network on images of Fashion-MNIST, in batches of
1 to 1,024 (with --quick 1, 4, 16, 64 and 256): without BN, with torch's layers, with ours, and with ours fused with
their nonlinearities (``from_torch(model, example=)``). One thread, nothing else running, the four taking turns, median
of 15 rounds (with --quick 7); one seed after the other.
"""

from __future__ import annotations

import time
from statistics import mean, median
from typing import TYPE_CHECKING

import torch
from torch import nn

from batchnorm.experiments import style
from batchnorm.experiments.claim import Cell, Claim, Record, Result
from batchnorm.experiments.numbers import with_interval
from batchnorm.racing.loading import load_task
from batchnorm.surgery import from_torch, insert, to_torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES, QUICK_SIZES, TIMES = tuple(2**i for i in range(11)), (1, 4, 16, 64, 256), 5
CLAIM = Claim(
    "throughput",
    "Computation over a batch of m examples is much more efficient than m computations for single examples.",
    "Section 1",
    f"with every kind of layer and without BN a training step over 256 images handles at least {TIMES} times as many "
    "images per second as one over a single image (means over seeds)",
)
NETWORKS = {
    "without BN": style.WITHOUT,
    "torch's layers": style.THIRD,
    "ours": style.WITH,
    "ours, fused": style.OTHER,
}


def alone(cell: Cell) -> bool:
    """Seconds are taken."""
    return True


def cells(quick: bool, seeds: int) -> list[Cell]:
    """One per seed."""
    sizes, rounds = (QUICK_SIZES, 7) if quick else (SIZES, 15)
    return [{"seed": seed, "sizes": list(sizes), "rounds": rounds} for seed in range(seeds)]


def networks(example: torch.Tensor, model: nn.Module) -> dict[str, nn.Module]:
    """The four, with the same weights."""
    inserted = insert(model, example)
    torchs = to_torch(insert(model, example))
    return dict(
        zip(NETWORKS, (model, torchs, inserted, from_torch(insert(model, example), example=example)), strict=True)
    )


def measure(seed: int, sizes: list[int], rounds: int) -> Record:
    """Images per second of each network at each size."""
    torch.manual_seed(seed)
    task = load_task("inception")
    made = networks(task.train[torch.arange(2)][0], task.model())
    optimizers = {name: torch.optim.SGD(network.parameters(), 1e-3) for name, network in made.items()}
    rates: dict[str, list[float]] = {name: [] for name in made}
    for size in sizes:
        images, labels = task.train[torch.arange(size)]
        repeats = max(1, 32 // size)  # steps per turn: at least a few milliseconds
        seconds: dict[str, list[float]] = {name: [] for name in made}
        for _ in range(rounds):
            for name, network in made.items():
                started = time.perf_counter()
                for _ in range(repeats):
                    optimizers[name].zero_grad()
                    task.training_loss(network.train(), (images, labels)).backward()
                    optimizers[name].step()
                seconds[name].append(time.perf_counter() - started)
        for name, taken in seconds.items():
            rates[name].append(size * repeats / median(taken[1:]))  # the first turn warms up
    return {"rates": rates}


def conclude(records: list[Record]) -> Result:
    """Images per second by size; how many times more than one at a time."""
    sizes = records[0]["sizes"]
    at = {
        name: {m: [r["rates"][name][i] for r in records] for i, m in enumerate(sizes)} for name in NETWORKS
    }  # fmt: skip
    gains = {name: mean(found[256]) / mean(found[1]) for name, found in at.items()}
    rows = [
        {"m": f"{m:,}", **{f"{name}, images/s": with_interval(found[m], "{:,.0f}") for name, found in at.items()}}
        for m in sizes
    ]

    def draw(figure: Figure) -> None:
        axes = style.axes_of(
            figure, f"Training in batches of 256 is {min(gains.values()):.0f} to {max(gains.values()):.0f} times "
            "faster than one by one", "images in the batch, m", "images per second",
        )  # fmt: skip
        for (name, found), (color, dash) in zip(at.items(), NETWORKS.values(), strict=True):
            axes.plot(sizes, [mean(found[m]) for m in sizes], dash, marker="o", color=color, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sizes, [str(m) for m in sizes])
        axes.legend(frameon=False)

    return Result(
        min(gains.values()) >= TIMES,
        "Images per second at m = 256 over those at m = 1: "
        + ", ".join(f"{name} {gain:.1f}" for name, gain in gains.items())
        + ".",
        rows,
        draw,
    )
