"""The example and the model given are as they were, whatever a forward does with them and whoever holds them."""

import collections

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchnorm as bn

X = torch.randn(3, 4, 6, 6)
VERBS = {
    "from_torch": lambda model, example: bn.from_torch(model, example=example),
    "insert": bn.insert,
    "insert of trained ones": lambda model, x: bn.insert(model, x, batches=[x], forward=lambda m, b: m(*b)),
    "fold": bn.fold,
}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.plain = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return F.relu(self.plain(F.relu(self.bn(self.conv(x)))))


# ---- the example -----------------------------------------------------------------------------------------------------


class Graph:
    """As torch_geometric's: tensors in an object in an object."""

    def __init__(self, x):
        self.store = collections.UserDict(x=x)

    @property
    def x(self):
        return self.store["x"]


def in_place(self, x):
    return Block.forward(self, x.mul_(2))


def taking_out(self, batch):
    return Block.forward(self, batch.pop("x"))


def writing_to(self, graph):
    graph.store["x"] = Block.forward(self, graph.x)
    return graph.x


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("forward", "made", "read"),
    [
        (in_place, lambda x: x, lambda x: x),
        (taking_out, lambda x: {"x": x}, lambda batch: batch["x"]),
        (taking_out, lambda x: collections.UserDict(x=x), lambda batch: batch["x"]),
        (writing_to, Graph, lambda graph: graph.x),
    ],
    ids=["tensor", "dict", "UserDict", "object"],
)
def test_the_example_is_as_before(verb, forward, made, read):
    model = type("Changing", (Block,), {"forward": forward})().eval()
    x = X.clone()
    example = (made(x),)
    done = VERBS[verb](model, example)
    assert read(example[0]) is x
    assert torch.equal(x, X)
    if verb == "fold":
        assert done.batchnorm_report.of("folded") == ["bn"]  # it ran in float64, whatever holds the tensors


# ---- the model -------------------------------------------------------------------------------------------------------
