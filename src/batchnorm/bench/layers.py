"""Our layer against torch's, on the user's shapes: seconds per call, side by side in one process per case.

Shapes: N examples, C channels, S places. A side is a way to compute activation(BN(x) + residual).

A case whose results are wrong is not timed. Interleaved: every round calls each side, so that a disturbance of the
machine hits all of them, in a new order, so that each follows each: what the one before leaves in the caches is worth
5% to small calls.
"""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.bench.clock import TURN, rotating, seconds_of
from batchnorm.common.errors import one_line
from batchnorm.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.ops.activations import ROWS, Activation, activation_named


def _in_place(g: Activation) -> nn.Module:
    """Torch's module, in place where that saves memory, as users write it."""
    module: Any = g.module()
    if g.result_tells and hasattr(module, "inplace"):
        module.inplace = True
    return module


LAYOUTS = ("contiguous", "channels-last")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    **{name: partial(_in_place, activation_named(name)) for name in ROWS},
}
KINDS = {2: BatchNorm1d, 3: BatchNorm1d, 4: BatchNorm2d, 5: BatchNorm3d}
STOCK = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}

# Settings of glibc's malloc that keep large tensors from being returned to the system and faulted in again.
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
WARM_UP = 12  # rounds: until the heap has the size that it keeps
ROUNDS = 7  # at the least
WRONG = 8.0  # times torch's own error against float64, or units of eps, whichever is more


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    shape: tuple[int, ...]
    layout: str = "contiguous"
    dtype: str = "float32"
    activation: str = "relu"
    residual: bool = False
    training: bool = True
    backward: bool = True  # in training
    device: str = "cpu"

    def tensor(self, seed: int) -> Tensor:
        """Random values in the case's shape, layout and dtype."""
        generator = torch.Generator(self.device).manual_seed(seed)
        x = torch.randn(self.shape, generator=generator, device=self.device).to(DTYPES[self.dtype])
        return x if self.layout == "contiguous" else x.movedim(1, -1).contiguous().movedim(-1, 1)

    def layers(self) -> tuple[nn.Module, nn.Module]:
        """Ours and torch's, with the same parameters."""
        channels, rank = self.shape[1], len(self.shape)
        activation = None if self.activation == "none" else self.activation
        ours, stock = KINDS[rank](channels, activation=activation), STOCK[rank](channels)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            stock.weight.uniform_(0.5, 1.5, generator=generator)
            stock.bias.uniform_(-0.5, 0.5, generator=generator)
        if DTYPES[self.dtype] == torch.float64:
            ours, stock = ours.double(), stock.double()
        ours.load_state_dict(copy.deepcopy(stock.state_dict()))
        both = ours, Stock(stock, ACTIVATIONS[self.activation]())
        return both[0].to(self.device).train(self.training), both[1].to(self.device).train(self.training)

    def floor(self) -> float:
        """Reads and writes of the whole tensor that no implementation avoids, in memory beyond the caches."""
        # All channels at once are too much for a cache; a GPU always works on many.
        large = self.layout == "channels-last" or len(self.shape) == 2 or self.device == "cuda"
        again = 2 if large and self.training else 1  # x, and on the way back x and dy: once for the sums, once more
        fused = self.residual and self.activation != "none"
        forward = again + 1 + self.residual
        return forward + (again * (2 + fused) + 1 + fused if self.training and self.backward else 0)


class Stock(nn.Module):
    """The code that users write with torch's layer."""

    def __init__(self, norm: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.norm, self.activation = norm, activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        return self.activation(y if residual is None else y + residual)


SIDES = ("ours", "ours compiled", "eager", "compiled", "copy")


@dataclass(frozen=True)
class Row:
    """A case with the median seconds of each side and their spread (interquartile range over median)."""

    case: Case
    seconds: dict[str, float]
    spread: dict[str, float]
    rounds: int
    error: str | None = None

    def ratio(self, side: str, over: str = "ours") -> float | None:
        """Seconds of one side over those of another; None where one was not timed."""
        both = self.seconds.get(side), self.seconds.get(over)
        return None if None in both else both[0] / both[1]  # type: ignore[operator]

    def over_floor(self) -> float | None:
        """Ours over the time that the floor's bytes take at the speed of a copy.

        A copy moves the tensor twice, on the CPU three times: what is written is read first.
        """
        copies = self.ratio("ours", "copy")
        return None if copies is None else (2 if self.case.device == "cuda" else 3) * copies / self.case.floor()

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def geometric_mean(values: list[float]) -> float | None:
    """exp(mean(log values)); None of nothing."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def bench(
    cases: list[Case], sides: tuple[str, ...] = SIDES, *, seconds: float = 2.0, threads: int | None = None,
    keep_memory: bool = True,
) -> Iterator[Row]:  # fmt: skip
    """Time the cases, on the CPU each in a process of its own.

    Args:
        cases: what to time.
        sides: which of ``SIDES``.
        seconds: about how long the rounds of a case take, after the warm-up.
        threads: of each process; default: torch's.
        keep_memory: malloc keeps freed memory (``KEPT``); False: the system's default.

    Yields:
        A row per case, as it is done; ``error`` is set where results were wrong or a side failed.
    """
    before = {name: os.environ.get(name) for name in KEPT}
    os.environ.update(KEPT if keep_memory else {})
    try:
        for case in cases:
            if case.device == "cuda":  # starting it takes seconds, and malloc has no part in it
                yield measure(case, sides, seconds, threads)
                continue
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                yield process.submit(measure, case, sides, seconds, threads).result()
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def measure(case: Case, sides: tuple[str, ...], seconds: float, threads: int | None) -> Row:
    """One case, in this process."""
    if threads is not None:
        torch.set_num_threads(threads)
    if any(side.endswith("compiled") for side in sides):
        torch.compiler.reset()  # it compiles a layer for a few shapes only
    try:
        error = wrong(case)
        return _timed(case, sides, seconds) if error is None else Row(case, {}, {}, 0, error)
    except Exception as failure:  # one side out of memory, say; the other cases go on
        return Row(case, {}, {}, 0, one_line(failure))


def _timed(case: Case, sides: tuple[str, ...], seconds: float) -> Row:
    calls = {side: call_of(case, side) for side in sides}
    for _ in range(WARM_UP):
        for call in calls.values():
            call()
    times: dict[str, list[float]] = {side: [] for side in calls}
    until = time.perf_counter() + seconds
    orders, turn = random.Random(0), min(TURN, seconds / ROUNDS / len(sides))
    while len(times[sides[0]]) < ROUNDS or time.perf_counter() < until:
        for side in orders.sample(sides, len(sides)):
            seconds_of(calls[side], case.device, turn)
            times[side].append(seconds_of(calls[side], case.device, turn))
    middle = {side: median(values) for side, values in times.items()}
    spread = {}
    for side, values in times.items():
        low, _, high = quantiles(values, n=4)
        spread[side] = (high - low) / middle[side]
    return Row(case, middle, spread, len(times[sides[0]]))


def call_of(case: Case, side: str) -> Callable[[], object]:
    """One call of a side: forward, and in training backward."""
    if side == "copy":
        tensors_of_copy, to = rotating(lambda: [case.tensor(0)], case.device), torch.empty_like(case.tensor(0))

        def copied() -> None:
            to.copy_(next(tensors_of_copy)[0])

        return copied
    ours, stock = case.layers()
    layer: Any = ours if side.startswith("ours") else stock
    parameters = list(layer.parameters())
    if side.endswith("compiled"):
        layer = torch.compile(layer, fullgraph=True, dynamic=False)

    def tensors() -> list[Tensor]:
        return [case.tensor(seed).requires_grad_(case.training) for seed in range(1 + case.residual)]

    if not case.training:
        inputs = rotating(tensors, case.device)

        def infer() -> None:
            with torch.inference_mode():
                layer(*next(inputs))

        return infer
    batches = rotating(lambda: [case.tensor(2), *tensors()], case.device)

    def train() -> None:
        d_y, *arguments = next(batches)
        y = layer(*arguments)
        if case.backward:
            torch.autograd.grad(y, [*arguments, *parameters], d_y)

    return train


KINKS = (-3.0, 0.0, 3.0, 6.0)  # where the derivative of some activation jumps


def _away_from_kinks(case: Case, exact: nn.Module) -> Tensor:
    """The gradient of y, zero where rounding alone decides on which side of a kink z lies."""
    inputs = [case.tensor(seed).double() for seed in range(1 + case.residual)]
    with torch.no_grad():
        z = copy.deepcopy(exact).norm(inputs[0])  # type: ignore[operator]
        z = z + inputs[1] if case.residual else z
    d_y, near = case.tensor(2), 16 * torch.finfo(DTYPES[case.dtype]).eps
    for kink in KINKS:
        d_y[(z - kink).abs() < near * (1 + abs(kink))] = 0
    return d_y


def wrong(case: Case) -> str | None:
    """The fault of our results, or None: outputs and gradients against float64, beside torch's own error."""
    results: dict[str, list[Tensor]] = {}
    ours, stock = case.layers()
    exact = copy.deepcopy(stock).double()
    d_y = _away_from_kinks(case, exact)
    for name, layer in (("ours", ours), ("torch", stock), ("exact", exact)):
        dtype = torch.float64 if name == "exact" else DTYPES[case.dtype]
        inputs = [case.tensor(seed).to(dtype).requires_grad_() for seed in range(1 + case.residual)]
        y = layer(*inputs)
        leaves = [*inputs, *layer.parameters()]
        results[name] = [y.detach(), *torch.autograd.grad(y, leaves, d_y.to(dtype))]
    names = ("y", "dx", *(["dresidual"] * case.residual), "dweight", "dbias")
    for name, mine, theirs, right in zip(names, results["ours"], results["torch"], results["exact"], strict=True):
        size = right.abs().max().clamp(min=1)
        mine_error, their_error = ((t.double() - right).abs().mean() / size for t in (mine, theirs))
        unit = torch.finfo(mine.dtype).eps
        if not mine_error <= WRONG * max(float(their_error), unit):
            ours_off, torch_off = float(mine_error / unit), float(their_error / unit)
            return f"{name} is off by {ours_off:.1f} units of rounding; torch's by {torch_off:.1f}"
    return None
