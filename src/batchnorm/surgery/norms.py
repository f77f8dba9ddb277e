"""Which modules are batch normalization in eval, torch's, ours or another package's, and what else they compute.

timm's ``BatchNormAct2d`` is batch normalization, then its children ``drop`` and ``act``; inplace_abn's ``ABN`` names an
activation; a frozen one of torchvision's or DETR's keeps everything in buffers. What such a class states is believed
once it agrees, in float64, with what the layer computes.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.functional import parse_activation
from batchnorm.nn.base import FusedBatchNorm
from batchnorm.nn.norm import AnyBatchNorm
from batchnorm.ops.activations import ROWS, activation_called
from batchnorm.ops.reference import per_channel
from batchnorm.surgery.convert import OURS
from batchnorm.surgery.fold_check import error
from batchnorm.surgery.weights import affine

KNOWN = {*OURS, *OURS.values(), AnyBatchNorm, nn.SyncBatchNorm}
_NAMED = {"selu": nn.SELU}  # of those that no layer takes over; any other is none
_AGREES = 1e-10  # relative to the largest value, in float64


class Rest(nn.Module):
    """The rest of a folded layer that names its activation: activation(x + residual)."""

    def __init__(self, activation: Any) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """activation(input + residual)"""
        g = parse_activation(self.activation)
        return g.in_place(input + residual) if residual is not None else g.in_place(input.clone()) if g.code else input

    def extra_repr(self) -> str:
        """The activation."""
        return f"activation={self.activation!r}"


def norms_of(model: nn.Module) -> dict[str, Any]:
    """The modules that may be batch normalization, by name: torch's and what else holds running statistics."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, _BatchNorm) or _looks(layer)}


def _looks(layer: nn.Module) -> bool:
    buffers = dict(layer.named_buffers(recurse=False))  # a ScriptModule's _buffers are no dict
    mean, var = buffers.get("running_mean"), buffers.get("running_var")
    small = all(p.dim() <= 1 for p in layer.parameters())  # a whole network may hold its inputs' statistics
    scripted = isinstance(layer, torch.jit.ScriptModule)  # cannot be taken apart
    same = mean is not None and var is not None and mean.dim() == 1 and mean.shape == var.shape
    return same and small and not scripted


def is_known(layer: nn.Module) -> bool:
    """Torch's classes and ours, whose forward is their own."""
    return type(layer) in KNOWN and "forward" not in vars(layer)


def rest_of(layer: Any, with_residual: bool) -> nn.Module:
    """The part of such a layer behind batch normalization: the activation that it states."""
    if isinstance(layer, FusedBatchNorm):
        return Rest(layer.activation) if with_residual or layer.activation is not None else nn.Identity()
    named = vars(layer).get("activation")
    children = OrderedDict(layer.named_children())
    if not children and isinstance(named, str):
        if named in ROWS:
            given = [vars(layer)["activation_param"]] if "activation_param" in vars(layer) else []  # of inplace_abn
            g = activation_called(named, given, {})
            return Rest(named if g is None else g.as_users_write_it())
        return _NAMED.get(named, nn.Identity)()
    if all(type(child) is nn.Identity for child in children.values()):
        return nn.Identity()
    return nn.Sequential(children)


def computes(layer: Any, rest: nn.Module, x: Tensor) -> bool:
    """Whether a layer in float64 is rest(scale * x + shift), on x and on values around its running mean."""
    mean_C, var_C = layer.running_mean, layer.running_var
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(x.device)
    layer, rest = copy.deepcopy((layer, rest))
    scale_C, shift_C = affine(layer)
    try:
        around = noise * per_channel(9 * var_C.clamp(min=0).sqrt() + 1, x) + per_channel(mean_C, x)
        with torch.no_grad():
            for given in (x, around):
                stated = rest(given * per_channel(scale_C, x) + per_channel(shift_C, x))
                found = layer(given.clone())
                if not isinstance(found, Tensor) or not error(found, stated) <= _AGREES:
                    return False
    except Exception:  # whatever it does with an input alone, or with channels in another dimension
        return False
    return True


def check_statistics(name: str, layer: Any, verb: str = "fold") -> None:
    """Statistics and parameters that no fold makes right.

    Raises:
        ValueError: values that are not finite, or negative variances, with the layer's name.
    """
    again = (
        "it is frozen, which recalibrate leaves alone: batchnorm.unfreeze(model), then recalibrate"
        if getattr(layer, "frozen_statistics", False)
        else "batchnorm.recalibrate(model, batches), or batchnorm recalibrate --checkpoint, estimates it anew"
    )
    ways = {"running_mean": f"{again}, or ", "running_var": f"{again}, or ", "weight": "", "bias": ""}
    for key, way in ways.items():
        values = getattr(layer, key, None)
        if values is None:
            continue
        wrong = {"values that are not finite": ~values.isfinite()}
        wrong |= {"negative values": values < 0} if key == "running_var" else {}
        for what, where in wrong.items():
            if where.any():
                raise ValueError(
                    f"{verb}: {key} of layer {name!r} has {what} in {int(where.sum())} of {len(values)} channels: "
                    f"{way}take a checkpoint from before."
                )
