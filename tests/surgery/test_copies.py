"""The example and the model given are as they were, whatever a forward does with them and whoever holds them."""

import collections
import copy
import dataclasses
import functools
import types
import weakref

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


def test_sparse_tensors_in_an_example_and_in_the_outputs():
    class Convolution(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.bn, self.act = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU()

        def forward(self, x, edges):
            return self.act(self.bn(self.lin(torch.sparse.mm(edges, x)))), edges.coalesce()

    model, example = Convolution(), (torch.randn(6, 4), torch.eye(6).to_sparse())
    assert bn.from_torch(model, example=example).batchnorm_report.of("fused") == ["bn"]
    assert bn.fold(model.eval(), example).batchnorm_report.of("folded") == ["bn"]


# ---- the model -------------------------------------------------------------------------------------------------------


class Weak(nn.Module):
    def __init__(self, parent):
        super().__init__()
        self.parent = weakref.ref(parent)

    def forward(self, x):
        return self.parent().last(self.parent().path(x))


class Slots:
    __slots__ = ("empty", "path")

    def __init__(self, path):
        self.path = path


def local_class(me, base=object):
    class Local(base):
        def forward(self, x):
            return me.last(me.path(x))

        __call__ = nn.Module.__call__ if base is nn.Module else forward

    return Local()


def frozen(path):
    return dataclasses.make_dataclass("Frozen", ["path"], frozen=True)(path)


class Held(Block):
    """Its forward is done by something that holds it."""

    def __init__(self, kind):
        super().__init__()
        known = types.SimpleNamespace(net=self)
        self.known = known
        self.run = HOLDERS[kind](self, known)

    def path(self, x):
        return F.relu(self.bn(self.conv(x)))

    def last(self, x):
        return F.relu(self.plain(x))

    def forward(self, x):
        return self.run(x)


class Turns(collections.deque):
    def __call__(self, x):
        for step in self:
            x = step(x)
        return x


class Calls:
    def __init__(self, held):
        self.held = held

    def __call__(self, x):
        return self.held.path(x)


HOLDERS = {
    "weak reference": lambda net, _: Weak(net),
    "cache": lambda net, _: functools.lru_cache(typed=True)(lambda x: net.last(net.path(x))),
    "deque": lambda net, _: Turns([lambda x: net.path(x), lambda x: net.last(x)]),
    "slots": lambda net, _: Calls(Slots(lambda x: net.last(net.path(x)))),
    "local class": lambda net, _: local_class(net),
    "module of a local class": lambda net, _: local_class(net, nn.Module),
    "frozen dataclass": lambda net, _: Calls(frozen(lambda x: net.last(net.path(x)))),
    "object that is an attribute": lambda net, known: lambda x: known.net.last(known.net.path(x)),
}
CONVERTED = {
    **VERBS,
    "from_torch alone": lambda m, x: bn.from_torch(m),
    "sync": lambda m, x: bn.convert_sync_batchnorm(m),
}


@pytest.mark.parametrize("verb", CONVERTED)
@pytest.mark.parametrize("kind", HOLDERS)
def test_what_holds_the_model_holds_the_copy_in_the_copy(verb, kind):
    model = Held(kind).eval()
    expected = model(X)
    before, called = copy.deepcopy(model.state_dict()), []
    for module in (model.conv, model.bn, model.plain):
        module.register_forward_pre_hook(lambda *_: called.append(1))
    done = CONVERTED[verb](model, (X,))
    for module in done.modules():
        module._forward_pre_hooks.clear()
    y = done.eval()(X)
    assert not called
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    if verb != "insert":
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


class Itself:
    def __init__(self, path):
        self.path = path

    def __deepcopy__(self, memo):
        return self


PARTS, CONTEXT = {}, types.SimpleNamespace()


class Registered:
    def path(self, x):
        return PARTS["bn"](PARTS["conv"](x))


@pytest.mark.parametrize("verb", [*VERBS, "accelerate"])
@pytest.mark.parametrize("kind", ["object", "registry"])
def test_a_layer_of_the_model_given_that_would_run_is_named(verb, kind):
    model = Block()
    PARTS.update(conv=model.conv, bn=model.bn)
    model.run = Itself(lambda x: model.bn(model.conv(x))) if kind == "object" else Registered()
    model.__class__ = type("Running", (Block,), {"forward": lambda self, x: F.relu(self.plain(self.run.path(x)))})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"layer conv of the model given was called when a copy of it ran"):
        {**VERBS, "accelerate": bn.accelerate}[verb](model.eval(), (X,))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    model(X)  # and no hook is left


def in_a_global_dict(self, x):
    return PARTS["bn"](PARTS["conv"](x))


def through_a_function(self, x):
    return in_a_global_dict(self, x)


def in_a_global_object(self, x):
    return CONTEXT.bn(self.conv(x))


@pytest.mark.parametrize("verb", CONVERTED)
@pytest.mark.parametrize(
    ("forward", "name"),
    [(in_a_global_dict, "PARTS"), (through_a_function, "PARTS"), (in_a_global_object, "CONTEXT.bn")],
)
def test_a_forward_that_reads_global_parts_is_named(verb, forward, name):
    model = nn.Sequential(type("Reading", (Block,), {"forward": forward})()).eval()
    PARTS.update(conv=model[0].conv, bn=model[0].bn)
    CONTEXT.bn = model[0].bn
    with pytest.raises(ValueError, match=rf"0.forward is a function that reads the global variable '{name}', which is"):
        CONVERTED[verb](model, (X,))
    PARTS.clear()
    CONTEXT.bn = None


def test_hooks_may_note_down_modules_in_global_containers():
    model = Block().eval()
    model.conv.register_forward_hook(lambda module, *_: PARTS.update({"last": module}))
    PARTS["last"] = model.conv
    bn.from_torch(model, example=X)(X)
    assert PARTS.pop("last") is not model.conv


def test_a_module_that_gives_itself_as_its_copy_is_named():
    model = nn.Sequential(type("Itself", (Block,), {"__deepcopy__": lambda self, memo: self})())
    with pytest.raises(ValueError, match=r"copy.deepcopy gives 0, 0.conv, .* as it is, .* look at its __deepcopy__"):
        bn.from_torch(model)
