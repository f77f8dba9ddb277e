"""Race a LightningModule as it is: one function that returns a Task. From this directory:

batchnorm race --task lightning_module:task --quick

The module is the plain one: contenders put batch normalization before its nonlinearities, and run through its schedule
in fewer steps. The data here is made up, so that the example runs anywhere: which of 8 spirals does a point belong to?
"""

import itertools

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import batchnorm as bn


class Spirals(pl.LightningModule):
    """A multilayer perceptron, (N, 2) -> (N, 8), 8 hidden layers deep."""

    def __init__(self) -> None:
        super().__init__()
        layers = [m for a, b in itertools.pairwise([2] + 8 * [64]) for m in (nn.Linear(a, b), nn.ReLU())]
        self.net = nn.Sequential(*layers, nn.Linear(64, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def spirals(n: int, seed: int) -> TensorDataset:
    """``n`` points on 8 arms, slightly blurred."""
    generator = torch.Generator().manual_seed(seed)
    arm = torch.randint(8, (n,), generator=generator)
    radius = torch.rand(n, generator=generator)
    angle = 2 * torch.pi * (arm / 8 + 1.25 * radius) + 0.12 * torch.randn(n, generator=generator)
    return TensorDataset(torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1), arm)


def task() -> bn.Task:
    """What ``batchnorm race --task lightning_module:task`` calls."""
    train, val = DataLoader(spirals(16_000, 0), 64, shuffle=True, drop_last=True), DataLoader(spirals(4_000, 1), 500)
    return bn.Task.from_lightning(Spirals, (train, val), max_epochs=16, metric="val_acc")
