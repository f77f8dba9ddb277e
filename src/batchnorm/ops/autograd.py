"""The ops' ``autograd.Function``s.

Why not ``register_autograd``: ``torch.func.grad`` raises with it, ``jvp`` gives zeros, second derivatives are None.

torch.compile takes no ``*args`` in the forward of a Function.

Shapes: as in ``schema``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.ops import fakes, reference
from batchnorm.ops.activations import Activation
from batchnorm.ops.arguments import Affine
from batchnorm.ops.schema import ops


def keep(ctx: Any, x: Any, mean: Any, var: Any, affine: Any, y: Any, *more: Any) -> None:
    """For backward: x, (C,) values, and with a residual and an activation y where that tells dg/dz, else the residual.

    The bias only where dg/dz hangs on it: elsewhere it may change between forward and backward, as torch's may.
    """
    weight, bias, residual, eps, activation, a, b = affine
    kept = None
    needed = bias if activation else None
    if residual is not None and activation:
        kept = residual
        if Activation(activation, a, b).result_tells:
            kept, needed = y, None
    ctx.save_for_backward(x, mean, var, weight, needed, kept, *more)
    ctx.scalars, ctx.has_residual = (eps, activation, a, b), residual is not None
    ctx.dtypes = (None if weight is None else weight.dtype), (None if bias is None else bias.dtype)


def of_inputs(ctx: Any, dy: Any, kept: Any, dx: Any, dweight: Any, dbias: Any, dresidual: Any) -> tuple[Any, ...]:
    """The gradients of x, weight, bias and residual, in their dtypes, and None for the rest of ``Affine``."""
    dresidual = None if not ctx.has_residual else dy if kept is None else dresidual
    return dx, *map(_in_dtype, (dweight, dbias), ctx.dtypes), dresidual, None, None, None, None


def _in_dtype(gradient: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    return None if dtype is None else gradient if gradient.dtype == dtype else gradient.to(dtype)


def without_functorch(function: type[torch.autograd.Function]) -> Any:
    """``function.apply`` without what it does in Python for torch.func."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


class Forward(torch.autograd.Function):
    """Training: y, and the batch statistics, which carry no gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, residual, eps, activation, a, b):  # type: ignore[no-untyped-def]
        return ops.forward.default(x, weight, bias, residual, eps, activation, a, b)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        y, mean, var = output
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)  # no zeros for those of mean and var
        keep(ctx, inputs[0], mean, var, inputs[1:], y)

    @staticmethod
    def backward(ctx, dy, *_):  # type: ignore[no-untyped-def]
        return (None,) * 8 if dy is None else _gradients(ctx, dy, True)


class EagerForward(torch.autograd.Function):
    """``Forward`` and the running statistics in one piece, which takes half the time. Not for torch.func."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, eps, activation, a, b, *running):  # type: ignore[no-untyped-def]
        affine = (weight, bias, residual, eps, activation, a, b)
        y, mean, var = ops.train.default(x, *affine, *running)
        keep(ctx, x, mean, var, affine, y)
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        return *_gradients(ctx, dy, True), *(None,) * 5


class Normalize(torch.autograd.Function):
    """Evaluation: y from given statistics, which are constants."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, mean, var, weight, bias, residual, eps, activation, a, b):  # type: ignore[no-untyped-def]
        return ops.normalize.default(x, mean, var, weight, bias, residual, eps, activation, a, b)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        keep(ctx, *inputs[:3], inputs[3:], output)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        dx, *others = _gradients(ctx, dy, False)
        return dx, None, None, *others


class EagerNormalize(torch.autograd.Function):
    """The same in one piece, as ``EagerForward``."""

    @staticmethod
    def forward(ctx, x, mean, var, *affine):  # type: ignore[no-untyped-def]
        y = ops.normalize.default(x, mean, var, *affine)
        keep(ctx, x, mean, var, affine, y)
        return y

    backward = Normalize.backward


eager_forward, eager_normalize = map(without_functorch, (EagerForward, EagerNormalize))


def _gradients(ctx: Any, dy: Tensor, training: bool) -> tuple[Any, ...]:
    x, mean, var, weight, bias, kept = ctx.saved_tensors
    run = Backward.apply if torch.is_grad_enabled() else ops.backward.default  # derivatives of the gradient wanted?
    return of_inputs(ctx, dy, kept, *run(dy, x, mean, var, weight, bias, kept, *ctx.scalars, training))


class Backward(torch.autograd.Function):
    """The gradient of those above; its own derivatives go through the reference's equations, right to any order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dy, x, mean, var, weight, bias, kept, eps, activation, a, b, training):  # type: ignore[no-untyped-def]
        return ops.backward.default(dy, x, mean, var, weight, bias, kept, eps, activation, a, b, training)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs[:7])
        ctx.scalars = inputs[7:]

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        dy, x, mean, var, weight, bias, kept = ctx.saved_tensors
        *scalars, training = ctx.scalars
        given: dict[str, Any] = {"dy": dy, "x": x, "weight": weight, "bias": bias, "kept": kept}
        present = {name: t for name, t in given.items() if t is not None}

        def gradient(*tensors: Tensor) -> tuple[Tensor, ...]:
            values = given | dict(zip(present, tensors, strict=True))
            affine = Affine(values["weight"], values["bias"], values["kept"], *scalars)
            return reference_backward(values["dy"], values["x"], mean, var, affine, training)

        outputs, pullback = torch.func.vjp(gradient, *present.values())
        grads = tuple(torch.zeros_like(o) if g is None else g for g, o in zip(grads, outputs, strict=True))
        found = dict(zip(present, pullback(grads), strict=True))
        return (
            found["dy"], found["x"], None, None, found.get("weight"), found.get("bias"), found.get("kept"),
            *(None,) * 5,
        )  # fmt: skip


def reference_backward(
    dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, affine: Affine, training: bool
) -> tuple[Tensor, ...]:
    """The op ``backward`` in differentiable steps; in training mean and var are functions of x again."""
    wide = reference.widen(x)
    if training:
        mean, var = reference.statistics(wide)
    d_z = reference_d_z(dy, wide, mean, var, affine)
    dx, dweight, dbias = reference.backward(d_z, wide, mean, var, affine.weight_C, affine.eps, training)
    d_residual = x.new_empty(0) if affine.residual_NCS is None or affine.activation == 0 else d_z.to(x.dtype)
    dtype = fakes.per_channel(x).dtype
    return dx.to(x.dtype), dweight.to(dtype), dbias.to(dtype), d_residual


def reference_d_z(dy: Tensor, wide: Tensor, mean: Tensor, var: Tensor, affine: Affine) -> Tensor:
    """dy through the activation, in the dtype of sums, as x is here; the residual is what is kept in its place."""
    d_z, kept, g = dy.to(wide.dtype), affine.residual_NCS, affine.g
    if g.code == 0:
        return d_z
    kept = None if kept is None else kept.to(wide.dtype)
    if kept is not None and g.result_tells:
        return d_z * g.from_result(kept)
    z = reference.normalize(wide, mean, var, affine.weight_C, affine.bias_C, affine.eps)
    return d_z * g.derivative(z if kept is None else z + kept)
