"""A training step of a whole network with torch's layers and after ``from_torch``, side by side.

Comes from: ``cli/bench.py``; networks from transformers, built from their configurations. Goes to: the terminal.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from batchnorm.surgery import from_torch


def _resnet(layers: str, depths: list[int], sizes: list[int]) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(layer_type=layers, depths=depths, hidden_sizes=sizes)
    return ResNetForImageClassification(config)


def _mobilenet() -> nn.Module:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    return MobileNetV2ForImageClassification(MobileNetV2Config())


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: _resnet("basic", [2, 2, 2, 2], [64, 128, 256, 512]),
    "resnet50": lambda: _resnet("bottleneck", [3, 4, 6, 3], [256, 512, 1024, 2048]),
    "mobilenetv2": _mobilenet,
}


@dataclass(frozen=True)
class NetworkRow:
    """Median seconds of a step, their spread, and the share of batch normalization in torch's step."""

    network: str
    seconds: dict[str, float]
    spread: dict[str, float]
    share: float
    steps: int


def bench_network(
    name: str, *, batch: int, size: int, channels_last: bool, steps: int, report: Callable[[], object] = lambda: None
) -> NetworkRow:
    """Time ``steps`` steps (forward, backward, SGD) with each kind of layer, in turns.

    Args:
        name: one of ``NETWORKS``.
        batch: examples; images are (batch, 3, size, size).
        channels_last: layout of images and weights.
        report: called after each step.
    """
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    stock: Any = NETWORKS[name]().to(memory_format=layout).train()  # type: ignore[call-overload]
    models = {"torch": stock, "ours": from_torch(stock)}
    images = torch.randn(batch, 3, size, size).contiguous(memory_format=layout)
    labels = torch.randint(stock.config.num_labels, (batch,))
    optimizer = torch.optim.SGD(stock.parameters(), lr=1e-4, momentum=0.9, fused=True)  # the parameters are shared

    def step(model: Any) -> None:
        model(pixel_values=images, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    times: dict[str, list[float]] = {kind: [] for kind in models}
    for round_ in range(steps + 2):  # the first two warm up
        for kind, model in models.items():
            started = time.perf_counter()
            step(model)
            if round_ > 1:
                times[kind].append(time.perf_counter() - started)
            report()
    spread = {}
    for kind, values in times.items():
        low, _, high = quantiles(values, n=4)
        spread[kind] = (high - low) / median(values)
    with profile(activities=[ProfilerActivity.CPU]) as measured:
        step(stock)
    events = measured.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    normalizing = sum(event.self_cpu_time_total for event in events if "batch_norm" in event.key.lower())
    middle = {kind: median(values) for kind, values in times.items()}
    return NetworkRow(name, middle, spread, normalizing / total, steps)
