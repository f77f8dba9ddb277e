"""The reference against float64 aten, against its own autograd, and to any order."""

import pytest
import torch
import torch.nn.functional as F
from cases import ACTIVATIONS, FLOAT_DTYPES, LAYOUTS, REFERENCE_SUM_ULP, REFERENCE_ULP, SHAPES
from helpers import arrange, channel_tensors, parameter_dtype, stock_activation, ulps
from torch.autograd import gradcheck

from batchnorm.functional import parse_activation
from batchnorm.ops import reference

SILU = parse_activation("silu")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_gradient_and_statistics_are_those_of_float64_aten(shape, dtype, training):
    x = (3 * torch.randn(shape) + 1).to(dtype)
    d_y = torch.randn(shape).to(dtype)
    mean, var, weight, bias = channel_tensors(shape[1], parameter_dtype(dtype))
    wide = [t.detach().double().requires_grad_(i in (0, 3, 4)) for i, t in enumerate((x, mean, var, weight, bias))]

    gradients = reference.batch_norm_backward(d_y, x, mean, var, weight, bias, training, 1e-5)
    y = reference.batch_norm(x, mean, var, weight, bias, training, 0.3, 1e-5)
    expected = F.batch_norm(*wide, training, 0.3, 1e-5)

    gradients_expected = torch.autograd.grad(expected, (wide[0], *wide[3:]), d_y.double())
    assert y.dtype == dtype
    assert ulps(y, expected) <= REFERENCE_ULP[dtype]
    assert ulps(gradients[0], gradients_expected[0]) <= REFERENCE_ULP[dtype]
    actual_C, expected_C = (*gradients[1:3], mean, var), (*gradients_expected[1:], *wide[1:3])
    for actual, wanted in zip(actual_C, expected_C, strict=True):
        assert actual.dtype == parameter_dtype(dtype)
        assert ulps(actual, wanted) <= REFERENCE_SUM_ULP[dtype]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_do_not_depend_on_the_layout(layout):
    x = arrange(torch.randn(4, 5, 6, 3), layout)
    same = x.contiguous()
    tensors = channel_tensors(5, torch.float32)
    for training in (True, False):
        y = reference.batch_norm(x, *tensors, training, 0.0, 1e-5)
        assert ulps(y, reference.batch_norm(same, *tensors, training, 0.0, 1e-5)) <= REFERENCE_ULP[torch.float32]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_section_3_is_the_gradient_of_algorithm_1(activation, with_residual, training):
    g = parse_activation(activation)
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True) if with_residual else None
    mean, var, weight, bias = channel_tensors(3, torch.float64)
    d_y = torch.randn(4, 3, 5, dtype=torch.float64)

    y = reference.batch_norm(x, mean.clone(), var.clone(), weight, bias, training, 0.1, 1e-5, g, residual)
    inputs = [t for t in (x, weight, bias, residual) if t is not None]
    expected = torch.autograd.grad(y, inputs, d_y)
    actual = reference.batch_norm_backward(d_y, x, mean, var, weight, bias, training, 1e-5, g, residual)

    assert (actual[3] is None) == (residual is None)
    for a, e in zip(actual, expected, strict=False):
        assert ulps(a, e) <= REFERENCE_ULP[torch.float64]


@pytest.mark.parametrize("activation", ACTIVATIONS[1:], ids=str)
def test_activations_and_their_derivatives_are_torchs_at_the_kinks_too(activation):
    g = parse_activation(activation)
    z = torch.cat([torch.linspace(-8, 8, 101), torch.tensor([*g.row.kinks(g.a, g.b)])]).double().requires_grad_()
    y = stock_activation(z, activation)
    (expected,) = torch.autograd.grad(y.sum(), z)
    assert ulps(g.value(z), y) <= REFERENCE_ULP[torch.float64]
    assert ulps(g.in_place(z.detach().clone()), y) <= REFERENCE_ULP[torch.float64]
    assert ulps(g.derivative(z).double(), expected) <= REFERENCE_ULP[torch.float64]
    if g.result_tells:
        assert ulps(g.from_result(y).double(), expected) <= REFERENCE_ULP[torch.float64]


@pytest.mark.parametrize("explicit", [True, False])
def test_third_order_in_training_is_right(explicit):  # torch's own is silently wrong
    x = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    d_y = torch.randn(4, 3, 2, dtype=torch.float64)
    weight = torch.rand(3, dtype=torch.float64, requires_grad=True)

    def second_order(x, weight):
        if explicit:
            first = reference.batch_norm_backward(d_y, x, None, None, weight, None, True, 1e-5, SILU)[:2]
        else:
            y = reference.batch_norm(x, None, None, weight, None, True, 0.1, 1e-5, SILU)
            first = torch.autograd.grad(y, (x, weight), d_y, create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in first), (x, weight), create_graph=True)

    assert gradcheck(second_order, (x, weight))


def test_running_variance_is_unbiased_while_normalization_is_biased():
    x = torch.tensor([[1.0], [2.0], [6.0]])  # mean 3, sum of squares 14
    mean, var = torch.zeros(1), torch.ones(1)
    y = reference.batch_norm(x, mean, var, None, None, True, 1.0, 1e-30)
    torch.testing.assert_close(mean, torch.tensor([3.0]))
    torch.testing.assert_close(var, torch.tensor([14 / 2]))
    torch.testing.assert_close(y, (x - 3) / (14 / 3) ** 0.5)


def test_momentum_none_averages_all_batches():
    batches = torch.randn(4, 20, 3, dtype=torch.float64)
    mean, var = torch.full((3,), 9.0, dtype=torch.float64), torch.full((3,), 9.0, dtype=torch.float64)
    for number, x in enumerate(batches, start=1):
        mean, var = reference.update_running(mean, var, *reference.statistics(x), 20, None, number)
    torch.testing.assert_close(mean, batches.mean(1).mean(0))
    torch.testing.assert_close(var, batches.var(1).mean(0))


def test_an_empty_batch_changes_nothing():
    x = torch.randn(0, 3, 4, requires_grad=True)
    mean, var, weight, bias = channel_tensors(3, torch.float32)
    before = mean.clone(), var.clone()
    y = reference.batch_norm(x, mean, var, weight, bias, True, 0.1, 1e-5)
    gradients = reference.batch_norm_backward(y.detach(), x, mean, var, weight, bias, True, 1e-5)
    assert y.shape == gradients[0].shape == x.shape
    assert not gradients[1].any()
    assert not gradients[2].any()
    torch.testing.assert_close((mean, var), before, rtol=0, atol=0)


def test_a_float32_residual_beside_a_half_input_keeps_its_precision():
    x, residual = torch.randn(4, 3, dtype=torch.bfloat16), torch.randn(4, 3)
    y = reference.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, residual_NCS=residual)
    expected = F.batch_norm(x.double(), None, None, training=True) + residual
    assert y.dtype == torch.float32
    assert ulps(y, expected) <= 2 * REFERENCE_ULP[torch.float32]  # normalized in float32, not in float64, here


def test_evaluation_without_statistics_raises_as_torch_does():
    with pytest.raises(RuntimeError, match="running_mean and running_var must be defined in evaluation mode"):
        reference.batch_norm(torch.randn(4, 3), None, None, None, None, False, 0.1, 1e-5)
