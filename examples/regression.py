"""Race a regression on a table: mean squared error, Adam, a cosine, scored by a function. From this directory:

batchnorm race --task regression:task

The data here is made up, so that the example runs anywhere: Friedman's function (1991) of 10 columns, five of them
idle. The network has no batch normalization; the contenders put it in.
"""

import itertools

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import TensorDataset, random_split

import batchnorm as bn


def table(n: int) -> TensorDataset:
    """Rows (n, 10) and what is to be told from them (n, 1), noisy, with mean 0 and standard deviation 1."""
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(n, 10, generator=draw)
    a, b, c, d, e = x[:, :5].T
    y = 10 * torch.sin(torch.pi * a * b) + 20 * (c - 0.5) ** 2 + 10 * d + 5 * e + torch.randn(n, generator=draw)
    return TensorDataset(x, ((y - y.mean()) / y.std())[:, None])


def network() -> nn.Module:
    """(N, 10) -> (N, 1), 6 hidden layers deep, without batch normalization."""
    widths = [10] + 6 * [64]
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(64, 1))


def root_mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Of all test examples at once."""
    return (outputs - targets).square().mean().sqrt()


def task() -> bn.Task:
    """What ``batchnorm race --task regression:task`` calls."""
    train, test = random_split(table(12_000), [10_000, 2_000], torch.Generator().manual_seed(1))
    return bn.Task(
        "friedman", network, train, test, nn.MSELoss(), root_mean_squared_error, metric_name="RMSE",
        lower_is_better=True, batch_size=64, steps=2_000,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
        scheduler=lambda optimizer, steps: CosineAnnealingLR(optimizer, T_max=steps),
    )  # fmt: skip
