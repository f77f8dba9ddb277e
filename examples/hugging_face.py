"""Race a model of transformers: batches are dicts, the loss is the model's own. From this directory:

batchnorm race --task hugging_face:task

Network and data are made up, so that nothing is fetched: ``AutoModelForImageClassification`` and a data set of
``datasets`` would stand in their places. Scored is the accuracy of ``output.logits`` against ``batch["labels"]``.
"""

from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import ResNetConfig, ResNetForImageClassification, get_linear_schedule_with_warmup

import batchnorm as bn


class Stripes(Dataset[dict[str, Any]]):
    """Images (3, 32, 32) of stripes in 8 directions, shifted and under noise."""

    def __init__(self, n: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(8, (n,), generator=draw)
        angle = torch.pi / 8 * self.labels[:, None, None]
        rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
        phase = 6.28 * torch.rand(n, 1, 1, generator=draw)
        waves = torch.sin(0.8 * (angle.cos() * rows + angle.sin() * columns) + phase)
        self.images = waves[:, None] + 2 * torch.randn(n, 3, 32, 32, generator=draw)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def model() -> nn.Module:
    """A small ResNet, with batch normalization."""
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**sizes, num_labels=8))


def task() -> bn.Task:
    """What ``batchnorm race --task hugging_face:task`` calls."""
    return bn.Task(
        "stripes", model, Stripes(6_000, 0), Stripes(1_000, 1), batch_size=32, steps=600,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01),
        scheduler=lambda optimizer, steps: get_linear_schedule_with_warmup(optimizer, steps // 10, steps),
        clip_grad_norm=1.0,
    )  # fmt: skip
