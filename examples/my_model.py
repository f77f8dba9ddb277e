"""Race your own model: one function that returns a Task. From this directory:

batchnorm race --task my_model:task --quick

The model is the plain one: contenders put batch normalization before its nonlinearities and take its dropout out.
The data here is made up, so that the example runs anywhere: which of 8 spirals does a point belong to?
"""

import itertools

import torch
from torch import nn
from torch.utils.data import TensorDataset

import batchnorm as bn


def model() -> nn.Module:
    """A multilayer perceptron, (N, 2) -> (N, 8), 8 hidden layers deep."""
    widths = [2] + 8 * [64]
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Dropout(0.1), nn.Linear(64, 8))


def spirals(n: int, seed: int) -> TensorDataset:
    """``n`` points on 8 arms, slightly blurred."""
    generator = torch.Generator().manual_seed(seed)
    arm = torch.randint(8, (n,), generator=generator)
    radius = torch.rand(n, generator=generator)
    angle = 2 * torch.pi * (arm / 8 + 1.25 * radius) + 0.12 * torch.randn(n, generator=generator)
    return TensorDataset(torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1), arm)


def task() -> bn.Task:
    """What ``batchnorm race --task my_model:task`` calls."""
    return bn.Task("spirals", model, train=spirals(16_000, 0), test=spirals(4_000, 1), batch_size=64, steps=4_000)
