"""What ``recalibrate`` costs over the forward passes that it makes. From the root:

    python benchmarks/recalibrate_overhead.py [--rounds 15] [--batches 20] [--threads 1] [--only mlp]

A pass of ``recalibrate(model, batches)`` beside ``model(x)`` in train mode, without gradients, on the same batches; in
turns, the ratio taken within each turn. Networks with torch's layers and with ours. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from statistics import median, quantiles

import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.bench.networks import NETWORKS
from batchnorm.racing.zoo import inception, mlp

# Name: the network, the shape of a batch.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet18, 32x3x64x64": (NETWORKS["resnet18"], (32, 3, 64, 64)),
    "inception, 256x1x28x28": (lambda: bn.insert(inception(), torch.randn(2, 1, 28, 28)), (256, 1, 28, 28)),
    "mlp, 256x784": (lambda: bn.insert(mlp(), torch.randn(2, 784)), (256, 784)),
}


def stock(model: nn.Module) -> nn.Module:
    """A copy with torch's layers."""
    return bn.to_torch(copy.deepcopy(model))


def forward(model: nn.Module, batches: list[Tensor]) -> None:
    """What any way of re-estimating costs at least."""
    with torch.no_grad():
        for x in batches:
            model(x)


def seconds(call: Callable[[], object]) -> float:
    """Of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure(model: nn.Module, batches: list[Tensor], rounds: int) -> tuple[float, list[float]]:
    """Median seconds of a batch's forward pass; the ratios, one a turn."""
    model.train()
    plain, ratios = [], []
    for turn in range(rounds + 2):  # the first two warm up
        calls = [lambda: forward(model, batches), lambda: bn.recalibrate(model, batches)]
        order = (0, 1) if turn % 2 else (1, 0)
        took = {side: seconds(calls[side]) for side in order}
        if turn > 1:
            plain.append(took[0] / len(batches))
            ratios.append(took[1] / took[0])
    return median(plain), ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="networks whose name begins so")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {options.threads} threads, {options.batches} batches, {options.rounds} turns\n")
    print("| network and batch | layers | BN layers | forward of a batch, ms | recalibrate / forward | quartiles |")
    print("|---|---|---:|---:|---:|---:|")
    for name, (make, shape) in CASES.items():
        if not name.startswith(options.only):
            continue
        batches = [torch.randn(shape) for _ in range(options.batches)]
        ours = bn.from_torch(make())
        for kind, model in (("ours", ours), ("torch", stock(ours))):
            layers = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
            forward_seconds, ratios = measure(model, batches, options.rounds)
            low, middle, high = quantiles(ratios, n=4)
            cells = (name, kind, layers, f"{1e3 * forward_seconds:.2f}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}")
            print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()
