"""Later calls of what was fused: sums that broadcast then, and what a forward asks about where it runs."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import get_default_dtype, is_grad_enabled, nn

import batchnorm as bn
from tests.surgery.test_fuse import assert_back, same, shaken

X = torch.randn(3, 4, 6, 6, dtype=torch.float64)
Y = X + 1


class Normalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)


# ---- the other summand -----------------------------------------------------------------------------------------------


class Sum(Normalized):
    def __init__(self, activation):
        super().__init__()
        self.activation = activation

    def forward(self, x, other):
        return self.activation(self.norm(self.conv(x)) + other)


class InPlace(Sum):
    def forward(self, x, other):
        y = self.norm(self.conv(x))
        y += other
        return self.activation(y)


class Position(Normalized):
    """With one of shape (1, C, H, W), which is of the output's shape where the batch is one example."""

    def __init__(self):
        super().__init__()
        self.position, self.gain = nn.Parameter(torch.randn(1, 4, 6, 6)), nn.Parameter(torch.randn(1))

    def forward(self, x):
        return F.silu(self.norm(self.conv(x)) + self.position * self.gain)


def trained(model, train, *given):
    """Outputs, gradients and statistics of a copy."""
    model, leaves = copy.deepcopy(model).train(train), [t.detach().clone().requires_grad_() for t in given]
    y = model(*leaves)
    (y * torch.linspace(0, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [y, *(t.grad for t in (*leaves, *model.parameters())), *model.buffers()]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", [Sum, InPlace])
@pytest.mark.parametrize("activation", [F.relu, F.silu, F.tanh, lambda y: y])
def test_a_summand_that_broadcasts_in_a_later_call(kind, activation, train):
    model = shaken(kind(activation))
    fused = bn.from_torch(model, example=(X, Y))
    assert fused.norm.fused
    shapes = [X[:1], X[:, :1], X[:1, :, :1, :1], X[0], X[0, 0, 0, 0], X[:, :, :, 2:3]]
    for other in shapes if kind is InPlace else [*shapes, torch.randn(2, *X.shape).double()]:
        torch.testing.assert_close(trained(fused, train, X, other), trained(model, train, X, other))
    if kind is Sum and not train:
        torch.testing.assert_close(trained(fused, train, X[:1], Y), trained(model, train, X[:1], Y))
    with pytest.raises(RuntimeError, match="must match the size"):
        fused(X, X[:2])
    same_shape = trained(fused, train, X, Y + 3)
    torch.testing.assert_close(same_shape, trained(model, train, X, Y + 3))


def test_an_example_of_one_and_a_batch_of_more():
    model = shaken(Position()).eval()
    fused = bn.from_torch(model, example=X[:1])
    assert fused.norm.fused
    for train in (False, True):
        torch.testing.assert_close(trained(fused, train, X), trained(model, train, X))
    (row,) = bn.from_torch(model, example=X).batchnorm_report
    assert row.why == "its output goes to add(), of something of another shape, (1, 4, 6, 6)"


def test_who_calls_a_layer_with_another_shape_is_told():
    with pytest.raises(ValueError, match=r"residual must have the shape of input.*expand it, or add it yourself"):
        bn.BatchNorm2d(4)(X.float(), residual=X[:1].float())


# ---- what a forward asks ---------------------------------------------------------------------------------------------


class Asking(Normalized):
    """By a question, which may be of another result in a later call."""

    def __init__(self, ask):
        super().__init__()
        self.ask = ask

    def forward(self, x):
        y = F.relu(self.norm(self.conv(x)))
        return y * 2 if self.ask(self) else y


ASKED = [
    (lambda _: torch.is_autocast_enabled("cpu"), "under autocast"),
    (lambda _: torch.is_autocast_enabled(), "under autocast"),
    (lambda m: m.training and torch.is_autocast_enabled("cpu"), "under autocast"),
    (lambda _: torch.get_autocast_dtype("cpu") == torch.float16, "under autocast in float16"),
    (lambda _: is_grad_enabled(), "without gradients"),  # by a name of its own
    (lambda m: not m.training and not torch.is_grad_enabled(), "without gradients"),
    (lambda _: torch.is_inference_mode_enabled(), "in inference mode"),
    (lambda _: torch.is_autocast_enabled("cpu") and not is_grad_enabled(), "under autocast without gradients"),
    (lambda _: get_default_dtype() == torch.float64, "with another default dtype"),
    (lambda _: torch.tensor(1.0).dtype == torch.float64, "with another default dtype"),
]


@pytest.mark.parametrize(("ask", "where"), ASKED)
def test_what_does_something_else_elsewhere_is_left_alone(ask, where):
    model = shaken(Asking(ask))
    before = [torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.get_default_dtype()]
    fused = bn.from_torch(model, example=X)
    (row,) = fused.batchnorm_report
    assert row.why == f"the forward of the model cannot be traced: it does something else {where}"
    assert type(fused) is Asking
    assert before == [torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.get_default_dtype()]
    assert torch.is_grad_enabled()


class Harmless(Normalized):
    """Asks, and does the same, or does so where torch's compiler and exporters run alone."""

    def forward(self, x):
        if torch.is_grad_enabled() and torch.is_autocast_enabled() and torch.is_inference_mode_enabled():
            assert x is not None
        y = F.relu(self.norm(self.conv(x))) + torch.eye(6) * torch.ones(6)
        return y * 2 if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.jit.is_scripting() else y


def test_who_asks_and_does_the_same_is_fused():
    """The compiler sees the way that eager takes."""
    model = shaken(Harmless())
    fused = bn.from_torch(model, example=X)
    assert fused.norm.fused
    same(model, fused, X)
    torch.testing.assert_close(torch.compile(fused.eval(), backend="eager")(X), model.eval()(X))


# ---- modules that are no children ------------------------------------------------------------------------------------


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class OfTheClass(Normalized):
    act = nn.SiLU()

    def forward(self, x):
        return self.act(self.norm(self.conv(x)))


class OfAList(Normalized):
    def __init__(self):
        super().__init__()
        self.acts = [nn.LeakyReLU(0.2), nn.ReLU(inplace=True)]

    def forward(self, x):
        return self.acts[1](self.acts[0](self.norm(self.conv(x))) - 1)


class WithDropout(OfTheClass):
    drop = nn.Dropout(0.5).eval()

    def forward(self, x):
        return self.drop(super().forward(x))


class Hooked(OfTheClass):
    act = nn.SiLU()
    act.register_forward_hook(lambda module, args, out: out * 2)


class WithWeights(OfTheClass):
    project = nn.Conv2d(4, 4, 1).double()

    def forward(self, x):
        return self.project(super().forward(x))


class Theirs(OfTheClass):
    act = Swish()

    def forward(self, x):
        return F.relu(super().forward(x) + self.norm.weight.sum())


class Within(nn.Module):
    """Its child's forward is written into its own."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = OfTheClass(), nn.BatchNorm2d(4)
        self.inner.last = self.last

    def forward(self, x):
        return F.relu(self.inner.last(self.inner(x)))


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        (OfTheClass, "silu"),
        (OfAList, ("leaky_relu", 0.2)),
        (WithDropout, "silu"),
        (Within, "silu"),
        (Hooked, "it calls a SiLU that is no child of a module (a class has it, or a list)"),
        (WithWeights, "it calls a Conv2d that is no child of a module (a class has it, or a list)"),
        (Theirs, "its output is read more than once"),
    ],
)
def test_an_activation_that_is_no_child(kind, found):
    model = shaken(kind())
    fused = bn.from_torch(model, example=X)
    same(model, fused, X)
    (name, layer), *_ = [(n, m) for n, m in fused.named_modules() if isinstance(m, bn.BatchNorm2d)]
    why = next(row.why for row in fused.batchnorm_report if row.layer in (name, name.replace("inner.", "")))
    assert layer.activation == found or why.endswith(found), why
    again = pickle.loads(pickle.dumps(fused))
    torch.testing.assert_close(again.eval()(X), model.eval()(X))
    assert_back(model, fused)
