"""The ops: signatures, fake kernels, batching rules, and the ``autograd.Function`` around them.

Shapes: N examples, C channels, S places; x_NCS is (N, C, ...) of float16, bfloat16, float32 or float64. Statistics and
sums, (C,), are float64; gradients of parameters, (C,), are float64 beside a float64 x, else float32. Nothing is changed
in place but by ``update_running_`` and ``train``. Between ``statistics`` and ``normalize``, ``gradient_sums`` and
``input_gradient`` comes what others have to add: other processes, say. Device kernels register themselves beside:
``csrc/ops.cpp`` for CPU.

Why not ``register_autograd``: ``torch.func.grad`` raises with it, ``jvp`` gives zeros, second derivatives are None.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.ops import reference
from batchnorm.ops.activations import Activation

library = torch.library.Library("batchnorm", "DEF")
library.define("statistics(Tensor x) -> (Tensor mean, Tensor var)")
library.define(  # statistics and normalize in one go
    "forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, int activation, float a, float b)"
    " -> (Tensor y, Tensor mean, Tensor var)"
)
library.define(
    "normalize(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? residual, float eps,"
    " int activation, float a, float b) -> Tensor"
)
library.define(
    "gradient_sums(Tensor dy, Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? kept, float eps,"
    " int activation, float a, float b) -> (Tensor dz, Tensor dz_xhat)"
)
library.define(
    "input_gradient(Tensor dy, Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? kept,"
    " Tensor dz_mean, Tensor dz_xhat_mean, float eps, int activation, float a, float b)"
    " -> (Tensor dx, Tensor dresidual)"
)
library.define(  # gradient_sums and input_gradient in one go
    "backward(Tensor dy, Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? kept, float eps,"
    " int activation, float a, float b, bool training) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)"
)
library.define(  # forward for each `size` examples, and for what is left: mean and var are (groups, C)
    "forward_groups(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, int size, int groups, float eps,"
    " int activation, float a, float b) -> (Tensor y, Tensor mean, Tensor var)"
)
library.define(
    "backward_groups(Tensor dy, Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? kept,"
    " int size, int groups, float eps, int activation, float a, float b)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)"
)
library.define(  # forward and update_running_ in one call
    "train(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor(a!)? running_mean, Tensor(b!)? running_var,"
    " Tensor(c!)? batches, Tensor(d!)? skipped, float? momentum, float eps, int activation, float a, float b)"
    " -> (Tensor y, Tensor mean, Tensor var)"
)
library.define(
    "update_running_(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? batches, Tensor(d!)? skipped,"
    " Tensor mean, Tensor var,"
    " int values, float? momentum) -> ()"
)
library.define(  # update_running_ under torch.compile: whether a forward is a repetition is asked when the graph runs
    "update_once_(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? batches, Tensor(d!)? skipped,"
    " Tensor mean, Tensor var, SymInt? values, Tensor? counts, float? momentum) -> ()"
)
library.define("count_once_(Tensor(a!) steps, Tensor counts) -> ()")  # the same for the steps that Renorm counts


# ---- fake kernels: shapes, dtypes and layouts, for torch.compile -----------------------------------------------------


def _dense(x: Tensor) -> Tensor:
    """Empty, of x's shape, in the layout of results: x's where it is contiguous or channels-last, else contiguous."""
    channels_last = x.permute([0, *range(2, x.dim()), 1])
    kept = x.is_contiguous() or channels_last.is_contiguous()
    return torch.empty_strided(x.shape, x.stride() if kept else x.contiguous().stride(), dtype=x.dtype, device=x.device)


def _per_channel(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _wide(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[1], dtype=torch.float64), x.new_empty(x.shape[1], dtype=torch.float64)


def _d_residual(x: Tensor, kept: Tensor | None, activation: int) -> Tensor:
    return x.new_empty(0) if kept is None or activation == 0 else _dense(x)


@torch.library.register_fake("batchnorm::statistics", lib=library)
def _(x):  # type: ignore[no-untyped-def]
    return _wide(x)


@torch.library.register_fake("batchnorm::forward", lib=library)
def _(x, weight, bias, residual, eps, activation, a, b):  # type: ignore[no-untyped-def]
    return _dense(x), *_wide(x)


@torch.library.register_fake("batchnorm::train", lib=library)
def _(x, weight, bias, residual, running_mean, running_var, batches, skipped, momentum, eps, activation, a, b):  # type: ignore[no-untyped-def]
    return _dense(x), *_wide(x)


@torch.library.register_fake("batchnorm::normalize", lib=library)
def _(x, mean, var, weight, bias, residual, eps, activation, a, b):  # type: ignore[no-untyped-def]
    return _dense(x)


@torch.library.register_fake("batchnorm::backward", lib=library)
def _(dy, x, mean, var, weight, bias, kept, eps, activation, a, b, training):  # type: ignore[no-untyped-def]
    return _dense(x), _per_channel(x), _per_channel(x), _d_residual(x, kept, activation)


@torch.library.register_fake("batchnorm::gradient_sums", lib=library)
def _(dy, x, mean, var, weight, bias, kept, eps, activation, a, b):  # type: ignore[no-untyped-def]
    return _wide(x)


@torch.library.register_fake("batchnorm::input_gradient", lib=library)
def _(dy, x, mean, var, weight, bias, kept, dz_mean, dz_xhat_mean, eps, activation, a, b):  # type: ignore[no-untyped-def]
    return _dense(x), _d_residual(x, kept, activation)


@torch.library.register_fake("batchnorm::forward_groups", lib=library)
def _(x, weight, bias, residual, size, groups, eps, activation, a, b):  # type: ignore[no-untyped-def]
    mean = x.new_empty(groups, x.shape[1], dtype=torch.float64)
    return _dense(x), mean, torch.empty_like(mean)


@torch.library.register_fake("batchnorm::backward_groups", lib=library)
def _(dy, x, mean, var, weight, bias, kept, size, groups, eps, activation, a, b):  # type: ignore[no-untyped-def]
    return _dense(x), _per_channel(x), _per_channel(x), _d_residual(x, kept, activation)


@torch.library.register_fake("batchnorm::update_running_", lib=library)
def _(running_mean, running_var, batches, skipped, mean, var, values, momentum):  # type: ignore[no-untyped-def]
    return None


@torch.library.register_fake("batchnorm::update_once_", lib=library)
def _(running_mean, running_var, batches, skipped, mean, var, values, counts, momentum):  # type: ignore[no-untyped-def]
    return None


@torch.library.register_fake("batchnorm::count_once_", lib=library)
def _(steps, counts):  # type: ignore[no-untyped-def]
    return None


# ---- batching rules for vmap: the batch joins the channels, which are normalized apart anyway ------------------------


def _join(x: Tensor | None, dim: int | None, size: int, channel: int) -> Tensor | None:
    """Batch dimension ``dim`` moved in front of the channels and merged with them; expanded where there is none."""
    if x is None:
        return None
    x = x.expand(size, *x.shape).movedim(0, channel) if dim is None else x.movedim(dim, channel)
    return x.flatten(channel, channel + 1)


def _split(x: Tensor, size: int, channel: int) -> Tensor:
    return x.unflatten(channel, (size, -1)) if x.dim() > channel else x


def _batched(op: Any, tensors: int, channels_of: tuple[int, ...], out_channels: tuple[int, ...]) -> Any:
    """The rule for an op whose first arguments are tensors with channels in the given dimensions."""

    def rule(info: Any, in_dims: Any, *args: Any) -> Any:
        size = info.batch_size
        joined = [_join(a, d, size, c) for a, d, c in zip(args, in_dims, channels_of, strict=False)]
        out = op(*joined, *args[tensors:])
        outs = out if isinstance(out, tuple) else (out,)
        split = tuple(_split(o, size, c) for o, c in zip(outs, out_channels, strict=True))
        dims = tuple(c if o.dim() > c else None for o, c in zip(outs, out_channels, strict=True))
        return (split, dims) if isinstance(out, tuple) else (split[0], dims[0])

    return rule


ops = torch.ops.batchnorm
for name, inputs, outputs in (
    ("statistics", (1,), (0, 0)),
    ("normalize", (1, 0, 0, 0, 0, 1), (1,)),
    ("gradient_sums", (1, 1, 0, 0, 0, 0, 1), (0, 0)),
    ("input_gradient", (1, 1, 0, 0, 0, 0, 1, 0, 0), (1, 1)),
    ("backward", (1, 1, 0, 0, 0, 0, 1), (1, 0, 0, 1)),
):
    torch.library.register_vmap(
        f"batchnorm::{name}", _batched(getattr(ops, name), len(inputs), inputs, outputs), lib=library
    )


@torch.library.register_vmap("batchnorm::forward", lib=library)
def _(info, in_dims, x, weight, bias, residual, eps, activation, a, b):  # type: ignore[no-untyped-def]
    """One batch with many parameters has one mean and variance: so the running statistics need not be batched."""
    if in_dims[0] is not None:
        return _batched(ops.forward, 4, (1, 0, 0, 1), (1, 0, 0))(
            info, in_dims, x, weight, bias, residual, eps, activation, a, b
        )
    mean, var = ops.statistics(x)
    dims = (None, None, None, *in_dims[1:4], None, None, None)
    normalize = _batched(ops.normalize, 6, (1, 0, 0, 0, 0, 1), (1,))
    y, y_dim = normalize(info, dims, x, mean, var, weight, bias, residual, eps, activation, a, b)
    return (y, mean, var), (y_dim, None, None)


# ---- autograd --------------------------------------------------------------------------------------------------------


class Forward(torch.autograd.Function):
    """Training: y, and the batch statistics, which carry no gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, residual, eps, activation, a, b):  # type: ignore[no-untyped-def]
        return ops.forward.default(x, weight, bias, residual, eps, activation, a, b)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        x, weight, bias, residual, eps, activation, a, b = inputs
        y, mean, var = output
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)  # no zeros for those of mean and var
        _keep(ctx, x, mean, var, weight, bias, residual, y, (eps, activation, a, b, True))

    @staticmethod
    def backward(ctx, dy, *_):  # type: ignore[no-untyped-def]
        if dy is None:
            return (None,) * 8
        dx, dweight, dbias, dresidual = _gradients(ctx, dy)
        return dx, dweight, dbias, dresidual, None, None, None, None


class EagerForward(torch.autograd.Function):
    """``Forward`` and the running statistics in one piece, which takes half the time. Not for torch.func."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x, weight, bias, residual, running_mean, running_var, batches, skipped, momentum, eps, activation, a, b
    ):
        y, mean, var = ops.train.default(
            x, weight, bias, residual, running_mean, running_var, batches, skipped, momentum, eps, activation, a, b
        )
        _keep(ctx, x, mean, var, weight, bias, residual, y, (eps, activation, a, b, True))
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        return *_gradients(ctx, dy), *(None,) * 9


# Without what `Function.apply` does in Python for torch.func.
eager_forward = super(torch.autograd.Function, EagerForward).apply


class Normalize(torch.autograd.Function):
    """Evaluation: y from given statistics, which are constants."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, mean, var, weight, bias, residual, eps, activation, a, b):  # type: ignore[no-untyped-def]
        return ops.normalize.default(x, mean, var, weight, bias, residual, eps, activation, a, b)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        x, mean, var, weight, bias, residual, eps, activation, a, b = inputs
        _keep(ctx, x, mean, var, weight, bias, residual, output, (eps, activation, a, b, False))

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        dx, dweight, dbias, dresidual = _gradients(ctx, dy)
        return dx, None, None, dweight, dbias, dresidual, *(None,) * 4


class EagerNormalize(Normalize):
    """The same in one piece, as ``EagerForward``."""

    setup_context = torch.autograd.Function.setup_context

    @staticmethod
    def forward(ctx, *inputs):  # type: ignore[no-untyped-def]
        output = Normalize.forward(*inputs)
        Normalize.setup_context(ctx, inputs, output)
        return output


def _keep(ctx: Any, x: Any, mean: Any, var: Any, weight: Any, bias: Any, residual: Any, y: Any, scalars: Any) -> None:
    """For backward: x and (C,) values; with a residual and an activation also y or the residual."""
    needed = bias_kept(bias, residual, *scalars[1:4])
    ctx.save_for_backward(x, mean, var, weight, needed, kept(residual, y, *scalars[1:4]))
    ctx.scalars, ctx.has_residual, ctx.bias_dtype = scalars, residual is not None, dtype_of(bias)


def kept(residual: Tensor | None, y: Tensor, activation: int, a: float, b: float) -> Tensor | None:
    """The tensor that backward needs of a layer with a residual and an activation."""
    return None if residual is None or activation == 0 else y if Activation(activation, a, b).result_tells else residual


def bias_kept(bias: Tensor | None, residual: Tensor | None, activation: int, a: float, b: float) -> Tensor | None:
    """The bias, where dg/dz hangs on it. Elsewhere it may change between forward and backward, as torch's may."""
    return None if activation == 0 or (residual is not None and Activation(activation, a, b).result_tells) else bias


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, mean, var, weight, bias, kept = ctx.saved_tensors
    run = Backward.apply if torch.is_grad_enabled() else ops.backward.default  # derivatives of the gradient wanted?
    dx, dweight, dbias, dresidual = run(dy, x, mean, var, weight, bias, kept, *ctx.scalars)
    return (
        dx,
        as_parameter(dweight, dtype_of(weight)),
        as_parameter(dbias, ctx.bias_dtype),
        None if not ctx.has_residual else dy if kept is None else dresidual,
    )


def dtype_of(t: Tensor | None) -> torch.dtype | None:
    """Its dtype, if it is there."""
    return None if t is None else t.dtype


def as_parameter(gradient: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """A gradient in its parameter's dtype; none without a parameter."""
    return None if dtype is None else gradient if gradient.dtype == dtype else gradient.to(dtype)


class Backward(torch.autograd.Function):
    """The gradient of the two above; its own derivatives go through the reference's equations, right to any order."""

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
        eps, activation, a, b, training = ctx.scalars
        given: dict[str, Any] = {"dy": dy, "x": x, "weight": weight, "bias": bias, "kept": kept}
        present = {name: t for name, t in given.items() if t is not None}

        def gradient(*tensors: Tensor) -> tuple[Tensor, ...]:
            values = given | dict(zip(present, tensors, strict=True))
            return _reference_backward(
                **values, mean=mean, var=var, eps=eps, activation=activation, a=a, b=b, training=training
            )

        outputs, pullback = torch.func.vjp(gradient, *present.values())
        grads = tuple(torch.zeros_like(o) if g is None else g for g, o in zip(grads, outputs, strict=True))
        found = dict(zip(present, pullback(grads), strict=True))
        return (
            found["dy"], found["x"], None, None, found.get("weight"), found.get("bias"), found.get("kept"),
            *(None,) * 5,
        )  # fmt: skip


def _reference_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, kept: Tensor | None,
    mean: Tensor, var: Tensor, eps: float, activation: int, a: float, b: float, training: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The op ``backward`` in differentiable steps; in training mean and var are functions of x again."""
    wide = reference.widen(x)
    if training:
        mean, var = reference.statistics(wide)
    d_z = reference_d_z(dy, wide, mean, var, weight, bias, kept, eps, activation, a, b)
    dx, dweight, dbias = reference.backward(d_z, wide, mean, var, weight, eps, training)
    d_residual = x.new_empty(0) if kept is None or activation == 0 else d_z.to(x.dtype)
    return dx.to(x.dtype), dweight.to(_per_channel(x).dtype), dbias.to(_per_channel(x).dtype), d_residual


def reference_d_z(
    dy: Tensor, wide: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None,
    kept: Tensor | None, eps: float, activation: int, a: float, b: float,
) -> Tensor:  # fmt: skip
    """dy through the activation, in the dtype of sums, as x is here; ``kept`` as the ops have it."""
    g, d_z = Activation(activation, a, b), dy.to(wide.dtype)
    if activation == 0:
        return d_z
    kept = None if kept is None else kept.to(wide.dtype)
    if kept is None or not g.result_tells:
        z = reference.normalize(wide, mean, var, weight, bias, eps)
        return d_z * g.derivative(z if kept is None else z + kept)
    return d_z * g.from_result(kept)
