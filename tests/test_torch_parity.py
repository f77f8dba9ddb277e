"""Our layers and function through the cases that torch tests its own with; derivatives; adversarial numbers."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from cases import ACTIVATIONS, ADVERSARIAL, ADVERSARIAL_ULP, ATEN_ULP, FLOAT_DTYPES
from helpers import channel_tensors, parameter_dtype, ulps
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

import batchnorm as bn
from batchnorm.functional import parse_activation
from batchnorm.ops import reference

MODULES = [m for m in module_db if m.module_cls in (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)]
OPS = [(op, dtype) for op in op_db if op.name == "nn.functional.batch_norm" for dtype in sorted(op.dtypes, key=str)]
exactly = functools.partial(torch.testing.assert_close, rtol=0, atol=0)


def test_torchs_cases_are_there():
    assert len(MODULES) == 3
    assert {dtype for _, dtype in OPS} >= set(FLOAT_DTYPES)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("info", MODULES, ids=lambda info: info.name)
def test_modules_outputs_gradients_and_buffers(info, dtype, training):
    cases = info.module_inputs_func(info, "cpu", dtype, requires_grad=True, training=training)
    assert cases
    for case in cases:
        args, kwargs = case.constructor_input.args, case.constructor_input.kwargs
        stock = info.module_cls(*args, **kwargs, dtype=dtype).train(training)
        ours = getattr(bn, info.module_cls.__name__)(*args, **kwargs, dtype=dtype).train(training)
        for _ in range(2):
            x = case.forward_input.args[0].detach()
            x_ours, x_stock = x.clone().requires_grad_(), x.clone().requires_grad_()
            y_ours, y_stock = ours(x_ours), stock(x_stock)
            d_y = torch.randn_like(y_stock)  # not of y**2: its gradient is all cancellation
            y_ours.backward(d_y)
            y_stock.backward(d_y)
            assert list(ours.state_dict()) == list(stock.state_dict())
            parameters = zip(ours.parameters(), stock.parameters(), strict=True)
            buffers = [(getattr(ours, name), buffer) for name, buffer in stock.named_buffers()]
            pairs = [(a.grad, b.grad) for a, b in parameters] + buffers
            for a, b in [(y_ours, y_stock), (x_ours.grad, x_stock.grad), *pairs]:
                assert ulps(a, b, dtype) <= ATEN_ULP[dtype]


@pytest.mark.parametrize("info", MODULES, ids=lambda info: info.name)
def test_modules_errors(info):
    cases = info.module_error_inputs_func(info, "cpu", torch.float32, requires_grad=False, training=True)
    assert cases
    for case in cases:
        given = case.module_error_input
        assert case.error_on == ModuleErrorEnum.FORWARD_ERROR
        layer = getattr(bn, info.module_cls.__name__)(*given.constructor_input.args, **given.constructor_input.kwargs)
        with pytest.raises(case.error_type, match=case.error_regex):
            layer(*given.forward_input.args)


@pytest.mark.parametrize(("op", "dtype"), OPS, ids=lambda value: getattr(value, "formatted_name", str(value)))
def test_function_outputs_gradients_and_buffers(op, dtype):
    samples = list(op.sample_inputs("cpu", dtype, requires_grad=True))
    assert samples
    for sample in samples:
        results, d_y = [], torch.randn_like(sample.input)
        for function in (bn.batch_norm, op.op):
            x, *args = copy.deepcopy((sample.input.detach(), *(a if a is None else a.detach() for a in sample.args)))
            inputs = [t.requires_grad_() for t in (x, *args[2:]) if t is not None]
            y = function(x, *args, **sample.kwargs)
            d_x, *others = torch.autograd.grad(y, inputs, d_y)
            if sample.kwargs.get("training") and x.dim() > 1 and x.numel() <= 3 * x.shape[1]:
                d_x = d_x + d_y  # two or three values: a gradient near 0, what is left when terms of d_y's size cancel
            results.append((y, d_x, *others, *(a for a in args if a is not None)))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a.isnan(), b.isnan())
            assert ulps(a.nan_to_num(), b.nan_to_num()) <= ATEN_ULP[dtype]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("path", ["layer", "reference"])
def test_first_and_second_derivatives(path, activation, with_residual, training):
    x, residual = torch.randn(2, 4, 2, 2, dtype=torch.float64)
    mean, var, weight, bias = channel_tensors(2, torch.float64)
    layer = bn.BatchNorm1d(2, activation=activation, dtype=torch.float64).train(training)

    def function(x, weight, bias, residual=None):
        if path == "layer":
            state = {"weight": weight, "bias": bias, "running_mean": mean.clone(), "running_var": var.clone()}
            return torch.func.functional_call(layer, state, (x, residual))
        statistics = mean.clone(), var.clone()
        return reference.batch_norm(
            x, *statistics, weight, bias, training, 0.1, 1e-5, parse_activation(activation), residual
        )

    inputs = [x.requires_grad_(), weight, bias, *([residual.requires_grad_()] if with_residual else [])]
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


def outcome(function, x, d_y, channels, widened=False):
    """y, d_x, d_weight, running_var of one call, in float64 if widened."""
    if widened:
        # Subtracting a value of the channel is exact where the values are near to it, and changes no result.
        x, d_y, channels = x.double() - x[:1, :, :1].double(), d_y.double(), [t.double() for t in channels]
    mean, var, weight = (t.detach().clone() for t in channels)
    x, weight = x.detach().requires_grad_(), weight.requires_grad_()
    y = function(x, mean, var, weight)
    return y.detach(), *torch.autograd.grad(y, (x, weight), d_y), var


@pytest.mark.parametrize(("name", "dtype", "mean", "deviation", "m"), ADVERSARIAL, ids=str)
@pytest.mark.parametrize("path", ["layer", "reference"])
def test_adversarial_batches(path, name, dtype, mean, deviation, m):
    x = (torch.randn(m // 16, 2, 16, dtype=torch.float64) * deviation + mean).to(dtype)
    channels = [torch.zeros(2), torch.ones(2), torch.tensor([1.3, -0.7])]
    layer = bn.BatchNorm1d(2, bias=False)

    def ours(x, mean, var, weight):
        if path == "reference":
            return reference.batch_norm(x, mean, var, weight, None, True, 0.1, 1e-5)
        state = {"weight": weight, "running_mean": mean, "running_var": var}
        return torch.func.functional_call(layer, state, x)

    def stock(x, mean, var, weight):
        return F.batch_norm(x, mean, var, weight, None, True, 0.1, 1e-5)

    d_y = torch.randn_like(x)
    expected = outcome(stock, x, d_y, channels, widened=True)
    names = ("y", "d_x", "d_weight", "running_var")
    actual, torchs = outcome(ours, x, d_y, channels), outcome(stock, x, d_y, channels)
    for what, a, t, e in zip(names, actual, torchs, expected, strict=True):
        allowed = ADVERSARIAL_ULP if path == "reference" else max(ADVERSARIAL_ULP, ulps(t, e, dtype))
        if what == "running_var" and e.max() > torch.finfo(torch.float32).max:
            # float32 cannot hold it: infinite, or left out by a layer, which does not take up what is not finite
            assert a.isinf().all() if path == "reference" else torch.equal(a, channels[1])
        else:
            assert ulps(a, e, dtype) <= allowed, what


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("ratio", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("path", ["layer", "reference"])
def test_adversarial_population_statistics(path, ratio, dtype):  # one value per channel among them
    for shape in ((1, 2), (64, 2)):
        x = (torch.randn(shape, dtype=torch.float64) + min(ratio, 6e4)).to(dtype)
        mean, var = torch.full((2,), min(ratio, 6e4)), torch.tensor([1.0, 1e-12])
        expected = (x.double() - mean.double()) / (var.double() + 1e-5).sqrt()  # float64 aten cancels, too
        stock = F.batch_norm(x, mean, var)
        if path == "layer":
            layer = bn.BatchNorm1d(2, affine=False).eval()
            layer.running_mean, layer.running_var = mean, var
            actual, allowed = layer(x), max(ADVERSARIAL_ULP, ulps(stock, expected))
        else:
            actual = reference.batch_norm(x, mean, var, None, None, False, 0.1, 1e-5)
            allowed = ADVERSARIAL_ULP
        assert ulps(actual, expected) <= allowed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("own_dtype", [True, False])
def test_16_bit_inputs_with_their_own_or_float32_parameters(dtype, own_dtype):
    x = torch.randn(16, 3, 5).to(dtype).requires_grad_()
    layer = bn.BatchNorm1d(3, dtype=dtype if own_dtype else parameter_dtype(dtype), activation="relu")
    y = layer(x)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, layer.weight.grad.dtype) == (dtype, dtype, layer.weight.dtype)
    expected = F.relu(F.batch_norm(x.detach().double(), None, None, training=True))
    assert ulps(y, expected) <= ATEN_ULP[dtype]
