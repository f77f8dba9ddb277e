"""Batch normalization in two steps, moments and normalization, for masks, groups and several processes.

For statistics that are not those of one whole batch on one machine: of places that a mask selects, of groups of
examples, of several processes, or corrected towards the population's.

Shapes: N examples, C channels, S places (none for (N, C)), G groups. x_NCS is (N, C, ...), mask_N1S its like in bool.
Statistics are float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from batchnorm import ops
from batchnorm.ops import fallback, reference, schema
from batchnorm.ops.activations import Activation
from batchnorm.ops.reference import over_NS, per_channel
from batchnorm.ops.repetition import is_repeated

# Adds up what each process has, in place of nothing to add.
Reduce = Callable[[Tensor], Tensor]


class Moments(NamedTuple):
    """Mean and biased variance of each channel, and of how many values: (1,), or (C,) where channels differ."""

    mean_C: Tensor
    var_C: Tensor
    values: Tensor


class Affine(NamedTuple):
    """The step after the statistics: y = activation(weight * xhat + bias + residual)."""

    weight_C: Tensor | None
    bias_C: Tensor | None
    residual_NCS: Tensor | None
    eps: float
    g: Activation


def statistics(x_NCS: Tensor, mask_N1S: Tensor | None = None) -> tuple[Tensor, Moments]:
    """(x, its moments); with a mask, those of the places where it is True, and x with the others filled somehow."""
    if not is_eager():
        return _plain_statistics(x_NCS, mask_N1S)
    if mask_N1S is None:
        with torch.no_grad():
            mean_C, var_C = _piece("statistics", x_NCS)(x_NCS)
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


def normalize(
    x_NCS: Tensor, moments: Moments, affine: Affine, mask_N1S: Tensor | None, reduce: Reduce | None = None
) -> Tensor:
    """y by the given moments, whose gradient is that of batch statistics; 0 where the mask is False.

    ``reduce`` adds up the gradient's sums over the processes that the moments are of.
    """
    if affine.residual_NCS is not None and affine.residual_NCS.dtype != x_NCS.dtype:
        dtype = torch.promote_types(x_NCS.dtype, affine.residual_NCS.dtype)  # as y + residual has it
        x_NCS, affine = x_NCS.to(dtype), affine._replace(residual_NCS=affine.residual_NCS.to(dtype))
    if affine.residual_NCS is not None and mask_N1S is not None:
        affine = affine._replace(residual_NCS=affine.residual_NCS.where(mask_N1S, 0))
    # Without kernels all of it is differentiable, the moments too.
    y = _normalize(x_NCS, *affine, *moments, mask_N1S, reduce) if is_eager() else _plain(x_NCS, moments, affine)
    return y if mask_N1S is None else y.where(mask_N1S, 0)


def of_batch(x_NCS: Tensor, affine: Affine, mask_N1S: Tensor | None) -> tuple[Tensor, Moments]:
    """(y, moments): one batch, of the places that a mask selects."""
    x_NCS, moments = statistics(x_NCS, mask_N1S)
    return normalize(x_NCS, moments, affine, mask_N1S), moments


def update_running_(
    running_mean_C: Tensor,
    running_var_C: Tensor,
    batches: Tensor | None,
    skipped: Tensor | None,
    moments: Moments,
    momentum: float | None,
    values: int | None = None,
) -> None:
    """The running statistics move towards the moments, in place: not at all for no values, the mean alone for one.

    ``values``: how many they are, where no mask and no other process has a say in that. A batch of which a mask selects
    nothing is not counted.
    """
    mean_C, var_C, n = (t.detach() for t in moments)
    running = (running_mean_C, running_var_C, batches, None if ops.is_traced() else skipped)
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        counts = n if values is None else None
        torch.ops.batchnorm.update_once_.default(*running, mean_C, var_C, values, counts, momentum)
    elif values and is_eager() and _has_update(running_mean_C, batches):
        torch.ops.batchnorm.update_running_.default(*running, mean_C, var_C, values, momentum)
    else:
        unbiased_C = var_C * (n / (n - 1).clamp(min=1))
        counted = (n > 0).any() if values is None else None
        ops.blend_(*running, mean_C, unbiased_C, momentum, (n > 0, n > 1), counted)


def _has_update(running_mean_C: Tensor, batches: Tensor | None) -> bool:
    """Whether a kernel moves these statistics, and counts so."""
    device = running_mean_C.device
    counts = batches is None or (batches.dtype == torch.int64 and batches.device == device)
    return counts and running_mean_C.dtype in ops.dtypes_served(device.type)


@torch.library.impl("batchnorm::update_once_", "CompositeExplicitAutograd", lib=schema.library)
def update_once_(
    running_mean_C: Tensor, running_var_C: Tensor, batches: Tensor | None, skipped: Tensor | None, mean_C: Tensor,
    var_C: Tensor, values: int | None, counts: Tensor | None, momentum: float | None,
) -> None:  # fmt: skip
    """``update_running_`` within a compiled graph, which checkpointing may run again."""
    if not is_repeated(None):
        n = counts if counts is not None else mean_C.new_tensor([values])
        update_running_(running_mean_C, running_var_C, batches, skipped, Moments(mean_C, var_C, n), momentum, values)


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


def check(
    x_NCS: Tensor, running_mean_C: Tensor | None, running_var_C: Tensor | None, affine: Affine, one_value: bool
) -> None:
    """torch's errors for what does not fit together; ``one_value`` per channel may be allowed."""
    weight_C, bias_C, residual_NCS, eps, *_ = affine
    ops.refuse_gradient(running_mean_C, running_var_C)
    if not ops.has_kernel(x_NCS, running_mean_C, running_var_C, weight_C, bias_C, residual_NCS, True, eps):
        has_one = x_NCS.dim() > 1 and x_NCS.numel() == x_NCS.shape[1]
        some = x_NCS.detach() if has_one and not one_value else x_NCS.detach()[:1].repeat(2, *[1] * (x_NCS.dim() - 1))
        kept = [None if t is None else t.detach().clone() for t in (running_mean_C, running_var_C)]
        F.batch_norm(some, kept[0], kept[1], weight_C, bias_C, True, 0.0, eps)


# ---- the pieces ------------------------------------------------------------------------------------------------------


def is_eager() -> bool:
    """Whether kernels run: no torch.compile, torch.func, tracer or forward-mode derivatives, which know torch's ops."""
    return ops.is_eager() and not ops.is_traced() and forward_ad._current_level < 0


def _piece(name: str, x: Tensor) -> Any:
    """The op of this name where a kernel serves x, else its equations."""
    if x.dtype in ops.dtypes_served(x.device.type):
        return getattr(torch.ops.batchnorm, name).default
    return getattr(fallback, name)


def _plain_statistics(x_NCS: Tensor, mask_N1S: Tensor | None) -> tuple[Tensor, Moments]:
    """In torch's own ops, differentiable."""
    wide = reference.widen(x_NCS)
    mask = torch.ones_like(x_NCS[:, :1], dtype=torch.bool) if mask_N1S is None else mask_N1S
    filled_NCS = x_NCS if mask_N1S is None else x_NCS.where(mask_N1S, 0)
    return filled_NCS, Moments(*reference.masked_statistics(wide, mask))


def _plain(x_NCS: Tensor, moments: Moments, affine: Affine) -> Tensor:
    """y in torch's own ops, differentiable through the moments too."""
    weight_C, bias_C, residual_NCS, eps, g = affine
    z = reference.normalize(reference.widen(x_NCS), moments.mean_C, moments.var_C, weight_C, bias_C, eps)
    z = z if residual_NCS is None else z + residual_NCS
    return g.value(z).to(x_NCS.dtype)


def without_functorch(function: type[torch.autograd.Function]) -> Any:
    """``function.apply`` without what it does in Python for torch.func."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


class _Normalize(torch.autograd.Function):
    """``ops.normalize`` forward; backward the gradient of batch statistics, by sums that ``reduce`` completes."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x, weight, bias, residual, eps, g, mean, var, count, mask, reduce
    ):
        y = _piece("normalize", x)(x, mean, var, weight, bias, residual, eps, *g)
        needed = schema.bias_kept(bias, residual, *g)
        ctx.save_for_backward(x, mean, var, weight, needed, schema.kept(residual, y, *g), count, mask)
        ctx.scalars, ctx.reduce, ctx.has_residual = (eps, *g), reduce, residual is not None
        ctx.dtypes = schema.dtype_of(weight), schema.dtype_of(bias)
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, mean, var, weight, bias, kept, count, mask = ctx.saved_tensors
        if torch.is_grad_enabled():
            if ctx.reduce is not None:
                raise RuntimeError(
                    "second derivatives through synchronized statistics are not supported (create_graph=True): "
                    "use another source of statistics."
                )
            dx, dz_xhat, dz, dresidual = differentiable_gradients(dy, x, mask, weight, bias, kept, *ctx.scalars)
        else:
            given = (dy, x, mean, var, weight, bias, kept)
            dz, dz_xhat = _piece("gradient_sums", x)(*given, *ctx.scalars)
            dx = dresidual = None
            if ctx.needs_input_grad[0] or ctx.needs_input_grad[3]:
                sums = torch.stack([dz, dz_xhat])
                means = (sums if ctx.reduce is None else ctx.reduce(sums)) / count.clamp(min=1)
                dx, dresidual = _piece("input_gradient", x)(*given, means[0], means[1], *ctx.scalars)
        dresidual = None if not ctx.has_residual else dy if kept is None else dresidual
        dweight, dbias = map(schema.as_parameter, (dz_xhat, dz), ctx.dtypes)
        return dx, dweight, dbias, dresidual, *(None,) * 7


_normalize = without_functorch(_Normalize)


def differentiable_gradients(
    dy: Tensor, x: Tensor, mask: Tensor | None, weight: Any, bias: Any, kept: Any, *scalars: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias, dresidual in torch's own ops, the statistics too, for derivatives of them."""
    mean_C, var_C, n = _plain_statistics(x, mask)[1]
    given = (dy, x, mean_C, var_C, weight, bias, kept)
    dz, dz_xhat = fallback.gradient_sums(*given, *scalars)
    dx, dresidual = fallback.input_gradient(*given, dz / n.clamp(min=1), dz_xhat / n.clamp(min=1), *scalars)
    return dx, dz_xhat, dz, dresidual
