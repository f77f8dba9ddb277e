"""Additions and activations taken over by the layer before them, and given back."""

import copy
import pickle
import random

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.ops.activations import activation_named
from tests.surgery.annotated import Annotated


def shaken(model):
    """Statistics and parameters that are not those of a fresh layer, which is nearly the identity."""
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.running_mean.normal_(), layer.running_var.uniform_(0.2, 3)
            nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    return model.double()


class Block(nn.Module):
    """Written as torchvision does: one activation module with two call sites, an addition in place."""

    def __init__(self, channels=4):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.relu, self.stride = nn.ReLU(inplace=True), 1

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x
        return self.relu(y)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.other, self.plain = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x, scale=None):
        y = self.drop(F.leaky_relu(self.norm(self.conv(x)), 0.3))
        y = torch.sigmoid(self.other(y))
        return y + self.plain(x) if scale is None else y * scale


def same(model, fused, x):
    """In eval, and a training step: outputs, gradients, state."""
    for mode in (False, True):
        results = []
        for m in (copy.deepcopy(model), copy.deepcopy(fused)):
            torch.manual_seed(0)
            leaf = x.detach().clone().requires_grad_()
            y = m.train(mode)(leaf)
            (y * torch.linspace(0, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
            grads = [p.grad for p in m.parameters()]
            results.append(([y, leaf.grad, *grads], dict(m.state_dict())))
        for a, b in zip(results[0][0], results[1][0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-9, atol=1e-9)


def assert_back(model, fused):
    """to_torch gives what there was."""
    back = bn.to_torch(fused)
    assert repr(back) == repr(model)
    assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
    assert all(a is b for a, b in zip(back.parameters(), model.parameters(), strict=True))


X = torch.randn(3, 4, 6, 6, dtype=torch.float64)


def test_a_module_alone_behind_a_layer_becomes_an_identity():
    model = shaken(
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.BatchNorm2d(4), nn.LeakyReLU(0.2))
    )
    fused = bn.from_torch(model, example=X)
    assert [row.why for row in fused.batchnorm_report] == ["with 2", "with 4"]
    assert [layer.activation for layer in (fused[1], fused[3])] == ["silu", ("leaky_relu", 0.2)]
    assert isinstance(fused[2], nn.Identity)
    assert type(model[2]) is nn.SiLU
    same(model, fused, X)
    assert_back(model, fused)


def test_a_residual_block_is_two_calls_of_ours():
    model = shaken(nn.Sequential(Block(), Block()))
    fused = bn.from_torch(model, example=X)
    assert [tuple(row) for row in fused.batchnorm_report if row.layer.startswith("0")] == [
        ("0.bn1", "fused", "with relu, in the forward of 0"),
        ("0.bn2", "fused", "with add() and relu, in the forward of 0"),
    ]
    assert isinstance(fused[0], Block)
    assert fused[0].stride == 1
    calls = []
    hook = fused[0].bn2.register_forward_hook(
        lambda m, args, kwargs, out: calls.append(kwargs.keys()), with_kwargs=True
    )
    fused(X)
    assert calls == [{"residual"}]
    hook.remove()
    same(model, fused, X)
    assert repr(fused) == repr(bn.from_torch(model)).replace(
        "track_running_stats=True)", "track_running_stats=True, activation='relu')"
    )
    again = pickle.loads(pickle.dumps(copy.deepcopy(fused)))
    torch.testing.assert_close(again.eval()(X), fused.eval()(X))
    assert_back(model, fused)


def test_functions_and_arguments_with_defaults():
    model = shaken(Functional())
    fused = bn.from_torch(model, example=X)
    assert {row.layer: row.why for row in fused.batchnorm_report} == {
        "norm": "with leaky_relu(), in the forward of the model",
        "other": "with sigmoid(), in the forward of the model",
        "plain": "with add(), in the forward of the model",
    }
    assert fused.norm.activation == ("leaky_relu", 0.3)
    same(model, fused, X)
    assert_back(model, fused)
    fused.eval(), model.eval()
    torch.testing.assert_close(fused(X, scale=None), model(X))
    assert fused.norm.fused
    torch.testing.assert_close(fused(X, X), model(X, X))  # the forward was written for calls without it
    assert type(fused) is Functional
    assert not fused.norm.fused


class Unusual(nn.Module):
    """One of each that is left alone."""

    def __init__(self):
        super().__init__()
        self.read_twice, self.used_twice, self.to_conv = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.conv, self.never, self.broadcast = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.flow = Flow()

    def forward(self, x):
        y = self.read_twice(x)
        y = F.relu(y) * y
        y = F.relu(self.used_twice(self.used_twice(y)))
        y = self.conv(self.to_conv(y))
        y = self.broadcast(y) + y.mean(0, keepdim=True)
        return self.flow(y)


class Flow(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(self.norm(x)) if x.sum() != 0 else x


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        y = F.relu(self.norm(x))
        x += 1
        return y


class ByMode(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        y = F.relu(self.norm(x))
        return F.dropout(y, 0.5, self.training)


def test_what_is_left_alone_and_why():
    model = shaken(Unusual())
    fused = bn.from_torch(model, example=X)
    why = {row.layer: row.why for row in fused.batchnorm_report}
    assert {row.done for row in fused.batchnorm_report} == {"left alone"}
    assert why.pop("flow.norm").startswith("the forward of flow cannot be traced: symbolically traced variables cannot")
    assert why == {
        "read_twice": "its output is read more than once",
        "used_twice": "it is called 2 times",
        "to_conv": "its output goes to conv",
        "never": "the example does not reach it",
        "broadcast": "its output goes to add(), of something of another shape, (1, 4, 6, 6)",
    }
    same(model, fused, X)
    assert_back(model, fused)
    in_place = bn.from_torch(shaken(nn.Sequential(InPlace())), example=X)
    assert in_place.batchnorm_report[0].why.endswith("cannot be traced: it changes what it is given")
    by_mode = bn.from_torch(shaken(ByMode()), example=X)
    assert by_mode.batchnorm_report[0].why.endswith("cannot be traced: it does something else in train than in eval")


class Auxiliary(nn.Module):
    """An activation that is used once more in train."""

    def __init__(self):
        super().__init__()
        self.norm, self.relu = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x):
        y = self.relu(self.norm(x))
        return y + self.relu(x - 1) if self.training else y


def test_what_is_called_otherwise_in_train_or_looked_at_by_hooks():
    fused = bn.from_torch(shaken(Auxiliary()), example=X)
    assert fused.batchnorm_report[0].why == "it, or what follows it, is called differently in train"
    model = shaken(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())).eval()
    model[1].register_forward_hook(lambda *_: None)
    assert "hooks" in bn.from_torch(model, example=X).batchnorm_report[0].why
    assert "hooks" in bn.fold(model, X).batchnorm_report[0].why


def test_a_forward_that_would_give_other_values_is_put_back(monkeypatch):
    from batchnorm.surgery import graph

    monkeypatch.setattr(graph, "_activation_of", lambda module, node: activation_named("tanh"))  # were it read wrongly
    model = shaken(nn.Sequential(Block()))
    fused = bn.from_torch(model, example=X)
    assert all("rewritten, gives other values" in row.why for row in fused.batchnorm_report)
    same(model, fused, X)
    assert repr(fused) == repr(bn.from_torch(model))


def test_the_model_given_is_unchanged_on_errors_too():
    model = shaken(nn.Sequential(Block()))
    before, text = copy.deepcopy(model.state_dict()), repr(model)
    with pytest.raises(RuntimeError, match="channels"):
        bn.from_torch(model, example=torch.randn(3, 5, 6, 6, dtype=torch.float64))
    bn.from_torch(model, example=X)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert repr(model) == text
    assert all(p.grad is None for p in model.parameters())


def test_what_cannot_go_back():
    with pytest.raises(TypeError, match="layer '0' was built with activation='relu'"):
        bn.to_torch(nn.Sequential(bn.BatchNorm1d(3, activation="relu")))
    with pytest.raises(ValueError, match=r"layer '0' has statistics=Ghost\(size=2"):
        bn.to_torch(nn.Sequential(bn.BatchNorm1d(3, statistics=bn.Ghost(2))))
    frozen = nn.Sequential(bn.BatchNorm1d(3))
    bn.freeze(frozen)
    with pytest.raises(ValueError, match=r"layer '0' is frozen.*unfreeze\(model\) first"):
        bn.to_torch(frozen)
    with pytest.raises(TypeError, match=r"to_torch takes a torch.nn.Module, got list"):
        bn.to_torch([])


class Stem(nn.Module):
    """An activation in its forward, and blocks with some in theirs, one in a child that only normalizes."""

    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), nn.Sequential(Block(), Block())

    def forward(self, x):
        return self.blocks(F.relu(self.stem(x)))


def test_only_what_holds_a_layer_is_written_into_a_forward_around_it():
    model = shaken(Stem())
    called = []
    model.blocks.register_forward_hook(lambda *_: called.append(1))
    fused = bn.from_torch(model, example=X)
    assert fused.batchnorm_report.of("fused") == ["stem.1"] + [f"blocks.{i}.bn{j}" for i in range(2) for j in (1, 2)]
    called.clear()
    same(model, fused, X)
    assert len(called) == 4  # each of both, in eval and train
    assert_back(model, fused)
    model.stem.register_forward_hook(lambda *_: None)
    why = bn.from_torch(model, example=X).batchnorm_report[0].why
    assert why == "the forward of the model cannot be traced: stem in it has hooks, which would not be called"


class SideHead(nn.Module):
    """In train one more reader: of the layer's output, where in eval the activation alone reads it."""

    def __init__(self):
        super().__init__()
        self.norm, self.relu, self.aux = nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 1)

    def forward(self, x):
        y = self.norm(x)
        return (self.relu(y), self.aux(y)) if self.training else self.relu(y)


def test_one_more_reader_in_train():
    fused = bn.from_torch(shaken(SideHead()), example=X)
    assert fused.batchnorm_report[0].why == "it, or what follows it, is called differently in train"


def test_a_model_that_gives_other_values_with_all_fused_is_put_back(monkeypatch):
    from batchnorm.surgery import fuse

    monkeypatch.setattr(fuse, "_same", lambda *_: True)  # were the reader in train not seen
    model = shaken(nn.Sequential(SideHead()))
    fused = bn.from_torch(model, example=X)
    assert fused.batchnorm_report[0].done == "left alone"
    assert fused.batchnorm_report[0].why.startswith("with all that could be fused, the model gives other values")
    assert type(fused[0].relu) is nn.ReLU
    assert fused[0].norm.activation is None


class NotRecorded(nn.Module):
    """What torch.fx does not record, in a forward that is to be rewritten."""

    def __init__(self, what):
        super().__init__()
        self.conv, self.norm, self.what, self.calls, self.seen = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), what, 0, []
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        if self.what == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                x = self.conv(x)
        elif self.what == "no_grad":
            with torch.no_grad():
                x = self.conv(x)
        elif self.what == "set_grad_enabled":
            with torch.set_grad_enabled(False):
                x = self.conv(x)
        elif self.what == "checkpoint":
            x = checkpoint(self.conv, x, use_reentrant=False)
        elif self.what == "random":
            x = x * random.random()
        elif self.what == "numpy":
            x = x * numpy.random.rand()
        elif self.what == "torch":
            x = x + torch.rand(1)
        elif self.what == "attribute":
            self.calls += 1
        elif self.what == "list":
            self.seen.append(len(self.seen))
        elif self.what == "buffer":
            self.count += 1
        return F.relu(self.norm(x))


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("autocast", "it enters autocast, which would be lost"),
        ("no_grad", "it enters no_grad, which would be lost"),
        ("set_grad_enabled", "it enters set_grad_enabled, which would be lost"),
        ("checkpoint", "it calls torch.utils.checkpoint, which would be lost"),
        *[(what, "it draws random numbers that would be constants") for what in ("random", "numpy", "torch")],
        ("attribute", "it changes an attribute of a NotRecorded, which would happen once"),
        ("list", "it changes a list, which would happen once"),
        ("buffer", "it changes a tensor in place, which would happen once"),
    ],
)
def test_what_torch_fx_would_lose_is_left_alone(what, why):
    model = NotRecorded(what)
    fused = bn.from_torch(model, example=X.float())
    assert fused.batchnorm_report[0].why == f"the forward of the model cannot be traced: {why}"
    assert not any(isinstance(value, torch.fx.Proxy) for value in (*vars(fused).values(), *fused.seen))
    assert type(fused) is NotRecorded
    assert torch.is_grad_enabled()
    pickle.loads(pickle.dumps(fused))


def test_a_reader_that_keeps_the_tensor_and_none():
    class Keeps(nn.Sequential):
        def forward(self, x):
            self.feature = self[0](x)
            return self[1](self.feature)

    kept = bn.from_torch(Keeps(nn.BatchNorm2d(4), nn.ReLU()), example=X.float())
    assert kept.batchnorm_report[0].why == "its output is read more than once"

    class Unread(nn.Sequential):
        def forward(self, x):
            self[0](x)
            return x

    unread = bn.from_torch(Unread(nn.BatchNorm2d(4)), example=X.float())
    assert unread.batchnorm_report[0].why == "nothing is known to read its output"


@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_an_activation_with_hooks_stays(register):
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    getattr(model[2], register)(lambda *_: None)
    assert bn.from_torch(model, example=X.float()).batchnorm_report[0].why == "its output goes to 2, which has hooks"
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    model[1].register_full_backward_hook(lambda *_: None)
    assert "hooks" in bn.from_torch(model, example=X.float()).batchnorm_report[0].why


def test_back_from_a_forward_that_was_rewritten_twice():
    model = shaken(nn.Sequential(Block()))
    hook = model[0].bn2.register_forward_hook(lambda *_: None)
    once = bn.from_torch(model, example=X)
    once[0].bn2._forward_hooks.clear(), hook.remove()
    twice = bn.from_torch(once, example=X)
    assert twice[0].bn2.fused
    same(model, twice, X)
    assert_back(model, twice)


@pytest.mark.parametrize("default", [(1, 2), [1], {"a": 1}], ids=str)
def test_containers_as_defaults(default):
    class WithDefault(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x, sizes=default):
            return F.relu(self.norm(x)) * len(sizes)

    report = bn.from_torch(shaken(WithDefault()), example=X).batchnorm_report
    assert len(report) == 1  # fused, or left alone with a reason


def test_scripted_parts():
    inner = nn.BatchNorm1d(4)
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(4, 4), inner)), nn.BatchNorm1d(4), nn.ReLU())
    fused = bn.from_torch(model, example=torch.randn(3, 4))
    assert fused.batchnorm_report.of("fused") == ["1"]
    assert inner.num_batches_tracked == 0


def test_gradients_are_compared_without_a_trace_in_random_numbers():
    model = shaken(nn.Sequential(Block(), nn.Dropout()))
    state = torch.get_rng_state()
    bn.from_torch(model, example=X)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_forward_that_cannot_be_checked_is_not_rewritten():
    class Written(nn.Sequential):
        def forward(self, x):
            return F.relu(self[1](self[0](x.float())))

    why = bn.from_torch(Written(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), example=X.float()).batchnorm_report[0].why
    assert why.endswith("cannot be traced: it does not run in float64, in which it is checked")


def test_in_inference_mode():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), nn.ReLU())
    with torch.inference_mode():
        assert bn.from_torch(model, example=X.float() + 1).batchnorm_report.of("fused") == ["0.1"]


# ---- what torch.fx is helped with, and what may stand in between -----------------------------------------------------


class MakesTensors(nn.Module):
    """Adds something that its forward makes of nothing it is given."""

    def __init__(self, make):
        super().__init__()
        self.conv, self.norm, self.make = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), make

    def forward(self, x):
        return F.relu(self.norm(self.conv(x))) + self.make(self)


def in_place(_):
    t = torch.zeros(6)
    t[0] = 1
    return t


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda _: torch.eye(6), None),
        (lambda _: torch.eye(6).flatten().view(6, 6).mT.contiguous() * 2, None),
        (lambda _: torch.arange(6), None),
        (lambda _: torch.tensor(1.0), None),
        (lambda _: torch.arange(6, dtype=torch.int64) if len(torch.arange(3).tolist()) == 3 else 0, None),
        (lambda _: torch.zeros(6, dtype=torch.float64, device="cpu").double(), None),
        (lambda self: torch.eye(6, dtype=next(self.parameters()).dtype), "dtype or device of its parameters"),
        (lambda self: torch.eye(6, device=next(self.parameters()).device), "dtype or device of its parameters"),
        (in_place, "it makes a tensor and changes it in place, which would be a constant"),
        (
            lambda _: torch.from_numpy(numpy.ones(6)),
            "it changes an attribute of a MakesTensors, which would happen once",
        ),
    ],
)
def test_tensors_that_a_forward_makes_are_made_again_each_time(make, why):
    model = shaken(MakesTensors(make))
    fused = bn.from_torch(model, example=X)
    (row,) = fused.batchnorm_report
    assert row.done == ("left alone" if why else "fused"), row
    assert why is None or why in row.why
    same(model, fused, X)
    if why is None:  # no constant is kept anywhere
        assert not [value for value in vars(fused).values() if isinstance(value, torch.Tensor)]
        twin, x = copy.deepcopy(model).float(), X.float()
        torch.testing.assert_close(fused.float()(x).float(), twin(x).float())


def test_annotations_that_are_strings():
    model = shaken(nn.Sequential(Annotated()))
    fused = bn.from_torch(model, example=X)
    assert fused.batchnorm_report.of("fused") == ["0.bn"]
    same(model, fused, X)
    assert_back(model, fused)


class Between(nn.Module):
    """Something between the layer and an activation, or an addition, that its forward calls."""

    def __init__(self, between, then):
        super().__init__()
        self.norm, self.between, self.then = nn.BatchNorm2d(4), between, then

    def forward(self, x):
        return self.then(self.between(self.norm(x)), x)


def relu(y, x):
    return F.relu(y)


def silu(y, x):
    return F.silu(y)


def add(y, x):
    return y + x


@pytest.mark.parametrize(
    ("between", "then", "why"),
    [
        (nn.Dropout(0.0), relu, None),
        (nn.Dropout(0.4), relu, None),
        (nn.Dropout2d(0.4), relu, None),
        (nn.Dropout(0.0), silu, None),
        (nn.Dropout(0.0), add, None),
        (nn.Identity(), add, None),
        (nn.Sequential(nn.Dropout(0.0), nn.Identity()), silu, None),
        (nn.Dropout(0.4), silu, "a Dropout(p=0.4) is between it and silu"),
        (nn.Dropout(0.4), add, "a Dropout(p=0.4) is between it and an addition"),
        (nn.AlphaDropout(0.0), relu, "its output goes to between"),
    ],
)
def test_dropout_and_nothing_in_between(between, then, why):
    model = shaken(Between(between, then))
    fused = bn.from_torch(model, example=X)
    (row,) = fused.batchnorm_report
    assert (row.done, row.why if why else why) == (("left alone", why) if why else ("fused", None))
    same(model, fused, X)
    assert repr(bn.to_torch(fused)) == repr(model)
    modules = nn.Sequential(copy.deepcopy(model.norm), between, {relu: nn.ReLU(), silu: nn.SiLU()}.get(then, nn.Tanh()))
    if then is not add:
        same(modules, bn.from_torch(modules, example=X), X)


def test_what_is_called_between_is_called_still():
    fused = bn.from_torch(shaken(Between(nn.Identity(), relu)), example=X)
    called = []
    fused.between.register_forward_hook(lambda *_: called.append(1))
    fused(X)
    assert called == [1]


def test_shared_layers_are_left_alone_and_the_rest_is_done():
    shared, relu = nn.BatchNorm2d(4), nn.ReLU()
    model = shaken(nn.Sequential(nn.Conv2d(4, 4, 1), shared, relu, nn.Conv2d(4, 4, 1), shared, relu, Block()))
    model[0].alias = model[6]
    fused = bn.from_torch(model, example=X)
    assert {row.layer: row.done for row in fused.batchnorm_report} == {
        "0.alias.bn1": "fused", "0.alias.bn2": "fused", "1": "left alone",
    }  # fmt: skip
    assert fused[0].alias is fused[6]
    same(model, fused, X)
    assert_back(model, fused)


ACTS = [nn.GELU(), nn.GELU("tanh"), nn.ELU(0.5), nn.Mish(), nn.Hardtanh(-2.0, 0.5)]


class Calls(nn.Module):
    """The function that a module stands for, as a network's forward calls it."""

    def __init__(self, function):
        super().__init__()
        self.norm, self.function = nn.BatchNorm2d(4), function

    def forward(self, x):
        return self.function(self.norm(x) + x)


@pytest.mark.parametrize(
    ("function", "activation"),
    [
        (F.gelu, "gelu"),
        (lambda y: F.gelu(y, approximate="tanh"), "gelu_tanh"),
        (lambda y: F.elu(y, 0.5), ("elu", 0.5)),
        (F.mish, "mish"),
        (lambda y: F.hardtanh(y, -2.0, max_val=0.5), ("hardtanh", -2.0, 0.5)),
        (lambda y: F.leaky_relu(y, negative_slope=0.25), ("leaky_relu", 0.25)),
    ],
)
def test_functions_with_parameters_are_taken_over_with_them(function, activation):
    model = shaken(Calls(function))
    fused = bn.from_torch(model, example=X)
    assert fused.norm.activation == activation
    same(model, fused, X)
    assert_back(model, fused)


@pytest.mark.parametrize("act", ACTS, ids=str)
def test_every_activation_is_taken_over_and_given_back(act):
    model = shaken(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), act))
    fused = bn.from_torch(model, example=X)
    assert isinstance(fused[2], nn.Identity)
    assert repr(fused[1].g.module()) == repr(act)
    same(model, fused, X)
    assert_back(model, fused)


def test_a_slope_that_is_trained_stays_where_it_is():
    model = shaken(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.PReLU()))
    fused = bn.from_torch(model, example=X)
    assert type(fused[2]) is nn.PReLU
    assert fused.batchnorm_report[0].why.startswith("its output goes to 2, a PReLU: its slope is a parameter that is")
    same(model, fused, X)


def test_how_often_the_model_runs_as_the_docstring_says(monkeypatch):
    runs, forward = [], nn.Conv2d.forward

    def counted(self, x):
        runs.append(self.kernel_size)
        return forward(self, x)

    tail = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    model = shaken(nn.Sequential(Calls(F.relu), tail))
    model[0].norm = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)).double()
    monkeypatch.setattr(nn.Conv2d, "forward", counted)
    fused = bn.from_torch(model, example=X)
    assert {row.done for row in fused.batchnorm_report} == {"fused"}
    assert [runs.count((size, size)) for size in (1, 3)] == [9, 15]
