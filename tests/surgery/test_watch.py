"""What one watched forward pass tells: makers and readers of tensors."""

import copy
import random

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from batchnorm.surgery.watch import watch


class Network(nn.Module):
    """Control flow, a functional activation, an addition, a module used twice, several inputs, a dict of outputs."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.twice = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x, scale=None, flip=False):
        y = F.relu(self.norm(self.conv(x)))
        if flip:
            y = y.flip(-1)
        if y.shape[0] > 1:  # asks about y, does not read it
            y = self.twice(y)
        z = self.block(y) + y
        return {"out": self.twice(z), "scaled": z if scale is None else z * scale}


def names(watched, calls):
    return [watched.calls[i].name for i in calls]


def test_who_made_and_who_reads_each_tensor():
    watched = watch(Network(), {"x": torch.randn(2, 2, 5, 5), "scale": torch.tensor(2.0)})
    (norm,) = watched.of("norm")
    assert watched.maker(norm).name == "conv"
    assert watched.only_reader(norm).name == "relu"
    assert watched.only_reader(norm).owner == ""
    assert len(watched.of("twice")) == 2
    assert names(watched, watched.of("twice")[0].readers) == ["block.0", "add"]
    (block,) = watched.of("block.1")
    assert block.owner == "block"
    assert watched.only_reader(block).name == "add"
    add = watched.only_reader(block)
    assert names(watched, add.readers) == ["twice", "mul"]
    assert watched.only_reader(add) is None
    assert names(watched, watched.calls[-1].inputs) == ["twice", "mul"]
    assert "block.1" in str(watched)
    flipped = watch(Network(), (torch.randn(1, 2, 5, 5), None, True))
    assert [call.name for call in flipped.calls if call.kind == "function"] == ["relu", "flip", "add"]


def test_what_is_read_in_unusual_ways_is_seen():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Identity()

        def forward(self, x):
            y = self.a(x)
            z = self.b(y)  # the same tensor
            z.add_(1)
            w = z.T + torch.zeros_like(z).T.reshape_as(z.T)
            z[0] = 0
            return w, len(z), z.data

    watched = watch(Odd(), torch.randn(2, 3))
    (a,) = watched.of("a")
    assert watched.only_reader(a).name == "b"
    assert names(watched, watched.of("b")[0].readers) == ["add_"]
    add = next(call for call in watched.calls if call.name == "add_")
    assert len(add.readers) == 4  # .T twice, [0] = 0, .data; zeros_like only asks


def test_the_model_is_as_before_on_errors_too():
    model = Network().train()
    model.norm.eval()
    before = copy.deepcopy(model.state_dict())
    watch(model, torch.randn(2, 2, 5, 5))
    with pytest.raises(RuntimeError, match="channels"):
        watch(model, torch.randn(2, 3, 5, 5))
    assert model.training
    assert not model.norm.training
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    y = model(torch.randn(2, 2, 5, 5))  # no hook is left that would fail
    assert y["out"].requires_grad


@torch.jit.script
def scripted(x):
    return x.exp()


class Shown:
    def __init__(self, *tensors):
        self.tensors = tensors


class Reads(nn.Module):
    """A layer that an activation reads, and something else."""

    def __init__(self, other):
        super().__init__()
        self.norm, self.relu, self.other = nn.BatchNorm1d(3), nn.ReLU(), other

    def forward(self, x):
        y = self.norm(x)
        z = self.relu(y)
        if self.other == "keeps":
            self.feature = y
        elif self.other == "shows":
            return Shown(z, y)
        else:
            return z, self.other(y)
        return z


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x):
        return self.inner(x.exp())


@pytest.mark.parametrize(
    ("other", "label"),
    [
        (scripted, "exp()"),
        (torch.vmap(lambda x: x.exp()), "exp()"),
        (torch.jit.script(Inner()), "exp()"),
        ("keeps", "what keeps it after the run"),
        ("shows", "the model's output"),
    ],
    ids=["script", "vmap", "scripted module", "attribute", "object"],
)
def test_readers_that_torchs_functions_do_not_show_are_seen(other, label):
    watched = watch(Reads(other), torch.randn(4, 3))
    assert {watched.calls[i].label for i in watched.of("norm")[0].readers} == {"relu", label}


class Rude(nn.Module):
    """Changes what it is given, and draws from all generators."""

    def forward(self, x):
        random.random(), numpy.random.rand(), torch.rand(1)
        return x.mul_(2)


def test_the_example_and_random_numbers_are_as_before():
    x = torch.ones(2, 3)
    before = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()
    watch(Rude(), x)
    assert x.eq(1).all()
    assert random.getstate() == before[0]
    assert numpy.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_what_is_compiled_is_watched_as_it_was_written():
    watched = watch(torch.compile(nn.Sequential(nn.Linear(3, 3), nn.ReLU())), torch.randn(2, 3))
    (linear,) = watched.of("_orig_mod.0")
    assert watched.only_reader(linear).name == "_orig_mod.1"
