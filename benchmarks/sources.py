"""What each source of training statistics costs beside the plain batch. From the root:

    python benchmarks/sources.py [--shape 256,64,14,14] [--rounds 21] [--threads 2]

Forward and backward of one layer, all sides in turns in one process, malloc keeping freed memory; the ratio is taken
within each turn. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Callable
from statistics import median, quantiles

import torch
from torch import Tensor

import batchnorm as bn
from batchnorm.bench.clock import seconds_of
from batchnorm.bench.layers import KEPT

# Side: the layer's source of statistics, and whether half of the places are masked.
SIDES: dict[str, tuple[bn.Source, bool]] = {
    "Batch()": (bn.Batch(), False),
    "Ghost(8)": (bn.Ghost(8), False),
    "Ghost(32)": (bn.Ghost(32), False),
    "Ghost(60)": (bn.Ghost(60), False),
    "Ghost(32, shuffle=True)": (bn.Ghost(32, shuffle=True), False),
    "Renorm()": (bn.Renorm(), False),
    "Batch(), mask": (bn.Batch(), True),
}
PLAIN = "Batch()"


def step(source: bn.Source, mask: Tensor | None, x: Tensor, dy: Tensor) -> Callable[[], None]:
    """One forward and backward of a layer with this source."""
    layer = bn.BatchNorm2d(x.shape[1], statistics=source)

    def call() -> None:
        x.grad = None
        layer(x, mask=mask).backward(dy)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="256,64,14,14")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in KEPT.items()):  # malloc reads them when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEPT)
    torch.set_num_threads(options.threads)
    shape = tuple(map(int, options.shape.split(",")))
    print(f"torch {torch.__version__}, {options.threads} threads, {shape} float32, {options.rounds} turns\n")
    print("| statistics | contiguous: ms | of Batch() | quartiles | channels-last: ms | of Batch() | quartiles |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    cells: dict[str, list[str]] = {side: [side] for side in SIDES}
    for layout in (torch.contiguous_format, torch.channels_last):
        x, dy = (torch.randn(shape).to(memory_format=layout) for _ in range(2))
        mask = torch.rand(shape[:1] + shape[2:]) > 0.5
        x.requires_grad_()
        calls = {side: step(source, mask if masked else None, x, dy) for side, (source, masked) in SIDES.items()}
        turns = []
        for _ in range(options.rounds + 1):  # the first warms up
            order = random.sample(list(calls), len(calls))
            turns.append(
                {side: seconds_of(calls[side], "cpu") for side in order for _ in range(2)}
            )  # the second counts
        for side in SIDES:
            low, middle, high = quantiles([turn[side] / turn[PLAIN] for turn in turns[1:]], n=4)
            cells[side] += [
                f"{1e3 * median(turn[side] for turn in turns[1:]):.2f}",
                f"{middle:.2f}",
                f"{low:.2f} to {high:.2f}",
            ]
    for row in cells.values():
        print("|", " | ".join(row), "|")


if __name__ == "__main__":
    main()
