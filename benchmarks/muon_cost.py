"""What a step of Muon costs beside torch's fused SGD, as a share of a training step; in turns, medians.

python benchmarks/muon_cost.py    (OMP_NUM_THREADS=1 for one core)
"""

import time
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import batchnorm as bn
from batchnorm.racing.zoo import inception

BATCH, ROUNDS, WARM_UP = 256, 60, 10


def step(model: nn.Module, optimizer: Any, x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    """Seconds of forward and backward, and of the optimizer."""
    start = time.perf_counter()
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    middle = time.perf_counter()
    optimizer.step()
    return middle - start, time.perf_counter() - middle


def main() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))
    models = {name: bn.accelerate(inception(), x[:4], "fast") for name in ("Muon", "SGD")}
    optimizers: dict[str, Any] = {
        "Muon": bn.RECIPES["fast"].optimizer(models["Muon"]),
        "SGD": torch.optim.SGD(models["SGD"].parameters(), lr=0.1, momentum=0.9, nesterov=True, fused=True),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for _ in range(ROUNDS):
        for name, model in models.items():
            times[name].append(step(model, optimizers[name], x, y))
    passes, steps = ({n: median(t[i] for t in ts[WARM_UP:]) for n, ts in times.items()} for i in (0, 1))
    for name in models:
        print(f"{name:5} forward and backward {1e3 * passes[name]:.1f} ms, optimizer {1e3 * steps[name]:.2f} ms")
    print(f"Muon costs {(steps['Muon'] - steps['SGD']) / (passes['SGD'] + steps['SGD']):.1%} of a training step more")


if __name__ == "__main__":
    main()
