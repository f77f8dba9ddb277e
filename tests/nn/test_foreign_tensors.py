"""Subclasses of Tensor, parameters that others compute, and what users give by mistake."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import batchnorm as bn
from batchnorm import ops

X = torch.randn(4, 3, 5, 5)


class Image(torch.Tensor):
    """As fastai's: everything that is made of one is one."""


class Tagged(torch.Tensor):
    """As MONAI's: carries something along."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        made = super().__torch_function__(function, types, args, kwargs or {})
        if isinstance(made, cls):
            made.tag = next((t.tag for t in torch.utils._pytree.tree_leaves(args) if hasattr(t, "tag")), None)
        return made


def tagged(x):
    x = x.as_subclass(Tagged)
    x.tag = "a scan"
    return x


@pytest.mark.parametrize("on_kernels", [True, False])
@pytest.mark.parametrize("options", [{}, {"statistics": bn.Ghost(2)}], ids=str)
@pytest.mark.parametrize("wrap", [lambda x: x.as_subclass(Image), tagged], ids=["Image", "Tagged"])
def test_subclasses_train_with_an_activation_in_place_behind(wrap, options, on_kernels, monkeypatch):
    if not on_kernels:
        monkeypatch.setitem(ops._SERVED, "cpu", ())

    def gradients(x):
        torch.manual_seed(0)
        norm = bn.BatchNorm2d(3, **options)
        model = nn.Sequential(nn.Conv2d(3, 3, 1), norm, nn.ReLU(inplace=True), nn.Conv2d(3, 1, 1))
        y = model(x)
        y.square().sum().backward()
        return y, [p.grad for p in model.parameters()], norm.running_var

    (y, *found), (_, *expected) = gradients(wrap(X)), gradients(X)
    torch.testing.assert_close(found, expected)
    assert type(y) is type(wrap(X))
    assert getattr(y, "tag", None) == getattr(wrap(X), "tag", None)


def test_a_subclass_may_be_the_residual_the_mask_or_an_argument_of_the_function():
    mask = torch.rand(4, 5, 5) > 0.3
    expected = bn.BatchNorm2d(3)(X, residual=X, mask=mask)
    for arguments in ((tagged(X), X, mask), (X, tagged(X), mask), (X, X, tagged(mask))):
        y = bn.BatchNorm2d(3)(*arguments)
        assert y.tag == "a scan"
        torch.testing.assert_close(y.as_subclass(torch.Tensor), expected)
    y = bn.batch_norm(tagged(X), training=True, activation="relu")
    assert y.tag == "a scan"
    torch.testing.assert_close(y.as_subclass(torch.Tensor), F.batch_norm(X, None, None, training=True).relu())


def test_monais_tensors_keep_what_they_know():
    from monai.data import MetaTensor

    model = nn.Sequential(bn.BatchNorm2d(3), nn.ReLU(inplace=True))
    y = model(MetaTensor(X, affine=torch.eye(4) * 2))
    y.sum().backward()
    assert torch.equal(y.affine, torch.eye(4, dtype=y.affine.dtype) * 2)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("options", [{}, {"statistics": bn.Ghost(2)}, {"statistics": bn.Renorm()}], ids=str)
def test_a_bias_may_move_between_two_backwards(options, activation):
    layer, stock = bn.BatchNorm2d(3, activation=activation, **options), nn.BatchNorm2d(3)
    behind = {None: nn.Identity(), "relu": nn.ReLU(), "silu": nn.SiLU()}[activation]
    for each, model in ((layer, layer), (stock, nn.Sequential(stock, behind))):
        each.weight.requires_grad_(False)
        y = model(X)
        for _ in range(2):
            (y * X.relu()).sum().backward(retain_graph=True)
            with torch.no_grad():
                each.bias.add_(1)
    if not options:
        torch.testing.assert_close(layer.bias.grad, stock.bias.grad)


def pruned(layer):
    prune.l1_unstructured(layer, "weight", amount=0.5)


def parametrized(layer):
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Softplus())


def weight_normed(layer):
    parametrizations.weight_norm(layer, "weight")


@pytest.mark.parametrize("change", [lambda layer: None, pruned, parametrized, weight_normed])
@pytest.mark.parametrize("trains_bias", [True, False])
def test_affine_parameters_that_others_compute_are_frozen_and_freed(change, trains_bias):
    model = nn.Sequential(bn.BatchNorm2d(3), bn.BatchNorm2d(3))
    change(model[1])
    model[1].bias.requires_grad_(trains_bias)
    bn.freeze(model, affine=True)
    assert not any(p.requires_grad for p in model.parameters())
    assert not model(X).requires_grad
    bn.unfreeze(model)
    wanted = {name: p.requires_grad for name, p in model[1].named_parameters()}
    assert wanted.pop("bias") is trains_bias
    assert all(wanted.values())


@pytest.mark.parametrize(
    "given",
    [torch.relu, (), {"type": "ReLU"}, 3, ("leaky_relu", "0.1")],
    ids=["function", "nothing", "dict", "number", "slope"],
)
def test_an_activation_that_is_none_is_described(given):
    with pytest.raises(TypeError, match=r"activation takes a name, \"relu\", a tuple with.*Known: ReLU"):
        bn.BatchNorm2d(3, activation=given)


def test_a_class_stands_for_its_module():
    assert bn.BatchNorm2d(3, activation=nn.ReLU).activation == "relu"
    assert bn.BatchNorm2d(3, activation=nn.LeakyReLU).activation == ("leaky_relu", 0.01)
    assert bn.BatchNorm2d(3, activation=nn.GELU).activation == "gelu"
    with pytest.raises(TypeError, match="cannot fuse activation Softplus"):
        bn.BatchNorm2d(3, activation=nn.Softplus)
    with pytest.raises(TypeError, match="cannot fuse activation PReLU: its slope is a parameter that is trained"):
        bn.BatchNorm2d(3, activation=nn.PReLU)
    with pytest.raises(TypeError, match="cannot fuse activation Conv2d"):
        bn.BatchNorm2d(3, activation=nn.Conv2d)


def test_advice_can_be_followed():
    one = torch.randn(1, 3)
    with pytest.raises(ValueError, match=r"drop_last=True\)\), or call \.eval\(\)\."):
        bn.BatchNorm1d(3)(one)
    for layer in (bn.BatchNorm1d(3, track_running_stats=False), bn.BatchNorm1d(3, track_running_stats=False).eval()):
        with pytest.raises(ValueError, match=r"track_running_stats=False\) eval normalizes by the batch too\.$"):
            layer(one)


@pytest.mark.parametrize(
    ("layer", "shape", "advice"),
    [
        (bn.BatchNorm2d(3), (3, 32, 32), r"pass input\.unsqueeze\(0\)"),
        (bn.BatchNorm3d(3), (3, 4, 8, 8), r"pass input\.unsqueeze\(0\)"),
        (bn.BatchNorm1d(3), (3,), r"pass input\.unsqueeze\(0\)"),
        (bn.BatchNorm2d(3), (8, 3, 32), "use BatchNorm1d"),
        (bn.BatchNorm2d(3), (8, 3), "use BatchNorm1d"),
        (bn.BatchNorm1d(3), (8, 3, 5, 5), "use BatchNorm2d"),
    ],
)
def test_advice_about_dimensions(layer, shape, advice):
    with pytest.raises(ValueError, match=advice):
        layer(torch.randn(shape))
