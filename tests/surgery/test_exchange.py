"""Every batch normalization layer exchanged: what the new one computes, what stays, in every kind of layer."""

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.surgery.exchange import exchanged, ghost, group_norm, layer_norm, renorm
from tests.surgery.test_fold import NORMS, shaken
from tests.surgery.test_remove import Residual, WithResidual

SHAPES = [(5, 12), (5, 12, 4), (5, 12, 3, 2), (5, 12, 3, 2, 2)]


def by_groups(x, groups, norm):
    """Wu & He 2018, equation 7: mean and variance of each group of channels."""
    grouped = x.reshape(len(x), groups, -1)
    var, mean = torch.var_mean(grouped, -1, correction=0, keepdim=True)
    y = ((grouped - mean) / (var + vars(norm)["eps"]).sqrt()).view_as(x)
    shape = [-1] + [1] * (x.dim() - 2)
    return y if norm.weight is None else y * norm.weight.view(shape) + norm.bias.view(shape)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("package", [nn, bn, "sync"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_group_and_layer_normalization(shape, package, affine):
    kind = nn.SyncBatchNorm if package == "sync" else getattr(package, NORMS[len(shape)])
    x = torch.randn(shape, dtype=torch.float64)
    model = shaken(nn.Sequential(kind(12, eps=0.01, affine=affine), nn.Tanh()))
    norm, before = model[0], copy.deepcopy(model.state_dict())
    for make, groups in ((group_norm, 1 if isinstance(norm, nn.BatchNorm1d) else 6), (layer_norm, 1)):
        made = exchanged(model, x, make)
        assert made.batchnorm_report.of("replaced") == ["0"]
        torch.testing.assert_close(made(x), by_groups(x, groups, norm).tanh())
        assert not made.training
        assert made.train()[0].training
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert type(model[0]) is kind


def test_layer_normalization_of_vectors_is_torchs():
    x = torch.randn(5, 12, dtype=torch.float64)
    model = shaken(nn.Sequential(nn.BatchNorm1d(12)))
    made = exchanged(model, x, layer_norm)
    expected = nn.functional.layer_norm(x, (12,), model[0].weight, model[0].bias, model[0].eps)
    torch.testing.assert_close(made(x), expected)


@pytest.mark.parametrize(
    ("kind", "channels", "groups"),
    [(nn.BatchNorm2d, *row) for row in ((1, 1), (2, 1), (7, 1), (10, 5), (32, 16), (64, 32), (100, 25), (256, 32))]
    + [(nn.BatchNorm1d, *row) for row in ((7, 1), (16, 2), (64, 8), (100, 10), (512, 32))],
)
def test_groups(kind, channels, groups):
    made = group_norm(kind(channels))
    assert (made.num_groups, made.num_channels) == (groups, channels)


@pytest.mark.parametrize("make", [group_norm, layer_norm])
def test_the_layers_parameters_and_what_they_have_no_more(make):
    layer = bn.BatchNorm2d(4, bias=False).double()
    layer.weight.requires_grad_(False)
    made = make(layer)
    assert made.weight is layer.weight
    assert made.bias is None
    assert made(torch.randn(2, 4, 3, 3, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize(("make", "source"), [(ghost, bn.Ghost(32)), (renorm, bn.Renorm())])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, bn.BatchNorm2d, nn.SyncBatchNorm])
def test_other_statistics_are_the_same_in_eval_and_their_own_in_train(kind, make, source):
    x = torch.randn(70, 4, 3, 3, dtype=torch.float64)
    model = shaken(nn.Sequential(nn.Conv2d(4, 4, 1), kind(4, eps=0.01, momentum=0.3), nn.ReLU()))
    made = exchanged(model, x, make)
    assert made[1].statistics == source
    assert {k: t for k, t in made.state_dict().items() if "renorm" not in k}.keys() == model.state_dict().keys()
    torch.testing.assert_close(made(x), model(x))
    expected = bn.BatchNorm2d(4, eps=0.01, momentum=0.3, statistics=source).double()
    expected.load_state_dict(model[1].state_dict(), strict=False)
    for _ in range(2):
        torch.testing.assert_close(made.train()(x), expected(model[0](x)).relu())
    torch.testing.assert_close(made[1].running_var, expected.running_var)


def test_activations_and_residuals_stay_behind():
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    model = shaken(WithResidual(nn.Conv2d(4, 4, 1)))
    made = exchanged(model, x, layer_norm)
    torch.testing.assert_close(made(x), nn.functional.silu(by_groups(model.first(x), 1, model.norm) + x))
    residual = shaken(nn.Sequential(Residual(4, 8), Residual(8, 8)))
    for make in (group_norm, ghost):
        fused = bn.from_torch(residual, example=x)
        assert fused.batchnorm_report.of("fused")
        plain = exchanged(residual, x, make)
        torch.testing.assert_close(exchanged(fused, x, make)(x), plain(x))
        torch.testing.assert_close(exchanged(fused, x, make).train()(x), plain.train()(x))


def test_what_insert_gave_is_exchanged_too():
    x = torch.randn(3, 4, dtype=torch.float64)
    inserted = bn.insert(nn.Sequential(nn.Linear(4, 6), nn.ReLU()).double(), x)
    made = exchanged(inserted, x, group_norm)
    assert made.batchnorm_report.of("replaced") == ["0.batch_norm"]
    expected = by_groups(nn.functional.linear(x, inserted[0].weight), 1, inserted[0].batch_norm)
    torch.testing.assert_close(made(x), expected.relu())


def test_a_layer_in_several_places_stays_one_and_the_model_may_be_a_layer():
    x = torch.randn(3, 4, dtype=torch.float64)
    norm = nn.BatchNorm1d(4)
    made = exchanged(nn.Sequential(norm, nn.Linear(4, 4), norm).double(), x, group_norm)
    assert made[0] is made[2]
    assert type(exchanged(norm, x, layer_norm)) is nn.GroupNorm


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = bn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(x, mask=x[:, :1] > -9)


class Own(nn.BatchNorm1d):
    pass


def test_what_is_left_alone_has_a_row():
    x = torch.randn(3, 4)
    hooked = nn.Sequential(nn.BatchNorm1d(4))
    hooked[0].register_forward_hook(lambda *_: None)
    for model, name, why in (
        (nn.Sequential(Own(4)), "0", "a Own may do more than batch normalization"),
        (hooked, "0", "it has hooks, which would see something else"),
    ):
        assert exchanged(model, x, group_norm).batchnorm_report == [(name, "left alone", why)]
    sequence = torch.randn(3, 4, 5)
    assert exchanged(Masked(), sequence, group_norm).batchnorm_report == [("norm", "left alone", "it is given a mask")]


def test_refused():
    x = torch.randn(3, 4)
    with pytest.raises(TypeError, match=r"exchanged: make gave None for layer '0', which is no module"):
        exchanged(nn.Sequential(nn.BatchNorm1d(4)), x, lambda layer: None)
    with pytest.raises(ValueError, match=r"exchanged: the model does not run on the example \(RuntimeError"):
        exchanged(nn.Sequential(nn.BatchNorm1d(4)), x, lambda layer: nn.Linear(5, 5))
