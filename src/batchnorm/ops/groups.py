"""Ghost batches: each group of examples normalized by itself.

Shapes: N examples, C channels, S places (none for (N, C)), G groups. x_NCS is (N, C, ...), mask_N1S its like in bool.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm import ops
from batchnorm.ops import autograd
from batchnorm.ops.arguments import Affine, Moments
from batchnorm.ops.modes import runs_kernels
from batchnorm.ops.split import by_moments, differentiable_gradients, merged, statistics


def normalize_groups(
    x_NCS: Tensor, affine: Affine, mask_N1S: Tensor | None, size: int, groups: int
) -> tuple[Tensor, Moments]:
    """(y, the moments of all): each ``size`` examples normalized by themselves, the last group with what is left."""
    same = affine.residual_NCS is None or affine.residual_NCS.dtype == x_NCS.dtype
    if mask_N1S is None and same and runs_kernels() and _loops_over_groups(x_NCS):
        y, mean_GC, var_GC = _normalize_groups(x_NCS, *affine, size, groups)
        n, values = x_NCS.shape[0], x_NCS.numel() // x_NCS.shape[0] // x_NCS.shape[1]
        counts = [float(size * values)] * (groups - 1) + [float((n - (groups - 1) * size) * values)]
        return y, merged(mean_GC, var_GC, mean_GC.new_tensor(counts)[:, None])
    y, moments = _groups_as_channels(x_NCS, affine, mask_N1S, size, groups)
    if not x_NCS.is_contiguous() and x_NCS.movedim(1, -1).is_contiguous():  # channels-last, which joining undid
        y = y.movedim(1, -1).contiguous().movedim(-1, 1)
    return y, moments


def reordered(t: Tensor, order: Tensor, back: Tensor) -> Tensor:
    """t[order]; ``back`` undoes it, which autograd's own way of adding up by index takes several times as long for."""
    return _Reordered.apply(t, order, back) if runs_kernels() else t[order]


def _loops_over_groups(x: Tensor) -> bool:
    op = "batchnorm::forward_groups"
    served = x.dtype in ops.dtypes_served(x.device.type)
    return served and torch._C._dispatch_has_kernel_for_dispatch_key(op, x.device.type.upper())


def _groups_as_channels(
    x_NCS: Tensor, affine: Affine, mask_N1S: Tensor | None, size: int, groups: int
) -> tuple[Tensor, Moments]:
    """The same without a kernel: groups joined with the channels, which are normalized apart anyway."""
    last = (groups - 1) * size
    if x_NCS.shape[0] - last != size and groups > 1:  # the last group by itself
        parts = [slice(last), slice(last, None)]
        done = [
            _groups_as_channels(
                x_NCS[part],
                affine._replace(residual_NCS=None if affine.residual_NCS is None else affine.residual_NCS[part]),
                None if mask_N1S is None else mask_N1S[part],
                size,
                many,
            )
            for part, many in zip(parts, (groups - 1, 1), strict=True)
        ]
        each = [torch.stack(t) for t in zip(*(moments for _, moments in done), strict=True)]
        return torch.cat([y for y, _ in done]), merged(*each)

    def joined(t: Tensor) -> Tensor:  # (G * size, C, S) -> (size, G * C, S)
        return t.unflatten(0, (groups, -1)).movedim(0, 1).flatten(1, 2)

    channels = x_NCS.shape[1]
    weight_C, bias_C, residual_NCS = affine[:3]
    wide = affine._replace(
        weight_C=None if weight_C is None else weight_C.repeat(groups),
        bias_C=None if bias_C is None else bias_C.repeat(groups),
        residual_NCS=None if residual_NCS is None else joined(residual_NCS),
    )
    mask = None if mask_N1S is None else joined(mask_N1S.expand(-1, channels, *mask_N1S.shape[2:]))
    x, moments = statistics(joined(x_NCS), mask)
    y = by_moments(x, moments, wide, mask).unflatten(1, (groups, channels)).movedim(1, 0).flatten(0, 1)
    mean_GC, var_GC, values_GC = (t.expand(groups * channels).unflatten(0, (groups, channels)) for t in moments)
    return y, merged(mean_GC, var_GC, values_GC)


class _NormalizeGroups(torch.autograd.Function):
    """``forward_groups`` and ``backward_groups``."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, eps, activation, a, b, size, groups):  # type: ignore[no-untyped-def]
        affine = (weight, bias, residual, eps, activation, a, b)
        y, mean, var = torch.ops.batchnorm.forward_groups.default(x, *affine, size, groups)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        autograd.keep(ctx, x, mean, var, affine, y)
        ctx.groups = (size, groups)
        return y, mean, var

    @staticmethod
    def backward(ctx, dy, *_):  # type: ignore[no-untyped-def]
        x, mean, var, weight, bias, kept = ctx.saved_tensors
        if dy is None:
            return (None,) * 10
        affine = Affine(weight, bias, kept, *ctx.scalars)
        if torch.is_grad_enabled():
            found = _differentiable_gradients_of_groups(dy, x, affine, *ctx.groups)
        else:
            found = torch.ops.batchnorm.backward_groups.default(dy, x, mean, var, *affine, *ctx.groups)
        return *autograd.of_inputs(ctx, dy, kept, *found), None, None


_normalize_groups = autograd.without_functorch(_NormalizeGroups)


def _differentiable_gradients_of_groups(
    dy: Tensor, x: Tensor, affine: Affine, size: int, groups: int
) -> tuple[Any, ...]:
    """The same of each group."""
    starts, kept = [i * size for i in range(groups)], affine.residual_NCS
    parts = [slice(start, end) for start, end in zip(starts, [*starts[1:], None], strict=True)]
    each = [
        differentiable_gradients(dy[p], x[p], None, affine._replace(residual_NCS=None if kept is None else kept[p]))
        for p in parts
    ]
    dx, dweight, dbias, dresidual = zip(*each, strict=True)
    return torch.cat(dx), sum(dweight), sum(dbias), torch.cat(dresidual)


class _Reordered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t, order, back):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(order, back)
        return t[order]

    @staticmethod
    def backward(ctx, dt):  # type: ignore[no-untyped-def]
        order, back = ctx.saved_tensors
        return _Reordered.apply(dt, back, order), None, None
