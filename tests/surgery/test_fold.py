"""Folding: every kind of layer, both directions, what is refused and why."""

import copy
import functools
from collections import UserDict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchnorm as bn
from batchnorm.surgery.fold_check import run_in_double
from batchnorm.surgery.norms import Rest


def shaken(model, dtype=torch.float64):
    """Statistics and parameters that are not those of a fresh layer, which is nearly the identity."""
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None:
            layer.running_mean.normal_(), layer.running_var.uniform_(0.2, 3)
            if layer.affine:
                nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    return model.to(dtype).eval()


def assert_same(model, folded, x, error=1e-12):
    before = copy.deepcopy(model.state_dict())
    torch.testing.assert_close(folded(x), model(x), rtol=error, atol=error)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


CONVS = [
    nn.Conv1d(4, 6, 3), nn.Conv1d(4, 6, 3, groups=2, dilation=2, padding=1), nn.Conv2d(4, 6, 3, bias=False),
    nn.Conv2d(4, 4, 3, groups=4, stride=2, padding=1, padding_mode="reflect"), nn.Conv3d(4, 6, 2),
    nn.ConvTranspose1d(4, 6, 3), nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2, output_padding=1),
    nn.ConvTranspose2d(4, 8, 3, groups=4, bias=False, dilation=2), nn.ConvTranspose3d(4, 6, 2, padding=1),
    nn.Linear(4, 6), nn.Linear(4, 6, bias=False),
]  # fmt: skip
NORMS = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}


def input_for(layer):
    dims = 2 if isinstance(layer, nn.Linear) else 3 + (len(layer.kernel_size) - 1)
    return torch.randn(2, 4, *[7] * (dims - 2), dtype=torch.float64)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("package", [nn, bn])
@pytest.mark.parametrize("layer", CONVS, ids=str)
def test_into_the_layer_before(layer, package, affine):
    x = input_for(layer)
    out = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    model = shaken(nn.Sequential(copy.deepcopy(layer), getattr(package, NORMS[x.dim()])(out, affine=affine), nn.Tanh()))
    folded = bn.fold(model, x)
    assert folded.batchnorm_report == [("1", "folded", "into 0, before it")]
    assert type(folded[1]) is nn.Identity
    assert_same(model, folded, x)


@pytest.mark.parametrize(
    "layer",
    [
        *[
            c
            for c in CONVS
            if not isinstance(c, nn.modules.conv._ConvTransposeNd) and not any(getattr(c, "padding", ()))
        ],
        nn.Conv2d(4, 6, 3, padding="valid"),
        nn.Conv1d(4, 6, 3, padding="same", padding_mode="circular"),
        *[nn.Conv2d(4, 6, 3, padding=(1, 2), groups=2, padding_mode=m) for m in ("reflect", "replicate", "circular")],
    ],
    ids=str,
)
def test_into_the_layer_after(layer):
    x = input_for(layer)
    model = shaken(nn.Sequential(nn.Tanh(), getattr(nn, NORMS[x.dim()])(4), copy.deepcopy(layer)))
    folded = bn.fold(model, x)
    assert folded.batchnorm_report == [("1", "folded", "into 2, after it")]
    assert_same(model, folded, x)


def test_a_layer_between_two_takes_up_both():
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    model = shaken(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)))
    folded = bn.fold(model, x)
    assert folded.batchnorm_report.of("folded") == ["1", "3"]
    assert_same(model, folded, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype):
    x = torch.randn(2, 4, 6, 6, dtype=dtype)
    model = shaken(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), dtype)
    folded = bn.fold(model, x)
    assert folded[0].weight.dtype == folded[0].bias.dtype == dtype
    assert_same(model, folded, x, {torch.float32: 1e-5}.get(dtype, 0.1))


class Rows(nn.Module):
    """As LeViT has it: features last, rows for batch normalization."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6)

    def forward(self, x):
        y = self.linear(x)
        return self.norm(y.flatten(0, 1)).reshape_as(y)


def test_a_linear_layer_whose_output_is_laid_out_in_rows():
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    model = shaken(Rows())
    folded = bn.fold(model, x)
    assert folded.batchnorm_report == [("norm", "folded", "into linear, before it")]
    assert_same(model, folded, x)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), bn.BatchNorm2d(4, activation="relu")

    def forward(self, x):
        return self.norm(self.conv(x), residual=x)


def test_what_is_left_of_a_fused_layer():
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    model = shaken(Residual())
    folded = bn.fold(model, x)
    assert isinstance(folded.norm, Rest)
    assert repr(folded.norm) == "Rest(activation='relu')"
    assert_same(model, folded, x)


class Registered(nn.BatchNorm2d):
    """Its subclasses give a name."""

    def __init_subclass__(cls, name):
        super().__init_subclass__()


class Named(Registered, name="named"):
    pass


class Slotted(nn.BatchNorm2d):
    __slots__ = ("more",)


def test_classes_that_ask_something_of_their_subclasses_or_of_their_objects():
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    model = shaken(nn.Sequential(nn.Conv2d(4, 4, 1), Named(4), nn.Conv2d(4, 4, 1), Slotted(4)))
    folded = bn.fold(model, x)
    assert folded.batchnorm_report == [
        ("1", "folded", "into 0, before it"),
        ("3", "left alone", "a Slotted has __slots__: the same object cannot be of another class"),
    ]
    assert_same(model, folded, x)


class Reached(nn.Module):
    """Reaches its layers past their names, as torch does not see it."""

    def __init__(self, norm, hold, reach):
        super().__init__()
        self.conv, self.norm, self.reach = nn.Conv2d(4, 4, 1), norm, reach
        vars(self)["held"] = hold(self)

    def forward(self, x):
        return self.reach(self.held, self.conv, x)


WAYS = {
    "list": (lambda net: [net.conv, net.norm], lambda held, conv, x: held[1](held[0](x))),
    "object": (lambda net: SimpleNamespace(norm=net.norm), lambda held, conv, x: held.norm(conv(x))),
    "alias": (lambda net: net.norm, lambda held, conv, x: held(conv(x))),
    "partial": (lambda net: functools.partial(net.norm), lambda held, conv, x: held(conv(x))),
    "bound": (lambda net: net.norm.__call__, lambda held, conv, x: held(conv(x))),
}


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), bn.BatchNorm2d(4, activation="silu")], ids=["stock", "silu"])
@pytest.mark.parametrize(("hold", "reach"), WAYS.values(), ids=list(WAYS))
def test_layers_that_the_forward_reaches_past_their_names(norm, hold, reach):
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    model = shaken(Reached(copy.deepcopy(norm), hold, reach))
    folded = bn.fold(model, x)
    assert folded.batchnorm_report == [("norm", "folded", "into conv, before it")]
    assert_same(model, folded, x)


class AddsInPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        x = x * 1
        x += self.norm(self.conv(x))
        return x


@pytest.mark.parametrize(
    "model", [nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), nn.ReLU(inplace=True)), AddsInPlace()], ids=type
)
def test_what_is_changed_in_place_later_is_checked_as_it_was(model):
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    shaken(model)
    folded = bn.fold(model, x)
    assert [row.done for row in folded.batchnorm_report] == ["folded"]
    assert_same(model, folded, x)


class NamesDtypes(nn.Module):
    """As recurrent networks make their first state, and as models guard against narrow inputs."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.gru = nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.GRU(6, 5, batch_first=True)

    def forward(self, x):
        y = self.norm(self.conv(x.float().to(torch.float32)))
        return self.gru(y.transpose(1, 2), torch.zeros(1, len(x), 5))[0] + torch.ones(5, dtype=torch.float32)


def test_a_forward_that_names_its_dtypes_is_checked_in_float64():
    x = torch.randn(2, 4, 6)
    model = shaken(NamesDtypes(), torch.float32)
    assert run_in_double(copy.deepcopy(model).double(), x.double()).dtype == torch.float64
    folded = bn.fold(model, x)
    assert folded.batchnorm_report == [("norm", "folded", "into conv, before it")]
    assert torch.get_default_dtype() == torch.float32
    assert_same(model, folded, x, 1e-5)


def test_a_model_that_does_not_run_in_float64_is_refused():
    class Keeps(nn.Linear):
        def forward(self, x):
            return F.linear(super().forward(x), self.kept)

    model = nn.Sequential(Keeps(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    model[0].kept = torch.eye(4)
    with pytest.raises(ValueError, match=r"does not run in float64, .*: RuntimeError: .* dtype.*take dtypes from"):
        bn.fold(model, torch.randn(2, 4))
    assert torch.get_default_dtype() == torch.float32


def test_examples_in_mappings_of_other_kinds():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))

        def forward(self, pixels):
            return self.model(pixels)

    x = torch.randn(2, 4, 6, 6)
    folded = bn.fold(shaken(Named(), torch.float32), UserDict(pixels=x))  # as transformers' BatchFeature is one
    assert folded.batchnorm_report.of("folded") == ["model.1"]


class PlainBlocks(nn.Module):
    """For ``insert``: before an activation module, before a function, before a sum."""

    def __init__(self):
        super().__init__()
        self.a, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()
        self.b, self.c, self.head = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

    def forward(self, x):
        x = F.relu(self.b(self.relu(self.a(x))))
        return self.head(F.relu(self.c(x) + x).mean((2, 3)))


@pytest.mark.parametrize(
    "then", [lambda m, x: m, lambda m, x: bn.from_torch(m, example=x), lambda m, x: bn.to_torch(m)],
    ids=["insert", "from_torch", "to_torch"],
)  # fmt: skip
def test_what_insert_gave_goes_back_whatever_was_done_in_between(then):
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    model = then(shaken(bn.insert(PlainBlocks().double(), x)), x)
    folded = bn.fold(model, x)
    assert folded.batchnorm_report == [(f"{name}.batch_norm", "folded", f"into {name}") for name in "abc"]
    assert type(folded) is PlainBlocks
    assert type(folded.a) is nn.Conv2d
    assert_same(model, folded, x)


def test_what_insert_gave_and_somebody_took_away():
    x = torch.randn(2, 4)
    model = bn.insert(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), x).eval()
    model[0].batch_norm = nn.Identity()
    assert bn.fold(model, x).batchnorm_report == []


class Asks(nn.Module):
    """Reads something of one of its layers of batch normalization, or only calls it."""

    def __init__(self, asks):
        super().__init__()
        self.conv, self.norm, self.asks = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), asks

    def forward(self, x):
        return self.asks(self, self.norm(self.conv(x)))


@pytest.mark.parametrize(
    ("asks", "key"),
    [
        (lambda net, y: y.view(len(y), net.norm.num_features, -1), "num_features"),
        (lambda net, y: y.to(net.norm.weight.dtype), "weight"),
        (lambda net, y: y * getattr(net.norm, "eps", 1), "eps"),
        (lambda net, y: y if hasattr(net.norm, "running_mean") else 2 * y, "running_mean"),
        (lambda net, y: y.to(next(net.norm.parameters()).dtype), "parameters"),
        (lambda net, y: y + net.norm.forward(y), "momentum"),
    ],
)
def test_a_layer_of_which_a_forward_reads_more_than_what_it_gives_is_left_alone(asks, key):
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    model = shaken(nn.Sequential(Asks(asks), nn.Flatten(1), nn.Linear(144, 4), nn.BatchNorm1d(4)))
    folded = bn.fold(model, x)
    assert folded.batchnorm_report == [
        ("0.norm", "left alone", f"the forward of 0 reads its {key}"),
        ("3", "folded", "into 2, before it"),
    ]
    assert_same(model, folded, x)


@pytest.mark.parametrize(
    "asks", [lambda net, y: y.to(next(net.parameters()).dtype), lambda net, y: y if net.norm.training else y * 2]
)
def test_what_a_folded_layer_answers_too_may_be_asked(asks):
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    model = shaken(Asks(asks))
    assert bn.fold(model, x).batchnorm_report.of("folded") == ["norm"]
    assert_same(model, bn.fold(model, x), x)


def insists(net, y):
    assert isinstance(net.norm, nn.BatchNorm2d)
    return y


@pytest.mark.parametrize(
    "asks",
    [
        lambda net, y: y * 2 if type(net.norm) is nn.BatchNorm2d else y,
        lambda net, y: y if net.conv.bias is None else y * 2,
        insists,
    ],
    ids=["its class", "the other's bias", "its class or else"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_without_which_the_model_is_another_is_found_and_left_alone(asks, dtype):
    x = torch.randn(2, 4, 6, 6, dtype=dtype)
    blocks = [nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), Asks(asks), Asks(lambda net, y: y), Asks(asks)]
    blocks[1].conv.bias = blocks[3].conv.bias = None
    model = shaken(nn.Sequential(*blocks), dtype)
    folded = bn.fold(model, x)
    assert folded.batchnorm_report.of("folded") == ["0.1", "2.norm"]
    left = [row for row in folded.batchnorm_report if row.done == "left alone"]
    assert [row.layer for row in left] == ["1.norm", "3.norm"]
    assert {row.why for row in left} == {
        "without it the model is another, in float64 too: a forward does more than call it"
    }
    assert_same(model, folded, x, {torch.float32: 1e-4, torch.float64: 1e-12}[dtype])


class Amplified(nn.Sequential):
    """Gives one value's distance from what it is in float64."""

    def forward(self, x):
        y = super().forward(x).flatten()[self.at].double()
        return 1 + (y - self.exact) * 1e3


def test_what_is_only_rounding_is_refused():
    x = torch.randn(2, 4, 6, 6)
    plain = shaken(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), torch.float32)
    exact = copy.deepcopy(plain).double()(x.double()).flatten()
    off, off_folded = ((m(x).flatten() - exact).abs() for m in (plain, bn.fold(plain, x)))
    model = Amplified(*plain).eval()
    model.at = (off_folded - 2 * off).argmax().item()
    model.exact = exact[model.at].item()
    with pytest.raises(ValueError, match=r"output 0 of the model is .* off, .*: pass a larger tolerance if that is"):
        bn.fold(model, x, tolerance=2e-6)


class Levels(nn.Module):
    """A detector's head, one for all sizes of its maps: ``order`` says how its two layers are called on them."""

    def __init__(self, order, first, second):
        super().__init__()
        self.order, self.conv, self.norm = order, first, second

    def forward(self, x):
        return self.order(self.conv, self.norm, x.relu(), x[..., ::2].relu())


def one_by_one(conv, norm, *levels):
    return [norm(conv(x)) for x in levels]


def crossed(conv, norm, large, small):
    large, small = conv(large), conv(small)
    small = norm(small)
    return [norm(large), small]


def norm_first_and_crossed(conv, norm, large, small):
    large, small = norm(large), norm(small)
    return [conv(small), conv(large)]


@pytest.mark.parametrize(
    ("order", "side"), [(one_by_one, "before"), (crossed, "before"), (norm_first_and_crossed, "after")]
)
def test_a_pair_that_is_called_together_several_times(order, side):
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    model = shaken(Levels(order, nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    folded = bn.fold(model, x)
    assert folded.batchnorm_report == [("norm", "folded", f"into conv, {side} it")]
    assert_same(model, folded, x)
    with pytest.raises(ValueError, match=r"fold refused: conv with norm folded in is .* off, more than 1.0e-12"):
        bn.fold(model.float(), x.float(), tolerance=1e-12)


def test_a_branch_that_two_inputs_go_through():
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = nn.Sequential(
                nn.Conv2d(4, 6, 3),
                nn.BatchNorm2d(6),
                nn.ReLU(),
                nn.BatchNorm2d(6),
                nn.Conv2d(6, 4, 1),
                nn.BatchNorm2d(4),
            )

        def forward(self, x):
            return self.branch(x) - self.branch(x.flip(3))

    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    model = shaken(Siamese())
    folded = bn.fold(model, x)
    assert folded.batchnorm_report.of("folded") == ["branch.1", "branch.3", "branch.5"]
    assert_same(model, folded, x)


@pytest.mark.parametrize(
    ("order", "why"),
    [
        (lambda conv, norm, a, b: [norm(conv(a)), norm(conv(b)), conv(b)], "2 times: conv before it is called 3 times"),
        (lambda conv, norm, a, b: [norm(conv(a)), norm(conv(b)), norm(a)], "3 times: conv before it is called 2 times"),
        (lambda conv, norm, a, b: [norm(conv(a)), norm(a)], "2 times: conv before it is called once"),
        (
            lambda conv, norm, a, b: [norm(conv(a)), norm(conv(b).flip(1))],
            "2 times: the channels of conv are others in each call",
        ),
    ],
)
def test_a_pair_that_is_not_always_called_together_is_left_alone(order, why):
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    model = shaken(Levels(order, nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    folded = bn.fold(model, x)
    (row,) = folded.batchnorm_report
    assert row.why == f"it is called {why}; its output goes to the model's output"
    assert_same(model, folded, x)


class Louder(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


class FeaturesLast(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def test_a_subclass_with_channels_in_another_dimension_is_left_alone():
    model = shaken(nn.Sequential(nn.Linear(4, 5), FeaturesLast(5), nn.ReLU()))
    (row,) = bn.fold(model, torch.randn(3, 6, 4, dtype=torch.float64)).batchnorm_report
    assert row.why.startswith("a FeaturesLast computes something else than batch normalization")


class Several(nn.Module):
    """One of each that cannot be folded."""

    def __init__(self):
        super().__init__()
        self.conv, self.read_twice = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.used_twice = nn.BatchNorm2d(4)
        self.padded, self.after_relu = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.never, self.untracked = nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False)
        self.masked = bn.BatchNorm2d(4)
        self.features, self.of_places = nn.Linear(4, 4), nn.BatchNorm1d(36)
        self.shared, self.after_shared = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.weird = Louder(4)
        self.functional = nn.BatchNorm2d(4)
        self.head = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.after_head = nn.BatchNorm1d(4)

    def forward(self, x):
        y = self.conv(x)
        y = self.read_twice(y) + y
        y = self.used_twice(self.used_twice(y))
        y = self.padded(self.after_relu(F.relu(y)))
        y = self.masked(y, mask=torch.ones(y.shape[0], 6, 6, dtype=torch.bool)) + self.untracked(y)
        y = self.weird(y) + self.functional(F.conv2d(y, torch.eye(4, dtype=y.dtype)[..., None, None]))
        y = self.of_places(self.features(y.flatten(2).transpose(1, 2)))
        y = y.mean(1)
        return self.after_head(self.head(self.after_shared(self.shared(self.shared(y)))))


def test_what_is_left_alone_and_why():
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    model = shaken(Several())
    folded = bn.fold(model, x)
    why = {row.layer: row.why for row in folded.batchnorm_report if row.done == "left alone"}
    assert why == {
        "read_twice": "conv before it is read by add() too; its output goes to add()",
        "used_twice": "it is called 2 times: it reads add(), which has no weights to fold into; its output goes to "
        "used_twice",
        "after_relu": "it reads relu(), which has no weights to fold into; padded after it pads with 0",
        "never": "the example does not reach it",
        "untracked": "it has no running statistics: it normalizes by each batch in eval too",
        "masked": "it is given a mask",
        "of_places": "a channel of features before it goes to several of its own; its output goes to mean()",
        "after_shared": "shared before it is called 2 times; the weight of head after it is computed from others",
        "weird": "a Louder computes something else than batch normalization: put that in a module behind it",
        "functional": "it reads conv2d(), which has no weights to fold into; its output goes to add()",
        "after_head": "the weight of head before it is computed from others; its output goes to the model's output",
    }
    assert folded.batchnorm_report.of("folded") == []
    assert "\nused_twice    left alone  it is called 2 times: it reads add()" in str(folded.batchnorm_report)
    assert_same(model, folded, x)


def test_what_is_refused():
    x = torch.randn(2, 3, 5, 5)
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    with pytest.raises(ValueError, match=r"layer '0.1' is in train mode: call model.eval\(\) first"):
        bn.fold(model, x)
    with pytest.raises(TypeError, match=r"fold takes a torch.nn.Module, got list"):
        bn.fold([], x)
    model.eval()
    before = copy.deepcopy(model.state_dict())
    for tolerance in (-1, float("nan")):
        with pytest.raises(ValueError, match=r"fold: tolerance must be 0 or more \(got "):
            bn.fold(model, x, tolerance=tolerance)
    with pytest.raises(RuntimeError, match="channels"):
        bn.fold(model, torch.randn(2, 4, 5, 5))
    with pytest.raises(ValueError, match=r"fold refused: 0.0 with 0.1 folded in is .* off, more than 1.0e-12"):
        bn.fold(model, x, tolerance=1e-12)
    model[0][1].running_mean.fill_(1000)
    model[0][1].running_var.fill_(1e-4)
    with pytest.raises(ValueError, match=r"fold refused: 0.0 with 0.1 folded in is .*: fold in a wider dtype"):
        bn.fold(model.half(), x.half())
    model.float().load_state_dict(before)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_lazy_layers_that_did_not_run_are_named():
    lazy = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d()).eval()
    with pytest.raises(ValueError, match=r"fold: 0 \(LazyLinear\) does not know its shapes yet: run the model once"):
        bn.fold(lazy, torch.randn(2, 3))
    lazy.load_state_dict(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).state_dict())
    with pytest.raises(ValueError, match=r"fold: 0 \(LazyLinear\) is lazy, and has not run yet: run the model once"):
        bn.fold(lazy, torch.randn(2, 3))
    lazy(torch.randn(2, 3))
    assert bn.fold(lazy, torch.randn(2, 3)).batchnorm_report.of("folded") == ["1"]


def test_compiled_models_and_those_that_torch_cannot_copy_are_refused_by_name():
    x = torch.randn(5, 3)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    with pytest.raises(ValueError, match=r"pass model._orig_mod, and compile the result"):
        bn.fold(torch.compile(model, backend="eager"), x)
    with pytest.raises(ValueError, match=r"fold: 0 is compiled .*: put its _orig_mod in its place"):
        bn.fold(nn.Sequential(torch.compile(model, backend="eager")), x)
    model[1].seen, model[0].seen = {"last": model(x)}, [3, "x"]
    with pytest.raises(ValueError, match=r"cannot be copied: 1.seen is computed, .*torch.no_grad\(\)"):
        bn.fold(model, x)
    with torch.no_grad():
        model[1].seen = {"last": model(x)}
    assert bn.fold(model, x).batchnorm_report.of("folded") == ["1"]


def test_frozen_statistics_are_enough():
    model = nn.Sequential(nn.Linear(3, 4), bn.BatchNorm1d(4))
    bn.freeze(model)
    folded = bn.fold(model.train(), torch.randn(5, 3))
    assert not folded.training
    assert model.training


class Detector(nn.Module):
    """Keeps the candidates above a threshold; how many, rounding decides: some lie at it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)

    def forward(self, x):
        y = self.norm(self.conv(x)).flatten(2).transpose(1, 2)[0]
        return y[self.kept(y)]

    def kept(self, y):
        return (y[:, 0] * 12).sigmoid() < 1.0


class Lottery(Detector):
    def kept(self, y):
        return (y[:, 0].double() * 1e15).long() % 8 == 0  # the last bits decide


def test_how_many_values_come_out_may_depend_on_rounding():
    model, x = shaken(Detector(), torch.float32), torch.randn(1, 3, 40, 40)
    model.norm.weight.data.fill_(5.0)
    assert len(model(x)) != len(copy.deepcopy(model).double()(x.double()))
    assert bn.fold(model, x).batchnorm_report.of("folded") == ["norm"]
    with pytest.raises(
        ValueError, match=r"that the model gives depends on the data, .*: \d+x6, and folded \d+x6: give another"
    ):
        bn.fold(shaken(Lottery(), torch.float32), x)


def test_graph_modules_of_torch_fx():
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    model = torch.fx.symbolic_trace(shaken(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU())))
    folded = bn.fold(model, x)
    assert folded.batchnorm_report == [("1", "folded", "into 0, before it")]
    assert_same(model, folded, x)
    around = nn.Sequential(model, nn.Flatten(2), nn.BatchNorm1d(6).double().eval())
    assert bn.fold(around, x).batchnorm_report.of("folded") == ["0.1"]


class EEGNet(nn.Module):
    """Depthwise and separable convolutions, padded, with batch normalization behind each."""

    def __init__(self):
        super().__init__()
        self.time, self.norm1 = nn.Conv2d(1, 4, (1, 5), padding="same", bias=False), nn.BatchNorm2d(4)
        self.space, self.norm2 = nn.Conv2d(4, 8, (6, 1), groups=4, bias=False), nn.BatchNorm2d(8)
        self.depth, self.point = nn.Conv2d(8, 8, (1, 3), groups=8, padding="same"), nn.Conv2d(8, 6, 1, bias=False)
        self.norm3, self.drop, self.head = nn.BatchNorm2d(6), nn.Dropout(0.25), nn.Linear(24, 3)

    def forward(self, x):
        y = F.elu(self.norm2(self.space(self.norm1(self.time(x[:, None])))))
        y = self.drop(F.avg_pool2d(y, (1, 4)))
        return self.head(F.elu(self.norm3(self.point(self.depth(y)))).flatten(1))


class Tokens(nn.Module):
    """A transformer over time with batch normalization, and a recurrent layer that reads it, features last."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Linear(5, 8), nn.BatchNorm1d(8)
        self.up, self.down, self.norm2 = nn.Linear(8, 16), nn.Linear(16, 8), nn.BatchNorm1d(8)
        self.lstm = nn.LSTM(8, 4, batch_first=True)

    def forward(self, x):
        x = self.norm(self.embed(x).transpose(1, 2)).transpose(1, 2)
        x = self.norm2(self.down(F.gelu(self.up(x))).permute(0, 2, 1)).permute(0, 2, 1)
        return self.lstm(x)[0]


@pytest.mark.parametrize(("model", "shape"), [(EEGNet(), (2, 6, 16)), (Tokens(), (2, 7, 5))], ids=["eeg", "tokens"])
def test_networks_that_fold_as_a_whole(model, shape):
    x = torch.randn(shape, dtype=torch.float64)
    folded = bn.fold(shaken(model), x)
    assert folded.batchnorm_report.of("folded") == [row.layer for row in folded.batchnorm_report]
    assert_same(model, folded, x)


def test_a_scripted_part_stays_as_it_is():
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    scripted = torch.jit.script(shaken(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))))
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), scripted).double().eval()
    folded = bn.fold(model, x)
    (row, left) = folded.batchnorm_report
    assert row == ("1", "folded", "into 0, before it")
    assert (left.layer, left.done) == ("2", "left alone")
    assert "RecursiveScriptModule" in left.why
    assert_same(model, folded, x)
    plain = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), torch.jit.script(nn.Conv2d(4, 4, 1))).double()
    assert bn.insert(plain, x).batchnorm_report.of("normalized") == ["0"]
