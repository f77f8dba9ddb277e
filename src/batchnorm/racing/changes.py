"""What contenders make of the task's network: a row each, by the public functions.

Comes from: ``contenders.py``. Goes to: ``trainer.network_of``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from batchnorm.nn.base import FusedBatchNorm
from batchnorm.nn.statistics import Ghost, Renorm, Statistics
from batchnorm.surgery import from_torch, insert
from batchnorm.surgery.norms import norms_of

Change = Callable[[nn.Module, Any], nn.Module]


def with_batch_norm(model: nn.Module, example: Any) -> nn.Module:
    """Given batch normalization by ``insert``, unless the network has it: then it stays where it is.

    ``batchnorm_report`` tells which layers have it.
    """
    inserted = insert(model, example)
    names = inserted.batchnorm_report.of("normalized")  # type: ignore[union-attr, operator]
    if names and has_batch_norm(model):
        return insert(model, example, skip=names)
    if not names and not has_batch_norm(model):
        raise ValueError(f"there is no layer to normalize.\n{inserted.batchnorm_report}")
    return inserted


def without_batch_norm(model: nn.Module, example: Any) -> nn.Module:
    """``remove`` takes it out, where it is."""
    from batchnorm.surgery import remove

    return remove(model, example) if has_batch_norm(model) else model


def has_batch_norm(model: nn.Module) -> bool:
    """Whether any of its layers is batch normalization."""
    return bool(norms_of(model))


def _exchange(name: str) -> Change:
    def change(model: nn.Module, example: Any) -> nn.Module:
        from batchnorm.surgery import exchange

        return exchange.exchanged(model, example, getattr(exchange, name))

    return change


def _statistics(make: Callable[[], Statistics]) -> Change:
    def change(model: nn.Module, example: Any) -> nn.Module:
        converted = from_torch(model)
        for layer in converted.modules():
            if isinstance(layer, FusedBatchNorm):
                layer.statistics = make()
        return converted

    return change


CHANGES: dict[str, Change] = {
    "nothing": lambda model, example: model,
    "with-bn": with_batch_norm,
    "without-bn": without_batch_norm,
    "ghost": _statistics(lambda: Ghost(32)),
    "renorm": _statistics(Renorm),
    "group-norm": _exchange("group_norm"),
    "layer-norm": _exchange("layer_norm"),
    "fused": lambda model, example: from_torch(model, example=example),
}
WITH = ("with-bn",)
