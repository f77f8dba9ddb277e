"""Statistics of each domain, and sources that users write: what a layer asks of a source, and nothing more."""

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn


def model(**options):
    return nn.Sequential(nn.Conv2d(3, 4, 3), bn.BatchNorm2d(4, statistics=bn.Domains(3), **options), nn.ReLU())


BATCHES = [torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * (seed + 1) for seed in range(3)]


def test_each_domain_is_a_layer_of_its_own_but_for_weight_and_bias():
    one = model()
    each = [nn.Sequential(copy.deepcopy(one[0]), nn.BatchNorm2d(4), nn.ReLU()) for _ in BATCHES]
    for _ in range(2):
        for domain, x in enumerate(BATCHES):
            with bn.Domains.select(one, domain):
                torch.testing.assert_close(one(x), each[domain](x))
    one.eval()
    for domain, (x, alone) in enumerate(zip(BATCHES, each, strict=True)):
        with bn.Domains.select(one, domain):
            torch.testing.assert_close(one(x), alone.eval()(x))
            assert one[1].num_batches_tracked == 2


def test_a_domain_stays_selected_without_a_block_and_comes_back_after_one():
    one = model()
    bn.Domains.select(one, 2)
    with bn.Domains.select(one, 1):
        assert one[1].domain == 1
    assert one[1].domain == 2
    with pytest.raises(RuntimeError, match="inside"), bn.Domains.select(one, 0):
        raise RuntimeError("inside")
    assert one[1].domain == 2


def test_every_domain_begins_with_what_the_layer_has():
    layer = bn.BatchNorm2d(4)
    layer(torch.randn(8, 4, 5, 5) + 3)
    before = layer.running_mean.clone()
    layer.statistics = bn.Domains(2)
    with bn.Domains.select(layer, 1):
        assert torch.equal(layer.running_mean, before)
    layer.statistics = bn.Batch()
    assert set(layer.state_dict()) == set(nn.BatchNorm2d(4).state_dict())


def test_recalibrate_freeze_and_fold_work_on_the_selected_domain():  # AdaBN
    one = model()
    with bn.Domains.select(one, 1):
        bn.recalibrate(one, [BATCHES[1]])
        expected = one[0](BATCHES[1])
        torch.testing.assert_close(one[1].running_mean, expected.mean((0, 2, 3)))
        folded = bn.fold(one.eval(), BATCHES[1])
        torch.testing.assert_close(folded(BATCHES[1]), one(BATCHES[1]), rtol=1e-4, atol=1e-5)
    assert not one[1].running_mean.any()


def test_all_of_it_is_saved_and_a_plain_checkpoint_is_of_the_selected_domain():
    one, other = model(), model()
    for domain, x in enumerate(BATCHES):
        with bn.Domains.select(one, domain):
            one(x)
    bn.Domains.select(one, 1)
    other.load_state_dict(one.state_dict())
    for domain, x in enumerate(BATCHES):
        with bn.Domains.select(one, domain), bn.Domains.select(other, domain):
            torch.testing.assert_close(other.eval()(x), one.eval()(x))
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    plain(BATCHES[0])
    other.load_state_dict(plain.state_dict())
    assert torch.equal(other[1].running_mean, plain[1].running_mean)
    plain.load_state_dict({k: v for k, v in other.state_dict().items() if "domain" not in k})


def test_preserved_state_and_micro_batches_are_of_the_selected_domain():
    one = model()
    saved = copy.deepcopy(one.state_dict())
    with bn.preserve_state(one), bn.Domains.select(one, 1):
        one(BATCHES[1])
    assert all(torch.equal(t, saved[name]) for name, t in one.state_dict().items())
    with bn.Domains.select(one, 2), bn.accumulate_statistics(one):
        for part in BATCHES[2].split(4):
            one(part)
    with bn.Domains.select(one, 2):
        assert one[1].num_batches_tracked == 1
        torch.testing.assert_close(one[1].running_mean, 0.1 * one[0](BATCHES[2]).mean((0, 2, 3)))


def test_another_number_of_domains_keeps_those_that_there_are():
    one = model()
    for domain, x in enumerate(BATCHES):
        with bn.Domains.select(one, domain):
            one(x)
    bn.Domains.select(one, 1)
    means = [one[1].domain_mean[0].clone(), one[1].running_mean.clone()]
    one[1].statistics = bn.Domains(4)
    assert one[1].domain == 1
    for domain, mean in enumerate(means):
        with bn.Domains.select(one, domain):
            assert torch.equal(one[1].running_mean, mean)
    one[1].statistics = bn.Domains(2)
    assert one[1].domain_mean.shape == (2, 4)
    with pytest.raises(ValueError, match=r"domain 1 is selected, which Domains\(number=1\) has not"):
        one[1].statistics = bn.Domains(1)


def test_a_block_may_be_entered_again_and_end_without_the_source():
    one = model()
    first = bn.Domains.select(one, 1)
    for _ in range(2):
        with first:
            assert one[1].domain == 1
        assert one[1].domain == 0
    with bn.Domains.select(one, 2):
        one[1].statistics = bn.Batch()


def test_statistics_of_several_domains_are_not_gathered_as_one():
    one = model()

    def selects(network, batch):
        with bn.Domains.select(network, 1):
            network(batch)

    with pytest.raises(RuntimeError, match="select it around them"):
        bn.recalibrate(one, BATCHES, forward=selects)
    with pytest.raises(RuntimeError, match="select it around them"), bn.accumulate_statistics(one):
        selects(one, BATCHES[0])
    selects(one, BATCHES[0])
    bn.recalibrate(one, BATCHES)
    assert not one[1].gathering


@pytest.mark.parametrize("compile", [False, True])
def test_a_mask_and_a_compiled_model(compile):
    one = bn.BatchNorm1d(3, statistics=bn.Domains(2))
    call = torch.compile(one, backend="aot_eager") if compile else one
    x, mask = torch.randn(6, 3), torch.tensor([True, True, True, False, False, True])
    for _ in range(2):
        with bn.Domains.select(one, 1):
            call(x, mask=mask)
    with bn.Domains.select(one, 1):
        torch.testing.assert_close(one.running_mean, 0.19 * x[mask].mean(0))


def test_a_model_of_no_values_begins_with_those_of_a_new_layer():
    with torch.device("meta"):
        empty = model()
    real = empty.to_empty(device="cpu")
    assert real[1].domain == 0
    assert real[1].domain_var.eq(1).all()
    assert not real[1].domain_mean.any()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: bn.Domains(0), ValueError, r"at least 1 \(got 0\)"),
        (lambda: bn.Domains(True), ValueError, "at least 1"),
        (lambda: bn.BatchNorm2d(4, statistics=bn.Domains(2), track_running_stats=False), ValueError, "track_running"),
        (lambda: bn.Domains.select(nn.Linear(2, 2), 0), ValueError, "no layer has statistics=Domains"),
        (lambda: bn.Domains.select(model(), 3), ValueError, "domains 0 to 2, got 3"),
        (lambda: bn.Domains.select(model(), 1.0), TypeError, "whole number, got 1.0"),
        (lambda: bn.Domains.select(model(), torch.tensor(1.5)), TypeError, "whole number, got tensor"),
        (lambda: bn.to_torch(model()), ValueError, "which torch's does not have"),
    ],
)
def test_what_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


# ---- a source that a user writes -------------------------------------------------------------------------------------


class Slow(bn.Source):
    """Normalize by a mean over batches that moves slowly, which the layer keeps in a buffer; the batch's variance."""

    initial = {"slow_mean": 0.0}  # noqa: RUF012

    def buffers(self, layer):
        return {"slow_mean": torch.zeros(layer.num_features)}

    def known(self, layer):
        return layer.slow_mean.clone()

    def normalize(self, x_NCS, affine, mask_N1S, known):
        moments = self.moments(x_NCS, mask_N1S)
        y = self.apply(x_NCS, moments._replace(mean_C=known.double()), affine, mask_N1S)
        return y, moments

    def after(self, layer, known, moments):
        layer.slow_mean.lerp_(moments.mean_C.to(layer.slow_mean), 0.01)

    def in_recalibrate(self, known):
        return bn.Batch()


def test_a_source_of_a_users_own_keeps_state_in_the_layer():
    layer, x = bn.BatchNorm1d(3, statistics=Slow()), torch.randn(16, 3) + 2
    y = layer(x)
    torch.testing.assert_close(y, x / (x.var(0, correction=0) + 1e-5).sqrt())
    torch.testing.assert_close(layer.slow_mean, 0.01 * x.mean(0))
    torch.testing.assert_close(layer.running_mean, 0.1 * x.mean(0))
    again = bn.BatchNorm1d(3, statistics=Slow())
    again.load_state_dict(layer.state_dict())
    torch.testing.assert_close(again(x), layer(x))
    bn.recalibrate(layer, [x])
    torch.testing.assert_close(layer.running_mean, x.mean(0))
    layer.statistics = bn.Batch()
    assert "slow_mean" not in layer.state_dict()
    layer.load_state_dict(again.state_dict())


class Halves(bn.Source):
    """The moments of the first half, for all."""

    def normalize(self, x_NCS, affine, mask_N1S, known):
        moments = self.moments(x_NCS[: len(x_NCS) // 2])
        return self.apply(x_NCS, moments, affine), moments


def test_the_gradient_of_a_users_source_is_that_of_its_equation():
    layer = bn.BatchNorm1d(3, statistics=Halves(), activation="gelu").double()
    x, r = (torch.randn(8, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    parameters = tuple(
        p.detach().clone().requires_grad_() for p in (torch.rand(3).double() + 1, torch.randn(3).double())
    )

    def ours(x, r, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x, r))

    def equation(x, r, weight, bias):
        half = x[:4]
        xhat = (x - half.mean(0)) / (half.var(0, correction=0) + layer.epsilon).sqrt()
        return torch.nn.functional.gelu(weight * xhat + bias + r)

    given, d_y = (x, r, *parameters), torch.randn(8, 3, dtype=torch.float64)
    expected = torch.autograd.grad(equation(*given), given, d_y)
    torch.testing.assert_close(torch.autograd.grad(ours(*given), given, d_y), expected)


class Wrong(bn.Source):
    def __init__(self, given, initial=()):
        self.given, self.initial = given, dict.fromkeys(initial, 0)

    def buffers(self, layer):
        return {name: torch.zeros(3) for name in self.initial} if isinstance(self.initial, dict) else None

    def normalize(self, x_NCS, affine, mask_N1S, known):
        y, moments = super().normalize(x_NCS, affine, mask_N1S, known)
        return {"y": y, "short": (y[:1], moments), "tuple": (y, tuple(moments)), "none": None}[self.given]


@pytest.mark.parametrize("given", ["y", "short", "tuple", "none"])
def test_a_source_that_returns_something_else_is_told_what(given):
    with pytest.raises(TypeError, match=r"normalize of Wrong returns \(y, moments\), y of \(8, 3\)"):
        bn.BatchNorm1d(3, statistics=Wrong(given))(torch.randn(8, 3))


def test_a_source_takes_no_buffer_of_torchs():
    with pytest.raises(ValueError, match="none of them torch's own; initial: running_mean, got running_mean"):
        bn.BatchNorm1d(3, statistics=Wrong("y", ["running_mean"]))
