"""Functions that a copy has in its attributes, made anew where they hold modules of the model that was copied.

``copy.deepcopy`` copies no function. A lambda that ``__init__`` put into an attribute, or a hook, holds the original in
its closure, and would go on to call the original's layers. The copy gets one that holds the copy's. A copy to throw
away (``apart``) gets its own of all that its functions can change: lists, counters and generators, in closures and in
global variables.

Comes from: ``copied``. Goes to: the copy's attributes.
"""

from __future__ import annotations

import copy
import dis
import random
from collections import deque
from collections.abc import Iterator
from functools import partial
from itertools import count
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

# What functions change that read it as a global variable.
_CHANGE = (list, dict, set, bytearray, deque, count, random.Random, torch.Tensor, torch.Generator, nn.Module)
_FIXED = (int, float, complex, str, bytes, bool, type(None), type, ModuleType, torch.dtype, torch.device)


def rebind(copied: nn.Module, memo: dict[int, Any], originals: list[nn.Module], apart: bool = False) -> None:
    """Have the functions in the copy's attributes hold the copy's modules. ``memo``: what deepcopy made, by id;
    ``apart``: and nothing that they could change of anybody else's.

    Raises:
        ValueError: one reads a global variable that is a module of the original.
    """
    found = (_Apart if apart else _Rebound)(memo, originals)
    for name, module in copied.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for key, value in list(vars(module).items()):
            if key in ("_parameters", "_buffers", "_modules"):
                continue
            found.place = f"{name}.{key}".lstrip(".")
            new = found.of(value)
            if new is not value:
                vars(module)[key] = new


class _Rebound:
    """What each value is to be in the copy. What deepcopy made is changed in place, all else is made anew."""

    def __init__(self, memo: dict[int, Any], originals: list[nn.Module]) -> None:
        self.copies = {id(module): memo[id(module)] for module in originals if id(module) in memo}
        self.copies = {i: made for i, made in self.copies.items() if id(made) != i}
        self.own = {id(made): made for i, made in memo.items() if id(made) != i}
        self.done: dict[int, tuple[Any, Any]] = {}  # both, so that no identity is given away twice
        self.place = ""

    def of(self, value: Any) -> Any:
        if id(value) in self.copies:
            return self.copies[id(value)]
        if isinstance(value, nn.Module | torch.Tensor | type):
            return value
        if id(value) not in self.done:
            self.done[id(value)] = value, value  # while it is looked into: it may hold itself
            self.done[id(value)] = value, self._made(value)
        return self.done[id(value)][1]

    def _made(self, value: Any) -> Any:
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, MethodType):
            parts = self.of(value.__func__), self.of(value.__self__)
            return value if _same(parts, (value.__func__, value.__self__)) else MethodType(*parts)
        if isinstance(value, partial):
            return self._partial(value)
        if isinstance(value, dict):
            return self._dict(value)
        if isinstance(value, list):
            new = [self.of(each) for each in value]
            if id(value) in self.own:
                value[:] = new
            return value if _same(new, value) else new
        if type(value) in (tuple, set, frozenset):
            items = list(value)
            changed = [self.of(each) for each in items]
            return value if _same(changed, items) else type(value)(changed)
        if id(value) in self.own and isinstance(getattr(value, "__dict__", None), dict):
            for key, held in list(vars(value).items()):
                if (new_held := self.of(held)) is not held:
                    vars(value)[key] = new_held
        return value

    def _dict(self, value: dict[Any, Any]) -> dict[Any, Any]:
        new = {self.of(key): self.of(held) for key, held in value.items()}
        if _same([*new, *new.values()], [*value, *value.values()]):
            return value
        target = value if id(value) in self.own else copy.copy(value)
        target.clear()
        target.update(new)
        return target

    def _partial(self, value: partial[Any]) -> partial[Any]:
        parts = value.func, value.args, value.keywords, value.__dict__
        new = tuple(self.of(part) for part in parts)
        if _same(new, parts):
            return value
        target = value if id(value) in self.own else partial(value.func)
        target.__setstate__(new)  # type: ignore[attr-defined]
        return target

    def _function(self, old: FunctionType) -> FunctionType:
        for name in _names(old.__code__):
            if id(old.__globals__.get(name)) in self.copies:
                raise ValueError(
                    f"the model cannot be copied: {self.place} is a function that reads the global variable {name!r}, "
                    "which is the model given or a part of it, and a copy would go on to use that one: make it a "
                    "method, or give it the module as an argument."
                )
        if not self._holds(old, set()):
            return old
        cells = [self._cell(cell) for cell in old.__closure__ or ()]
        new = FunctionType(old.__code__, self._globals(old), old.__name__, None, tuple(cells))
        self.done[id(old)] = old, new
        for name in ("__qualname__", "__module__", "__doc__", "__annotations__"):
            setattr(new, name, getattr(old, name))
        new.__defaults__, new.__kwdefaults__ = self.of(old.__defaults__), self.of(old.__kwdefaults__)
        vars(new).update(self.of(vars(old)))
        for cell, made in zip(old.__closure__ or (), cells, strict=True):
            if made is not cell:
                made.cell_contents = self.of(cell.cell_contents)
        return new

    def _globals(self, function: FunctionType) -> dict[str, Any]:
        return function.__globals__

    def _cell(self, cell: CellType) -> CellType:
        """One for all functions that share it; the same one where it holds nothing of the original."""
        if id(cell) not in self.done:
            self.done[id(cell)] = cell, CellType() if self._holds(cell, set()) else cell
        made: CellType = self.done[id(cell)][1]
        return made

    def _holds(self, value: Any, seen: set[int]) -> bool:
        """Whether a module of the original is in it: in closures, defaults, partials, methods, containers."""
        if id(value) in self.copies:
            return True
        if id(value) in seen or isinstance(value, nn.Module | torch.Tensor | type):
            return False
        seen.add(id(value))
        return any(self._holds(part, seen) for part in _parts(value))


class _Apart(_Rebound):
    """The same, of a copy to throw away."""

    def __init__(self, memo: dict[int, Any], originals: list[nn.Module]) -> None:
        super().__init__(memo, originals)
        self.memo = memo
        self.globals: dict[int, dict[str, Any]] = {}

    def of(self, value: Any) -> Any:
        own = id(value) in self.own or id(value) in self.copies or id(value) in self.done
        if own or isinstance(value, (*_FIXED, FunctionType, MethodType, partial, CellType, tuple)):
            return super().of(value)
        try:
            made = copy.deepcopy(value, self.memo)
        except Exception:  # whatever an object raises that does not want it: a lock, a file, what gradients go through
            if not isinstance(value, list | dict | set):
                return super().of(value)
            made = copy.copy(value)
        self.done[id(value)] = value, made
        self.own[id(made)] = made
        return super().of(made)

    def _holds(self, value: Any, seen: set[int]) -> bool:
        """Whether a function keeps, or writes to, anything: in its closure, its defaults, global variables."""
        if not isinstance(value, FunctionType) or id(value) in seen:
            return not isinstance(value, FunctionType)
        seen.add(id(value))
        keeps = any((value.__closure__, value.__defaults__, value.__kwdefaults__, vars(value)))
        writes = any(step.opname == "STORE_GLOBAL" for step in _steps(value.__code__))
        return keeps or writes or any(self._holds(held, seen) for _, held in self._read(value))

    def _read(self, function: FunctionType) -> Iterator[tuple[str, Any]]:
        """The global variables that it reads: its file's own functions, objects and containers."""
        own = function.__globals__
        for name in set(_names(function.__code__)):
            held = own.get(name)
            functions = isinstance(held, FunctionType) and held.__globals__ is own
            if functions or isinstance(held, _CHANGE) or type(held).__module__ == own.get("__name__"):
                yield name, held

    def _globals(self, function: FunctionType) -> dict[str, Any]:
        """One for all functions of a file, with copies of what they read."""
        old = function.__globals__
        new = self.globals.setdefault(id(old), dict(old))
        for name, held in self._read(function):
            if new[name] is held:
                new[name] = self.of(held)
        return new


def _parts(value: Any) -> list[Any]:
    if isinstance(value, FunctionType):
        return [*(value.__closure__ or ()), value.__defaults__, value.__kwdefaults__, vars(value)]
    if isinstance(value, CellType):
        try:
            return [value.cell_contents]
        except ValueError:  # nothing in it yet
            return []
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords, vars(value)]
    if isinstance(value, dict):
        return [*value, *value.values()]
    return list(value) if isinstance(value, list | tuple | set | frozenset) else []


def _names(code: CodeType) -> Iterator[str]:
    """What a function reads by name, and the functions in it."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)


def _steps(code: CodeType) -> Iterator[dis.Instruction]:
    """Of a function, and of the functions in it."""
    yield from dis.get_instructions(code)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _steps(inner)


def _same(new: Any, old: Any) -> bool:
    return all(a is b for a, b in zip(new, old, strict=True))
