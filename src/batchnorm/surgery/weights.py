"""The arithmetic of folding: scale * x + shift into the weights of the layer before or after.

Shapes: C channels; G groups, O outputs and I inputs of a group, then the kernel's places, if any.

    W' = gamma / sqrt(var + eps) * W,   b' = gamma / sqrt(var + eps) * (b - mean) + beta
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.surgery.affine import affine_of


def affine(layer: Any) -> tuple[Tensor, Tensor]:
    """scale * x + shift, in float64. Layers that name no eps, as DETR's frozen ones, have torch's."""
    mean_C, var_C = layer.running_mean.double(), layer.running_var.double()
    rstd_C = (var_C + vars(layer).get("eps", 1e-5)).rsqrt()
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    scale_C = rstd_C if weight is None else weight.detach().double() * rstd_C
    shift_C = -mean_C * scale_C
    return scale_C, shift_C if bias is None else shift_C + bias.detach().double()


def outputs_of(target: Any) -> int:
    """How many channels it gives out."""
    groups, outputs = _by_group(target).shape[:2]
    return groups * outputs


def scale_outputs(target: Any, scale_C: Tensor, shift_C: Tensor) -> None:
    """target <- scale * target(x) + shift."""
    weight_GOI = _by_group(target)
    groups, outputs = weight_GOI.shape[:2]
    scaled = weight_GOI * scale_C.view(groups, outputs, *[1] * (weight_GOI.dim() - 2))
    bias = shift_C if target.bias is None else scale_C * target.bias.detach().double() + shift_C
    _set(target, scaled, bias)


def scale_inputs(target: Any, scale_C: Tensor, shift_C: Tensor) -> None:
    """target <- target(scale * x + shift)."""
    weight_GOI = _by_group(target)
    shape = (len(weight_GOI), 1, -1, *[1] * (weight_GOI.dim() - 3))
    bias = (weight_GOI * shift_C.view(shape)).flatten(2).sum(2).flatten()
    bias = bias if target.bias is None else bias + target.bias.detach().double()
    _set(target, weight_GOI * scale_C.view(shape), bias)


def _by_group(target: Any) -> Tensor:
    """The weight as (groups, outputs of a group, inputs of a group, ...), in float64."""
    grouped = target.weight.detach().double().unflatten(0, (getattr(target, "groups", 1), -1))
    return grouped.transpose(1, 2) if _is_transposed(target) else grouped


def _is_transposed(target: Any) -> bool:
    row = affine_of(target)
    return row is not None and row.transposed


def _set(target: Any, weight_GOI: Tensor, bias: Tensor) -> None:
    old = target.weight
    weight = (weight_GOI.transpose(1, 2) if _is_transposed(target) else weight_GOI).flatten(0, 1)
    weight = torch.empty_like(old).copy_(weight)  # in the memory format that it had
    target.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
    target.bias = nn.Parameter(bias.to(old.dtype), requires_grad=old.requires_grad)
