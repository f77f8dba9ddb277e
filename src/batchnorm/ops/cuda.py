"""The ops on CUDA: arguments checked, results allocated, Triton kernels launched. Nothing waits for the device.

Shapes: as in ``schema``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from batchnorm.ops import cuda_kernels as kernels
from batchnorm.ops import schema
from batchnorm.ops.activations import NAMES, Activation
from batchnorm.ops.arguments import Running
from batchnorm.ops.running import blend_

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # float64 goes through torch's own kernels

# ---- launch shapes ---------------------------------------------------------------------------------------------------

TILE = 4096  # values that a program holds at once: 16 for each of its threads
WARPS = 8
ROW = 64  # channels of a tile of rows: 128 bytes of 16-bit values
PLACES = 1024  # of a tile of planes
PROGRAMS = 4  # for each multiprocessor: half of the threads that it can hold
MOST_PARTS = 1024  # of a sum: what one program can merge
FEW, MANY = 4, 32  # tiles of a channel that one program takes: always; where there are channels enough for the device


class Cut(NamedTuple):
    """How x is cut into tiles and programs; see ``cuda_kernels``."""

    planes: bool
    N: int
    C: int
    S: int
    inner: int
    unit: int
    A: int
    B: int
    big: bool  # sizes of 2^31 or nearly
    blocks: int  # of channels
    parts: int
    whole: bool  # one program takes all of its channels' values

    @property
    def sizes(self) -> dict[str, Any]:
        return {
            "N": self.N, "C": self.C, "S": self.S, "inner": self.inner,
            "PLANES": self.planes, "UNIT": self.unit, "BIG": self.big, "A": self.A, "B": self.B, **_OPTIONS,
        }  # fmt: skip


_OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": True}


def cut(x: Tensor) -> Cut:
    """The launch shape for a dense x."""
    return _cut(x.shape, x.is_contiguous(), _processors(x.device))


@functools.lru_cache(1024)
def _cut(shape: torch.Size, contiguous: bool, processors: int) -> Cut:
    N, C, S = shape[0], shape[1], math.prod(shape[2:])
    planes = S > 1 and contiguous
    if not planes:
        N, S = N * S, 1
    inner = S if planes else C
    unit = math.gcd(inner, 16)
    most = triton.next_power_of_2(max(N, 1))
    B = min(triton.next_power_of_2(max(inner, 1)), max(PLACES, TILE // most) if planes else ROW)
    A = min(most, TILE // B)
    blocks = C if planes else triton.cdiv(C, B)
    tiles = triton.cdiv(N, A) * (triton.cdiv(S, B) if planes else 1)
    big = max(N, S) > (1 << 31) - 2 * TILE
    parts = max(1, min(tiles, PROGRAMS * processors // max(blocks, 1), MOST_PARTS))
    whole = tiles <= FEW or (tiles <= MANY and blocks >= processors)
    return Cut(planes, N, C, S, inner // max(unit, 1), unit, A, B, big, blocks, parts, whole)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


# ---- what the ops refuse, in the words of csrc/tensors.h -------------------------------------------------------------


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"batchnorm: {message}")


def _shape(t: Tensor) -> str:
    return f"({', '.join(map(str, t.shape))})"


def _check_input(x: Tensor, activation: int = 0) -> None:
    _check(x.dim() >= 2, f"x must be (N, C, ...), got {_shape(x)}")
    _check(0 <= activation < len(NAMES), f"unknown activation {activation}")
    _check(x.dtype in DTYPES, f"expected float32, bfloat16 or float16, got {x.dtype}")


def _check_channels(x: Tensor, channel: int = 1, **tensors: Tensor | None) -> None:
    """(C,), C the size of x's dimension ``channel``."""
    for name, t in tensors.items():
        if t is not None:
            C = x.shape[channel]
            _check(t.device == x.device, f"{name} must be on {x.device}, as x is")
            _check(t.shape == (C,), f"{name} must be ({C},), one value for each channel, got {_shape(t)}")
            _check(t.is_floating_point(), f"expected float32, float64, bfloat16 or float16, got {t.dtype}")


def _check_like(x: Tensor, **tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None:
            _check(t.device == x.device, f"{name} must be on {x.device}, as x is")
            _check(t.shape == x.shape, f"{name} must have x's shape, {_shape(x)}, got {_shape(t)}")
            _check(t.dtype == x.dtype, f"{name} must have x's dtype")


def _check_running(running: Running, x: Tensor, channel: int) -> None:
    mean, var, batches, skipped, momentum = running
    _check_channels(x, channel, running_mean=mean, running_var=var)
    _check((mean is None) == (var is None), "running_mean and running_var must be given together")
    _check(momentum is not None or batches is not None or mean is None, "momentum=None needs the number of batches")
    fits = batches is None or (batches.device == x.device and batches.numel() == 1 and batches.dtype == torch.int64)
    _check(fits, f"batches must be one int64 on {x.device}")
    C = x.shape[channel]
    fits = skipped is None or (skipped.device, skipped.shape, skipped.dtype) == (x.device, (C,), torch.int64)
    _check(fits, f"skipped must be ({C},) of int64 on {x.device}")


# ---- layouts ---------------------------------------------------------------------------------------------------------


def _dense(x: Tensor) -> Tensor:
    """x, copied where it is neither contiguous nor channels-last."""
    return x if x.is_contiguous() or x.movedim(1, -1).is_contiguous() else x.contiguous()


def _laid_out_as(t: Tensor | None, x: Tensor) -> Tensor | None:
    if t is None or all(a == b or size == 1 for a, b, size in zip(t.stride(), x.stride(), x.shape, strict=True)):
        return t
    return torch.empty_like(x).copy_(t)


def _wide(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=torch.float64)


# ---- the ops ---------------------------------------------------------------------------------------------------------


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Algorithm 1, lines 1 and 2: two launches."""
    _check_input(x)
    return _statistics(_dense(x))


def _statistics(x: Tensor, *running: Any) -> tuple[Tensor, Tensor]:
    """Mean and variance of a dense x; ``running``: mean, var, batches, skipped, momentum, updated on the way."""
    mean, var, k = _wide(x), _wide(x), cut(x)
    if x.numel() == 0:
        return mean.fill_(torch.nan), var.fill_(torch.nan)
    partial = x.new_empty((3, k.parts, k.C), dtype=torch.float64)
    kernels.sum_x[k.blocks, k.parts](x, partial, **k.sizes)
    running = running or (None,) * 5
    grid, shape = _merge(k)
    values = x.numel() // k.C
    kernels.merge_x[grid](partial, mean, var, *running, k.C, k.parts, values, **shape)
    return mean, var


def _merge(k: Cut) -> tuple[tuple[int], dict[str, Any]]:
    """The launch that brings the parts together: all parts of some channels in one program."""
    P = triton.next_power_of_2(k.parts)
    B = min(triton.next_power_of_2(k.C), max(1, MOST_PARTS // P))
    return (triton.cdiv(k.C, B),), {"P": P, "B": B, **_OPTIONS}


def normalize(x: Tensor, mean: Tensor, var: Tensor, *affine: Any) -> Tensor:
    """Algorithm 1, lines 3 and 4, with given statistics: one launch."""
    weight, bias, residual, eps, activation, a, b = affine
    _check_input(x, activation)
    _check_channels(x, mean=mean, var=var, weight=weight, bias=bias)
    _check_like(x, residual=residual)
    x = _dense(x)
    y, k, residual = torch.empty_like(x), cut(x), _laid_out_as(residual, x)
    if x.numel():
        channels = _contiguous(mean, var, weight, bias)
        kernels.write_y[k.blocks, k.parts](x, residual, y, *channels, eps, a, b, ACTIVATION=activation, **k.sizes)
    return y


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def forward(x: Tensor, *affine: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1: ``train`` without running statistics."""
    return train(x, *affine, *Running())


def train(x: Tensor, *affine_and_running: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1 and the running statistics: one launch for short channels, else three; and one for ``batches``."""
    affine, running = affine_and_running[:7], Running(*affine_and_running[7:])
    weight, bias, residual, eps, activation, a, b = affine
    _check_input(x, activation)
    _check_running(running, x, 1)
    _check_channels(x, weight=weight, bias=bias)
    _check_like(x, residual=residual)
    if _enters_as_a_whole(running) and x.numel():
        y, mean, var = forward(x, *affine)
        values = x.numel() // x.shape[1]
        blend_(running, mean, var * (values / (values - 1)))
        return y, mean, var
    if running.batches is not None:
        running.batches.add_(1)
    x = _dense(x)
    k, residual = cut(x), _laid_out_as(residual, x)
    given = _contiguous(*running[:2])
    if x.numel() == 0 or not k.whole:
        mean, var = _statistics(x, *given, *running[2:])
        y = normalize(x, mean, var, weight, bias, residual, eps, activation, a, b)
    else:
        y, mean, var = torch.empty_like(x), _wide(x), _wide(x)
        kernels.forward[k.blocks, 1](
            x, residual, y, mean, var, *_contiguous(weight, bias), *given, *running[2:], eps, a, b,
            values=x.numel() // k.C, ACTIVATION=activation, **k.sizes,
        )  # fmt: skip
    _write_back(given, *running[:2])
    return y, mean, var


def _enters_as_a_whole(running: Running) -> bool:
    """The plain average with a guard: whether a batch enters hangs on all channels, and so on all programs."""
    return running.mean_C is not None and running.skipped is not None and running.momentum is None


def _write_back(written: list[Tensor | None], *tensors: Tensor | None) -> None:
    """Into running statistics that were not contiguous, and so were copied."""
    for new, t in zip(written, tensors, strict=True):
        if t is not None and new is not None and new is not t:
            t.copy_(new)


def update_running_(*running_and_moments: Any) -> None:
    """Algorithm 2, line 10: one launch, and one for ``batches``."""
    *given, mean, var, values = running_and_moments
    running = Running(*given)
    _check_channels(mean, 0, var=var)
    _check_running(running, mean, 0)
    C = len(mean)
    if _enters_as_a_whole(running) and values and C:
        return blend_(running, mean, var * (values / (values - 1)))
    if running.batches is not None:
        running.batches.add_(1)
    if values == 0 or C == 0:
        return None
    written = _contiguous(*running[:2])
    kernels.update_running[(triton.cdiv(C, PLACES),)](
        *written, *running[2:4], *_contiguous(mean, var), values, running.momentum, C, B=PLACES, **_OPTIONS
    )
    _write_back(written, *running[:2])
    return None


class _Gradient(NamedTuple):
    """The arguments that the gradient ops share, checked and laid out alike."""

    dy: Tensor
    x: Tensor
    kept: Tensor | None
    channels: list[Tensor | None]  # mean, var, weight, bias
    scalars: tuple[float, float, float]  # eps, a, b
    options: dict[str, int]

    def empty_dresidual(self) -> Tensor | None:
        return None if self.kept is None else torch.empty_like(self.x)


def _gradient(dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, affine: Any) -> _Gradient:
    weight, bias, kept, eps, activation, a, b = affine
    _check_input(x, activation)
    _check_channels(x, mean=mean, var=var, weight=weight, bias=bias)
    _check_like(x, dy=dy, kept=kept)
    x = _dense(x)
    kept = None if activation == 0 else _laid_out_as(kept, x)
    told = Activation(activation, a, b).result_tells
    kind = kernels.NOTHING if kept is None else kernels.RESULT if told else kernels.RESIDUAL
    channels, options = _contiguous(mean, var, weight, bias), {"ACTIVATION": activation, "KEPT": kind.value}
    return _Gradient(_laid_out_as(dy, x), x, kept, channels, (eps, a, b), options)  # type: ignore[arg-type]


def gradient_sums(dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, *affine: Any) -> tuple[Tensor, Tensor]:
    """The sums of Section 3: two launches."""
    given = _gradient(dy, x, mean, var, affine)
    return _gradient_sums(given, cut(given.x))


def _gradient_sums(given: _Gradient, k: Cut, *parameters: Tensor) -> tuple[Tensor, Tensor]:
    """``parameters``: dweight and dbias, where to put the sums in float32 too."""
    x, dz, dz_xhat = given.x, _wide(given.x), _wide(given.x)
    if x.numel() == 0:
        for t in parameters:
            t.zero_()
        return dz.zero_(), dz_xhat.zero_()
    partial = x.new_empty((2, k.parts, k.C), dtype=torch.float64)
    kernels.sum_dz[k.blocks, k.parts](
        given.dy, x, given.kept, partial, *given.channels, *given.scalars, **given.options, **k.sizes
    )
    grid, shape = _merge(k)
    dweight, dbias = parameters or (None, None)
    eps = given.scalars[0]
    kernels.merge_dz[grid](partial, *given.channels[:2], dz, dz_xhat, dweight, dbias, eps, k.C, k.parts, **shape)
    return dz, dz_xhat


def input_gradient(dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, *affine_and_means: Any) -> tuple[Tensor, Tensor]:
    """d_x of Section 3 with the sums given: one launch."""
    *affine, dz_mean, dz_xhat_mean = affine_and_means
    given = _gradient(dy, x, mean, var, affine)
    _check_channels(x, dz_mean=dz_mean, dz_xhat_mean=dz_xhat_mean)
    return _input_gradient(given, cut(given.x), _contiguous(dz_mean, dz_xhat_mean), 1, True)


def _input_gradient(given: _Gradient, k: Cut, dz: Any, values: int, training: bool) -> tuple[Tensor, Tensor]:
    """dx and dresidual from the sums ``dz`` (of dz and of dz * xhat) over so many values."""
    x, dx, dresidual = given.x, torch.empty_like(given.x), given.empty_dresidual()
    if x.numel():
        kernels.write_dx[k.blocks, k.parts](
            given.dy, x, given.kept, dx, dresidual, *given.channels, *dz, values, *given.scalars,
            TRAINING=training, **given.options, **k.sizes,
        )  # fmt: skip
    return dx, x.new_empty(0) if dresidual is None else dresidual


def backward(
    dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, *affine_and_training: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Section 3: one launch for short channels, else three."""
    *affine, training = affine_and_training
    given = _gradient(dy, x, mean, var, affine)
    x, k = given.x, cut(given.x)
    dweight, dbias = (x.new_empty(k.C, dtype=torch.float32) for _ in range(2))
    values = x.numel() // max(k.C, 1)
    if x.numel() == 0 or not k.whole:
        sums = _gradient_sums(given, k, dweight, dbias)
        dx, dresidual = _input_gradient(given, k, sums, values, training)
        return dx, dweight, dbias, dresidual
    dx, empty = torch.empty_like(x), given.empty_dresidual()
    kernels.backward[k.blocks, 1](
        given.dy, x, given.kept, dx, empty, *given.channels, dweight, dbias, values, *given.scalars,
        TRAINING=training, **given.options, **k.sizes,
    )  # fmt: skip
    return dx, dweight, dbias, x.new_empty(0) if empty is None else empty


OPS = (statistics, forward, normalize, gradient_sums, input_gradient, backward, train, update_running_)


def _on_its_device(op: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device."""

    def launch(x: Tensor, *rest: Any) -> Any:
        if x.is_cuda and x.device.index != torch.cuda.current_device():
            with torch.cuda.device(x.device):
                return op(x, *rest)
        return op(x, *rest)

    return launch


def register(key: str = "CUDA") -> None:
    """Tell torch's dispatcher, once a first kernel has run: Triton needs a C compiler and the driver for that."""
    if key == "CUDA":
        values = torch.ones(1, device="cuda")
        update_running_(values, values.clone(), None, None, 0.5, values, values, 2)
    for op in OPS:
        schema.library.impl(op.__name__, _on_its_device(op), key)
