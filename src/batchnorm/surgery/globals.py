"""Which global variables a function reads, and which of them hold modules of a model."""

from __future__ import annotations

import dis
from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from types import CodeType, FunctionType, ModuleType
from typing import Any


def names(code: CodeType) -> Iterator[str]:
    """Names that a function reads, and the functions in it."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from names(inner)


def steps(code: CodeType) -> Iterator[dis.Instruction]:
    """Of a function, and of the functions in it."""
    yield from dis.get_instructions(code)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from steps(inner)


class Globals:
    """The global variables of functions by which they read a module of a model. ``modules``: their ids."""

    def __init__(self, modules: set[int]) -> None:
        self.modules = modules
        self.known: dict[int, bool] = {}

    def of(self, function: FunctionType, within: bool, seen: set[FunctionType] | None = None) -> Iterator[str]:
        """As the function writes them: ``part``, and ``within`` containers and objects ``PARTS``, ``context.part``;
        those that its file's functions read, too."""
        own, seen = function.__globals__, seen or set()
        seen.add(function)
        read = {name: own.get(name) for name in names(function.__code__)}
        for held in read.values():
            if isinstance(held, FunctionType) and held.__globals__ is own and held not in seen:
                yield from self.of(held, within, seen)
        if not any(self._is_near(held) for held in read.values()):
            return
        for step, after in pairwise(steps(function.__code__)):
            if step.opname not in ("LOAD_GLOBAL", "LOAD_NAME"):
                continue
            name, held = step.argval, own.get(step.argval)
            if within and id(held) not in self.modules and after.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                name = f"{name}.{after.argval}"
                held = getattr(held, "__dict__", {}).get(after.argval)
            if id(held) in self.modules or (within and self._has_one(held)):
                yield name

    def _has_one(self, held: Any) -> bool:
        """A container, by its values: what is noted down about modules has them as keys."""
        inside = held.values() if isinstance(held, dict) else held if isinstance(held, list | tuple | deque) else ()
        return any(id(each) in self.modules for each in inside)

    def _is_near(self, held: Any) -> bool:
        """Whether it is a module, or one is in it or in its attributes."""
        if isinstance(held, ModuleType) and held.__name__.partition(".")[0] == "torch":
            return False
        if id(held) not in self.known:
            inside = list(getattr(held, "__dict__", {}).values())
            self.known[id(held)] = id(held) in self.modules or any(
                id(each) in self.modules or self._has_one(each) for each in (held, *inside)
            )
        return self.known[id(held)]
