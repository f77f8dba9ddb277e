"""A training step of a whole network, or its inference, with torch's layers and after surgery, side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from batchnorm.bench.clock import seconds_of
from batchnorm.surgery import fold, from_torch


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


# What is made of the stock model, given an example.
MADE: dict[str, Callable[[Any, Any], nn.Module]] = {
    "torch": lambda stock, example: stock,
    "ours": lambda stock, example: from_torch(stock),
    "fused": lambda stock, example: from_torch(stock, example=example),
    "folded": lambda stock, example: fold(stock, example),
}


def kinds_of(device: str, training: bool) -> tuple[str, ...]:
    """The sides that are timed: names of ``MADE``, followed by "compiled" where torch.compile is around."""
    kinds = ("torch", "ours", "fused") if training else ("torch", "ours", "fused", "folded")
    return kinds if device == "cpu" else tuple(name for kind in kinds for name in (kind, f"{kind} compiled"))


TURN = {"cpu": 0.0, "cuda": 0.5}  # seconds: one step; or several, so that the host runs ahead as it does in training


@dataclass(frozen=True)
class NetworkRow:
    """Median seconds of a step, their spread, and the share of batch normalization in torch's step.

    ``peak``: the most bytes that the step held on the GPU.
    """

    network: str
    batch: int
    seconds: dict[str, float]
    spread: dict[str, float]
    peak: dict[str, int]
    share: float
    steps: int


def bench_network(
    name: str, *, batch: int, size: int, channels_last: bool, steps: int, device: str = "cpu", training: bool = True,
    report: Callable[[], object] = lambda: None,
) -> NetworkRow:  # fmt: skip
    """Time ``steps`` steps (forward, backward, SGD; or inference) of each kind of model, in turns.

    Args:
        name: one of ``NETWORKS``.
        batch: examples; images are (batch, 3, size, size).
        channels_last: layout of images and weights.
        device: "cpu", in float32; or "cuda", under autocast to bfloat16, and with torch.compile beside.
        training: whether a step trains; else it is a forward pass in eval, without gradients.
        report: called after each step.
    """
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    stock: Any = NETWORKS[name]().to(device, memory_format=layout).train(training)  # type: ignore[call-overload]
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=layout)
    inputs = {"pixel_values": images}
    if training:
        inputs["labels"] = torch.randint(stock.config.num_labels, (batch,), device=device)
    example = {key: value[:2] for key, value in inputs.items()}
    models: dict[str, Any] = {}
    for kind in kinds_of(device, training):
        model = MADE[kind.removesuffix(" compiled")](stock, example).train(training)
        models[kind] = torch.compile(model) if kind.endswith("compiled") else model
    optimizer = torch.optim.SGD(stock.parameters(), lr=1e-4, momentum=0.9, fused=True)  # the parameters are shared

    def step(model: Any) -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"), torch.set_grad_enabled(training):
            out = model(**inputs)
        if training:
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    times: dict[str, list[float]] = {kind: [] for kind in models}
    peak = dict.fromkeys(models, 0)
    for round_ in range(steps + 2):  # the first two warm up
        for kind, model in models.items():
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            took = seconds_of(partial(step, model), device, turn=TURN[device])
            if round_ > 1:
                times[kind].append(took)
            if device == "cuda":
                peak[kind] = torch.cuda.max_memory_allocated()
            report()
    spread = {}
    for kind, values in times.items():
        low, _, high = quantiles(values, n=4)
        spread[kind] = (high - low) / median(values)
    middle = {kind: median(values) for kind, values in times.items()}
    return NetworkRow(name, batch, middle, spread, peak, _share(partial(step, stock), device), steps)


def _share(step: Callable[[], None], device: str) -> float:
    """Of batch normalization in a step's time."""
    on_gpu = device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as measured:
        step()
    names = ("batch_norm", "batchnorm", "bn_fw", "bn_bw")  # torch's and cuDNN's
    total = normalizing = 0.0
    for event in measured.key_averages():
        if on_gpu and (event.device_type != torch.autograd.DeviceType.CUDA or event.is_user_annotation):
            continue  # an op's time on the GPU is that of its kernels, which are there too
        time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        total += time
        normalizing += time if any(name in event.key.lower() for name in names) else 0.0
    return normalizing / max(total, 1e-9)
