"""Momentum: the share of the batch, changed at will; whatever comes in, running statistics stay numbers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import batchnorm as bn
from batchnorm import ops

SCHEDULES = [[0.1, 0.5, 0.01, 1.0, 0.0], [0.1, None, 0.3, None, None], [None, 0.25, 0.25, None, 0.9]]


def expected(batches, momenta):
    """running <- (1 - a) * running + a * batch; a: momentum, or one over the batches so far."""
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    for count, (x, momentum) in enumerate(zip(batches, momenta, strict=True), 1):
        a = 1 / count if momentum is None else momentum
        mean, var = (1 - a) * mean + a * x.mean((0, 2)), (1 - a) * var + a * x.transpose(0, 1).flatten(1).var(1)
    return {"running_mean": mean, "running_var": var, "num_batches_tracked": torch.tensor(len(batches))}


@pytest.mark.parametrize("momenta", SCHEDULES, ids=str)
@pytest.mark.parametrize("way", ["eager", "compiled", "torch"])
def test_a_change_counts_from_the_next_batch(way, momenta):
    torch._dynamo.reset()  # each value compiles again, 8 at the most
    kind = nn.BatchNorm1d if way == "torch" else bn.BatchNorm1d
    layer, batches = kind(3).double(), [torch.randn(8, 3, 5).double() * k + k for k in range(1, 6)]
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if way == "compiled" else layer
    for x, momentum in zip(batches, momenta, strict=True):
        layer.momentum = momentum
        run(x)
    found = {name: t for name, t in layer.named_buffers() if name != "skipped_batches"}
    torch.testing.assert_close(found, expected(batches, momenta), rtol=1e-12, atol=1e-12)


def batch(kind, seed, dtype):
    x = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(seed))
    x = {
        "normal": x,
        "constant": torch.full_like(x, seed),
        "large": x * 1e18,  # squares of 1e36
        "huge": x.sign() * torch.finfo(torch.float32).max * 0.99,
        "far": x + 1e30,
        "tiny": x * 1e-40,
        "inf": x.index_fill(0, torch.tensor([seed % 4]), math.inf),
        "both inf": x.sign() * math.inf,
        "nan": x.index_fill(2, torch.tensor([seed % 3]), math.nan),
        "empty": x[:0],
    }[kind]
    return x.to(dtype)


CALLS = st.tuples(
    st.sampled_from(["normal", "constant", "large", "huge", "far", "tiny", "inf", "both inf", "nan", "empty"]),
    st.integers(0, 5),
    st.one_of(st.none(), st.floats(0, 1)),
    st.booleans(),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(CALLS, min_size=1, max_size=8), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
def test_running_statistics_stay_finite_and_variances_not_negative(calls, dtype, on_kernels):
    layer, trained = bn.BatchNorm1d(2), 0
    with pytest.MonkeyPatch.context() as patch:
        if not on_kernels:
            patch.setattr(ops, "has_kernel", lambda *arguments: False)
        for kind, seed, momentum, training in calls:
            layer.momentum, layer.training = momentum, training  # not train(), which would say what was skipped
            layer(batch(kind, seed, dtype))
            trained += training
            assert layer.running_mean.isfinite().all()
            assert layer.running_var.isfinite().all()
            assert (layer.running_var >= 0).all()
            assert (layer.skipped_batches <= trained).all()
            # A batch that is not finite enters the plain average in no channel, and is not counted.
            assert trained - layer.skipped_batches.sum() <= layer.num_batches_tracked <= trained
