"""The layer that batch normalization folds into: before it or after it, behind what only moves values, or why none.

A layer that is called several times folds where each of its calls goes with one call of the other, and no call of that
is left.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from batchnorm.surgery.affine import (
    PRUNED,
    affine_of,
    does_more,
    is_computed,
    is_pruned,
    looks_affine,
    pads_with_zeros,
    unregistered,
)
from batchnorm.surgery.checks import hooked
from batchnorm.surgery.fold_check import Fold, Way
from batchnorm.surgery.moves import as_function, came_from, channels_between
from batchnorm.surgery.watch import Call, Watched


class Place(NamedTuple):
    """A model that is being folded, how it was watched, which of its tensors others share, and which calls move."""

    model: nn.Module
    seen: Watched
    ties: dict[str, str]
    moves: dict[tuple[int, type], Tensor | None]


class _Beside(NamedTuple):
    """The call beside one of the layer's, the path to it, and which of the layer's channels its channels are."""

    call: Call
    path: list[Call]
    channels: Tensor


def before(place: Place, calls: list[Call], layer: Any) -> tuple[Fold | None, str]:
    """The layer that it folds into backwards, or why there is none."""
    return _folded(place, calls, False, [_before(place, call, layer, len(calls)) for call in calls])


def after(place: Place, calls: list[Call], layer: Any, rest: nn.Module) -> tuple[Fold | None, str]:
    """The layer that it folds into forwards, or why there is none."""
    return _folded(place, calls, True, [_after(place, call, layer, rest, len(calls)) for call in calls])


def _folded(
    place: Place, calls: list[Call], after: bool, found: list[tuple[_Beside | None, str]]
) -> tuple[Fold | None, str]:
    beside = [one for one, _ in found if one is not None]
    if len(beside) < len(calls):
        return None, next(why for one, why in found if one is None)
    into, channels = beside[0].call.name, beside[0].channels
    if not all(torch.equal(one.channels, channels) for one in beside):
        return None, f"the channels of {into} are others in each call"
    numbers = {call.index: number for name in (calls[0].name, into) for number, call in enumerate(place.seen.of(name))}
    ways = [Way(numbers[at.index], numbers[one.call.index], one.path) for at, one in zip(calls, beside, strict=True)]
    return Fold(calls[0].name, into, after, ways, channels), ""


def _before(place: Place, call: Call, layer: Any, times: int) -> tuple[_Beside | None, str]:
    path: list[Call] = []
    at = call
    while True:
        maker = place.seen.maker(at)
        if maker is None:
            return None, "what it reads is not made in the model"
        if maker.kind == "module" and affine_of(maker.target) is not None:
            break
        if _came_from(place, maker, layer) is None:
            return None, f"it reads {_unknown(maker, 'has no weights to fold into')}"
        if place.seen.only_reader(maker) is not at:
            return None, _also_read(place, maker, at)
        path.insert(0, maker)
        at = maker
    if place.seen.only_reader(maker) is not at:
        return None, _also_read(place, maker, at)
    reason = _unusable(place, maker, "before", times)
    if reason is not None:
        return None, reason
    row, shape = affine_of(maker.target), maker.shape
    assert row is not None
    assert shape is not None
    was, now = _channels(place, path, shape, len(shape) + row.channels, 1, layer)
    channels = as_function(was, now, shape[row.channels])
    if channels is None:
        return None, f"a channel of {maker.name} before it goes to several of its own"
    return _Beside(maker, path, channels), ""


def _after(place: Place, call: Call, layer: Any, rest: nn.Module, times: int) -> tuple[_Beside | None, str]:
    path: list[Call] = []
    at = call
    while True:
        reader = place.seen.only_reader(at)
        if reader is None:
            who = "its output" if at is call else f"{at.label} after it"
            return None, f"{who} is read more than once"
        if reader.kind == "module" and affine_of(reader.target) is not None:
            break
        if _came_from(place, reader, layer) is None:
            return None, f"its output goes to {_unknown(reader)}"
        path.append(reader)
        at = reader
    if type(rest) is not nn.Identity:
        return None, "its activation or residual comes before the next layer"
    row: Any = affine_of(reader.target)
    if row.spreads:
        return None, f"{reader.name} after it gives each place another number of inputs"
    if pads_with_zeros(reader.target):
        return None, f"{reader.name} after it pads with 0"
    reason = _unusable(place, reader, "after", times)
    if reason is not None:
        return None, reason
    given = at.shape
    assert call.shape is not None
    assert given is not None
    was, now = _channels(place, path, call.shape, 1, len(given) + row.channels, layer)
    channels = as_function(now, was, given[row.channels])
    if channels is None:
        return None, f"a channel of {reader.name} after it takes several of its own"
    return _Beside(reader, path, channels), ""


def _came_from(place: Place, call: Call, layer: Any) -> Tensor | None:
    """For each value that a call gives out, which one it was; None if it does more than move them."""
    target = place.model.get_submodule(call.name) if call.kind == "module" else call.target
    key = (call.index, type(target))  # which changes when it is folded
    if key not in place.moves:
        place.moves[key] = came_from(place.seen, call, target, layer.running_mean.dtype)
    return place.moves[key]


def _channels(
    place: Place, path: list[Call], shape: tuple[int, ...], before: int, behind: int, layer: Any
) -> tuple[Tensor, Tensor]:
    """For each value at the end of the path: the channel that it had at first, and the channel that it has there."""
    places = torch.arange(torch.Size(shape).numel()).view(shape)
    for call in path:
        step = _came_from(place, call, layer)
        assert step is not None
        places = places.flatten()[step]
    return channels_between(places, shape, before, behind)


def _also_read(place: Place, maker: Call, reader: Call) -> str:
    others = ", ".join(place.seen.calls[i].label for i in maker.readers if i != reader.index)
    return f"{maker.label} before it is read by {others or 'it'} too"


def _unknown(call: Call, otherwise: str = "") -> str:
    """How a report calls what is no layer of a known class."""
    if call.kind == "module" and looks_affine(call.target):
        return f"{call.name}, {unregistered(call.target)}"
    return f"{call.label}, which {otherwise}" if otherwise else call.label


def tied(ties: dict[str, str], seen: Watched, name: str) -> str | None:
    """Who else uses a layer's weight or bias: what ``affine.shared`` found, or a function somewhere else."""
    for key in ("weight", "bias"):
        if f"{name}.{key}" in ties:
            return f"the {key} of {name} is {ties[f'{name}.{key}']} too"
        if f"{name}.{key}" in seen.read:
            return f"{seen.read[f'{name}.{key}']} reads the {key} of {name} too"
    return None


def _unusable(place: Place, call: Call, side: str, times: int) -> str | None:
    name, layer, seen = call.name, call.target, place.seen
    if len(seen.of(name)) != times:
        return f"{name} {side} it is called {_times(len(seen.of(name)))}"
    if is_pruned(layer):
        return f"the weight of {name} {side} it {PRUNED}"
    if hooked(layer):
        return f"{name} {side} it has hooks, which would see something else"
    if does_more(layer):
        return f"{name} {side} it is a {type(layer).__qualname__}, which may do more"
    if is_computed(layer):
        return f"the weight of {name} {side} it is computed from others"
    return tied(place.ties, seen, name)


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"
