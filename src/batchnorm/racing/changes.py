"""Contenders' changes to the task's network: a row each, by the public functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from batchnorm.surgery import exchange, from_torch, insert, remove
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
    return _all_gone(remove(model, example)) if has_batch_norm(model) else model


def has_batch_norm(model: nn.Module) -> bool:
    """Whether any of its layers is batch normalization."""
    return bool(norms_of(model))


def _all_gone(model: nn.Module) -> nn.Module:
    """Half a change would be another contender's number."""
    if has_batch_norm(model):
        raise ValueError(f"not every batch normalization layer could be changed.\n{model.batchnorm_report}")
    return model


def _exchange(make: exchange.Maker, gone: bool = False) -> Change:
    def change(model: nn.Module, example: Any) -> nn.Module:
        found = exchange.exchanged(model, example, make)
        return _all_gone(found) if gone else found

    return change


class Row(NamedTuple):
    """``words``: for tables; ``make``: from the task's network and what it is called with the contender's."""

    words: str
    make: Change


# A new change is a row.
CHANGES = {
    "nothing": Row("", lambda model, example: model),
    "with-bn": Row("BN before the nonlinearities (bn.insert)", with_batch_norm),
    "without-bn": Row("no BN (bn.remove)", without_batch_norm),
    "ghost": Row("BN over 32 examples at a time (bn.Ghost)", _exchange(exchange.ghost)),
    "renorm": Row("batch renormalization (bn.Renorm)", _exchange(exchange.renorm)),
    "group-norm": Row("GroupNorm in BN's place", _exchange(exchange.group_norm, gone=True)),
    "layer-norm": Row("LayerNorm in BN's place", _exchange(exchange.layer_norm, gone=True)),
    "fused": Row("BN, activations and additions in one kernel (bn.from_torch)", lambda m, x: from_torch(m, example=x)),
}
