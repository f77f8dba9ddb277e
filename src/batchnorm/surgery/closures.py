"""Functions that a copy has in its attributes, made anew where they hold modules of the model that was copied.

``copy.deepcopy`` copies no function. A lambda that ``__init__`` put into an attribute, or a hook, holds the original in
its closure, and would go on to call the original's layers. The copy gets one that holds the copy's, and so it does of
what else deepcopy gives as it is: weak references, caches, classes. A copy to throw away (``apart``) gets its own of
all that its functions can change: lists, counters and generators, in closures and in global variables.
"""

from __future__ import annotations

import copy
import random
import weakref
from collections import deque
from collections.abc import Iterator, Set
from contextlib import suppress
from functools import lru_cache, partial
from itertools import count
from types import CellType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from batchnorm.surgery.globals import Globals, names, steps
from batchnorm.surgery.subclass import subclass

# What functions change that read it as a global variable.
_CHANGE = (list, dict, set, bytearray, deque, count, random.Random, torch.Tensor, torch.Generator, nn.Module)
_CACHED: Any = type(lru_cache(lambda: None))
_ANEW = (FunctionType, MethodType, partial, CellType, tuple, _CACHED, weakref.ref)  # which deepcopy gives as they are
_FIXED = (int, float, complex, str, bytes, bool, type(None), type, ModuleType, torch.dtype, torch.device)


def rebind(copied: nn.Module, memo: dict[int, Any], originals: list[nn.Module], apart: bool = False) -> None:
    """Have the functions in the copy's attributes hold the copy's modules. ``memo``: what deepcopy made, by id;
    ``apart``: and nothing that they could change of anybody else's.

    Raises:
        ValueError: one, or a module's own forward, reads a module of the original by a global variable.
    """
    found = (_Apart if apart else _Rebound)(memo, originals)
    found.place, found.notes = "a parameter's hook", True
    for p in {} if apart else {p: None for module in originals for p in module.parameters(recurse=False)}:
        made = memo.get(id(p), p)
        for hook in [*(p._backward_hooks or {}).values()] if made is not p and made.requires_grad else []:
            made.register_hook(found.of(hook))
    for name, module in copied.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for key, value in list(vars(module).items()):
            if key in ("_parameters", "_buffers", "_modules"):
                continue
            found.place, found.notes = f"{name}.{key}".lstrip("."), key.endswith("_hooks")
            new = found.of(value)
            if new is not value:
                vars(module)[key] = new
        found.check_forward(name, module)
        found.give_kind(module)


class _Rebound:
    """The counterpart of each value in the copy. Deepcopy's objects are changed in place, all others are made anew."""

    def __init__(self, memo: dict[int, Any], originals: list[nn.Module]) -> None:
        self.copies = {i: made for i, made in memo.items() if id(made) != i and i != id(memo)}
        self.own = {id(made): made for made in self.copies.values()}
        self.modules = {id(module) for module in originals} & self.copies.keys()
        self.globals_read = Globals(self.modules)
        self.done: dict[int, tuple[Any, Any]] = {}  # both, so that no identity is given away twice
        self.checked: set[FunctionType] = set()
        self.place, self.notes = "", False  # where it is; whether it is a hook, which may note down modules

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
        if type(value) is weakref.ref:
            held = value()
            new = self.of(held)
            return value if new is held else weakref.ref(new)
        if isinstance(value, _CACHED):
            new = self.of(value.__wrapped__)
            return value if new is value.__wrapped__ else lru_cache(**value.cache_parameters())(new)
        if isinstance(value, dict):
            return self._dict(value)
        if isinstance(value, list | deque):
            return self._list(value)
        if type(value) in (tuple, set, frozenset):
            items = list(value)
            changed = [self.of(each) for each in items]
            return value if _same(changed, items) else type(value)(changed)
        if id(value) in self.own:
            self._object(value)
        return value

    def _object(self, value: Any) -> None:
        own = getattr(value, "__dict__", None)
        for key, held in list(own.items()) if isinstance(own, dict) else []:
            if (new := self.of(held)) is not held:
                vars(value)[key] = new
        for slot in _slots(type(value)):
            with suppress(AttributeError):  # nothing is in it
                held = slot.__get__(value)
                if (new := self.of(held)) is not held:
                    slot.__set__(value, new)
        self.give_kind(value)

    def give_kind(self, value: Any) -> None:
        """Give an object of a local class, whose methods hold the original, a subclass that does not."""
        kind: Any = type(value)
        if self._kind(kind) is not kind:
            object.__setattr__(value, "__class__", self._kind(kind))  # a frozen dataclass too

    def _kind(self, kind: Any) -> Any:
        if id(kind) not in self.done:
            changed = {}
            for name, method in {name: m for k in reversed(kind.__mro__) for name, m in vars(k).items()}.items():
                function = getattr(method, "__func__", method)  # of static ones and class methods
                if isinstance(function, FunctionType | _CACHED) and self._reaches(self.modules, function, set()):
                    new = self.of(function)
                    changed[name] = new if function is method else type(method)(new)
            self.done[id(kind)] = (kind, subclass(kind, changed) if changed else kind)
        return self.done[id(kind)][1]

    def check_forward(self, name: str, module: nn.Module) -> None:
        """That a module's class reads no module of the original by a global variable."""
        forward = getattr(type(module), "forward", None)
        if isinstance(forward, FunctionType) and forward not in self.checked:
            self.place, self.notes = f"{name}.forward".lstrip("."), False
            self._check_globals(forward)
            self.checked.add(forward)

    def _list(self, value: Any) -> Any:
        new = [self.of(each) for each in value]
        if _same(new, value):
            return value
        target = value if id(value) in self.own else copy.copy(value)
        target.clear()
        target.extend(new)
        return target

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
        self._check_globals(old)
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

    def _check_globals(self, function: FunctionType) -> None:
        for name in self.globals_read.of(function, within=not self.notes):
            raise ValueError(
                f"the model cannot be copied: {self.place} is a function that reads the global variable {name!r}, "
                "which is, or holds, the model given or a part of it, and a copy would go on to use that one: have it "
                "read an attribute of self, or give it the module as an argument."
            )

    def _globals(self, function: FunctionType) -> dict[str, Any]:
        return function.__globals__

    def _cell(self, cell: CellType) -> CellType:
        """One for all functions that share it; the same one where it holds nothing of the original."""
        if id(cell) not in self.done:
            self.done[id(cell)] = cell, CellType() if self._holds(cell, set()) else cell
        made: CellType = self.done[id(cell)][1]
        return made

    def _holds(self, value: Any, seen: set[int]) -> bool:
        """Whether it is to be made anew."""
        return self._reaches(self.copies.keys(), value, seen)

    def _reaches(self, ids: Set[int], value: Any, seen: set[int]) -> bool:
        """Whether one of these is in it: in closures, defaults, partials, methods, containers, weak references."""
        if id(value) in ids:
            return True
        if id(value) in seen or isinstance(value, nn.Module | torch.Tensor | type):
            return False
        seen.add(id(value))
        return any(self._reaches(ids, part, seen) for part in _parts(value) if not isinstance(part, _FIXED))


class _Apart(_Rebound):
    """The same, of a copy to throw away."""

    def __init__(self, memo: dict[int, Any], originals: list[nn.Module]) -> None:
        super().__init__(memo, originals)
        self.memo = memo
        self.globals: dict[int, dict[str, Any]] = {}

    def of(self, value: Any) -> Any:
        own = id(value) in self.own or id(value) in self.copies or id(value) in self.done
        if own or isinstance(value, (*_FIXED, *_ANEW)):
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
        writes = any(step.opname == "STORE_GLOBAL" for step in steps(value.__code__))
        return keeps or writes or any(self._holds(held, seen) for _, held in self._read(value))

    def _read(self, function: FunctionType) -> Iterator[tuple[str, Any]]:
        """The global variables that it reads: its file's own functions, objects and containers."""
        own = function.__globals__
        for name in set(names(function.__code__)):
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
        return [*(value.__closure__ or ()), *filter(None, (value.__defaults__, value.__kwdefaults__, vars(value)))]
    if isinstance(value, CellType):
        try:
            return [value.cell_contents]
        except ValueError:  # nothing in it yet
            return []
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords, vars(value)]
    if isinstance(value, _CACHED):
        return [value.__wrapped__]
    if type(value) is weakref.ref:
        return [value()]
    if isinstance(value, dict):
        return [*value, *value.values()]
    return list(value) if isinstance(value, list | deque | tuple | set | frozenset) else []


def _slots(kind: type) -> Iterator[Any]:
    """The slots of a class's objects, outside of their ``__dict__``, if there are any."""
    for each in kind.__mro__:
        if "__slots__" in vars(each):
            yield from (slot for slot in vars(each).values() if isinstance(slot, MemberDescriptorType))


def _same(new: Any, old: Any) -> bool:
    return all(a is b for a, b in zip(new, old, strict=True))
