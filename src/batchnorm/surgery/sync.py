"""To synchronized statistics in a whole model, and the way back."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.nn.base import FusedBatchNorm
from batchnorm.nn.norm import AnyBatchNorm
from batchnorm.nn.sources import Batch, Synced
from batchnorm.surgery.adopt import become_stock
from batchnorm.surgery.checks import replaced, scripted
from batchnorm.surgery.convert import OURS, Model, with_same_tensors

_KNOWN: dict[type, type] = {**OURS, **{ours: ours for ours in OURS.values()}, AnyBatchNorm: AnyBatchNorm}


def convert_sync_batchnorm(
    model: Model, process_group: Any = None, *, subclasses: dict[type, type | None] | None = None
) -> Model:
    """The model with statistics over all processes in every batch normalization layer: torch's name, on gloo and nccl.

    The new model shares parameters and buffers with the given one, as the same objects; the given model keeps its
    layers. Devices, dtypes, hooks, modes, activations and state_dict keys are as they were. Each layer knows its name,
    for errors. Call it before ``DistributedDataParallel`` or ``fully_shard``.

    Args:
        model: any module, with torch's layers (``SyncBatchNorm`` too) or ours.
        process_group: the ranks whose batches are one; default: all.
        subclasses: what to make of subclasses of batch normalization that are not known: one of our layers, losing what
            the subclass adds; the subclass itself, where it is one of ours and leaves ``forward`` to it; or None, to
            leave such layers alone.

    Returns:
        A model of the same class.

    Raises:
        TypeError: a subclass that is not known; not a module.
        ValueError: a layer with ``Ghost`` or ``Renorm`` statistics, which it would lose; what ``from_torch`` refuses,
            and scripted parts with batch normalization.

    Example:
        >>> import torch, batchnorm as bn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
        >>> bn.convert_sync_batchnorm(model)[1].statistics
        Synced(layer='1')
        >>> type(bn.revert_sync_batchnorm(bn.convert_sync_batchnorm(model))[1]) is torch.nn.BatchNorm1d
        True
    """
    converted = with_same_tensors(model, "convert_sync_batchnorm")
    for row in scripted(converted):
        raise ValueError(f"convert_sync_batchnorm: in {row.layer} there is batch normalization, and {row.why}.")
    kinds = {nn.SyncBatchNorm: AnyBatchNorm, **_KNOWN, **(subclasses or {})}
    for name, layer in converted.named_modules():
        if not isinstance(layer, _BatchNorm):
            continue
        before = type(layer)
        kind = _checked(kinds, name, layer)
        if kind is None or isinstance(getattr(layer, "statistics", None), Synced):
            continue
        own = layer.__dict__.pop("process_group", None)
        ours = _become(layer, kind)
        ours.before_sync = None if before in (kind, nn.SyncBatchNorm) else before
        ours.statistics = Synced(process_group or own, name)
    return converted


def revert_sync_batchnorm(model: Model) -> Model:
    """The way back: every layer has the class that it had, and statistics of its own process' batch.

    torch's ``SyncBatchNorm`` does not know what it was: it becomes a layer of ours for inputs of 2 to 5 dimensions.
    Tensors are shared as in ``convert_sync_batchnorm``.

    Raises:
        TypeError: not a module.
    """
    reverted = with_same_tensors(model, "revert_sync_batchnorm")
    for layer in reverted.modules():
        if type(layer) is nn.SyncBatchNorm:
            layer.__dict__.pop("process_group", None)
            _become(layer, AnyBatchNorm)
        elif isinstance(layer, FusedBatchNorm) and isinstance(layer.statistics, Synced):
            layer.statistics = Batch()
            before = layer.__dict__.pop("before_sync", None)
            if before is not None and not (layer.frozen_statistics or layer.frozen_affine):
                become_stock(layer, before)
    return reverted


def _checked(kinds: dict[type, type | None], name: str, layer: _BatchNorm) -> Any:
    """The layer's replacement; None: it stays as it is."""
    if type(layer) not in kinds:
        raise TypeError(
            f"layer {name!r} is a {type(layer).__module__}.{type(layer).__qualname__}, and what that adds to batch "
            f"normalization is not known: pass subclasses={{{type(layer).__name__}: ...}} (one of our layers to "
            "become, itself, or None to leave it alone)."
        )
    if kinds[type(layer)] is not None and replaced(layer):
        raise ValueError(
            f"layer {name!r}: its forward was replaced on the object (accelerate puts hooks there), and would not be "
            "synchronized: take that away first, and put it on the result."
        )
    if not isinstance(getattr(layer, "statistics", Batch()), Batch | Synced):
        raise ValueError(
            f"layer {name!r} has statistics={layer.statistics!r}, which synchronizing would replace: "
            "layer.statistics = bn.Batch() first, if that is what you want."
        )
    kind = kinds[type(layer)]
    if kind is not None and not (isinstance(kind, type) and issubclass(kind, FusedBatchNorm)):
        raise TypeError(f"subclasses takes our layers (BatchNorm2d, say) or None as values, got {kind!r}.")
    return kind


def _become(layer: Any, kind: type) -> Any:
    """The same object as a layer of ours."""
    layer.__class__ = kind
    return layer
