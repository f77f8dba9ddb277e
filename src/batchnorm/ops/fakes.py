"""Fake kernels: shapes, dtypes and layouts of the ops' results, for torch.compile and torch.export.

Shapes: as in ``schema``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.ops.schema import library


def _dense(x: Tensor) -> Tensor:
    """Empty, of x's shape, in the layout of results: x's where it is contiguous or channels-last, else contiguous."""
    channels_last = x.permute([0, *range(2, x.dim()), 1])
    kept = x.is_contiguous() or channels_last.is_contiguous()
    return torch.empty_strided(x.shape, x.stride() if kept else x.contiguous().stride(), dtype=x.dtype, device=x.device)


def per_channel(x: Tensor) -> Tensor:
    """A gradient of a parameter."""
    return x.new_empty(x.shape[1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _wide(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[1], dtype=torch.float64), x.new_empty(x.shape[1], dtype=torch.float64)


def _d_residual(x: Tensor, kept: Tensor | None, activation: int) -> Tensor:
    return x.new_empty(0) if kept is None or activation == 0 else _dense(x)


@torch.library.register_fake("batchnorm::statistics", lib=library)
def _(x):  # type: ignore[no-untyped-def]
    return _wide(x)


@torch.library.register_fake("batchnorm::forward", lib=library)
def _(x, *affine):  # type: ignore[no-untyped-def]
    return _dense(x), *_wide(x)


@torch.library.register_fake("batchnorm::train", lib=library)
def _(x, *affine_and_running):  # type: ignore[no-untyped-def]
    return _dense(x), *_wide(x)


@torch.library.register_fake("batchnorm::normalize", lib=library)
def _(x, mean, var, *affine):  # type: ignore[no-untyped-def]
    return _dense(x)


@torch.library.register_fake("batchnorm::backward", lib=library)
def _(dy, x, mean, var, weight, bias, kept, eps, activation, a, b, training):  # type: ignore[no-untyped-def]
    return _dense(x), per_channel(x), per_channel(x), _d_residual(x, kept, activation)


@torch.library.register_fake("batchnorm::gradient_sums", lib=library)
def _(dy, x, mean, var, *affine):  # type: ignore[no-untyped-def]
    return _wide(x)


@torch.library.register_fake("batchnorm::input_gradient", lib=library)
def _(dy, x, mean, var, weight, bias, kept, eps, activation, a, b, dz_mean, dz_xhat_mean):  # type: ignore[no-untyped-def]
    return _dense(x), _d_residual(x, kept, activation)


@torch.library.register_fake("batchnorm::forward_groups", lib=library)
def _(x, weight, bias, residual, eps, activation, a, b, size, groups):  # type: ignore[no-untyped-def]
    mean = x.new_empty(groups, x.shape[1], dtype=torch.float64)
    return _dense(x), mean, torch.empty_like(mean)


@torch.library.register_fake("batchnorm::backward_groups", lib=library)
def _(dy, x, mean, var, weight, bias, kept, eps, activation, a, b, size, groups):  # type: ignore[no-untyped-def]
    return _dense(x), per_channel(x), per_channel(x), _d_residual(x, kept, activation)


@torch.library.register_fake("batchnorm::update_running_", lib=library)
def _(*arguments):  # type: ignore[no-untyped-def]
    return None


@torch.library.register_fake("batchnorm::update_once_", lib=library)
def _(*arguments):  # type: ignore[no-untyped-def]
    return None


@torch.library.register_fake("batchnorm::count_once_", lib=library)
def _(steps, counts):  # type: ignore[no-untyped-def]
    return None
