"""A subclass of somebody's class that its author hears nothing of: no registry, no metaclass of theirs learns of it."""

from __future__ import annotations

from abc import ABCMeta
from typing import Any


class _Plain:
    """The layout of a class without slots."""


def subclass(kind: Any, content: dict[str, Any]) -> Any:
    """One by the same name, for objects that there are already.

    ``type.__new__`` calls the ``__init_subclass__`` of the bases that it is given, so it gets the nearest ones above
    that have none; the bases that are set afterwards tell nobody. A metaclass is asked nothing: what it put into the
    class, the subclass inherits. Only that of ``abc`` knows something of each class.

    Raises:
        TypeError: there is no such class: it has slots, and a base with a hook.
    """
    maker: Any = ABCMeta if isinstance(kind, ABCMeta) else type
    above = next(each for each in kind.__mro__ if not _tells(each))
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    above = _Plain if above is object else above
    made = maker.__new__(type(kind), kind.__name__, (above,), {**names, "__slots__": (), **content})
    if above is not kind:
        type.__setattr__(made, "__bases__", (kind,))
    return made


def _tells(kind: type) -> bool:
    return any("__init_subclass__" in vars(each) for each in kind.__mro__[:-1])
