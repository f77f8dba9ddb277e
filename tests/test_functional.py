"""batch_norm(): torch's function, and what is added to it."""

import inspect
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import ACTIVATIONS, ATEN_ULP, SLOPE
from helpers import channel_tensors, stock_activation, ulps
from torch import nn
from torch.func import functional_call, grad, hessian, jvp, vmap

import batchnorm as bn
from batchnorm.functional import parse_activation


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


def test_torchs_arguments_come_first_in_torchs_order():
    torchs = list(inspect.signature(F.batch_norm).parameters.values())
    ours = list(inspect.signature(bn.batch_norm).parameters.values())
    assert [p.name for p in ours[: len(torchs)]] == [p.name for p in torchs]
    assert [p.default for p in ours[3 : len(torchs)]] == [p.default for p in torchs[3:]]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(torchs) :])


BAD_CALLS = {
    "one value per channel": (lambda f: f(ones(1, 3), None, None, training=True), "drop_last=True"),
    "eps of 0 in training": (lambda f: f(ones(4, 3), None, None, training=True, eps=0.0), "1e-5"),
    "eps below 0": (lambda f: f(ones(4, 3), ones(3), ones(3), eps=-1.0), "1e-5"),
    "no statistics": (lambda f: f(ones(4, 3), None, None), "training=True"),
    "one statistic": (lambda f: f(ones(4, 3), ones(3), None, training=True), None),
    "statistics of another size": (lambda f: f(ones(4, 3), ones(4), ones(4)), r"got input \(4, 3\)"),
    "weight of another size": (lambda f: f(ones(4, 3), None, None, ones(4), training=True), "num_features"),
    "float64 statistics": (lambda f: f(ones(4, 3), *ones(2, 3, dtype=torch.float64)), "all are float32"),
    "float16 beside float32 statistics": (
        lambda f: f(ones(4, 3).half(), ones(3), ones(3), ones(3).half(), training=True),
        "all are float32",
    ),
    "integers": (lambda f: f(ones(4, 3, dtype=torch.int32), ones(3), ones(3)), None),
    "no momentum": (lambda f: f(ones(4, 3), ones(3), ones(3), training=True, momentum=None), None),
}


@pytest.mark.parametrize("call", BAD_CALLS)
def test_errors_are_torchs_with_advice(call):
    call, advice = BAD_CALLS[call]
    with pytest.raises((ValueError, RuntimeError, TypeError)) as torchs:
        call(F.batch_norm)
    with pytest.raises(type(torchs.value), match=advice) as ours:
        call(bn.batch_norm)
    assert type(ours.value) is type(torchs.value)
    assert str(ours.value).startswith(str(torchs.value))


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        (None, (None, {})),
        ("silu", ("silu", {})),
        ("leaky_relu", ("leaky_relu", {"negative_slope": 0.01})),
        (("leaky_relu", 0.3), ("leaky_relu", {"negative_slope": 0.3})),
        (nn.LeakyReLU(0.3), ("leaky_relu", {"negative_slope": 0.3})),
        (nn.ReLU(inplace=True), ("relu", {})),
        (nn.ReLU6(), ("relu6", {})),
        (nn.SiLU(), ("silu", {})),
        (nn.Hardswish(), ("hardswish", {})),
        (nn.Sigmoid(), ("sigmoid", {})),
        (nn.Tanh(), ("tanh", {})),
        (nn.GELU(), ("gelu", {})),
        (nn.GELU("tanh"), ("gelu_tanh", {})),
        (nn.ELU(0.5), ("elu", {"alpha": 0.5})),
        ("elu", ("elu", {"alpha": 1.0})),
        (nn.Mish(), ("mish", {})),
        (nn.Hardtanh(-2, 3), ("hardtanh", {"min_val": -2.0, "max_val": 3.0})),
        (("hardtanh", -2, 3), ("hardtanh", {"min_val": -2.0, "max_val": 3.0})),
    ],
    ids=str,
)
def test_every_way_to_name_an_activation(given, parsed):
    g = parse_activation(given)
    assert (g.name, g.parameters) == parsed
    assert parse_activation(g.as_users_write_it()) == parse_activation(g.module() if g.name else None) == g


class Shifted(nn.ReLU):
    def forward(self, x):
        return super().forward(x - 1)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ("softplus", ValueError, 'unknown activation "softplus". Known: relu, relu6,'),
        (nn.Softplus(), TypeError, "cannot fuse activation Softplus. Known: ReLU, ReLU6,"),
        (nn.PReLU(), TypeError, "cannot fuse activation PReLU: its slope is a parameter that is trained"),
        (Shifted(), TypeError, "cannot fuse activation Shifted"),
        (("relu", 0.1), ValueError, 'activation "relu" has no parameters'),
        (("hardtanh", 0.1), ValueError, 'activation "hardtanh" takes .*min_val, max_val'),
    ],
    ids=str,
)
def test_activations_that_are_not_known(given, error, words):
    with pytest.raises(error, match=words):
        bn.batch_norm(ones(4, 3), activation=given, training=True)
    with pytest.raises(error, match=words):
        bn.BatchNorm1d(3, activation=given)


@pytest.mark.parametrize("given", [nn.ReLU(), nn.ReLU, "relu"], ids=str)
def test_an_activation_may_be_set_in_every_way_that_it_may_be_given(given):
    layer = bn.BatchNorm1d(3, activation="silu")
    layer.activation = given
    assert layer.activation == "relu"
    assert layer(torch.randn(4, 3)).min() == 0
    assert not list(layer.children())
    with pytest.raises(ValueError, match="unknown activation"):
        layer.activation = "softplus"


@pytest.mark.parametrize("given", [ones(4, 3).numpy(), [[1.0] * 3] * 4], ids=["array", "list"])
@pytest.mark.parametrize("call", [bn.BatchNorm1d(3), partial(bn.batch_norm, training=True)], ids=["layer", "function"])
def test_what_is_no_tensor_is_refused_by_name(call, given):
    with pytest.raises(TypeError, match=r"input must be a tensor, got (ndarray|list)"):
        call(given)
    with pytest.raises(TypeError, match=r"residual must be a tensor, got (ndarray|list)"):
        call(ones(4, 3), residual=given)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64, torch.float64])
def test_inputs_of_other_dtypes_are_refused_with_advice_that_works(dtype):
    x, layer = ones(4, 3).to(dtype), bn.BatchNorm1d(3)
    with pytest.raises(RuntimeError, match=r"pass input\.(float\(\)|to\(torch\.float32\))"):
        layer(x)
    if dtype != torch.complex64:
        layer(x.to(torch.float32))


def test_residual_of_another_shape():  # torch's + would broadcast it, and its gradient is another then
    with pytest.raises(ValueError, match=r"residual must have the shape of input, \(4, 3\), got \(1, 3\)"):
        bn.batch_norm(ones(4, 3), residual=ones(1, 3), training=True)


def test_residual_is_promoted_as_by_torchs_add():
    y = bn.batch_norm(torch.randn(4, 3).bfloat16(), residual=ones(4, 3), activation="relu", training=True)
    assert y.dtype == torch.float32


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_return_statistics_returns_what_the_update_in_place_would_have_left(training, activation):
    x, residual = torch.randn(2, 8, 3, 5)
    mean, var, weight, bias = channel_tensors(3, torch.float32)
    before, updated = (mean.clone(), var.clone()), (mean.clone(), var.clone())
    extras = {"activation": activation, "residual": residual}

    expected = bn.batch_norm(x, *updated, weight, bias, training, 0.3, 1e-3, **extras)
    y, *new = bn.batch_norm(x, mean, var, weight, bias, training, 0.3, 1e-3, **extras, return_statistics=True)

    torch.testing.assert_close((y, *new), (expected, *updated), rtol=0, atol=0)
    torch.testing.assert_close((mean, var), before, rtol=0, atol=0)
    assert all(t.data_ptr() not in (mean.data_ptr(), var.data_ptr()) for t in new)


def test_return_statistics_needs_statistics():
    with pytest.raises(ValueError, match=r"return_statistics=True needs .* torch\.zeros\(C\)"):
        bn.batch_norm(ones(4, 3), training=True, return_statistics=True)


def test_running_statistics_of_half_inputs_hold_squares_beyond_half():
    x = torch.tensor([[-6e4], [6e4]], dtype=torch.float16)
    _, _, var = bn.batch_norm(x, ones(1), ones(1), training=True, momentum=1.0, return_statistics=True)
    torch.testing.assert_close(var, 2 * x[1].double().square().float())


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_vmap_of_a_training_step_with_statistics_that_are_not_batched(activation):  # torch raises
    x = torch.randn(5, 8, 3, 4)
    mean, var, weight, bias = (t.detach() for t in channel_tensors(3, torch.float32))

    def step(x):
        return bn.batch_norm(x, mean, var, weight, bias, True, activation=activation, return_statistics=True)

    for actual, *expected in zip(vmap(step)(x), *map(step, x), strict=True):
        assert ulps(actual, torch.stack(expected)) <= ATEN_ULP[torch.float32]


def test_vmap_in_evaluation():
    x = torch.randn(5, 8, 3, 4)
    mean, var, weight, bias = (t.detach() for t in channel_tensors(3, torch.float32))
    y = vmap(lambda x, r: bn.batch_norm(x, mean, var, weight, bias, residual=r, activation="relu"), (None, 0))(x[0], x)
    assert ulps(y, F.relu(F.batch_norm(x[0], mean, var, weight, bias) + x)) <= ATEN_ULP[torch.float32]


@pytest.mark.parametrize("activation", ["relu", ("leaky_relu", SLOPE), "sigmoid"], ids=str)  # those in place
def test_torch_func_sees_through_the_activation(activation):
    x, tangent = torch.randn(2, 4, 3, dtype=torch.float64)

    def ours(x):
        return bn.batch_norm(x, training=True, activation=activation)

    def stock(x):
        return stock_activation(F.batch_norm(x, None, None, training=True), activation)

    torch.testing.assert_close(jvp(ours, (x,), (tangent,)), jvp(stock, (x,), (tangent,)))
    torch.testing.assert_close(*(grad(lambda x, f=f: f(x).pow(3).sum())(x) for f in (ours, stock)))
    torch.testing.assert_close(*(hessian(lambda x, f=f: f(x).pow(3).sum())(x) for f in (ours, stock)))


def test_an_ensemble_of_layers_trains_under_vmap():
    layers = [bn.BatchNorm1d(3, track_running_stats=False, activation="silu") for _ in range(4)]
    params, buffers = torch.func.stack_module_state(layers)
    x = torch.randn(8, 3)
    y = vmap(lambda p, b: functional_call(layers[0], (p, b), (x,)))(params, buffers)
    torch.testing.assert_close(y, torch.stack([layer(x) for layer in layers]))
