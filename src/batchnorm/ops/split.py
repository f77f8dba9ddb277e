"""Batch normalization in two steps, moments and normalization, for masks, groups and several processes.

For statistics that are not those of one whole batch on one machine: of places that a mask selects, of groups of
examples, of several processes, or corrected towards the population's.

Shapes: N examples, C channels, S places (none for (N, C)), G groups. x_NCS is (N, C, ...), mask_N1S its like in bool.
Statistics are float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm import ops
from batchnorm.ops import autograd, fallback, reference, schema
from batchnorm.ops.arguments import Affine, Moments, Running
from batchnorm.ops.modes import is_eager, is_traced, runs_kernels
from batchnorm.ops.reference import over_NS, per_channel
from batchnorm.ops.repetition import is_repeated

# Adds up what each process has, in place of nothing to add.
Reduce = Callable[[Tensor], Tensor]


def statistics(x_NCS: Tensor, mask_N1S: Tensor | None = None) -> tuple[Tensor, Moments]:
    """(x, its moments); with a mask, those of the places where it is True, and x with the others filled somehow."""
    if not runs_kernels():
        return differentiable_statistics(x_NCS, mask_N1S)
    if mask_N1S is None:
        mean_C, var_C = _piece("statistics", x_NCS)(x_NCS.detach())
        values = torch.full_like(mean_C[:1], x_NCS.numel() // max(x_NCS.shape[1], 1))
        return x_NCS, Moments(mean_C.where(values > 0, 0), var_C.where(values > 0, 0), values)
    filled_NCS = x_NCS.where(mask_N1S, 0)
    moments, cancels_C = _without_fill(filled_NCS, mask_N1S, 0.0)
    # Others would have to wait for the answer, and fake tensors, which are a type of their own, have none.
    if x_NCS.device.type != "cpu" or type(x_NCS) is not Tensor or cancels_C.any():
        f_C = moments.mean_C.nan_to_num().to(x_NCS.dtype)
        filled_NCS = x_NCS.where(mask_N1S, per_channel(f_C, x_NCS))
        moments, _ = _without_fill(filled_NCS, mask_N1S, f_C.double())
    return filled_NCS, moments


def _without_fill(filled_NCS: Tensor, mask_N1S: Tensor, f_C: Tensor | float) -> tuple[Moments, Tensor]:
    """The moments of the places that count, by a kernel for whole batches; and where their digits cancelled.

    Of m values n count, the others are f. These are 0 away from f, so that mu - f = m / n * (mu_m - f) and
    var = m / n * (var_m + (mu_m - f)^2) - (mu - f)^2: the nearer f is to mu, the less cancels.
    """
    with torch.no_grad():
        values = mask_N1S.sum(over_NS(mask_N1S), dtype=torch.float64)
        share = (mask_N1S[:, :1].numel() / values).where(values > 0, 0)
        of_all = _piece("statistics", filled_NCS)(filled_NCS.detach())
        mean_C, var_C = (t.where(values > 0, 0) for t in of_all)  # NaN of no examples
        square_C, away_C = share * (var_C + (mean_C - f_C) ** 2), share * (mean_C - f_C)
        var_C = (square_C - away_C**2).clamp(min=0)
        return Moments((f_C + away_C).where(values > 0, 0), var_C, values), away_C**2 > 4 * var_C


def merged(mean_GC: Tensor, var_GC: Tensor, count_G1: Tensor) -> Moments:
    """The moments of all groups together (law of total variance); groups of no values add nothing."""
    share = count_G1 / count_G1.sum(0).clamp(min=1)
    mean_C = (mean_GC * share).sum(0)
    return Moments(mean_C, ((var_GC + (mean_GC - mean_C) ** 2) * share).sum(0), count_G1.sum(0))


def by_moments(
    x_NCS: Tensor, moments: Moments, affine: Affine, mask_N1S: Tensor | None, reduce: Reduce | None = None
) -> Tensor:
    """y by the given moments, whose gradient is that of batch statistics; 0 where the mask is False.

    ``reduce`` adds up the gradient's sums over the processes that the moments are of.
    """
    if affine.residual_NCS is not None:
        x_NCS, affine = affine.in_one_dtype(x_NCS)
        if mask_N1S is not None:
            affine = affine._replace(residual_NCS=affine.residual_NCS.where(mask_N1S, 0))  # type: ignore[union-attr]
    # Without kernels all of it is differentiable, the moments too.
    y = (
        _by_moments(x_NCS, *affine, *moments, mask_N1S, reduce)
        if runs_kernels()
        else differentiable(x_NCS, moments, affine)
    )
    return y if mask_N1S is None else y.where(mask_N1S, 0)


def of_batch(x_NCS: Tensor, affine: Affine, mask_N1S: Tensor | None) -> tuple[Tensor, Moments]:
    """(y, moments): one batch, of the places that a mask selects."""
    x_NCS, moments = statistics(x_NCS, mask_N1S)
    return by_moments(x_NCS, moments, affine, mask_N1S), moments


def update_running_(running: Running, moments: Moments, values: int | None = None) -> None:
    """The running statistics move towards the moments, in place: not at all for no values, the mean alone for one.

    ``values``: how many they are, where no mask and no other process has a say in that. A batch of which a mask selects
    nothing is not counted.
    """
    mean_C, var_C, n = moments[0].detach(), moments[1].detach(), moments[2]
    if values and runs_kernels() and _has_update(running):
        torch.ops.batchnorm.update_running_.default(*running, mean_C, var_C, values)
    elif torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        counts = n if values is None else None
        torch.ops.batchnorm.update_once_.default(*running, mean_C, var_C, values, counts)
    else:
        running = running._replace(skipped=None) if is_traced() else running
        unbiased_C = var_C * (n / (n - 1).clamp(min=1))
        counted = (n > 0).any() if values is None else None
        ops.blend_(running, mean_C, unbiased_C, (n > 0, n > 1), counted)


def _has_update(running: Running) -> bool:
    """Whether a kernel moves these statistics, and counts so."""
    mean_C, batches = running.mean_C, running.batches
    if mean_C is None:
        return False
    counts = batches is None or (batches.dtype == torch.int64 and batches.device == mean_C.device)
    return counts and mean_C.dtype in ops.dtypes_served(mean_C.device.type)


@torch.library.impl("batchnorm::update_once_", "CompositeExplicitAutograd", lib=schema.library)
def update_once_(*arguments: Any) -> None:
    """``update_running_`` within a compiled graph, which checkpointing may run again."""
    *running, mean_C, var_C, values, counts = arguments
    if not is_repeated(None):
        n = counts if counts is not None else mean_C.new_tensor([values])
        update_running_(Running(*running), Moments(mean_C, var_C, n), values)


def count_(steps: Tensor, counts: Tensor) -> None:
    """One more step, where there was at least one value."""
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        torch.ops.batchnorm.count_once_.default(steps, counts)
    else:
        steps.add_((counts > 0).any())


@torch.library.impl("batchnorm::count_once_", "CompositeExplicitAutograd", lib=schema.library)
def count_once_(steps: Tensor, counts: Tensor) -> None:
    """``count_`` within a compiled graph, which checkpointing may run again."""
    if not is_repeated(None):
        count_(steps, counts)


def check(x_NCS: Tensor, running: Running, affine: Affine, one_value: bool) -> None:
    """torch's errors for what does not fit together; ``one_value`` per channel may be allowed."""
    ops.refuse_gradient(running)
    if not ops.has_kernel(x_NCS, affine, running, True, is_eager()):
        has_one = x_NCS.dim() > 1 and x_NCS.numel() == x_NCS.shape[1]
        some = x_NCS.detach() if has_one and not one_value else x_NCS.detach()[:1].repeat(2, *[1] * (x_NCS.dim() - 1))
        mean, var = (None if t is None else t.detach().clone() for t in running[:2])
        F.batch_norm(some, mean, var, affine.weight_C, affine.bias_C, True, 0.0, affine.eps)


# ---- the pieces ------------------------------------------------------------------------------------------------------


def _piece(name: str, x: Tensor) -> Any:
    """The op of this name where a kernel serves x, else its equations."""
    if x.dtype in ops.dtypes_served(x.device.type):
        return getattr(torch.ops.batchnorm, name).default
    return getattr(fallback, name)


def differentiable_statistics(x_NCS: Tensor, mask_N1S: Tensor | None) -> tuple[Tensor, Moments]:
    """In torch's own ops, differentiable."""
    wide = reference.widen(x_NCS)
    mask = torch.ones_like(x_NCS[:, :1], dtype=torch.bool) if mask_N1S is None else mask_N1S
    filled_NCS = x_NCS if mask_N1S is None else x_NCS.where(mask_N1S, 0)
    return filled_NCS, Moments(*reference.masked_statistics(wide, mask))


def differentiable(x_NCS: Tensor, moments: Moments, affine: Affine) -> Tensor:
    """y in torch's own ops, differentiable through the moments too."""
    wide = reference.widen(x_NCS)
    z = reference.normalize(wide, moments.mean_C, moments.var_C, affine.weight_C, affine.bias_C, affine.eps)
    z = z if affine.residual_NCS is None else z + affine.residual_NCS
    return affine.g.value(z).to(x_NCS.dtype)


class _ByMoments(torch.autograd.Function):
    """The op ``normalize`` forward; backward the gradient of batch statistics, by sums that ``reduce`` completes."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x, weight, bias, residual, eps, activation, a, b, mean, var, count, mask, reduce
    ):
        affine = (weight, bias, residual, eps, activation, a, b)
        y = _piece("normalize", x)(x, mean, var, *affine)
        autograd.keep(ctx, x, mean, var, affine, y, count, mask)
        ctx.reduce = reduce
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, mean, var, weight, bias, kept, count, mask = ctx.saved_tensors
        affine = Affine(weight, bias, kept, *ctx.scalars)
        if torch.is_grad_enabled():
            if ctx.reduce is not None:
                raise RuntimeError(
                    "second derivatives through synchronized statistics are not supported (create_graph=True): "
                    "use another source of statistics."
                )
            found = differentiable_gradients(dy, x, mask, affine)
        else:
            dz, dz_xhat = _piece("gradient_sums", x)(dy, x, mean, var, *affine)
            dx = dresidual = None
            if ctx.needs_input_grad[0] or ctx.needs_input_grad[3]:
                sums = torch.stack([dz, dz_xhat])
                means = (sums if ctx.reduce is None else ctx.reduce(sums)) / count.clamp(min=1)
                dx, dresidual = _piece("input_gradient", x)(dy, x, mean, var, *affine, means[0], means[1])
            found = dx, dz_xhat, dz, dresidual
        return *autograd.of_inputs(ctx, dy, kept, *found), *(None,) * 5


_by_moments = autograd.without_functorch(_ByMoments)


def differentiable_gradients(
    dy: Tensor, x: Tensor, mask: Tensor | None, affine: Affine
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias, dresidual in torch's own ops, the statistics too, for derivatives of them."""
    mean_C, var_C, n = differentiable_statistics(x, mask)[1]
    given = (dy, x, mean_C, var_C, *affine)
    dz, dz_xhat = fallback.gradient_sums(*given)
    dx, dresidual = fallback.input_gradient(*given, dz / n.clamp(min=1), dz_xhat / n.clamp(min=1))
    return dx, dz_xhat, dz, dresidual
