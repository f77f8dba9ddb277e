"""The Triton kernels behind ``cuda``: what one program does with its tiles, and how the parts of a sum come together.

Shapes: x is cut into tiles of (A, B) values. PLANES (contiguous): A examples by B places of one channel. Otherwise
(channels-last, (N, C)): A of the N values of B channels, S = 1. ``inner``, what lies side by side in memory (S or C),
comes as a multiple of UNIT, so that the compiler sees how far loads can be widened. A program takes every ``parts``-th
tile of its channels, from tile ``part`` on. There are no atomics: the same bits from run to run.

Precision: values are computed in float32, from x - mu with mu as float32 holds it; the rest of mu goes into the shift.
Sums are of x - K, K the mean of a program's first tile: in float32 from tile to tile, then in float64 over the threads
of a program and over the programs (Chan et al. 1979).
"""

from __future__ import annotations

import inspect
from typing import Any

import triton
import triton.language as tl

from batchnorm.ops.cuda_activations import activate, derivative, derivative_from_result

NOTHING, RESIDUAL, RESULT = (tl.constexpr(kind) for kind in range(3))  # what is kept beside x for backward


# ---- tiles -----------------------------------------------------------------------------------------------------------


@triton.jit
def _size(N, C, S, inner, PLANES: tl.constexpr, UNIT: tl.constexpr, BIG: tl.constexpr):
    """N, C and S, the one along memory as a multiple of UNIT; in 64 bits where 32 may not do."""
    wide = tl.full([], UNIT, tl.int64) if BIG else UNIT
    if BIG:
        N = N.to(tl.int64)
    if PLANES:
        return N, C, inner * wide
    else:
        return N, inner * wide, S


@triton.jit
def _tiles(N, S, PLANES: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """Tiles that one block of channels has."""
    if PLANES:
        return tl.cdiv(N, A) * tl.cdiv(S, B)
    else:
        return tl.cdiv(N, A)


@triton.jit
def _tile(t, N, C, S, PLANES: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """Offsets and mask of tile t, and how many values of each channel it holds."""
    if PLANES:
        across = tl.cdiv(S, B)
        n0, s0 = t // across * A, t % across * B
        n, s = n0 + tl.arange(0, A), s0 + tl.arange(0, B)
        offsets = (n.to(tl.int64)[:, None] * C + tl.program_id(0)) * S + s[None, :]
        return offsets, (n < N)[:, None] & (s < S)[None, :], tl.minimum(A, N - n0) * tl.minimum(B, S - s0)
    else:
        v0 = t * A
        v, c = v0 + tl.arange(0, A), tl.program_id(0) * B + tl.arange(0, B)
        return v.to(tl.int64)[:, None] * C + c[None, :], (v < N)[:, None] & (c < C)[None, :], tl.minimum(A, N - v0)


@triton.jit
def _channels(C, PLANES: tl.constexpr, B: tl.constexpr):
    """The channels of this program: one of planes, B of rows; and which of them exist."""
    if PLANES:
        channels = tl.program_id(0) + tl.arange(0, 1)
        return channels, channels < C
    else:
        channels = tl.program_id(0) * B + tl.arange(0, B)
        return channels, channels < C


@triton.jit
def _over_values(tile, PLANES: tl.constexpr):
    """(A, B) -> the sum of each channel."""
    columns = tl.sum(tile, axis=0)
    if PLANES:
        return tl.sum(columns, axis=0, keep_dims=True)
    else:
        return columns


# ---- per channel -----------------------------------------------------------------------------------------------------


@triton.jit
def _load_channels(pointer, channels, ok, otherwise: tl.constexpr):
    """(C,) of any float dtype, in float64; `otherwise` where there is none."""
    if pointer is None:
        return tl.full(channels.shape, otherwise, tl.float64)
    else:
        return tl.load(pointer + channels, mask=ok, other=otherwise).to(tl.float64)


@triton.jit
def _affine(mu, var, weight, bias, eps, channels, ok):
    """z = (x - mean) * scale + shift in float32: with mean the part of mu that float32 holds, the rest in the shift."""
    rstd = 1 / tl.sqrt(var + eps)
    mean = mu.to(tl.float32)
    scale = (_load_channels(weight, channels, ok, 1.0) * rstd).to(tl.float32)
    shift = _load_channels(bias, channels, ok, 0.0) - (mu - mean.to(tl.float64)) * scale.to(tl.float64)
    return mean, scale, shift.to(tl.float32), rstd


@triton.jit
def _blend(running, batch, a, channels, ok):
    """(1 - a) * running + a * batch, as running's dtype holds it."""
    old = tl.load(running + channels, mask=ok, other=0.0).to(tl.float64)
    return ((1 - a) * old + a * batch).to(tl.float32).to(running.dtype.element_ty)


@triton.jit
def _is_finite(t):
    wide = t.to(tl.float32)
    return wide - wide == 0


@triton.jit
def _update_running(running_mean, running_var, batches, skipped, mu, var, values, momentum, channels, ok):
    """Algorithm 2, line 10; without a momentum the plain average over all batches, which count this one already. With
    ``skipped`` (and a momentum: see ``cuda.train``), a channel that would not stay finite is left as it is, and counts
    one there."""
    if running_mean is not None:
        if momentum is None:
            a = 1 / tl.maximum(tl.load(batches), 1).to(tl.float64)
        else:  # it comes in float32: 1 - a must add up to 1 with that
            a = momentum * tl.full([], 1, tl.float64)
        mean = _blend(running_mean, mu, a, channels, ok)
        variance = _blend(running_var, var * (values.to(tl.float64) / (values - 1).to(tl.float64)), a, channels, ok)
        if skipped is not None:
            good = _is_finite(mean) & _is_finite(variance)
            left_out = tl.load(skipped + channels, mask=ok, other=0)
            tl.store(skipped + channels, left_out + tl.where(good, 0, 1), mask=ok)
            ok = ok & good
        tl.store(running_mean + channels, mean, mask=ok)
        tl.store(running_var + channels, variance, mask=ok)


# ---- the passes of one program ---------------------------------------------------------------------------------------


@triton.jit
def _sum_x(x, N, C, S, part, parts, PLANES: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """Of the values in every ``parts``-th tile: how many, their mean, the sum of squared distances from it."""
    tiles = _tiles(N, S, PLANES, A, B)
    offsets, mask, count = _tile(part, N, C, S, PLANES, A, B)
    first = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    K = _over_values(first, PLANES) / count.to(tl.float32)
    sums, squares = tl.zeros([A, B], tl.float32), tl.zeros([A, B], tl.float32)
    values = tl.full([], 0, tl.int64)
    for t in range(part, tiles, parts):
        offsets, mask, count = _tile(t, N, C, S, PLANES, A, B)
        d = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32) - K[None, :]
        d = tl.where(mask, d, 0.0)
        sums += d
        squares += d * d
        values += count
    m = values.to(tl.float64)
    shifted = _over_values(sums.to(tl.float64), PLANES) / m
    spread = _over_values(squares.to(tl.float64), PLANES) - m * shifted * shifted
    return m, K.to(tl.float64) + shifted, tl.where(spread < 0, 0.0, spread)


@triton.jit
def _write_y(
    x, residual, y, mean, scale, shift, a, b, N, C, S, part, parts,
    ACTIVATION: tl.constexpr, PLANES: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Algorithm 1, lines 3 and 4, the residual, the activation."""
    for t in range(part, _tiles(N, S, PLANES, A, B), parts):
        offsets, mask, _ = _tile(t, N, C, S, PLANES, A, B)
        centered = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
        z = centered * scale[None, :] + shift[None, :]
        if residual is not None:
            z += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(y + offsets, activate(z, ACTIVATION, a, b).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _load_dz(
    dy, x, kept, offsets, mask, mean, scale, shift, a, b, ACTIVATION: tl.constexpr, KEPT: tl.constexpr
):  # fmt: skip
    """dz = dy * g'(z), and x - mean; zero outside of the mask."""
    dz = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32)
    centered = tl.where(mask, tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32) - mean[None, :], 0.0)
    if ACTIVATION != 0:
        if KEPT == RESULT:
            y = tl.load(kept + offsets, mask=mask, other=0.0).to(tl.float32)
            dz *= derivative_from_result(y, ACTIVATION, a, b)
        else:
            z = centered * scale[None, :] + shift[None, :]
            if KEPT == RESIDUAL:
                z += tl.load(kept + offsets, mask=mask, other=0.0).to(tl.float32)
            dz *= derivative(z, ACTIVATION, a, b)
    return tl.where(mask, dz, 0.0), centered


@triton.jit
def _sum_dz(
    dy, x, kept, mean, scale, shift, a, b, N, C, S, part, parts,
    ACTIVATION: tl.constexpr, KEPT: tl.constexpr, PLANES: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """The sums of dz and of dz * (x - mean) over every ``parts``-th tile."""
    sums, products = tl.zeros([A, B], tl.float32), tl.zeros([A, B], tl.float32)
    for t in range(part, _tiles(N, S, PLANES, A, B), parts):
        offsets, mask, _ = _tile(t, N, C, S, PLANES, A, B)
        dz, centered = _load_dz(dy, x, kept, offsets, mask, mean, scale, shift, a, b, ACTIVATION, KEPT)
        sums += dz
        products += dz * centered
    return _over_values(sums.to(tl.float64), PLANES), _over_values(products.to(tl.float64), PLANES)


@triton.jit
def _write_dx(
    dy, x, kept, dx, dresidual, mean, scale, shift, rest, rstd, dz_mean, dz_xhat_mean, a, b, N, C, S, part, parts,
    ACTIVATION: tl.constexpr, KEPT: tl.constexpr, PLANES: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """dx = scale * (dz - E[dz] - xhat * E[dz * xhat]) (Section 3, with its sums collected); dresidual = dz."""
    centered_term = scale.to(tl.float64) * rstd * dz_xhat_mean
    mean_term = (scale.to(tl.float64) * dz_mean - centered_term * rest).to(tl.float32)[None, :]
    centered_term = centered_term.to(tl.float32)[None, :]
    for t in range(part, _tiles(N, S, PLANES, A, B), parts):
        offsets, mask, _ = _tile(t, N, C, S, PLANES, A, B)
        dz, centered = _load_dz(dy, x, kept, offsets, mask, mean, scale, shift, a, b, ACTIVATION, KEPT)
        d = scale[None, :] * dz - mean_term - centered * centered_term
        tl.store(dx + offsets, d.to(dx.dtype.element_ty), mask=mask)
        if dresidual is not None:
            tl.store(dresidual + offsets, dz.to(dresidual.dtype.element_ty), mask=mask)


# ---- kernels: grid (blocks of channels, parts) -----------------------------------------------------------------------


def _kernel(function: Any) -> Any:
    """A kernel that is not compiled again for each batch size: ``cut`` rounds them to powers of two."""
    here = set(inspect.signature(function).parameters)
    return triton.jit(function, do_not_specialize=sorted(here & {"N", "values", "parts"}))


@_kernel
def sum_x(
    x, partial, N, C, S, inner, PLANES: tl.constexpr, UNIT: tl.constexpr, BIG: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Count, mean and squared distances of each part into partial, (3, parts, C). Reads n."""
    N, C, S = _size(N, C, S, inner, PLANES, UNIT, BIG)
    channels, ok = _channels(C, PLANES, B)
    part, parts = tl.program_id(1), tl.num_programs(1)
    m, mean, squares = _sum_x(x, N, C, S, part, parts, PLANES, A, B)
    to = partial + part * C + channels
    tl.store(to, m + tl.zeros(channels.shape, tl.float64), mask=ok)
    tl.store(to + parts * C, mean, mask=ok)
    tl.store(to + 2 * parts * C, squares, mask=ok)


@_kernel
def merge_x(
    partial, mu, var, running_mean, running_var, batches, skipped, momentum, C, parts, values,
    P: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """The parts of B channels at once -> mu, var, and the running statistics. Grid (blocks of channels,)."""
    channels = tl.program_id(0) * B + tl.arange(0, B)
    part = tl.arange(0, P)
    ok, both = channels < C, (part < parts)[:, None] & (channels < C)[None, :]
    at = partial + part[:, None] * C + channels[None, :]
    m = tl.load(at, mask=both, other=0.0)
    means = tl.load(at + parts * C, mask=both, other=0.0)
    squares = tl.load(at + 2 * parts * C, mask=both, other=0.0)
    total = values.to(tl.float64)
    mean = tl.sum(m * means, axis=0) / total
    distance = tl.where(both, means - mean[None, :], 0.0)
    variance = tl.sum(squares + m * distance * distance, axis=0) / total
    tl.store(mu + channels, mean, mask=ok)
    tl.store(var + channels, variance, mask=ok)
    _update_running(running_mean, running_var, batches, skipped, mean, variance, values, momentum, channels, ok)


@_kernel
def write_y(
    x, residual, y, mu, var, weight, bias, eps, a, b, N, C, S, inner,
    ACTIVATION: tl.constexpr, PLANES: tl.constexpr, UNIT: tl.constexpr, BIG: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """y from given statistics. Reads n, or 2 n with a residual; writes n."""
    N, C, S = _size(N, C, S, inner, PLANES, UNIT, BIG)
    channels, ok = _channels(C, PLANES, B)
    mu, var = _load_channels(mu, channels, ok, 0.0), _load_channels(var, channels, ok, 1.0)
    mean, scale, shift, _ = _affine(mu, var, weight, bias, eps, channels, ok)
    part, parts = tl.program_id(1), tl.num_programs(1)
    _write_y(x, residual, y, mean, scale, shift, a, b, N, C, S, part, parts, ACTIVATION, PLANES, A, B)


@_kernel
def forward(
    x, residual, y, mu, var, weight, bias, running_mean, running_var, batches, skipped, momentum, eps, a, b, N, C, S,
    inner, values, ACTIVATION: tl.constexpr, PLANES: tl.constexpr, UNIT: tl.constexpr, BIG: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """All of a training step's forward, one program per block of channels. Reads 2 n (the second time mostly from
    cache), or 3 n with a residual; writes n."""
    N, C, S = _size(N, C, S, inner, PLANES, UNIT, BIG)
    channels, ok = _channels(C, PLANES, B)
    m, mean64, squares = _sum_x(x, N, C, S, 0, 1, PLANES, A, B)
    variance = squares / m
    tl.store(mu + channels, mean64, mask=ok)
    tl.store(var + channels, variance, mask=ok)
    _update_running(running_mean, running_var, batches, skipped, mean64, variance, values, momentum, channels, ok)
    mean, scale, shift, _ = _affine(mean64, variance, weight, bias, eps, channels, ok)
    _write_y(x, residual, y, mean, scale, shift, a, b, N, C, S, 0, 1, ACTIVATION, PLANES, A, B)


@_kernel
def sum_dz(
    dy, x, kept, partial, mu, var, weight, bias, eps, a, b, N, C, S, inner,
    ACTIVATION: tl.constexpr, KEPT: tl.constexpr, PLANES: tl.constexpr, UNIT: tl.constexpr,
    BIG: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Sums of dz and of dz * (x - mean) of each part into partial, (2, parts, C). Reads 2 n, or 3 n with a residual and
    an activation."""
    N, C, S = _size(N, C, S, inner, PLANES, UNIT, BIG)
    channels, ok = _channels(C, PLANES, B)
    mu, var = _load_channels(mu, channels, ok, 0.0), _load_channels(var, channels, ok, 1.0)
    mean, scale, shift, _ = _affine(mu, var, weight, bias, eps, channels, ok)
    part, parts = tl.program_id(1), tl.num_programs(1)
    sums, products = _sum_dz(
        dy, x, kept, mean, scale, shift, a, b, N, C, S, part, parts, ACTIVATION, KEPT, PLANES, A, B
    )
    tl.store(partial + part * C + channels, sums, mask=ok)
    tl.store(partial + (parts + part) * C + channels, products, mask=ok)


@triton.jit
def _finish_sums(sums, products, mu, var, eps):
    """The sum of dz * xhat from that of dz * (x - mean), mean being what float32 holds of mu."""
    return (products - (mu - mu.to(tl.float32).to(tl.float64)) * sums) / tl.sqrt(var + eps)


@_kernel
def merge_dz(
    partial, mu, var, dz, dz_xhat, dweight, dbias, eps, C, parts, P: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    """The parts of B channels at once -> the sums of dz and of dz * xhat, in float64 and, where wanted, in float32."""
    channels = tl.program_id(0) * B + tl.arange(0, B)
    part = tl.arange(0, P)
    ok, both = channels < C, (part < parts)[:, None] & (channels < C)[None, :]
    at = partial + part[:, None] * C + channels[None, :]
    sums = tl.sum(tl.load(at, mask=both, other=0.0), axis=0)
    products = tl.sum(tl.load(at + parts * C, mask=both, other=0.0), axis=0)
    mu, var = _load_channels(mu, channels, ok, 0.0), _load_channels(var, channels, ok, 1.0)
    products = _finish_sums(sums, products, mu, var, eps)
    tl.store(dz + channels, sums, mask=ok)
    tl.store(dz_xhat + channels, products, mask=ok)
    if dweight is not None:
        tl.store(dweight + channels, products.to(tl.float32), mask=ok)
        tl.store(dbias + channels, sums.to(tl.float32), mask=ok)


@_kernel
def write_dx(
    dy, x, kept, dx, dresidual, mu, var, weight, bias, dz, dz_xhat, values, eps, a, b, N, C, S, inner,
    TRAINING: tl.constexpr, ACTIVATION: tl.constexpr, KEPT: tl.constexpr, PLANES: tl.constexpr, UNIT: tl.constexpr,
    BIG: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """dx and dresidual, with the sums over ``values`` values. Reads 2 n, or 3 n with a residual and an activation;
    writes n, or 2 n."""
    N, C, S = _size(N, C, S, inner, PLANES, UNIT, BIG)
    channels, ok = _channels(C, PLANES, B)
    mu, var = _load_channels(mu, channels, ok, 0.0), _load_channels(var, channels, ok, 1.0)
    mean, scale, shift, rstd = _affine(mu, var, weight, bias, eps, channels, ok)
    dz_mean, dz_xhat_mean = tl.zeros(channels.shape, tl.float64), tl.zeros(channels.shape, tl.float64)
    if TRAINING:
        dz_mean = _load_channels(dz, channels, ok, 0.0) / values.to(tl.float64)
        dz_xhat_mean = _load_channels(dz_xhat, channels, ok, 0.0) / values.to(tl.float64)
    rest = mu - mu.to(tl.float32).to(tl.float64)
    part, parts = tl.program_id(1), tl.num_programs(1)
    _write_dx(
        dy, x, kept, dx, dresidual, mean, scale, shift, rest, rstd, dz_mean, dz_xhat_mean, a, b, N, C, S, part, parts,
        ACTIVATION, KEPT, PLANES, A, B,
    )  # fmt: skip


@_kernel
def backward(
    dy, x, kept, dx, dresidual, mu, var, weight, bias, dweight, dbias, values, eps, a, b, N, C, S, inner,
    TRAINING: tl.constexpr, ACTIVATION: tl.constexpr, KEPT: tl.constexpr, PLANES: tl.constexpr, UNIT: tl.constexpr,
    BIG: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """All of the gradient, one program per block of channels. Reads 4 n (the second two mostly from cache), or 6 n with
    a residual and an activation; writes n, or 2 n."""
    N, C, S = _size(N, C, S, inner, PLANES, UNIT, BIG)
    channels, ok = _channels(C, PLANES, B)
    mu, var = _load_channels(mu, channels, ok, 0.0), _load_channels(var, channels, ok, 1.0)
    mean, scale, shift, rstd = _affine(mu, var, weight, bias, eps, channels, ok)
    sums, products = _sum_dz(dy, x, kept, mean, scale, shift, a, b, N, C, S, 0, 1, ACTIVATION, KEPT, PLANES, A, B)
    products = _finish_sums(sums, products, mu, var, eps)
    tl.store(dweight + channels, products.to(tl.float32), mask=ok)
    tl.store(dbias + channels, sums.to(tl.float32), mask=ok)
    dz_mean, dz_xhat_mean = tl.zeros(channels.shape, tl.float64), tl.zeros(channels.shape, tl.float64)
    if TRAINING:
        dz_mean, dz_xhat_mean = sums / values.to(tl.float64), products / values.to(tl.float64)
    rest = mu - mu.to(tl.float32).to(tl.float64)
    _write_dx(
        dy, x, kept, dx, dresidual, mean, scale, shift, rest, rstd, dz_mean, dz_xhat_mean, a, b, N, C, S, 0, 1,
        ACTIVATION, KEPT, PLANES, A, B,
    )  # fmt: skip


@_kernel
def update_running(
    running_mean, running_var, batches, skipped, mu, var, values, momentum, C, B: tl.constexpr
):  # fmt: skip
    """The op ``update_running_``. Grid (blocks of channels,)."""
    channels = tl.program_id(0) * B + tl.arange(0, B)
    ok = channels < C
    mu, var = _load_channels(mu, channels, ok, 0.0), _load_channels(var, channels, ok, 1.0)
    _update_running(running_mean, running_var, batches, skipped, mu, var, values, momentum, channels, ok)
