"""The small networks that the built-in tasks train, without batch normalization, and these tasks.

Networks take the keyword that contenders change: ``activation``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from batchnorm.racing.data import load_images
from batchnorm.racing.task import Task

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid}


class Module(nn.Module):
    """An Inception module: 1x1, 3x3, double 3x3 (in place of 5x5) and pooling branches, concatenated.

    (N, in_channels, H, W) -> (N, 4 * width, H, W); ``conv(in, out, kernel)`` makes convolution + nonlinearity.
    """

    def __init__(self, conv: Callable[[int, int, int], nn.Module], in_channels: int, width: int) -> None:
        super().__init__()
        self.one = conv(in_channels, width, 1)
        self.three = nn.Sequential(conv(in_channels, width, 1), conv(width, width, 3))
        self.double_three = nn.Sequential(conv(in_channels, width, 1), conv(width, width, 3), conv(width, width, 3))
        self.pool = nn.Sequential(nn.AvgPool2d(3, stride=1, padding=1), conv(in_channels, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.double_three(x), self.pool(x)], dim=1)


def inception(*, activation: str = "relu") -> nn.Sequential:
    """The paper's kind of network at 28 x 28: (N, 1, 28, 28) -> (N, 10).

    17 convolutions deep, with a pooling that halves the places before the first and the fourth of five modules; no
    fully connected layer but the softmax's, dropout before it.
    """

    def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
        convolution = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2)
        return nn.Sequential(convolution, ACTIVATIONS[activation]())

    width, generator = 16, own_generator()
    classifier = nn.Linear(4 * width, 10)
    network = nn.Sequential(
        conv(1, width, 3, stride=2),
        conv(width, 2 * width, 3, stride=2),
        nn.MaxPool2d(3, stride=2, padding=1),  # 4 x 4 from here
        Module(conv, 2 * width, width),
        Module(conv, 4 * width, width),
        Module(conv, 4 * width, width),
        nn.MaxPool2d(3, stride=2, padding=1),  # 2 x 2
        Module(conv, 4 * width, width),
        Module(conv, 4 * width, width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.1),
        classifier,
    )
    # He et al. 2015: the network without BN needs an initialization that keeps the scale through its depth.
    initialize(network, lambda weight: nn.init.kaiming_normal_(weight, generator=generator))
    nn.init.normal_(classifier.weight, std=0.01, generator=generator)  # first predictions are even
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def mlp(*, activation: str = "sigmoid") -> nn.Sequential:
    """The network of the paper's Section 4.1: (N, 784) -> (N, 10), 3 hidden layers of 100 sigmoid units.

    "Weights initialized to small random Gaussian values".
    """

    def layer(in_features: int, out_features: int) -> list[nn.Module]:
        return [nn.Linear(in_features, out_features), ACTIVATIONS[activation]()]

    generator = own_generator()
    network = nn.Sequential(*layer(784, 100), *layer(100, 100), *layer(100, 100), nn.Linear(100, 10))
    initialize(network, lambda weight: nn.init.normal_(weight, std=0.05, generator=generator))
    return network


def own_generator() -> torch.Generator:
    """Random numbers for the weights alone: they do not hang on what layers draw when they are made."""
    return torch.Generator().manual_seed(int(torch.randint(2**31, ())))


def initialize(network: nn.Module, fill: Callable[[Tensor], Tensor]) -> None:
    """Fill the weights of convolutions and linear layers; biases are 0."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fill(layer.weight.data)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def inception_task(data: str | None = None) -> Task:
    """Fashion-MNIST (or MNIST) at 28 x 28, standardized with the training images' mean and deviation."""
    images = load_images(data)
    mean, std = _moments(images.train_images)

    def examples(images_NHW: Tensor, labels_N: Tensor) -> TensorDataset:
        return TensorDataset(images_NHW[:, None].float().sub_(mean).div_(std), labels_N.long())

    return Task(
        f"inception{_on(images.name)}",
        inception,
        train=examples(images.train_images, images.train_labels),
        test=examples(images.test_images, images.test_labels),
        batch_size=256,
        weight_decay=1e-4,
        learning_rate=0.1,
        steps=5_000,  # after 7,500 or 20,000 it is no better (docs/results.md), so --full has no more
        quick_steps=700,
        held_out=5_000,
    )


def mlp_task(data: str | None = None) -> Task:
    """Section 4.1: binary images (a pixel is on where it is above the middle), batches of 60."""
    images = load_images(data)

    def examples(images_NHW: Tensor, labels_N: Tensor) -> TensorDataset:
        return TensorDataset((images_NHW > 127).flatten(1).float(), labels_N.long())

    return Task(
        f"mlp{_on(images.name)}",
        mlp,
        train=examples(images.train_images, images.train_labels),
        test=examples(images.test_images, images.test_labels),
        batch_size=60,
        weight_decay=0.0,
        learning_rate=0.2,
        steps=12_500,  # after 25,000, or the paper's 50,000, it is no better (docs/results.md)
        quick_steps=5_000,
        held_out=5_000,
    )


def _on(data: str) -> str:
    """Part of the task's name where the data is not the one that rates were tuned on."""
    return "" if data == "fashion-mnist" else f"-{data}"


def _moments(images_NHW: Tensor) -> tuple[float, float]:
    values = images_NHW.double()
    return values.mean().item(), values.std(correction=0).item()
