"""A layer that ``insert`` gave batch normalization, in the words of TorchScript.

It reads annotations as they are, so that there is no ``from __future__ import annotations`` here; and it knows neither
``super()`` nor ``*args``, so that the forward that the layer had is a method of its own, ``affine``.
"""

import inspect
from functools import cache
from types import FunctionType
from typing import Any

from torch import Tensor, nn


def _behind(self: Any, input: Tensor) -> Tensor:
    return self.batch_norm(self.affine(input))


def _behind_transposed(self: Any, input: Tensor, output_size: list[int] | None = None) -> Tensor:
    return self.batch_norm(self.affine(input, output_size))


def _behind_features_last(self: Any, input: Tensor) -> Tensor:
    y = self.affine(input)
    if y.dim() > 2:
        return self.batch_norm(y.flatten(0, -2)).view_as(y)
    return self.batch_norm(y)


@cache
def _kind(kind: Any, last: bool) -> Any:
    sized = "output_size" in inspect.signature(kind.forward).parameters
    forward = _behind_features_last if last else _behind_transposed if sized else _behind
    was: Any = kind.forward
    affine = FunctionType(was.__code__, was.__globals__, "affine", was.__defaults__, was.__closure__)
    affine.__annotations__ = was.__annotations__
    return type(kind.__name__, (kind,), {"forward": forward, "affine": affine})


def scriptable(layer: nn.Module, kind: type, last: bool) -> nn.Module:
    """The layer's stand-in, with the same parameters, buffers and hooks; ``kind``: the class that it had; ``last``: its
    features are in the last dimension."""
    made = _kind(kind, last)
    twin: nn.Module = made.__new__(made)
    vars(twin).update(vars(layer) | {"_modules": dict(layer._modules)})
    return twin
