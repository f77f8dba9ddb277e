"""preserve_state leaves no trace; accumulate_statistics updates once, as from one large batch (pain 9)."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn

KINDS = [nn.BatchNorm1d, bn.BatchNorm1d]


def network(kind=bn.BatchNorm1d):
    return nn.Sequential(nn.Linear(4, 6), kind(6, momentum=0.3), nn.ReLU(), kind(6)).double()


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_preserve_state_brings_buffers_and_modes_back(kind, fails):
    model = network(kind)
    model[1].eval()
    before, modes, buffers = state(model), [m.training for m in model.modules()], list(model.buffers())
    try:
        with bn.preserve_state(model) as inside:
            assert inside is model
            model.train()(torch.randn(8, 4).double())
            model.eval()
            model[0].register_buffer("new", torch.zeros(1))
            model[3].running_mean = torch.ones(6).double()
            assert not same(state(model), before)
            if fails:
                raise OSError
    except OSError:
        assert fails
    assert same(state(model), before)
    assert [m.training for m in model.modules()] == modes
    assert all(a is b for a, b in zip(model.buffers(), buffers, strict=True))


def test_statistics_of_several_domains_are_kept_apart():  # pain 31: as docs/statistics.md shows it
    model, domains = network(), {"a": torch.randn(50, 4).double(), "b": torch.randn(50, 4).double() * 3 + 2}
    kept = {}
    for name, x in domains.items():
        bn.recalibrate(model, [x])
        kept[name] = {key: value.clone() for key, value in model.state_dict().items() if "running" in key}
    with bn.preserve_state(model):
        model.load_state_dict(kept["a"], strict=False)
        torch.testing.assert_close(model[1].running_mean, model[0](domains["a"]).mean(0))
    torch.testing.assert_close(model[1].running_mean, model[0](domains["b"]).mean(0))


@pytest.mark.parametrize("momentum", [0.3, 1.0, None])
@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_update_as_one_large_batch(kind, momentum):
    layer, large = kind(4, momentum=momentum).double(), kind(4, momentum=momentum).double()
    for step in range(3):
        x = torch.randn(24, 4).double() * (step + 1) + step
        with bn.accumulate_statistics(layer):
            outputs = [layer(part) for part in x.split([4, 8, 12])]
        large(x)
        torch.testing.assert_close(dict(layer.named_buffers()), dict(large.named_buffers()), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(outputs[0].mean(0), torch.zeros(4).double(), rtol=0, atol=1e-12)  # each by its own
    assert layer.momentum == momentum
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


def test_an_exception_discards_what_was_seen():
    model = network()
    before = state(model)

    def train():
        with bn.accumulate_statistics(model):
            model(torch.randn(8, 4).double())
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        train()
    assert same(state(model), before)
    assert model[1].momentum == 0.3


def test_nothing_seen_in_eval_or_frozen_and_nothing_that_is_not_finite():
    for prepare in (lambda m: m.eval(), lambda m: bn.freeze(m), lambda m: None):
        model = network()
        prepare(model)
        before = state(model)
        with bn.accumulate_statistics(model):
            if model.training and not model[1].frozen_statistics:
                model(torch.full((8, 4), torch.inf).double())
            else:
                model(torch.randn(8, 4).double())
        after = state(model)
        assert all(torch.equal(after[key], before[key]) for key in before if "running" in key)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_counts_once(reentrant):  # pain 8
    layer, twin, x = bn.BatchNorm1d(4), bn.BatchNorm1d(4), torch.randn(8, 4, requires_grad=True)
    with bn.accumulate_statistics(layer):
        for part in x.split(4):
            checkpoint(layer, part, use_reentrant=reentrant).square().sum().backward()
    with bn.accumulate_statistics(twin):
        for part in x.split(4):
            twin(part)
    torch.testing.assert_close(dict(layer.named_buffers()), dict(twin.named_buffers()))


# ---- what is not finite (pain 11) ------------------------------------------------------------------------------------


def broken(x, channel=1, value=torch.inf):
    x = x.clone()
    x[-1, channel] = value
    return x


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 1e30])  # squares of the last: beyond float32
@pytest.mark.parametrize("momentum", [0.3, 1.0, None])
@pytest.mark.parametrize("kind", KINDS)
def test_a_channel_that_would_not_be_finite_keeps_mean_and_variance(kind, momentum, value):
    layer, clean, x = kind(3, momentum=momentum), kind(3, momentum=momentum), torch.randn(3, 12, 3)
    for step, batch in enumerate(x):
        with bn.accumulate_statistics(layer):
            for part in (broken(batch, value=value) if step == 1 else batch).split(4):
                layer(part)
        if step != 1:
            clean(batch)
    kept, others = [1], [0, 2]
    counts = kind is bn.BatchNorm1d
    if momentum is not None or counts:  # torch's own layer does not know how many its average is over
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(getattr(layer, name)[kept], getattr(clean, name)[kept])
    large = kind(3, momentum=momentum)
    for batch in x:
        large(batch)
    torch.testing.assert_close(layer.running_var[others], large.running_var[others])
    assert layer.running_mean.isfinite().all()
    assert layer.running_var.isfinite().all()
    assert layer.num_batches_tracked == 3
    if counts:
        assert layer.skipped_batches.tolist() == [0, 1, 0]


def test_mean_and_variance_wait_together():
    layer = bn.BatchNorm1d(2, momentum=0.5).half()
    x = torch.tensor(
        [[-400.0, 1.0], [400.0, 3.0]]
    ).half()  # a mean of 0 fits into float16, a variance of 320,000 does not
    layer.running_mean.fill_(4)
    with bn.accumulate_statistics(layer):
        layer(x)
    assert layer.running_mean.tolist() == [4, 3]
    assert layer.running_var.tolist() == [1, 1.5]
    assert layer.skipped_batches.tolist() == [1, 0]


def test_what_was_skipped_is_said_once():
    layer, x = bn.BatchNorm1d(3), torch.randn(8, 3)
    for batch, skipped, said in ((broken(x), 1, True), (x, 1, False), (broken(x), 2, True), (broken(x, 0), 2, False)):
        with bn.accumulate_statistics(layer.train()):
            layer(x)
            layer(batch)
        assert layer.skipped_batches.max() == skipped
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            layer.eval().train().eval()
        assert len(warned) == said


def test_an_exception_leaves_the_count_too():
    layer, counts = bn.BatchNorm1d(3), [2, 0, 0]
    layer.skipped_batches.copy_(torch.tensor(counts))

    def train():
        with bn.accumulate_statistics(layer):
            layer(broken(torch.randn(8, 3)))
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        train()
    assert layer.skipped_batches.tolist() == counts
