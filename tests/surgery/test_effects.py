"""Forwards that change something besides what they give: torch.fx would write it down once, so they are left alone."""

import functools
import itertools
import random
from collections import deque
from types import SimpleNamespace
from typing import ClassVar

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchnorm as bn
from batchnorm.surgery.effects import Reached

X = torch.randn(3, 4, 6, 6)
TOTAL = 0
LOG: list[int] = []
COUNT = itertools.count()
NOISE = numpy.zeros(2)


class Tally:
    n = 0


TALLY = Tally()


def note() -> None:
    LOG.append(1)


def note_elsewhere() -> None:
    note()


def note_total() -> None:
    global TOTAL
    TOTAL += 1


def note_on_itself() -> None:
    note_on_itself.calls = getattr(note_on_itself, "calls", 0) + 1


@functools.cache
def cached(key: int) -> int:
    return key


def numbers():
    n = 0
    while True:
        yield n
        n += 1


def closure():
    n = 0

    def bump() -> None:
        nonlocal n
        n += 1

    return bump


class Block(nn.Module):
    """One that does something between two others of its kind."""

    calls = 0
    table: ClassVar[dict[int, int]] = {}

    def __init__(self, act) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), act
        self.seen: deque[int] = deque(maxlen=3)
        self.nested = {"a": [([],)]}
        self.space, self.tally, self.array = SimpleNamespace(n=0), Tally(), numpy.zeros(2)
        self.count, self.iterator = itertools.count(), iter(range(1000))
        self.random, self.numpy, self.torch = random.Random(0), numpy.random.default_rng(0), torch.Generator()
        self.bump = closure()
        self.plain = torch.zeros(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.act(self)
        return F.relu(self.norm(self.conv(x)))


ACTS = {
    "deque": lambda m: m.seen.append(1),
    "nested": lambda m: m.nested["a"][0][0].append(1),
    "namespace": lambda m: setattr(m.space, "n", m.space.n + 1),
    "object": lambda m: setattr(m.tally, "n", m.tally.n + 1),
    "array": lambda m: m.array.__setitem__(0, m.array[0] + 1),
    "tensor": lambda m: m.plain.add_(1),
    "count": lambda m: next(m.count),
    "iterator": lambda m: next(m.iterator),
    "random": lambda m: m.random.random(),
    "numpy": lambda m: m.numpy.random(),
    "torch": lambda m: torch.rand(2, generator=m.torch).tolist(),
    "closure": lambda m: m.bump(),
    "class": lambda m: setattr(type(m), "calls", type(m).calls + 1),
    "class table": lambda m: m.table.update({len(m.table): 1}),
    "another class": lambda m: setattr(Tally, "n", Tally.n + 1),
    "global": lambda m: note_total(),
    "global list": lambda m: note(),
    "global list by another": lambda m: note_elsewhere(),
    "global object": lambda m: setattr(TALLY, "n", TALLY.n + 1),
    "global count": lambda m: next(COUNT),
    "global array": lambda m: NOISE.__setitem__(0, NOISE[0] + 1),
    "function": lambda m: note_on_itself(),
}


@pytest.mark.parametrize("act", ACTS.values(), ids=list(ACTS))
def test_what_a_forward_changes_is_found(act):
    block = Block(act).eval()
    reached = Reached(block)
    block(X)
    assert reached.changed()


@pytest.mark.parametrize("name", ["nested", "object", "count", "closure", "class", "global", "global list", "function"])
def test_a_forward_that_changes_something_is_left_alone(name):
    fused = bn.from_torch(Block(ACTS[name]), example=X)
    (row,) = fused.batchnorm_report
    assert row.done == "left alone"
    assert row.why.startswith("the forward of the model cannot be traced: it changes ")
    assert row.why.endswith(", which would happen once")
    before = Reached(fused.eval())
    fused(X)
    assert before.changed()


def test_a_generator_that_it_draws_from():
    held = SimpleNamespace(numbers=numbers())
    next(held.numbers)
    reached = Reached(held)
    assert not reached.changed()
    next(held.numbers)
    assert reached.changed() == "a generator"


@pytest.mark.parametrize("act", [lambda m: None, lambda m: setattr(m, "scale", 2 * m.calls + 0.5), lambda m: cached(1)])
def test_what_stays_as_it_is_is_no_change(act):
    block = Block(act).eval()
    block(X)
    reached = Reached(block)
    block(X)
    assert reached.changed() is None
    assert bn.from_torch(block, example=X).batchnorm_report[0].done == "fused"


class Fills(nn.Module):
    """One that puts something into what it is given."""

    def __init__(self, into) -> None:
        super().__init__()
        self.norm, self.into = nn.BatchNorm2d(4), into

    def forward(self, x: torch.Tensor, cache) -> torch.Tensor:
        self.into(cache)
        return F.relu(self.norm(x))


@pytest.mark.parametrize(
    ("into", "cache"),
    [
        (lambda cache: cache.append(1), []),
        (lambda cache: cache.update(step=1), {}),
        (lambda cache: setattr(cache, "n", cache.n + 1), SimpleNamespace(n=0)),
        (lambda cache: cache[0].add_(1), [torch.zeros(2)]),
    ],
    ids=["list", "dict", "object", "tensor"],
)
def test_what_it_is_given_changes(into, cache):
    fused = bn.from_torch(Fills(into), example=(X, cache))
    assert fused.batchnorm_report[0].why.endswith("cannot be traced: it changes what it is given")
    reached = Reached(cache)
    fused.eval()(X, cache)
    assert reached.changed()
