"""The networks for images of 224 x 224, without batch normalization, and the tasks that train them.

Networks take the keyword that contenders change: ``activation``; and the number of ``classes``.
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from batchnorm.common.machine import cores
from batchnorm.racing.folders import read_folders
from batchnorm.racing.task import Task
from batchnorm.racing.zoo import ACTIVATIONS, initialize, own_generator

# Channels of the Inception modules, after the table in the appendix of Ioffe & Szegedy 2015:
# 1x1 (0: none), 3x3 with its reduction, double 3x3 with its reduction, pooling and its projection (0: none, stride 2).
MODULES = {
    "3a": (64, (64, 64), (64, 96), "average", 32),
    "3b": (64, (64, 96), (64, 96), "average", 64),
    "3c": (0, (128, 160), (64, 96), "max", 0),
    "4a": (224, (64, 96), (96, 128), "average", 128),
    "4b": (192, (96, 128), (96, 128), "average", 128),
    "4c": (160, (128, 160), (128, 160), "average", 128),
    "4d": (96, (128, 192), (160, 192), "average", 128),
    "4e": (0, (128, 192), (192, 256), "max", 0),
    "5a": (352, (192, 320), (160, 224), "average", 128),
    "5b": (352, (192, 320), (192, 224), "max", 128),
}
POOLS = {"average": nn.AvgPool2d, "max": nn.MaxPool2d}

# Bottlenecks of ResNet-50: how many in each stage, and their width. He et al. 2015, "Deep Residual Learning", Table 1.
STAGES = ((3, 64), (4, 128), (6, 256), (3, 512))
EXPANSION = 4

Conv = Callable[..., nn.Module]  # (in, out, kernel, stride=1): convolution and nonlinearity


class Module(nn.Module):
    """A row of MODULES, its branches concatenated: (N, in_channels, H, W) -> (N, out_channels, H, W), or H/2, W/2."""

    def __init__(
        self,
        conv: Conv,
        in_channels: int,
        one: int,
        three: tuple[int, int],
        double: tuple[int, int],
        pool: str,
        out: int,
    ) -> None:
        super().__init__()
        stride = 1 if out else 2
        branches = {
            "three": [conv(in_channels, three[0], 1), conv(three[0], three[1], 3, stride)],
            "double_three": [
                conv(in_channels, double[0], 1),
                conv(double[0], double[1], 3),
                conv(double[1], double[1], 3, stride),
            ],
            "pool": [POOLS[pool](3, stride, padding=1)],
        }
        if one:
            branches["one"] = [conv(in_channels, one, 1)]
        if out:
            branches["pool"].append(conv(in_channels, out, 1))
        self.branches = nn.ModuleDict({name: nn.Sequential(*layers) for name, layers in branches.items()})
        self.out_channels = one + three[1] + double[1] + (out or in_channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches.values()], dim=1)


def inception(*, classes: int = 1000, activation: str = "relu") -> nn.Sequential:
    """The paper's Inception: (N, 3, 224, 224) -> (N, classes).

    No fully connected layer but the softmax's, 5x5 convolutions replaced by two 3x3. With 1,000 classes it has 11.3e6
    parameters; the paper says 13.6e6, which its table does not add up to, nor do the 4c, 4d and 4e of its table have
    the numbers of channels that it gives for their outputs. Local response normalization, which the paper's network
    without batch normalization had, is left out, and so are further classifiers beside the last one.
    """

    def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
        return nn.Sequential(_convolution(in_channels, out_channels, kernel, stride), ACTIVATIONS[activation]())

    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=conv(3, 64, 7, 2),
        pool1=nn.MaxPool2d(3, 2, padding=1),
        reduce2=conv(64, 64, 1),
        conv2=conv(64, 192, 3),
        pool2=nn.MaxPool2d(3, 2, padding=1),
    )
    channels = 192
    for name, row in MODULES.items():
        module = Module(conv, channels, *row)
        layers[f"inception{name}"], channels = module, module.out_channels
    return _with_classifier(layers, channels, classes, dropout=0.4)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1, added to the input, which is projected where shapes differ."""

    def __init__(self, activation: str, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = EXPANSION * width
        self.conv1 = _convolution(in_channels, width, 1)
        self.conv2 = _convolution(width, width, 3, stride)
        self.conv3 = _convolution(width, out_channels, 1)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else _convolution(in_channels, out_channels, 1, stride)
        self.act1, self.act2, self.act3 = (ACTIVATIONS[activation]() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.act3(self.conv3(self.act2(self.conv2(self.act1(self.conv1(x))))) + self.shortcut(x))


def resnet50(*, classes: int = 1000, activation: str = "relu") -> nn.Sequential:
    """ResNet-50 for ``insert`` to put batch normalization into: (N, 3, 224, 224) -> (N, classes).

    He et al. 2015, with the stride in the 3x3 convolutions, as usual since. The last convolution of each block begins
    smaller by the square root of their number, so that the sum over all blocks keeps its scale without BN, too; BN
    does not see the difference, as BN(aWu) = BN(Wu).
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=_convolution(3, 64, 7, 2), act1=ACTIVATIONS[activation](), pool1=nn.MaxPool2d(3, 2, padding=1)
    )
    channels = 64
    for stage, (blocks, width) in enumerate(STAGES, start=1):
        for block in range(blocks):
            stride = 2 if stage > 1 and block == 0 else 1
            layers[f"stage{stage}_{block}"] = Bottleneck(activation, channels, width, stride)
            channels = EXPANSION * width
    network = _with_classifier(layers, channels, classes, dropout=0.0)
    bottlenecks = [layer for layer in network if isinstance(layer, Bottleneck)]
    for bottleneck in bottlenecks:
        bottleneck.conv3.weight.data.div_(math.sqrt(len(bottlenecks)))
    return network


def _convolution(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2)


def _with_classifier(layers: OrderedDict[str, nn.Module], channels: int, classes: int, dropout: float) -> nn.Sequential:
    """The whole network, initialized for training without batch normalization (He et al. 2015, "Delving Deep")."""
    classifier, generator = nn.Linear(channels, classes), own_generator()
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    layers |= {"dropout": nn.Dropout(dropout)} if dropout else {}
    network = nn.Sequential(layers | OrderedDict(classifier=classifier))
    initialize(network, lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=generator))
    nn.init.normal_(classifier.weight, std=0.01, generator=generator)  # first predictions are even
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


PAPER_BATCH, PAPER_RATE, PAPER_STEPS = 32, 0.0015, 31_000_000  # Section 4.2.2: Inception without batch normalization
BATCH, EPOCHS, QUICK_EPOCHS = 256, 90, 10
READERS = 16  # of a training process, at most: each holds two batches


def inception_task(data: str | None = None) -> Task:
    """Experiment 2 of the paper: ImageNet, or other images in folders."""
    return _task("imagenet", inception, data)


def resnet50_task(data: str | None = None) -> Task:
    """The same with today's usual network."""
    return _task("imagenet-resnet50", resnet50, data)


def _task(name: str, model: Callable[..., nn.Module], data: str | None) -> Task:
    """On GPUs where there are any: then in mixed precision, with a core for each process and the others for reading."""
    train, test = read_folders(data)
    batch_size = min(BATCH, len(train))
    per_epoch = len(train) // batch_size
    cuda = torch.cuda.is_available()
    return Task(
        name,
        partial(model, classes=int(train.labels.max()) + 1),
        train=train,
        test=test,
        batch_size=batch_size,
        weight_decay=1e-4,
        learning_rate=PAPER_RATE * batch_size / PAPER_BATCH,
        steps=EPOCHS * per_epoch,
        full_steps=round(PAPER_STEPS * PAPER_BATCH / batch_size),
        quick_steps=QUICK_EPOCHS * per_epoch,
        device="cuda" if cuda else "cpu",
        mixed_precision=cuda,
        readers=min(READERS, max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1)),
    )
