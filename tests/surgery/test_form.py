"""Forwards that torch.fx wrote, called in other ways than the example's, and what they return."""

import copy
import enum
import pickle
from collections import OrderedDict, namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchnorm as bn
from tests.surgery.test_fuse import shaken

X = torch.randn(3, 4, 6, 6, dtype=torch.float64)
Y = X + 1


class Mode(enum.Enum):
    PLAIN, TWICE = 1, 2


class Normalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)


class Named(Normalized):
    def forward(self, x, scale=2.0, mask=None, *more, mode=Mode.PLAIN, **others):
        y = F.silu(self.norm(x)) * scale
        y = y if mask is None else y * mask
        for each in more:
            y = y + each
        for each in others.values():
            y = y - each
        return y * 2 if mode is Mode.TWICE else y


class Listed(Normalized):
    def forward(self, x, extras=(), dtype=torch.float64):
        y = F.silu(self.norm(x))
        y = y + sum(extras) if isinstance(extras, list | tuple) and extras else y
        return y * 2 if dtype is torch.float16 else y


class Pair(Normalized):
    def forward(self, q, k):
        return F.silu(self.norm(q)) * (2 if q is k else k)


class Batched(Normalized):
    def forward(self, batch, flag=False):
        return F.silu(self.norm(batch["x"])) * (2 if "y" in batch or flag else 3)


def call(*args, **kwargs):
    return args, kwargs


OTHER_CALLS = [
    (Named, X, [call(x=X), call(X, 2.0), call(X, scale=2.0, mask=None, mode=Mode.PLAIN)], True),
    (Named, {"x": X, "scale": 2.0}, [call(X), call(scale=2.0, x=Y)], True),
    (Named, (X, 2.0, None, Y), [call(X, 2.0, None, X + 2)], True),
    (Named, {"x": X, "other": Y}, [call(X, other=X - 3)], True),
    (Named, X, [call(X, mode=Mode.TWICE)], False),
    (Named, X, [call(X, 3.0)], False),
    (Named, X, [call(X, mask=Y)], False),
    (Named, X, [call(X, 2.0, None, Y)], False),
    (Named, {"x": X, "other": Y}, [call(X, another=Y)], False),
    (Listed, X, [call(Y, ())], True),
    (Listed, {"x": X, "extras": [X, Y]}, [call(Y, [Y, X])], True),
    (Listed, {"x": X, "extras": [X, Y]}, [call(X, [Y])], False),
    (Listed, X, [call(X, [X])], False),
    (Listed, X, [call(X, dtype=torch.float16)], False),
    (Pair, (X, Y), [call(Y, X), call(k=X, q=Y)], True),
    (Pair, (X, Y), [call(X, X)], False),
    (Pair, (X, X), [call(Y, Y)], True),
    (Pair, (X, X), [call(X, Y)], False),
    (Batched, ({"x": X},), [call({"x": Y})], True),
    (Batched, ({"x": X},), [call({"x": X, "y": Y})], False),
    (Batched, ({"x": X},), [call({"x": X}, True)], False),
]


@pytest.mark.parametrize(("kind", "example", "calls", "fits"), OTHER_CALLS)
@pytest.mark.parametrize("first", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_call_unlike_the_example_runs_the_forward_that_there_was(kind, example, calls, fits, first):
    model = shaken(kind()).eval()
    fused = first(bn.from_torch(model, example=example))
    assert fused.norm.activation == "silu"
    for args, kwargs in calls:
        torch.testing.assert_close(fused(*args, **kwargs), model(*args, **kwargs))
        assert fused.norm.fused == fits
    if not fits:
        assert type(fused) is kind


def test_what_is_missing_is_said_by_the_forward_that_there_was():
    fused = bn.from_torch(shaken(Named()), example=X)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        fused(scale=2.0)


Out = namedtuple("Out", "y")


@pytest.mark.parametrize("kind", [OrderedDict, Out, dict, lambda y: [y["y"]]])
def test_the_class_of_what_is_returned(kind):
    class Returning(Normalized):
        def forward(self, x):
            y = F.relu(self.norm(x))
            return kind(y) if kind is Out else kind({"y": y})

    model = shaken(Returning())
    fused = bn.from_torch(model, example=X)
    assert type(fused(X)) is type(model(X))
    (row,) = fused.batchnorm_report
    assert row.done == "fused" or row.why.endswith("rewritten, returns a dict instead of a OrderedDict")
