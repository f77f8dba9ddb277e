"""The form of a call: which arguments are tensors, which of these are one, and all else, which stays as it was.

A forward that torch.fx wrote does what the old one did with the example's arguments. What was no tensor among them is
a constant in it, so that each call is compared with the example's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from enum import Enum
from functools import cache
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils import _pytree

_CONSTANTS = (
    type(None), bool, int, float, complex, str, bytes, slice, range, type, Enum, FunctionType, BuiltinFunctionType,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size,
)  # fmt: skip


class Form:
    """The form of the calls of a forward, by one of them."""

    def __init__(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> None:
        leaves, self.spec = _flat(forward, args, kwargs)
        self.kinds = [_kind(leaf) for leaf in leaves]
        self.same = _same(leaves, self.kinds)
        alone = not kwargs and len(args) == len(leaves) and all(kind is Tensor for kind in self.kinds)
        self.plain = len(args) if alone and len(set(self.same)) == len(args) else None  # so many different tensors

    def __deepcopy__(self, memo: dict[int, Any]) -> Form:  # it never changes
        return self

    def __getstate__(self) -> dict[str, Any]:  # pickled, a structure warns
        return vars(self) | {"spec": _pytree.tree_unflatten([0] * len(self.kinds), self.spec)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, spec=_pytree.tree_structure(state["spec"]))

    def given(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Sequence[Any] | None:
        """The tensors of a call, and what nobody here knows; None where it is of another form."""
        tensors = {id(arg) for arg in args if isinstance(arg, Tensor)}
        if len(args) == len(tensors) == self.plain and not kwargs:
            return tuple(args)
        try:
            leaves, spec = _flat(forward, args, kwargs)
        except TypeError:  # the forward itself says what is missing
            return None
        if spec != self.spec or not all(map(_fits, leaves, self.kinds)) or _same(leaves, self.kinds) != self.same:
            return None
        return [leaf for leaf, kind in zip(leaves, self.kinds, strict=True) if not isinstance(kind, _Constant)]

    def arguments(self, given: Sequence[Any]) -> tuple[Any, Any]:
        """The arguments of such a call: by place, and by name."""
        left = iter(given)
        leaves = [kind.value if isinstance(kind, _Constant) else next(left) for kind in self.kinds]
        made: tuple[Any, Any] = _pytree.tree_unflatten(leaves, self.spec)
        return made

    def proxies(self, make: Callable[[str], Any]) -> list[Any]:
        """Arguments to trace with: one of these for each tensor, the same for the same."""
        made = [make(f"given_{i}") for i in range(len(self.same))]
        return [made[first] for first in self.same]


class _Constant(NamedTuple):
    value: Any


def _kind(leaf: Any) -> Any:
    """Of a constant, it; else its class, where any tensor is a tensor."""
    return _Constant(leaf) if isinstance(leaf, _CONSTANTS) else Tensor if isinstance(leaf, Tensor) else type(leaf)


def _fits(leaf: Any, kind: Any) -> bool:
    if isinstance(kind, _Constant):
        return type(leaf) is type(kind.value) and (leaf is kind.value or bool(leaf == kind.value))
    return isinstance(leaf, fx.Proxy) or (isinstance(leaf, Tensor) if kind is Tensor else type(leaf) is kind)


def _same(leaves: list[Any], kinds: list[Any]) -> list[int]:
    """Of each that is no constant, the first that is the same object."""
    ids = [id(leaf) for leaf, kind in zip(leaves, kinds, strict=True) if not isinstance(kind, _Constant)]
    return [ids.index(each) for each in ids]


def _flat(forward: Callable[..., Any], args: Any, kwargs: Any) -> tuple[list[Any], Any]:
    """All that the forward gets, its defaults too."""
    bound = _signature(forward).bind(None, *args, **kwargs)
    bound.apply_defaults()
    return _pytree.tree_flatten((bound.args[1:], bound.kwargs))


@cache
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)
