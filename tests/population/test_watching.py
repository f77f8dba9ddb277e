"""Subclasses with a forward of their own, and layers kept in eval: what moves is found, what does not is left alone."""

import pytest
import torch
import torch.ao.nn.intrinsic.qat as qat
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization import get_default_qat_qconfig

import batchnorm as bn

KINDS = [nn.BatchNorm1d, bn.BatchNorm1d]
XS = (torch.randn(48, 4, generator=torch.Generator().manual_seed(1)) * 2 + 3).split(16)


def fixed(kind: type[nn.Module]) -> nn.Module:
    class Fixed(kind):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

    return nn.Sequential(Fixed(4))


def never_in_train(kind: type[nn.Module]) -> nn.Module:
    class Frozen(kind):  # type: ignore[misc, valid-type]
        def train(self, mode: bool = True) -> nn.Module:
            return super().train(False)

    return nn.Sequential(Frozen(4))


def kept_by_its_instance(kind: type[nn.Module]) -> nn.Module:
    layer = kind(4).eval()
    layer.train = lambda mode=True: layer
    return nn.Sequential(layer)


def kept_by_the_model(kind: type[nn.Module]) -> nn.Module:
    class Backbone(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            self[0].eval()
            return super().forward(x)

    return Backbone(kind(4))


@pytest.mark.parametrize("make", [fixed, never_in_train, kept_by_its_instance, kept_by_the_model])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_never_move_are_left_alone(kind, make):
    model = make(kind)
    model[0].running_mean.fill_(3), model[0].running_var.fill_(4)
    assert bn.recalibrate(model, XS) == []
    model.append(nn.BatchNorm1d(4))
    expected = [model[0].eval()(x).detach() for x in XS]
    with bn.accumulate_statistics(model):
        found = [model[:1].train()(x) for x in XS]
        torch.testing.assert_close(found if make is not kept_by_the_model else expected, expected)
    assert [row.layer for row in bn.recalibrate(model, XS)] == ["1"]
    torch.testing.assert_close(model[1].running_var, torch.cat(expected).var(0))
    assert (model[0].running_mean == 3).all()
    assert (model[0].running_var == 4).all()


class Assigning(nn.BatchNorm1d):
    """As many have written it by hand."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return (x - self.running_mean) / (self.running_var + self.eps).sqrt()
        self.num_batches_tracked += 1
        m, mean, var = self.momentum, x.mean(0), x.var(0, correction=0)
        with torch.no_grad():
            self.running_mean = m * mean + (1 - m) * self.running_mean
            self.running_var = m * var * len(x) / (len(x) - 1) + (1 - m) * self.running_var
        return (x - mean) / (var + self.eps).sqrt()


def test_statistics_that_a_forward_assigns_are_found():
    layer, x = Assigning(4), torch.cat(XS)
    with bn.accumulate_statistics(layer):
        for part in XS:
            layer(part)
        assert (layer.running_mean == 0).all()
    torch.testing.assert_close(layer.running_mean, 0.1 * x.mean(0))
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * x.var(0))
    buffers, layer.running_mean[0] = list(layer.buffers()), torch.nan
    (row,) = bn.recalibrate(layer, XS)
    assert row.values == len(x)
    torch.testing.assert_close(layer.running_mean, x.mean(0))
    torch.testing.assert_close(layer.running_var, x.var(0))
    assert all(a is b for a, b in zip(layer.buffers(), buffers, strict=True))
    bn.recalibrate(layer, XS)  # which finds what is there already
    torch.testing.assert_close(layer.running_mean, x.mean(0))


class Split(nn.BatchNorm1d):
    """As timm's: a layer for each part of the batch, itself for the first."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.others = nn.ModuleList([nn.BatchNorm1d(features)])

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        first, second = x.chunk(2)
        return torch.cat([super().forward(first), self.others[0](second)])


def test_a_part_of_the_batch_counts_as_many_values_as_it_has():
    layer, first = Split(4), torch.cat([x[:8] for x in XS])
    rows = bn.recalibrate(layer, XS)
    assert [row.values for row in rows] == [24, 24]
    torch.testing.assert_close(layer.running_var, first.var(0))
    layer.reset_running_stats()
    with bn.accumulate_statistics(layer):
        for x in XS:
            layer(x)
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * first.var(0))
    assert "_check_input_dim" not in vars(layer)


class Decaying(nn.BatchNorm1d):
    """It does not ask for its momentum."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.track_running_stats:
            self.running_mean.lerp_(x.detach().mean(0), 0.1)
            self.running_var.lerp_(x.detach().var(0), 0.1)
        return (x - self.running_mean) / (self.running_var + self.eps).sqrt()


def test_a_decay_of_its_own_is_refused_by_name_and_the_way_out_works():
    model = nn.Sequential(nn.BatchNorm1d(4), Decaying(4))
    with pytest.raises(ValueError, match=r"layer 1 \(Decaying\) keeps a share .*track_running_stats = False"):
        bn.recalibrate(model, XS)
    assert all((m.running_mean == 0).all() for m in model)
    model[1].track_running_stats = False
    assert [row.layer for row in bn.recalibrate(model, XS)] == ["0"]


def test_a_module_may_read_the_running_variance_of_its_child():
    """Quantization-aware training scales weights by it."""
    model = qat.ConvBn2d(3, 4, 1, qconfig=get_default_qat_qconfig("fbgemm"))
    xs = torch.randn(6, 16, 3, 5, 5).unbind()
    for x in xs:
        model(x)
    seen: list[Tensor] = []
    hook = model.bn.register_forward_hook(lambda layer, inputs, y: seen.append(inputs[0].detach()))
    with bn.preserve_state(model):
        model.bn.momentum = 0.0
        for x in xs:
            model(x)
    hook.remove()
    bn.recalibrate(model, xs)
    torch.testing.assert_close(model.bn.running_var, torch.cat(seen).var((0, 2, 3)), rtol=0.05, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_may_be_plain_attributes(kind):
    layer, x = kind(4), torch.cat(XS)
    for name in ("running_mean", "running_var"):
        value = getattr(layer, name)
        delattr(layer, name)
        setattr(layer, name, value)
    with bn.accumulate_statistics(layer):
        for part in XS:
            layer(part)
    torch.testing.assert_close(layer.running_mean, 0.1 * x.mean(0))
    bn.recalibrate(layer, XS)
    torch.testing.assert_close(layer.running_var, x.var(0))


def test_a_subclass_compiled():
    model, x = nn.Sequential(nn.Linear(4, 4), Assigning(4)), torch.cat(XS)
    compiled = torch.compile(model, backend="eager")
    bn.recalibrate(compiled, XS)
    torch.testing.assert_close(model[1].running_mean, model[0](x).mean(0))
    model[1].reset_running_stats()
    with bn.accumulate_statistics(model):
        for part in XS:
            compiled(part)
    torch.testing.assert_close(model[1].running_mean, 0.1 * model[0](x).mean(0))
