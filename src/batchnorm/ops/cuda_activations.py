"""The activations' equations in Triton: g(z), dg/dz at z (at a kink the one-sided derivative that torch takes), and
where y = g(z) tells it, dg/dz from y. ``a`` and ``b`` are the activation's parameters, float32.

A row of ``activations`` has its code and its branches here. A comparison that is false for NaN lets it pass.
"""

from __future__ import annotations

import triton
import triton.language as tl

from batchnorm.ops.activations import NAMES

RELU, RELU6, LEAKY_RELU, SILU, HARDSWISH, SIGMOID, TANH, GELU, GELU_TANH, ELU, MISH, HARDTANH = map(
    tl.constexpr, range(1, len(NAMES))
)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr, a, b):
    """g(z)."""
    if ACTIVATION == RELU:
        return tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == RELU6:
        return tl.where(z <= 0, 0.0, tl.where(z >= 6, 6.0, z))
    elif ACTIVATION == LEAKY_RELU:
        return tl.where(z > 0, z, z * a)
    elif ACTIVATION == SILU:
        return z * tl.sigmoid(z)
    elif ACTIVATION == HARDSWISH:
        return tl.where(z <= -3, 0.0, tl.where(z >= 3, z, z * (z + 3) / 6))
    elif ACTIVATION == SIGMOID:
        return tl.sigmoid(z)
    elif ACTIVATION == TANH:
        return _tanh(z)
    elif ACTIVATION == GELU:
        return z * _normal(z)
    elif ACTIVATION == GELU_TANH:
        return z * tl.sigmoid(_twice_u(z))
    elif ACTIVATION == ELU:
        t = _tanh(z / 2)  # exp(z) - 1 = 2 t / (1 - t), which does not cancel near 0
        return tl.where(z > 0, z, a * (2 * t / (1 - t)))
    elif ACTIVATION == MISH:
        e = tl.exp(tl.where(z > 20, 20.0, z))  # tanh(log(1 + e)) = n / (n + 2), n = e (e + 2)
        n = e * (e + 2)
        return z * (n / (n + 2))
    elif ACTIVATION == HARDTANH:
        return tl.where(z <= a, a, tl.where(z >= b, b, z))
    else:
        return z


@triton.jit
def derivative(z, ACTIVATION: tl.constexpr, a, b):
    """dg/dz at z."""
    if ACTIVATION == RELU:
        return tl.where(z > 0, 1.0, 0.0)
    elif ACTIVATION == RELU6:
        return tl.where((z > 0) & (z < 6), 1.0, 0.0)
    elif ACTIVATION == LEAKY_RELU:
        return tl.where(z > 0, 1.0, a)
    elif ACTIVATION == SILU:
        sigmoid = tl.sigmoid(z)
        return sigmoid * (1 + z * (1 - sigmoid))
    elif ACTIVATION == HARDSWISH:
        return tl.where(z <= -3, 0.0, tl.where(z >= 3, 1.0, z / 3 + 0.5))
    elif ACTIVATION == SIGMOID:
        sigmoid = tl.sigmoid(z)
        return sigmoid * (1 - sigmoid)
    elif ACTIVATION == TANH:
        e = tl.exp(-2 * tl.abs(z))  # 1 - tanh(z)^2 would cancel
        return 4 * e / ((1 + e) * (1 + e))
    elif ACTIVATION == GELU:
        return _normal(z) + z * (0.3989422804014327 * tl.exp(-0.5 * z * z))
    elif ACTIVATION == GELU_TANH:
        x = tl.where(z > 20, 20.0, tl.where(z < -20, -20.0, z))  # beyond it is 0 or 1
        e = tl.exp(-tl.abs(_twice_u(x)))
        s = 1 / (1 + e)  # s (1 - s) is e s^2
        return tl.where(x < 0, e * s, s) + x * (e * s * s) * (1.5957691216057308 * (1 + 3 * 0.044715 * x * x))
    elif ACTIVATION == ELU:
        return tl.where(z > 0, 1.0, a * tl.exp(z))
    elif ACTIVATION == MISH:
        x = tl.where(z > 20, 20.0, z)
        e = tl.exp(x)
        n = e * (e + 2)
        return n / (n + 2) + 4 * x * (e / (n + 2)) * ((e + 1) / (n + 2))
    else:
        tl.static_assert(ACTIVATION == HARDTANH)
        return tl.where((z > a) & (z < b), 1.0, 0.0)


@triton.jit
def derivative_from_result(y, ACTIVATION: tl.constexpr, a, b):
    """dg/dz where y = g(z) tells it; of the others z and y are on the same side of all kinks."""
    if ACTIVATION == SIGMOID:
        return y * (1 - y)
    elif ACTIVATION == TANH:
        return 1 - y * y
    else:
        return derivative(y, ACTIVATION, a, b)


@triton.jit
def _tanh(z):
    z2 = z * z  # near 0 by its series: 1 - 2 / (exp(2 z) + 1) would cancel
    series = -1382 / 155925 + z2 * (21844 / 6081075 - z2 * (929569 / 638512875))
    series = z + z * z2 * (-1 / 3 + z2 * (2 / 15 + z2 * (-17 / 315 + z2 * (62 / 2835 + z2 * series))))
    e = tl.exp(-2 * tl.abs(z))
    far = (1 - e) / (1 + e)
    return tl.where(z2 < 0.25, series, tl.where(z < 0, -far, far))


@triton.jit
def _normal(z):
    """The normal distribution function."""
    return 0.5 * (1 + tl.erf(z * 0.7071067811865476))


@triton.jit
def _twice_u(z):
    """(1 + tanh(u)) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (z + 0.044715 z^3)."""
    return 1.5957691216057308 * z * (1 + 0.044715 * z * z)
