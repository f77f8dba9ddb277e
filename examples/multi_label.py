"""Race a multi-label training, scored by a metric of torchmetrics (pip install torchmetrics). From this directory:

batchnorm race --task multi_label:task

The data here is made up, so that the example runs anywhere: which of 6 tones are in a noisy sound?
"""

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchmetrics.classification import MultilabelAUROC

import batchnorm as bn

TONES = 6


def sounds(n: int, seed: int) -> TensorDataset:
    """Sounds (n, 1, 128) and their labels (n, 6), 1 where a tone is in it: two of six, on average."""
    draw = torch.Generator().manual_seed(seed)
    labels = (torch.rand(n, TONES, generator=draw) < 1 / 3).long()
    phases, loudness = torch.rand(2, n, TONES, 1, generator=draw)
    waves = torch.sin(2 * torch.pi * (torch.arange(8, 8 + 2 * TONES, 2)[:, None] * torch.arange(128) / 128 + phases))
    mixed = (labels[..., None] * (0.2 + loudness) * waves).sum(1, keepdim=True)
    return TensorDataset(mixed + torch.randn(n, 1, 128, generator=draw), labels)


def network() -> nn.Module:
    """(N, 1, 128) -> (N, 6), with batch normalization."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32), (32, 32)):
        layers += [nn.Conv1d(inputs, outputs, 9, 2, 4, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(32, TONES))


def loss(output: Tensor, target: Tensor) -> Tensor:
    """The mean over examples and labels; the metric wants whole numbers as targets, the loss others."""
    return nn.functional.binary_cross_entropy_with_logits(output, target.float())


def task() -> bn.Task:
    """What ``batchnorm race --task multi_label:task`` calls."""
    return bn.Task(
        "tones", network, sounds(8_000, 0), sounds(2_000, 1), loss, MultilabelAUROC(TONES), metric_name="AUROC",
        batch_size=32, steps=1_000,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    )  # fmt: skip
