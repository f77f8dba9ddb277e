"""Side effects of a forward: counters, lists, caches, global variables.

A forward that torch.fx wrote has what was computed, and nothing else that happened: an ``append`` happened once, when
it was traced. All that the module can reach is looked at before and after.
"""

from __future__ import annotations

import gc
import operator
import random
import sys
from collections import deque
from collections.abc import Iterator
from enum import Enum
from itertools import count
from types import (
    CellType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any

import torch
from torch import Tensor

from batchnorm.surgery.globals import names

_PLAIN = (int, float, complex, str, bytes, type(None), Enum)
_FIXED = (*_PLAIN, CodeType, GetSetDescriptorType, MemberDescriptorType, torch.dtype, torch.device)
_OTHERS = {"batchnorm", "numpy", "torch", *sys.stdlib_module_names}  # whose functions and classes are not looked into
_RUNNING = {
    "_io",
    "_thread",
    "asyncio",
    "concurrent",
    "io",
    "logging",
    "multiprocessing",
    "queue",
    "socket",
    "threading",
}
_MOST = 100_000  # objects, those nearest to the module first


class Reached:
    """All that some objects can reach, as it is now: what they hold, their classes, the functions in these, and the
    global variables that those read."""

    def __init__(self, *roots: Any) -> None:
        self.found: dict[int, tuple[Any, list[Any], Any]] = {}
        waiting = deque(roots)
        while waiting and len(self.found) < _MOST:
            value = waiting.popleft()
            if id(value) not in self.found and not isinstance(value, _FIXED):
                parts = list(_parts(value))
                self.found[id(value)] = value, parts, _state(value)
                waiting += parts

    def changed(self) -> str | None:
        """The first object that has changed, in a word."""
        for value, parts, state in self.found.values():
            now = list(_parts(value))
            if len(now) != len(parts) or not all(map(_same, now, parts)) or _state(value) != state:
                return _named(value)
        return None


def _same(now: Any, then: Any) -> bool:
    return now is then or (type(now) is type(then) and isinstance(now, _PLAIN) and bool(now == then))


def _named(value: Any) -> str:
    if isinstance(value, FunctionType):
        return f"a variable that {value.__qualname__} reads"
    if isinstance(value, type):
        return f"an attribute of the class {value.__name__}"
    if isinstance(value, Tensor):
        return "a tensor in place"
    if isinstance(value, CellType):
        return "a variable of a function around one"
    kind = type(value)
    own = _is_users(kind.__module__) or isinstance(value, torch.nn.Module | SimpleNamespace)
    return f"an attribute of a {kind.__name__}" if own else f"a {kind.__name__}"


def _parts(value: Any) -> Iterator[Any]:
    """The objects that it holds."""
    if isinstance(value, FunctionType):
        yield from _parts_of_function(value)
    elif isinstance(value, type):
        for kind in value.__mro__ if _is_users(value.__module__) else ():
            if _is_users(kind.__module__):
                yield from (v for name, v in vars(kind).items() if not name.startswith(("__", "_abc_")))
    elif not isinstance(value, ModuleType) and type(value).__module__.partition(".")[0] not in _RUNNING:
        own = getattr(value, "__dict__", None)
        yield from (part for part in gc.get_referents(value) if part is not own)
        if type(own) is dict:
            yield from own
            yield from own.values()


def _parts_of_function(function: FunctionType) -> Iterator[Any]:
    """Also the global variables that it reads, and what it reads of files that it imported."""
    yield from (function.__closure__, function.__defaults__, function.__kwdefaults__)
    yield from vars(function).values()
    if _is_users(function.__globals__.get("__name__")):
        read = set(names(function.__code__))
        for name in sorted(read):
            held = function.__globals__.get(name)
            if not isinstance(held, ModuleType):
                yield held
            elif _is_users(held.__name__):
                yield from (vars(held).get(each) for each in sorted(read))


def _is_users(module: str | None) -> bool:
    return (module or "").partition(".")[0] not in _OTHERS


def _state(value: Any) -> Any:
    """The plain values that it holds."""
    if isinstance(value, Tensor):
        return None if value.is_inference() else value._version
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, count):
        return repr(value)
    if isinstance(value, bytearray):
        return bytes(value)
    if type(value).__module__.startswith("numpy"):
        state = getattr(getattr(value, "bit_generator", value), "state", None)
        return str(state) if state is not None else value.tobytes() if hasattr(value, "tobytes") else None
    return operator.length_hint(value, -1) if hasattr(type(value), "__length_hint__") else None
