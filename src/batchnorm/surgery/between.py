"""Modules that may stand between a layer and the activation that it takes over: ``Identity``, and dropout.

Dropout multiplies by 0 or 1 / (1 - p), so that an activation with g(c z) = c g(z) for c >= 0, as relu, may come before
it as well as behind it. What else is taken over across a dropout with p = 0 goes back when p is set to something else.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

from batchnorm.nn.base import FusedBatchNorm
from batchnorm.ops.activations import Activation

NOTHING = (nn.Identity,)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def passes(module: Any) -> bool:
    """Whether this may stand between them."""
    kind = _kind(module)
    return kind in NOTHING or kind in _DROPOUTS


def _kind(module: Any) -> Any:
    return type(module).watched_for if hasattr(type(module), "watched_for") else type(module)


def in_the_way(passed: list[Any], g: Activation, adds: bool) -> str | None:
    """Why not, in this case."""
    drops = [module for module in passed if getattr(module, "p", 0) > 0]
    if not drops or _commutes(g, adds):
        return None
    return f"a {type(drops[0]).__name__}(p={drops[0].p:g}) is between it and {'an addition' if adds else g.name}"


def _commutes(g: Activation, adds: bool) -> bool:
    return g.code != 0 and g.row.homogeneous and not adds


class Crossed:
    """A dropout with p = 0 that a layer took something over across, as the layer knows it."""

    def __init__(self, dropout: nn.Module, layer: FusedBatchNorm) -> None:
        self.dropout, self.layer = dropout, layer
        dropout.__class__ = _watched(_kind(dropout))
        vars(dropout)["crossed_by"] = (*vars(dropout).get("crossed_by", ()), self)

    def is_there(self) -> bool:
        """Always: a dropout that is gone drops nothing."""
        return True

    def hand_back(self) -> None:
        """Nobody needs to know p any more."""
        left = tuple(each for each in vars(self.dropout).get("crossed_by", ()) if each is not self)
        vars(self.dropout)["crossed_by"] = left
        if not left:
            del vars(self.dropout)["crossed_by"]
            self.dropout.__class__ = type(self.dropout).watched_for  # type: ignore[attr-defined]


def crossed(passed: list[Any], layer: FusedBatchNorm, g: Activation, adds: bool) -> tuple[Crossed, ...]:
    """Have those that must not drop anything tell when they are to."""
    if _commutes(g, adds):
        return ()
    return tuple(Crossed(module, layer) for module in passed if hasattr(module, "p"))


@cache
def _watched(kind: Any) -> type:
    """A subclass of a dropout's class whose layers get told when ``p`` is set."""

    def set_p(self: Any, p: float) -> None:
        vars(self)["p"] = p
        if p > 0:
            for each in vars(self)["crossed_by"]:
                each.layer.hand_back()

    def reduced(self: nn.Module, protocol: int) -> Any:
        return _made_again, (kind,), self.__dict__

    content = {"p": property(lambda self: vars(self)["p"], set_p), "watched_for": kind, "__reduce_ex__": reduced}
    return type(kind.__name__, (kind,), content)


def _made_again(kind: type) -> nn.Module:
    made: Any = _watched(kind)
    return made.__new__(made)
