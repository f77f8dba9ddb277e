"""The ops: their signatures, and their batching rules for vmap.

Shapes: N examples, C channels, S places; x_NCS is (N, C, ...) of float16, bfloat16, float32 or float64. Statistics and
sums, (C,), are float64; gradients of parameters, (C,), are float64 beside a float64 x, else float32. Nothing is changed
in place but by ``train``, ``update_running_`` and the two of compiled graphs. Arguments come in the order of
``arguments``. Between ``statistics`` and ``normalize``, ``gradient_sums`` and ``input_gradient`` comes what others have
to add: other processes, say. Device kernels register themselves beside: ``csrc/ops.cpp`` for CPU, ``cuda.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_AFFINE = "Tensor? weight, Tensor? bias, Tensor? residual, float eps, int activation, float a, float b"
_GRADIENT = f"Tensor dy, Tensor x, Tensor mean, Tensor var, {_AFFINE.replace('residual', 'kept')}"
_COUNTS = "Tensor(c!)? batches, Tensor(d!)? skipped, float? momentum"

library = torch.library.Library("batchnorm", "DEF")
library.define("statistics(Tensor x) -> (Tensor mean, Tensor var)")
library.define(f"normalize(Tensor x, Tensor mean, Tensor var, {_AFFINE}) -> Tensor")
library.define(f"forward(Tensor x, {_AFFINE}) -> (Tensor y, Tensor mean, Tensor var)")  # both in one go
library.define(  # and update_running_ in the same call
    f"train(Tensor x, {_AFFINE}, Tensor(a!)? running_mean, Tensor(b!)? running_var, {_COUNTS})"
    " -> (Tensor y, Tensor mean, Tensor var)"
)
library.define(f"gradient_sums({_GRADIENT}) -> (Tensor dz, Tensor dz_xhat)")
library.define(f"input_gradient({_GRADIENT}, Tensor dz_mean, Tensor dz_xhat_mean) -> (Tensor dx, Tensor dresidual)")
library.define(  # both in one go
    f"backward({_GRADIENT}, bool training) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)"
)
library.define(  # forward for each `size` examples, and for what is left: mean and var are (groups, C)
    f"forward_groups(Tensor x, {_AFFINE}, int size, int groups) -> (Tensor y, Tensor mean, Tensor var)"
)
library.define(
    f"backward_groups({_GRADIENT}, int size, int groups) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)"
)
library.define(
    f"update_running_(Tensor(a!) running_mean, Tensor(b!) running_var, {_COUNTS}, Tensor mean, Tensor var, int values)"
    " -> ()"
)
library.define(  # update_running_ under torch.compile: whether a forward is a repetition is asked when the graph runs
    f"update_once_(Tensor(a!) running_mean, Tensor(b!) running_var, {_COUNTS}, Tensor mean, Tensor var, SymInt? values,"
    " Tensor? counts) -> ()"
)
library.define("count_once_(Tensor(a!) steps, Tensor counts) -> ()")  # the same for steps that a source counts
ops = torch.ops.batchnorm


# ---- batching rules for vmap: the batch joins the channels, which are normalized apart anyway ------------------------


def _join(x: Tensor | None, dim: int | None, size: int, channel: int) -> Tensor | None:
    """Batch dimension ``dim`` moved in front of the channels and merged with them; expanded where there is none."""
    if x is None:
        return None
    x = x.expand(size, *x.shape).movedim(0, channel) if dim is None else x.movedim(dim, channel)
    return x.flatten(channel, channel + 1)


def _split(x: Tensor, size: int, channel: int) -> Tensor:
    return x.unflatten(channel, (size, -1)) if x.dim() > channel else x


def _batched(op: Any, channels_of: tuple[int | None, ...], out_channels: tuple[int, ...]) -> Any:
    """The rule for an op whose tensors have their channels in these dimensions; None for what is no tensor."""

    def rule(info: Any, in_dims: Any, *args: Any) -> Any:
        size = info.batch_size
        joined = [a if c is None else _join(a, d, size, c) for a, d, c in zip(args, in_dims, channels_of, strict=True)]
        out = op(*joined)
        outs = out if isinstance(out, tuple) else (out,)
        split = tuple(_split(o, size, c) for o, c in zip(outs, out_channels, strict=True))
        dims = tuple(c if o.dim() > c else None for o, c in zip(outs, out_channels, strict=True))
        return (split, dims) if isinstance(out, tuple) else (split[0], dims[0])

    return rule


_OF_AFFINE = (0, 0, 1, None, None, None, None)
_OF_GRADIENT = (1, 1, 0, 0, *_OF_AFFINE)
_RULES = {
    "statistics": _batched(ops.statistics, (1,), (0, 0)),
    "normalize": _batched(ops.normalize, (1, 0, 0, *_OF_AFFINE), (1,)),
    "gradient_sums": _batched(ops.gradient_sums, _OF_GRADIENT, (0, 0)),
    "input_gradient": _batched(ops.input_gradient, (*_OF_GRADIENT, 0, 0), (1, 1)),
    "backward": _batched(ops.backward, (*_OF_GRADIENT, None), (1, 0, 0, 1)),
}
for name, rule in _RULES.items():
    torch.library.register_vmap(f"batchnorm::{name}", rule, lib=library)
_forward_on_batches = _batched(ops.forward, (1, *_OF_AFFINE), (1, 0, 0))


@torch.library.register_vmap("batchnorm::forward", lib=library)
def _(info, in_dims, x, *affine):  # type: ignore[no-untyped-def]
    """One batch with many parameters has one mean and variance: so the running statistics need not be batched."""
    if in_dims[0] is not None:
        return _forward_on_batches(info, in_dims, x, *affine)
    mean, var = ops.statistics(x)
    y, y_dim = _RULES["normalize"](info, (None, None, None, *in_dims[1:]), x, mean, var, *affine)
    return (y, mean, var), (y_dim, None, None)
