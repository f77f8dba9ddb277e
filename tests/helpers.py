"""Tensors in the shapes, layouts and dtypes of `cases`, and the measure of error."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm import ops
from batchnorm.ops.activations import NO_ACTIVATION, Activation
from batchnorm.ops.arguments import Affine, Running


def arrange(x_NCS: Tensor, layout: str) -> Tensor:
    """The same values, laid out in memory as named in `cases.LAYOUTS` ("expanded" repeats the first place)."""
    match layout:
        case "contiguous":
            return x_NCS.contiguous()
        case "channels_last":
            return x_NCS.movedim(1, -1).contiguous().movedim(-1, 1)
        case "transposed":
            return x_NCS.movedim(0, -1).contiguous().movedim(-1, 0)
        case "every_second":
            return x_NCS.repeat_interleave(2, dim=-1)[..., ::2]
        case "expanded":
            return x_NCS[..., :1].expand(x_NCS.shape) if x_NCS.dim() > 2 else x_NCS
    raise ValueError(layout)


def parameter_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the (C,) tensors beside an input of this dtype: float32 beside 16 bits."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def through_ops(
    x: Tensor, mean: Any, var: Any, gamma: Any, beta: Any, training: bool, momentum: float, eps: float,
    g: Activation = NO_ACTIVATION, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`ops.batch_norm` with the arguments of the reference."""
    return ops.batch_norm(x, Affine(gamma, beta, residual, eps, *g), Running(mean, var, momentum=momentum), training)


def channel_tensors(channels: int, dtype: torch.dtype) -> list[Tensor]:
    """Some running_mean, running_var, weight, bias; the last two want a gradient."""
    mean, var, weight, bias = (
        torch.randn(channels),
        torch.rand(channels) + 0.5,
        torch.randn(channels),
        torch.randn(channels),
    )
    return [mean.to(dtype), var.to(dtype), weight.to(dtype).requires_grad_(), bias.to(dtype).requires_grad_()]


def stock_activation(y: Tensor, activation: str | tuple[Any, ...] | None) -> Tensor:
    """What a user writes behind torch's layer."""
    name, *parameters = activation if isinstance(activation, tuple) else (activation,)
    if name == "gelu_tanh":
        return F.gelu(y, approximate="tanh")
    return y if name is None else getattr(F, name)(y, *parameters)


def ulps(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None, least: float = 0.0) -> float:
    """Largest error in units of the dtype's eps and of the channel's largest value; NaN and inf are infinite errors.

    `least` is what the largest value counts for at the least: where an activation leaves hardly anything of a channel.

    Of (C,) tensors all channels together are measured by the largest: a sum that cancels cannot be exact.
    """
    expected = expected.double()
    error = (actual.double() - expected).abs()
    dims = [d for d in range(expected.dim()) if d != 1]
    if expected.numel() == 0 or not error.any():
        return 0.0
    unit = torch.finfo(dtype or actual.dtype).eps * expected.abs().amax(dims, keepdim=True).clamp(min=least)
    return (error / unit).where(error != 0, 0.0).nan_to_num(nan=torch.inf).max().item()
