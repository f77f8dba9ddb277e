"""Every batch normalization layer of a network exchanged for another normalization: what it is worth beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from batchnorm.common.errors import one_line
from batchnorm.nn import Ghost, Renorm
from batchnorm.nn.base import FusedBatchNorm
from batchnorm.nn.norm import AnyBatchNorm
from batchnorm.nn.sources import Source
from batchnorm.surgery.adopt import OURS, become_ours
from batchnorm.surgery.checks import checked, hooked, only_copies_run, scripted
from batchnorm.surgery.convert import Model
from batchnorm.surgery.copies import copied
from batchnorm.surgery.fuse import unfuse
from batchnorm.surgery.norms import Rest, is_known, norms_of, rest_of
from batchnorm.surgery.report import LEFT, Report, Row
from batchnorm.surgery.watch import Call, run, watch

Maker = Callable[[Any], nn.Module]
_GROUPS = 32  # of Wu & He 2018


class Behind(nn.Module):
    """activation(norm(x) + residual): what a layer of ours did behind batch normalization."""

    def __init__(self, norm: nn.Module, rest: Rest) -> None:
        super().__init__()
        self.norm, self.rest = norm, rest

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """activation(norm(input) + residual)"""
        y: Tensor = self.rest(self.norm(input), residual)
        return y


def exchanged(model: Model, example: Any, make: Maker) -> Model:
    """A copy with ``make(layer)`` in the place of every batch normalization layer, in its mode.

    What ``from_torch`` fused is given back first; an activation that a layer was built with, and a residual that it is
    given, stay behind the new one. ``make`` gets the copy's layer, and may return that, or take over its parameters.
    Layers of other classes than torch's and ours, with hooks, given a mask, or in scripts are left alone, with a row in
    ``batchnorm_report``.

    Args:
        model: any module with batch normalization.
        example: an input, run to see what layers are given, and that the result runs.
        make: from a layer to a module; see ``group_norm``, ``layer_norm``, ``ghost``, ``renorm``.

    Raises:
        ValueError: it does not run on the example; what all verbs refuse (wrappers, lazy layers).
        TypeError: not a module; ``make`` gave none.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.BatchNorm2d(64))
        >>> exchanged(model, torch.randn(2, 3, 8, 8), group_norm)[1].num_groups
        32
    """
    checked(model, "exchanged")
    made, report = copied(model), Report()
    unfuse(made)
    norms = norms_of(made)
    with only_copies_run(model, "exchanged"):
        seen = watch(made, example, whole=norms.values())
        for name, layer in norms.items():
            calls = seen.of(name)
            why = _unfit(layer, calls)
            if why is not None:
                report.append(Row(name, LEFT, why))
                continue
            rest, new = rest_of(layer, any(len(call.inputs) > 1 for call in calls)), make(layer)
            if not isinstance(new, nn.Module):
                raise TypeError(f"exchanged: make gave {new!r} for layer {name!r}, which is no module.")
            report.append(Row(name, "replaced", f"by {new}"))
            if new is not layer:  # which has its activation itself
                new = (Behind(new, rest) if isinstance(rest, Rest) else new).train(layer.training)
                made = _put(made, layer, new)
        try:
            run(made, example)
        except Exception as failure:  # whatever the new layers raise
            raise ValueError(f"exchanged: the model does not run on the example ({one_line(failure)}).") from failure
    made.batchnorm_report = Report([*report, *scripted(made)])  # type: ignore[assignment]
    return made


def _unfit(layer: Any, calls: list[Call]) -> str | None:
    if not is_known(layer):
        return f"a {type(layer).__qualname__} may do more than batch normalization"
    if hooked(layer):
        return "it has hooks, which would see something else"
    if any({2, "mask"} & {*call.given} for call in calls):
        return "it is given a mask"
    return None


def _put(model: Any, layer: nn.Module, new: nn.Module) -> Any:
    """The model with a module in all places of a layer, which may be the model itself."""
    for module in [*model.modules()]:
        for key, child in module._modules.items():
            if child is layer:
                module._modules[key] = new
    return new if model is layer else model


# ---- what to make of a layer -----------------------------------------------------------------------------------------


def group_norm(layer: Any) -> nn.GroupNorm:
    """Group normalization with 32 groups, or the most below that divide the channels, and the layer's parameters.

        y = weight * (x - mean of its group) / sqrt(variance of its group + eps) + bias

    A group has two channels or more, behind ``BatchNorm1d`` eight, as (N, C) has one value in each; fewer are one.

    Source: Wu & He, "Group Normalization", https://arxiv.org/abs/1803.08494.
    """
    channels = layer.num_features
    most = max(1, min(_GROUPS, channels // (8 if isinstance(layer, nn.BatchNorm1d) else 2)))
    return _with_affine(next(groups for groups in range(most, 0, -1) if channels % groups == 0), layer)


def layer_norm(layer: Any) -> nn.GroupNorm:
    """Layer normalization: one group, of all channels and places; weight and bias per channel, eps are the layer's.

    Of (N, C) it is ``nn.LayerNorm(C)``.

    Source: Ba, Kiros & Hinton, "Layer Normalization", https://arxiv.org/abs/1607.06450.
    """
    return _with_affine(1, layer)


def _with_affine(groups: int, layer: Any) -> nn.GroupNorm:
    """A group normalization with the layer's parameters; what it has not, is None."""
    some = layer.weight if layer.weight is not None else layer.running_mean
    there = {} if some is None else {"device": some.device, "dtype": some.dtype}
    norm = nn.GroupNorm(groups, layer.num_features, vars(layer)["eps"], layer.affine, **there)
    norm._parameters.update({key: layer._parameters.get(key) for key in norm._parameters})
    return norm


def ghost(layer: Any) -> nn.Module:
    """Batch normalization of 32 examples at a time; the same layer, parameters and buffers: the same in eval."""
    return _with_statistics(layer, Ghost(32))


def renorm(layer: Any) -> nn.Module:
    """Batch renormalization; the same layer, parameters and buffers: the same in eval."""
    return _with_statistics(layer, Renorm())


def _with_statistics(layer: Any, source: Source) -> nn.Module:
    """The same object, as a layer of ours with these training statistics."""
    if not isinstance(layer, FusedBatchNorm):
        vars(layer).pop("process_group", None)  # of a SyncBatchNorm
        become_ours(layer, OURS.get(type(layer), AnyBatchNorm))
    layer.statistics = source
    return layer
