"""Layers that keep their running statistics, or their affine parameters, whatever mode the model is in."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.nn.base import FusedBatchNorm
from batchnorm.nn.tracking import has_running_statistics, is_frozen
from batchnorm.population.snapshots import Kept, check_materialized


def freeze(model: nn.Module, *, running_stats: bool = True, affine: bool = False) -> None:
    """Keep the running statistics of every batch normalization layer as they are, in train as in eval; in place.

        y = weight * (x - running_mean) / sqrt(running_var + eps) + bias, in both modes

    It survives ``model.train()``, is part of the state_dict (keys ``frozen_statistics`` and ``frozen_affine`` in each
    layer, which are there only as long as it is true) and comes back when that is loaded. ``unfreeze`` undoes it. What
    was frozen before stays so. ``recalibrate`` and ``torch.optim.swa_utils.update_bn`` leave frozen statistics alone.

    Args:
        model: any module; its layers must be ours.
        running_stats: normalize with the running statistics in train too, and do not update them.
        affine: weight and bias no longer require a gradient.

    Raises:
        TypeError: a layer is torch's own (or a subclass of it), which ``model.train()`` would set going again: turn the
            model into ours first, by ``from_torch``.
        ValueError: nothing to freeze: no layer, layers without running statistics, or neither of the two wanted; a lazy
            layer has no shape yet. Whatever is raised, nothing has been changed then.

    Example:
        >>> import torch, batchnorm as bn
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), bn.BatchNorm2d(8))
        >>> bn.freeze(model)
        >>> _ = model.train()(torch.randn(4, 3, 9, 9))
        >>> model[1].running_mean.abs().sum().item()
        0.0

    Source: what users of detection networks call frozen batch normalization.
    """
    if not running_stats and not affine:
        raise ValueError("freeze: nothing to freeze with running_stats=False and affine=False.")
    check_materialized(model, "freeze")
    layers = _layers(model, "freeze")
    if not layers:
        raise ValueError(f"freeze: no batch normalization layer in {type(model).__name__}.")
    bare = [name for name, layer in layers.items() if not has_running_statistics(layer)]
    if running_stats and bare:
        raise ValueError(f"freeze: no running statistics to keep in {', '.join(bare)} (track_running_stats=False).")
    before = [Kept(layer) for layer in layers.values()]
    try:
        for layer in layers.values():
            layer.set_frozen(running_stats or is_frozen(layer), affine or layer.frozen_affine)
    except BaseException:  # all or nothing
        for kept in before:
            kept.bring_back()
        raise


def unfreeze(model: nn.Module) -> None:
    """Undo ``freeze``, in place: statistics move again in train; weight and bias require the gradient that they did.

    Args:
        model: any module. Layers that are not frozen stay as they are.

    Example:
        >>> import torch, batchnorm as bn
        >>> layer = bn.BatchNorm2d(8)
        >>> bn.freeze(layer, affine=True)
        >>> bn.unfreeze(layer)
        >>> layer.weight.requires_grad, "frozen_affine" in layer.state_dict()
        (True, False)
    """
    for module in model.modules():
        if isinstance(module, FusedBatchNorm):
            module.set_frozen(False, False)


def _way(others: dict[str, str]) -> str:
    """How layers of such classes become ours."""
    stock = {"BatchNorm1d", "BatchNorm2d", "BatchNorm3d"}
    if set(others.values()) <= stock:
        return "Call model = batchnorm.from_torch(model) first."
    if set(others.values()) <= stock | {"SyncBatchNorm"}:
        return "Call model = batchnorm.convert_sync_batchnorm(model) first."
    return (
        "batchnorm.from_torch(model).batchnorm_report says of each whether it can become one of ours; classes with a "
        "forward of their own cannot: build them on batchnorm's layers."
    )


def _layers(model: nn.Module, verb: str) -> dict[str, FusedBatchNorm]:
    """Our layers by name; refuses others."""
    found = {name or "the model": m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    others = {name: type(m).__name__ for name, m in found.items() if not isinstance(m, FusedBatchNorm)}
    if others:
        named = ", ".join(f"{name} ({kind})" for name, kind in list(others.items())[:5])
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        raise TypeError(
            f"{verb} needs layers of batchnorm, since .train() would undo it on torch's: found {named}{more}. "
            f"{_way(others)}"
        )
    return {name: m for name, m in found.items() if isinstance(m, FusedBatchNorm)}
