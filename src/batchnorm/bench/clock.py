"""Seconds of a call, on the CPU by the wall clock, on CUDA by events."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import cycle

import torch
from torch import Tensor

TURN = 0.015  # seconds of calls before those that are timed, and of those: until caches hold what they hold in a loop
COLD = 256 << 20  # bytes that a side's calls go through on CUDA before they come back: more than its caches hold
COPIES = 64  # at the most


def seconds_of(call: Callable[[], object], device: str, turn: float = TURN) -> float:
    """Of one call, in a loop of ``turn`` seconds."""
    if device == "cuda":
        return _on_cuda(call, turn)
    count, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < turn or count == 0:
        call()
        count += 1
    return elapsed / count


def _on_cuda(call: Callable[[], object], turn: float) -> float:
    """Between two events of the stream; the host's time where the device waits for it."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    count = 1
    while True:
        torch.cuda.synchronize()
        first.record()
        for _ in range(count):
            call()
        last.record()
        torch.cuda.synchronize()
        elapsed = first.elapsed_time(last) / 1e3
        if elapsed >= turn / 2:
            return elapsed / count
        count = max(2 * count, int(count * turn / max(elapsed, 1e-6)))


def rotating(make: Callable[[], list[Tensor]], device: str) -> Iterator[list[Tensor]]:
    """The same tensors over and over; on CUDA copies of them in turns, so that they are not found in its caches.

    What a call allocates is not rotated: results smaller than those caches may be written there, on all sides alike.
    """
    first = make()
    size = sum(t.nbytes for t in first)
    copies = min(COPIES, -(-COLD // size)) if device == "cuda" and size else 1
    return cycle(
        [first, *([t.detach().clone().requires_grad_(t.requires_grad) for t in first] for _ in range(copies - 1))]
    )
