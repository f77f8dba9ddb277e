"""Fused layers in the hands of code that knows torch's only: it finds ordinary layers, and the numbers stay."""

import copy
import functools
import pickle
import warnings
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
import torch.utils.mkldnn
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import batchnorm as bn
from tests.surgery.test_fuse import shaken

X = torch.randn(3, 4, 6, 6, dtype=torch.float64)


class BaseConv(nn.Module):
    """As YOLO's: one activation module per block, and a ``fuse`` of its own."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))

    def fuse(self):
        self.conv = fuse_conv_bn_eval(self.conv, self.bn)
        del self.bn
        self.forward = lambda x: self.act(self.conv(x))


class Residual(nn.Module):
    """An activation and an addition that stand in its forward, which is rewritten."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.silu(self.bn(self.conv(x))))) + x)


class Frozen(nn.Module):
    """As detectron2's: scale and shift, from a layer's attributes."""

    def __init__(self, layer):
        super().__init__()
        self.scale = (layer.weight * (layer.running_var + layer.eps).rsqrt()).detach().view(-1, 1, 1)
        self.shift = layer.bias.detach().view(-1, 1, 1) - layer.running_mean.view(-1, 1, 1) * self.scale

    def forward(self, x):
        return x * self.scale + self.shift


def own_method(model):
    for module in model.modules():
        if isinstance(module, BaseConv):
            module.fuse()
    return model


def free_function(model):
    """Folds each layer into the convolution before it, and puts an Identity in its place."""
    for module in model.modules():
        before = None
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, before, fuse_conv_bn_eval(getattr(module, before), child))
                setattr(module, name, nn.Identity())
            before = name
    return model


def frozen(model):
    for name, child in list(model.named_children()):
        setattr(model, name, Frozen(child) if isinstance(child, nn.BatchNorm2d) else frozen(child))
    return model


def only_reads(model):
    assert {layer.eps for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)} == {1e-5}
    return model


def as_it_is(model):
    return model


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def twice_rewritten(model):
    return bn.from_torch(model, example=X)


@pytest.mark.parametrize("first", [as_it_is, copy.deepcopy, pickled, twice_rewritten])
@pytest.mark.parametrize(
    "other", [own_method, free_function, frozen, only_reads, nn.SyncBatchNorm.convert_sync_batchnorm]
)
def test_code_that_reads_eps_finds_an_ordinary_network(other, first):
    model = shaken(nn.Sequential(BaseConv(), Residual(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Tanh())).eval()
    expected = model(X)
    fused = bn.from_torch(model, example=X)
    assert len(fused.batchnorm_report.of("fused")) == 4
    theirs = other(first(fused))
    torch.testing.assert_close(theirs(X), expected)
    if first is not as_it_is:
        assert fused[0].bn.activation == "silu"  # another model's layers are its own
    torch.testing.assert_close(fused(X), expected)


def test_one_of_a_rewritten_forward_gives_all_of_it_back_and_no_other_module():
    model = shaken(nn.Sequential(Residual(), Residual())).eval()
    fused = bn.from_torch(model, example=X)
    assert fused[0].bn2.eps == 1e-5
    assert [fused[0].bn.activation, fused[1].bn.activation] == [None, "silu"]
    assert type(fused[0]) is Residual
    assert type(fused[1]) is not Residual
    torch.testing.assert_close(fused(X), model(X))


class Scaled(nn.Module):
    """In a layer's place, of what has nothing to do with eps."""

    def __init__(self, layer):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x):
        return x * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


class Wrapper(nn.Module):
    """As FullyShardedDataParallel's, or a timer's."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


INSTEAD = {
    "identity": lambda layer: nn.Identity(),
    "group norm": lambda layer: nn.GroupNorm(2, layer.num_features).double(),
    "another layer": lambda layer: shaken(nn.Sequential(nn.BatchNorm2d(4)))[0].eval(),
    "one of ours": lambda layer: shaken(nn.Sequential(bn.BatchNorm2d(4)))[0].eval(),
    "from its tensors": Scaled,
    "a wrapper": lambda layer: Wrapper(layer),
}


def by_attribute(parent, name, new):
    setattr(parent, name, new)


def behind_torchs_back(parent, name, new):
    parent._modules[name] = new


HOW = [(as_it_is, by_attribute), (pickled, behind_torchs_back), (twice_rewritten, by_attribute)]
# Every pair of the three is in a third of their triples; the others are slow together.
REPLACED = [
    pytest.param(place, instead, *how, marks=[pytest.mark.slow] if (i + j + k) % len(HOW) else [],
                 id=f"{place}-{instead}-{how[0].__name__}")
    for i, place in enumerate(["0.bn", "1.bn", "1.bn2", "3"])
    for j, instead in enumerate(INSTEAD)
    for k, how in enumerate(HOW)
]  # fmt: skip


@pytest.mark.parametrize(("place", "instead", "first", "put"), REPLACED)
def test_what_a_layer_took_over_is_done_without_it(place, instead, first, put):
    """By others who put something else there, and by the layer again when it comes back."""
    model = shaken(nn.Sequential(BaseConv(), Residual(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Tanh())).eval()
    theirs, expected = first(bn.from_torch(model, example=X)), copy.deepcopy(model)
    assert len([m for m in theirs.modules() if getattr(m, "fused", False)]) == 4
    around, _, name = place.rpartition(".")
    was, layer = theirs.get_submodule(place), expected.get_submodule(place)
    torch.manual_seed(1)
    put(theirs.get_submodule(around), name, INSTEAD[instead](was))
    torch.manual_seed(1)
    put(expected.get_submodule(around), name, INSTEAD[instead](layer))
    torch.testing.assert_close(theirs(X), expected(X))
    put(theirs.get_submodule(around), name, was)
    torch.testing.assert_close(theirs(X), model(X))


def test_a_copy_of_a_layer_that_was_replaced_goes_back_alone():
    model = shaken(nn.Sequential(BaseConv(), Residual())).eval()
    fused = bn.from_torch(model, example=X)
    other = copy.deepcopy(fused)
    other[0].bn, other[1].bn2 = nn.Identity(), nn.BatchNorm2d(4).double().eval()
    other(X)
    assert [type(other[0].act), type(other[1])] == [nn.SiLU, Residual]
    assert [fused[0].bn.activation, fused[1].bn2.activation] == ["silu", "relu"]
    torch.testing.assert_close(fused(X), model(X))


def test_a_wrapped_block_keeps_what_was_fused():
    model = shaken(nn.Sequential(nn.Sequential(BaseConv().conv, nn.BatchNorm2d(4)), nn.ReLU())).eval()
    fused, layer = bn.from_torch(model, example=X), None
    layer, fused[0] = fused[0][1], Wrapper(fused[0])
    torch.testing.assert_close(fused(X), model(X))
    assert layer.activation == "relu"
    fused[0].module[1] = nn.Identity()
    model[0][1] = nn.Identity()
    torch.testing.assert_close(fused(X), model(X))


def test_a_compiled_network_sees_that_a_layer_is_gone():
    model = shaken(nn.Sequential(BaseConv(), Residual())).eval()
    fused, expected = bn.from_torch(model, example=X), copy.deepcopy(model)
    compiled = torch.compile(fused, backend="eager")
    torch.testing.assert_close(compiled(X), model(X))
    for network in (fused, expected):
        network[0].bn = network[1].bn = nn.Identity()
    torch.testing.assert_close(compiled(X), expected(X))


class Outer(nn.Module):
    """Rewritten around a child that was rewritten before: its text holds the child's."""

    def __init__(self):
        super().__init__()
        self.inner = Residual()
        self.inner.last = nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(self.inner.last(self.inner(x)))


@pytest.mark.parametrize("name", ["last", "bn", "bn2"])
def test_a_forward_around_another_goes_back_with_it(name):
    model = shaken(nn.Sequential(Outer())).eval()
    fused = bn.from_torch(model, example=X)
    assert len(fused.batchnorm_report.of("fused")) == 3
    assert getattr(fused[0].inner, name).eps == 1e-5
    torch.testing.assert_close(fused(X), model(X))
    torch.testing.assert_close(bn.to_torch(fused)(X), model(X))


def test_to_mkldnn():
    model = shaken(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())).float().eval()
    x = X.float()
    deployed = torch.utils.mkldnn.to_mkldnn(bn.from_torch(model, example=x))
    assert type(deployed[2]) is nn.ReLU
    torch.testing.assert_close(deployed(x.to_mkldnn()).to_dense(), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [BaseConv, Residual])
def test_dynamic_quantization_of_what_is_no_convolution(kind):
    """It asks every layer for its ``qconfig``."""
    model = shaken(nn.Sequential(kind(), nn.Flatten(), nn.Linear(144, 2))).float().eval()
    fused = bn.from_torch(model, example=X.float())
    assert fused[0].bn.fused
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's
        expected, got = (torch.ao.quantization.quantize_dynamic(m, {nn.Linear})(X.float()) for m in (model, fused))
    torch.testing.assert_close(got, expected)


def test_hooks_and_the_mode_that_the_placeholder_has_stay():
    fused = bn.from_torch(shaken(nn.Sequential(nn.BatchNorm2d(4), nn.LeakyReLU(0.2))), example=X).eval()
    seen = []
    fused[1].register_forward_hook(lambda *_: seen.append(1))
    expected = fused(X)
    assert fused[0].eps == 1e-5
    assert (type(fused[1]), fused[1].negative_slope, fused[1].training) == (nn.LeakyReLU, 0.2, False)
    torch.testing.assert_close(fused(X), expected)
    assert seen == [1, 1]


@pytest.mark.parametrize("first", [as_it_is, copy.deepcopy, pickled])
def test_a_dropout_that_was_crossed_is_where_it_was_when_it_drops(first):
    model = shaken(nn.Sequential(nn.BatchNorm2d(4), nn.Dropout(0.0), nn.SiLU()))
    fused = first(bn.from_torch(model, example=X))
    assert fused[0].activation == "silu"
    fused[1].p = model[1].p = 0.4
    assert [fused[0].activation, type(fused[1]), type(fused[2])] == [None, nn.Dropout, nn.SiLU]
    results = []
    for m in (model, fused):
        torch.manual_seed(0)
        results.append(m.train()(X))
    torch.testing.assert_close(*results)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.other, self.act = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.SiLU()

    def forward(self, x):
        return self.act(self.other(F.relu(self.norm(x) + x)))


def test_a_graph_module():
    model = shaken(nn.Sequential(Mixed())).eval()
    fused = bn.from_torch(torch.fx.symbolic_trace(model), example=X)
    assert len(fused.batchnorm_report.of("fused")) == 2
    copied, again = copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))
    for m in (fused, copied, again):
        torch.testing.assert_close(m(X), model(X))
    assert copied.get_submodule("0.norm").eps == 1e-5
    assert copied.get_submodule("0.norm").activation is None
    assert fused.get_submodule("0.norm").activation == "relu"
    torch.testing.assert_close(copied(X), model(X))
    with pytest.raises(
        TypeError, match=r"GraphModule was pickled with fused layers. Pickle batchnorm.to_torch\(model\)"
    ):
        again.get_submodule("0.norm").eps  # noqa: B018
    torch.testing.assert_close(again(X), model(X))
    torch.testing.assert_close(bn.to_torch(fused)(X), model(X))


class NormAct(nn.BatchNorm2d):
    """As timm's."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.LeakyReLU(0.2)

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class Blocks(nn.Module):
    """An activation of each kind that is taken over: a block's child, a layer's own, one behind, one behind a sum."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.LeakyReLU(0.2)
        self.seq = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.LeakyReLU(0.2))
        self.timm = NormAct(4)
        self.bn2, self.act2 = nn.BatchNorm2d(4), nn.LeakyReLU(0.2)

    def forward(self, x):
        x = self.timm(self.seq(self.act(self.bn(self.conv(x)))))
        return self.act2(self.bn2(x) + x)


def slope(parent, name):
    parent.get_submodule(name).negative_slope = 0.7


CHANGES = {
    "another": lambda parent, name: setattr(parent, name, nn.GELU()),
    "nothing": lambda parent, name: setattr(parent, name, nn.Identity()),
    "behind torch's back": lambda parent, name: parent._modules.update({name: nn.Tanh()}),
    "slope": slope,
}


@pytest.mark.parametrize("first", [as_it_is, copy.deepcopy, pickled])
@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
@pytest.mark.parametrize("place", ["act", "seq.2", "timm.act", "act2"])
def test_an_activation_that_was_taken_over_is_another(place, change, first):
    """By others who put something else there, or change it: the layer does no more what was there."""
    model = shaken(Blocks()).eval()
    fused, expected = first(bn.from_torch(model, example=X)), copy.deepcopy(model)
    assert len([m for m in fused.modules() if getattr(m, "fused", False)]) == 4
    before = model(X)
    torch.testing.assert_close(fused(X), before)
    around, _, name = place.rpartition(".")
    for each in (fused, expected):
        change(each.get_submodule(around), name)
    torch.testing.assert_close(fused(X), expected(X))
    torch.testing.assert_close(bn.to_torch(fused)(X), expected(X))
    torch.testing.assert_close(model(X), before)


def test_a_wrapped_activation_stays_taken_over_and_its_attributes_are_there():
    fused = bn.from_torch(shaken(nn.Sequential(nn.BatchNorm2d(4), nn.LeakyReLU(0.2))), example=X).eval()
    expected = fused(X)
    assert fused[1].negative_slope == 0.2
    assert not hasattr(fused[1], "p")
    fused[1].inplace = True
    fused[1] = Wrapper(fused[1])
    torch.testing.assert_close(fused(X), expected)
    assert fused[0].fused
    assert fused[0].eps == 1e-5
    assert (type(fused[1].module), fused[1].module.inplace) == (nn.LeakyReLU, True)
    torch.testing.assert_close(fused(X), expected)


def test_a_compiled_network_sees_that_an_activation_is_another():
    fused = bn.from_torch(shaken(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())), example=X).eval()
    compiled = torch.compile(fused, backend="eager")
    assert compiled(X).min() == 0
    fused[1] = nn.Identity()
    assert compiled(X).min() < 0


def doubled(self, x):
    return 2 * self.relu(self.bn(self.conv(x)) + x)


PATCHES = {
    "on the object": lambda block: setattr(block, "forward", MethodType(doubled, block)),
    "its class's own, on the object": lambda block: setattr(block, "forward", MethodType(Patched.forward, block)),
    "in the class": lambda block: setattr(Patched, "forward", doubled),
}


class Patched(nn.Module):
    """One whose forward others replace."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)) + x)


@pytest.mark.parametrize("patch", PATCHES.values(), ids=list(PATCHES))
def test_a_forward_that_others_replace(patch, monkeypatch):
    model = shaken(nn.Sequential(Patched())).eval()
    fused = bn.from_torch(model, example=X)
    assert fused[0].bn.fused
    monkeypatch.setattr(Patched, "forward", Patched.forward)  # as it is, and so again afterwards
    for each in (model, fused):
        patch(each[0])
    torch.testing.assert_close(fused(X), model(X))


def test_a_wrapper_around_the_rewritten_forward_keeps_what_was_fused():
    """As accelerate's hooks are."""
    model = shaken(nn.Sequential(Patched())).eval()
    fused = bn.from_torch(model, example=X)
    fused[0].forward = functools.update_wrapper(
        functools.partial(lambda old, x: old(x), fused[0].forward), fused[0].forward
    )
    torch.testing.assert_close(fused(X), model(X))
    assert fused[0].bn.fused


@pytest.mark.parametrize("kind", [Patched, BaseConv, Residual])
@pytest.mark.parametrize("mode", [True, False])
def test_scripts_of_rewritten_forwards(kind, mode):
    model = shaken(nn.Sequential(kind())).train(mode)
    fused, x = bn.from_torch(model, example=X), X.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted, expected = torch.jit.script(fused), torch.jit.script(copy.deepcopy(model))
    torch.testing.assert_close(scripted(x), expected(x))
    torch.testing.assert_close(scripted.state_dict(), expected.state_dict())
