"""The arguments of a network's call, and the target of its output."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from batchnorm.racing.errors import RaceError

TARGETS = ("labels", "label", "targets", "target", "y")  # a dict's keys, or an object's attributes: the first there is


class _Called(Exception):
    """Stops a forward pass at the network's door."""


class NotCalled(RaceError):
    """The forward pass does not go through the model's own."""


def arguments_of(model: nn.Module, call: Callable[[], Any]) -> Any:
    """A model's arguments in there: a tensor, a tuple of arguments, a dict of keyword arguments; it is not run.

    Raises:
        NotCalled: it is not called, or in a way that no example can have.
    """
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _Called

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        call()
    except _Called:
        pass
    finally:
        hook.remove()
    if not seen:
        raise NotCalled("forward= must call the model itself, not parts of it: what it is called with is its example.")
    args, kwargs = seen[0]
    if args and kwargs:
        return _by_name(inspect.signature(model.forward).bind(*args, **kwargs))
    return kwargs or (args[0] if len(args) == 1 and isinstance(args[0], Tensor) else args)


def _by_name(bound: inspect.BoundArguments) -> dict[str, Any]:
    """Arguments of both kinds as keyword arguments."""
    found: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            raise NotCalled(f"the model is called with keywords beside {name}, which cannot be one: pass all in order.")
        found |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return found


def target_of(batch: Any) -> Any:
    """Of a pair its second part, of a longer tuple all but the first; of dicts and objects their labels; else all."""
    if isinstance(batch, tuple | list) and len(batch) > 1:
        return batch[1] if len(batch) == 2 else tuple(batch[1:])
    for name in TARGETS:
        found = batch.get(name) if isinstance(batch, Mapping) else getattr(batch, name, None)
        if found is not None:
            return found
    return batch


def keywords_of(model: Callable[..., nn.Module]) -> set[str] | None:
    """The keywords that a model function takes; None if it takes any."""
    try:
        parameters = inspect.signature(model).parameters.values()
    except ValueError:  # of a class in C
        return set()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
