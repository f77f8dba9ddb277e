"""The blend of running statistics: in float64, guarded, the same by kernels, torch's ops and under torch.compile."""

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm import ops
from batchnorm.ops.arguments import Running
from batchnorm.ops.running import blend_

BATCHES = torch.randn(5, 32, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 3


def eager(layer, x, **options):
    return layer(x, **options)


def compiled(layer, x, **options):
    return torch.compile(layer, backend="aot_eager")(x, **options)


@pytest.fixture(params=["kernels", "aten", "compiled"])
def call(request, monkeypatch):
    if request.param == "aten":
        monkeypatch.setattr(ops, "has_kernel", lambda *arguments: False)
        monkeypatch.setitem(ops._SERVED, "cpu", ())
    return compiled if request.param == "compiled" else eager


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_float64_layer_averages_in_float64(call, momentum, masked):
    layer = bn.BatchNorm1d(3, momentum=momentum, dtype=torch.float64)
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for n, x in enumerate(BATCHES, 1):
        call(layer, x, **({"mask": torch.ones(32, dtype=torch.bool)} if masked else {}))
        a = momentum or 1 / n
        mean, var = (1 - a) * mean + a * x.mean(0), (1 - a) * var + a * x.var(0)
    torch.testing.assert_close(layer.running_mean, mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(layer.running_var, var, rtol=1e-14, atol=0)


def test_an_accumulated_update_is_the_same_blend():
    layers = [bn.BatchNorm1d(3, momentum=None, dtype=torch.float64), nn.BatchNorm1d(3, momentum=None).double()]
    for layer in layers:
        for x in BATCHES:
            with bn.accumulate_statistics(layer):
                for part in x.split(8):
                    layer(part)
        torch.testing.assert_close(layer.running_mean, BATCHES.mean(1).mean(0), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_new_statistics_are_rounded_once(dtype):
    old, new = torch.tensor([1.0, 7.0], dtype=dtype), torch.tensor([1e-3, 3.0], dtype=torch.float64)
    mean, var = old.clone(), old.clone()
    blend_(Running(mean, var), new, new)
    expected = (0.9 * old.double() + 0.1 * new).to(dtype)
    assert torch.equal(mean, expected)
    assert torch.equal(var, expected)


def test_places_that_do_not_move_and_batches_that_are_none():
    mean, var, batches = torch.zeros(2), torch.ones(2), torch.tensor(4)
    where = torch.tensor([True, False]), torch.tensor([False, False])
    blend_(Running(mean, var, batches, None, None), torch.ones(2), torch.full((2,), 5.0), where, torch.tensor(True))
    assert mean.tolist() == [pytest.approx(0.2), 0]
    assert var.tolist() == [1, 1]
    assert batches == 5
    blend_(Running(mean, var, batches), torch.ones(2), torch.ones(2), where, torch.tensor(False))
    assert batches == 5
