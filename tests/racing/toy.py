"""A task of milliseconds for the tests of the race, and tasks that are wrong in one way each."""

import multiprocessing
import os
import signal
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import batchnorm as bn


def model(*, activation: str = "relu", dropout: float = 0.2) -> nn.Module:
    nonlinearity = nn.ReLU if activation == "relu" else nn.Sigmoid
    return nn.Sequential(nn.Linear(8, 16), nonlinearity(), nn.Dropout(dropout), nn.Linear(16, 4))


def rates(optimizer: torch.optim.Optimizer, schedule: Any, steps: int) -> torch.Tensor:
    """The learning rates of all groups before each step: (steps, groups)."""
    found = []
    for step in range(1, steps + 1):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.after_step(step)
    return torch.tensor(found, dtype=torch.float64)


def examples(n: int, seed: int) -> TensorDataset:
    """Four classes: which of four directions a point leans to."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 8, generator=generator)
    return TensorDataset(x, x[:, :4].argmax(1))


def task() -> bn.Task:
    return bn.Task("toy", model, examples(1000, 0), examples(500, 1), batch_size=20, steps=200)


def slow() -> bn.Task:
    """Long enough to be killed in the middle."""
    return bn.Task("slow", model, examples(1000, 0), examples(500, 1), batch_size=20, steps=3000)


def plain() -> bn.Task:
    """A model function without ``activation=``."""

    return bn.Task("plain", lambda: model(), examples(1000, 0), examples(500, 1), batch_size=20, steps=200)


def explodes() -> bn.Task:
    """The baseline is fine; with batch normalization it is not."""

    class Network(nn.Sequential):
        passes = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.passes += self.training and any(isinstance(m, nn.BatchNorm1d) for m in self.modules())
            return super().forward(x) * (float("nan") if self.passes > 12 else 1.0)

    def watched() -> nn.Module:
        return Network(*model().children())

    return bn.Task("explodes", watched, examples(1000, 0), examples(500, 1), batch_size=20, steps=200)


def returns_a_model() -> nn.Module:
    return model()


def wrong_shapes() -> bn.Task:
    x = torch.randn(100, 9)
    return bn.Task("wrong_shapes", model, TensorDataset(x, x[:, 0]), examples(50, 1), steps=10)


def negative() -> bn.Task:
    return bn.Task("negative", model, examples(100, 0), examples(50, 1), steps=-1)


def unseeded() -> bn.Task:
    x = torch.randn(200, 8)
    data = TensorDataset(x, x[:, :4].argmax(1))
    return bn.Task("unseeded", model, data, data, batch_size=20, steps=50)


def raises() -> bn.Task:
    return {}["data"]  # type: ignore[no-any-return]


def no_dropout() -> bn.Task:
    """Without dropout, and without BN, two ranks compute what one process does."""

    def plain() -> nn.Module:
        return model(dropout=0.0)

    return bn.Task("no_dropout", plain, examples(1000, 0), examples(500, 1), batch_size=20, steps=200)


def linear() -> bn.Task:
    """Nothing to normalize."""
    return bn.Task("linear", lambda: nn.Linear(8, 4), examples(1000, 0), examples(500, 1), batch_size=20, steps=200)


def dies() -> bn.Task:
    """A training process that is killed, as for want of memory."""

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return nn.functional.cross_entropy(output, target)

    return bn.Task("dies", model, examples(1000, 0), examples(500, 1), loss, batch_size=20, steps=200)


def fails() -> bn.Task:
    """An error of the user's in the middle of training."""

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if multiprocessing.parent_process() is not None:
            raise ArithmeticError("a mistake of the user's")
        return nn.functional.cross_entropy(output, target)

    return bn.Task("fails", model, examples(1000, 0), examples(500, 1), loss, batch_size=20, steps=200)


def normalized() -> bn.Task:
    """With batch normalization already."""

    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))

    return bn.Task("normalized", network, examples(1000, 0), examples(500, 1), batch_size=20, steps=200)


def loaders() -> bn.Task:
    """Loaders with reading processes of their own."""

    def loader(data: TensorDataset, **more: bool) -> DataLoader[tuple[torch.Tensor, ...]]:
        return DataLoader(data, 20, num_workers=1, timeout=60, **more)

    train = loader(examples(200, 0), shuffle=True, persistent_workers=True)
    return bn.Task("loaders", lambda: model(), train, loader(examples(100, 1)), steps=20)


later = bn.Contender("not/after: the first", lambda model, example: bn.insert(model, example, skip=["0"]))


def contender() -> bn.Contender:
    return bn.Contender("theirs", "with-bn", recipe=bn.Recipe(learning_rate=2, decay_speed=2))
