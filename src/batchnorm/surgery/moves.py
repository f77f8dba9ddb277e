"""Calls that only move values, transpositions and the like: where each channel goes on the way through them.

A call is played again on numbers that say where they were; whatever it is called, it moves values if what comes out are
such numbers, and if other values take the same way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

if TYPE_CHECKING:
    from batchnorm.surgery.watch import Call, Watched

_PLAIN = (int, float, bool, str, type(None), type(...), torch.dtype, torch.device, torch.memory_format, torch.Size)
_DIGIT = 256  # whole numbers up to it are exact in every floating-point dtype


class _Here:
    """In noted arguments: the tensor that the call reads first."""


class _Other:
    """In noted arguments: another tensor, of which the shape is known."""

    def __init__(self, t: Tensor) -> None:
        self.shape = t.shape


def noted(args: Any, kwargs: Any) -> Any:
    """The arguments of a call, to play it again; None where they hold what cannot be kept. No tensor is kept."""
    first = True

    def kept(leaf: Any) -> Any:
        nonlocal first
        if isinstance(leaf, Tensor):
            here, first = first, False
            return _Here() if here else _Other(leaf)
        parts = (leaf.start, leaf.stop, leaf.step) if isinstance(leaf, slice) else (leaf,)
        if not all(isinstance(part, _PLAIN) for part in parts):
            raise TypeError
        return leaf

    try:
        return _pytree.tree_map(kept, (args, kwargs))
    except TypeError:
        return None


def play(target: Callable[..., Any], arguments: Any, t: Tensor) -> Any:
    """The call on another tensor; what it reads besides is not a number."""

    def given(leaf: Any) -> Any:
        if isinstance(leaf, _Other):
            return t.new_full((), torch.nan).expand(leaf.shape)
        return t if isinstance(leaf, _Here) else leaf

    args, kwargs = _pytree.tree_map(given, arguments)
    with torch.no_grad():
        return target(*args, **kwargs)


def came_from(seen: Watched, call: Call, target: Any, dtype: torch.dtype, train: bool = False) -> Tensor | None:
    """``moved``, of a call of one tensor that was watched; ``target``: what it called, as that is now."""
    maker = seen.maker(call)
    if call.kind not in ("module", "function") or maker is None or maker.shape is None or len(call.inputs) != 1:
        return None
    if isinstance(target, nn.Module) and next(target.parameters(), None) is not None:
        return None
    return moved(target, call.arguments, maker.shape, dtype, train)


def moved(
    target: Any, arguments: Any, shape: tuple[int, ...], dtype: torch.dtype, train: bool = False
) -> Tensor | None:
    """For each value that a call gives out, which one of its input it is; None where it does more than move them."""
    if arguments is None or (isinstance(target, nn.Module) and (target._forward_hooks or target._forward_pre_hooks)):
        return None
    try:
        target = copy.deepcopy(target).train(train) if isinstance(target, nn.Module) else target
        places = torch.arange(torch.Size(shape).numel()).view(shape)
        values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        out = play(target, arguments, values.clone())
        if not isinstance(out, Tensor) or out.dtype != dtype or not out.isfinite().all():
            return None
        came_from, unit = torch.zeros(out.shape, dtype=torch.int64), 1
        while unit < max(places.numel(), 2):
            digits = play(target, arguments, (places // unit % _DIGIT).to(dtype))
            came_from += digits.to(torch.int64) * unit
            unit *= _DIGIT
        inside = bool(((came_from >= 0) & (came_from < places.numel())).all())
        return came_from if inside and torch.equal(values.flatten()[came_from], out) else None
    except Exception:  # whatever the call raises on other values
        return None


def channels_between(came_from: Tensor, shape: tuple[int, ...], before: int, behind: int) -> tuple[Tensor, Tensor]:
    """Of all values that come out: the channel that each had in dimension ``before``, and has in ``behind``."""
    stride = torch.Size(shape[before:][1:]).numel()
    was = came_from // stride % shape[before]
    size = [1] * came_from.dim()
    size[behind] = -1
    now = torch.arange(came_from.shape[behind]).view(size).expand(came_from.shape)
    return was.flatten(), now.flatten()


def as_function(keys: Tensor, values: Tensor, size: int) -> Tensor | None:
    """For each key below ``size`` the one value that it goes with, -1 where it is not among them; None if several."""
    found = torch.full((size,), -1, dtype=torch.int64)
    found[keys] = values
    return found if torch.equal(found[keys], values) else None
