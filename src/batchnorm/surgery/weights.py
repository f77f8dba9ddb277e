"""The arithmetic of folding: scale * x + shift into the weights of the layer before or after.

    W' = gamma / sqrt(var + eps) * W,   b' = gamma / sqrt(var + eps) * (b - mean) + beta

Comes from: ``fold``. Goes to: its layers' parameters.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def affine(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    """scale * x + shift, in float64."""
    mean_C, var_C = layer.running_mean.double(), layer.running_var.double()  # type: ignore[union-attr]
    rstd_C = (var_C + vars(layer)["eps"]).rsqrt()
    scale_C = rstd_C if layer.weight is None else layer.weight.detach().double() * rstd_C
    shift_C = -mean_C * scale_C
    return scale_C, shift_C if layer.bias is None else shift_C + layer.bias.detach().double()


def scale_outputs(target: Any, scale_C: Tensor, shift_C: Tensor) -> None:
    """target <- scale * target(x) + shift. Transposed convolutions have (in, out / groups, ...) weights."""
    weight = target.weight.detach().double()
    if isinstance(target, TRANSPOSED):
        grouped = weight.unflatten(0, (target.groups, -1))  # (groups, in / groups, out / groups, ...)
        by_group = scale_C.view(target.groups, 1, -1, *[1] * (weight.dim() - 2))
        weight = (grouped * by_group).flatten(0, 1)
    else:
        weight = weight * scale_C.view(-1, *[1] * (weight.dim() - 1))
    bias = shift_C if target.bias is None else scale_C * target.bias.detach().double() + shift_C
    _set(target, weight, bias)


def scale_inputs(target: Any, scale_C: Tensor, shift_C: Tensor) -> None:
    """target <- target(scale * x + shift), for weights (out, in / groups, ...)."""
    weight = target.weight.detach().double()
    groups = getattr(target, "groups", 1)
    grouped = weight.unflatten(0, (groups, -1))  # (groups, out / groups, in / groups, ...)
    shape = (groups, 1, -1, *[1] * (weight.dim() - 2))
    bias = (grouped * shift_C.view(shape)).flatten(2).sum(2).flatten()
    bias = bias if target.bias is None else bias + target.bias.detach().double()
    _set(target, (grouped * scale_C.view(shape)).flatten(0, 1), bias)


def _set(target: Any, weight: Tensor, bias: Tensor) -> None:
    old = target.weight
    target.weight = nn.Parameter(weight.to(old.dtype), requires_grad=old.requires_grad)
    target.bias = nn.Parameter(bias.to(old.dtype), requires_grad=old.requires_grad)
