"""Race an image classifier as it is trained today: a ResNet with batch normalization, augmentation, AdamW, one cycle.

batchnorm race --task image_classifier:task

The images are made up, so that the example runs anywhere; put your CIFAR-10 in the place of ``Images``.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import Dataset

import batchnorm as bn


class Images(Dataset[tuple[Tensor, int]]):
    """(3, 16, 16) in 10 classes: a pattern for each, somewhere else in every image, in other colors, under noise."""

    def __init__(self, n: int, seed: int, augment: bool) -> None:
        draw = torch.Generator().manual_seed(seed)
        patterns = torch.randn(10, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        self.augment, self.labels = augment, torch.randint(10, (n,), generator=draw)
        images = F.interpolate(patterns, 16, mode="bicubic")[self.labels] * torch.randn(n, 3, 1, 1, generator=draw)
        places = torch.randint(-3, 4, (n, 2), generator=draw).tolist()
        moved = [image.roll(place, (1, 2)) for image, place in zip(images, places, strict=True)]
        self.images = torch.stack(moved) + torch.randn(n, 3, 16, 16, generator=draw)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        if self.augment:  # a random crop of the padded image, flipped or not
            top, left, flip = torch.randint(5, (3,)).tolist()
            image = F.pad(image, (2, 2, 2, 2))[:, top : top + 16, left : left + 16]
            image = image.flip(2) if flip > 2 else image
        return image, int(self.labels[index])


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        around = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = around if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def resnet() -> nn.Module:
    """(N, 3, 16, 16) -> (N, 10)."""
    stem = (nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    blocks = (Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def task() -> bn.Task:
    """What ``batchnorm race --task image_classifier:task`` calls."""
    gpu = torch.cuda.is_available()
    return bn.Task(
        "images", resnet, Images(10_000, 1, augment=True), Images(1_000, 2, augment=False), batch_size=64, steps=800,
        optimizer=lambda parameters: AdamW(parameters, lr=3e-3, weight_decay=0.05),
        scheduler=lambda optimizer, steps: OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps),
        clip_grad_norm=1.0, device="cuda" if gpu else "cpu", mixed_precision=gpu,
    )  # fmt: skip
