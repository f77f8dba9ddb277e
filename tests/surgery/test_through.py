"""Forwards that torch.fx wrote, when what they went through is changed: they give back what the user's own would do."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchnorm as bn
from tests.surgery.test_fuse import Block, shaken

X = torch.randn(3, 4, 6, 6, dtype=torch.float64)


def unit():
    return nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))


class Holding(nn.Module):
    """With a layer whose activation stands in the forward, and one of each that a forward may go through."""

    def __init__(self):
        super().__init__()
        self.stem, self.act = unit(), nn.SiLU()
        self.blocks = nn.ModuleList([unit(), nn.Tanh(), unit()])
        self.named = nn.ModuleDict({"a": nn.Conv2d(4, 4, 1), "b": unit()})
        self.empty, self.nested = nn.ModuleList(), nn.ModuleList([nn.ModuleList([nn.Conv2d(4, 4, 1)])])
        self.sequence = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh(), unit())
        self.scales, self.shortcut = nn.ParameterList([torch.randn(1)]), None
        self.register_parameter("gain", None)

    def forward(self, x):
        y = self.act(self.stem(x))
        for block in (*self.blocks, *self.empty, *(each for inner in self.nested for each in inner)):
            y = F.relu(block(y))
        for name, block in self.named.items():
            y = F.relu(block(y)) * len(name)
        for block in self.sequence:
            y = F.relu(block(y))
        for scale in self.scales:
            y = self.act(y * scale)
        y = y if self.gain is None else y * self.gain
        return y if self.shortcut is None else y + self.shortcut(x)


def new():
    torch.manual_seed(2)
    return shaken(unit()).eval()


def put(m, name, value):
    setattr(m, name, value)


CHANGES = {
    "append": lambda m: m.blocks.append(new()),
    "extend": lambda m: m.blocks.extend([new(), nn.Tanh()]),
    "insert": lambda m: m.blocks.insert(0, new()),
    "insert behind": lambda m: m.blocks.insert(2, nn.Sigmoid()),
    "delete": lambda m: m.blocks.__delitem__(1),
    "delete a layer": lambda m: m.blocks.__delitem__(2),
    "replace": lambda m: m.blocks.__setitem__(1, new()),
    "exchange": lambda m: m.blocks.__init__([m.blocks[2], m.blocks[1], m.blocks[0]]),
    "append to none": lambda m: m.empty.append(new()),
    "append inside": lambda m: m.nested[0].append(new()),
    "add_module": lambda m: m.blocks.add_module("more", new()),
    "update": lambda m: m.named.update({"more": new()}),
    "pop": lambda m: m.named.pop("a"),
    "update what is there": lambda m: m.named.update({"a": nn.Tanh()}),
    "a sequence's": lambda m: m.sequence.append(nn.Tanh()),
    "del of a sequence": lambda m: m.sequence.__delitem__(1),
    "a list anew": lambda m: put(m, "blocks", nn.ModuleList([*m.blocks, nn.Tanh()])),
    "an activation": lambda m: put(m, "act", nn.Tanh()),
    "what was none": lambda m: put(m, "shortcut", nn.Conv2d(4, 4, 1).double()),
    "a parameter": lambda m: m.scales.append(torch.randn(1).double()),
    "a parameter that was none": lambda m: put(m, "gain", nn.Parameter(torch.randn(1).double())),
    "a layer around": lambda m: put(m, "stem", nn.Sequential(m.stem, nn.Tanh())),
}


@pytest.fixture(scope="module")
def both():
    model = shaken(Holding()).eval()
    fused = bn.from_torch(model, example=X)
    assert len(fused.batchnorm_report.of("fused")) == 5
    return model, fused


@pytest.mark.parametrize("first", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_forward_went_through_is_changed(both, change, first):
    model, fused = (first(m) for m in both)
    torch.testing.assert_close(fused(X), model(X))
    assert fused.stem[1].fused
    for m in (model, fused):
        torch.manual_seed(1)
        CHANGES[change](m)
    torch.testing.assert_close(fused(X), model(X))
    assert type(fused) is Holding
    assert not fused.stem[1].fused if change != "a layer around" else not fused.stem[0][1].fused


def test_what_the_new_forward_calls_by_its_name_may_be_another_one():
    model = shaken(nn.Sequential(Block())).eval()
    fused = bn.from_torch(model, example=X)
    for m in (model, fused):
        torch.manual_seed(1)
        m[0].conv1 = nn.Conv2d(4, 4, 1).double()
    torch.testing.assert_close(fused(X), model(X))
    assert fused[0].bn1.fused


class Around(nn.Module):
    """Goes through a module that was rewritten before."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = Holding(), nn.BatchNorm2d(4)
        self.inner.last = self.last

    def forward(self, x):
        return F.relu(self.inner.last(self.inner(x)))


@pytest.mark.parametrize("change", ["append", "an activation", "append to none"])
def test_through_a_module_that_was_rewritten_before(change):
    model = shaken(Around()).eval()
    fused = bn.from_torch(bn.from_torch(model, example=X), example=X)
    for m in (model, fused):
        CHANGES[change](m.inner)
    torch.testing.assert_close(fused(X), model(X))


def test_a_compiled_network_sees_that_a_list_is_longer(both):
    model, fused = (copy.deepcopy(m) for m in both)
    compiled = torch.compile(fused, backend="eager")
    torch.testing.assert_close(compiled(X), model(X))
    for m in (model, fused):
        CHANGES["append"](m)
    torch.testing.assert_close(compiled(X), model(X))
