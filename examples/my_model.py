"""Race your own model: one function that returns a Task. From this directory:

batchnorm race --task my_model:task --quick

The model is the plain one: contenders put batch normalization before its nonlinearities and take its dropout out.
The data here is made up, so that the example runs anywhere: rows of 16 numbers, in 8 classes that another network made.
The learning rate is the best for the baseline of 0.05, 0.1, 0.15 and 0.2 in 800 steps, by rows held out of training.
"""

import itertools

import torch
from torch import nn
from torch.utils.data import TensorDataset

import batchnorm as bn


def model() -> nn.Module:
    """A multilayer perceptron, (N, 16) -> (N, 8), 6 hidden layers deep."""
    widths = [16] + 6 * [64]
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Dropout(0.1), nn.Linear(64, 8))


def rows(n: int, seed: int) -> TensorDataset:
    """``n`` random rows, and the class that a random network with a hidden layer gives each of them."""
    network = torch.Generator().manual_seed(99)
    hidden, last = (torch.randn(shape, generator=network) for shape in ((16, 32), (32, 8)))
    x = torch.randn(n, 16, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (torch.tanh(0.4 * x @ hidden) @ last).argmax(1))


def task() -> bn.Task:
    """What ``batchnorm race --task my_model:task`` calls."""
    return bn.Task(
        "rows", model, train=rows(16_000, 0), test=rows(4_000, 1), batch_size=64, learning_rate=0.15, steps=3_000,
        quick_steps=800,
    )  # fmt: skip
