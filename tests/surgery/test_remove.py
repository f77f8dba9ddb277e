"""remove: the inverse of insert, exact in eval, and a network to train that shows no trace of batch normalization."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import batchnorm as bn
from batchnorm.racing.zoo import inception, mlp
from batchnorm.surgery.remove import ChannelAffine, ChannelAffineThen, Removed, passed_on
from tests.surgery.test_fold import CONVS, NORMS, input_for, shaken
from tests.surgery.test_foreign_networks import CASES, marked, networks

X = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def assert_removed(model, example, error=1e-11, left=()):
    """In eval the same, without batch normalization or nothing in its place, the model unchanged; gives the result."""
    text, before, mode = repr(model), copy.deepcopy(model.state_dict()), model.training
    removed = bn.remove(model, example)
    assert (repr(model), model.training, removed.training) == (text, mode, mode)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert [n for n, m in removed.named_modules() if isinstance(m, _BatchNorm)] == [*left]
    were = [n for n, m in model.named_modules() if type(m) is nn.Identity]
    assert [n for n, m in removed.named_modules() if type(m) is nn.Identity] == were
    twin, ours = copy.deepcopy(model).eval(), copy.deepcopy(removed).eval()
    torch.testing.assert_close(ours(example), twin(example), rtol=error, atol=error)
    return removed


class Residual(nn.Module):
    """As torchvision writes it, with batch normalization or without."""

    def __init__(self, channels, out, norm=True):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1, bias=not norm)
        if norm:
            self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=not norm)
        if norm:
            self.bn2 = nn.BatchNorm2d(out)
        self.downsample = None
        if channels != out:
            convolution = nn.Conv2d(channels, out, 1, bias=not norm)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm2d(out)) if norm else nn.Sequential(convolution)
        self.norm = norm

    def forward(self, x):
        out = self.conv1(x)
        out = self.relu(self.bn1(out) if self.norm else out)
        out = self.conv2(out)
        out = self.bn2(out) if self.norm else out
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


def resnet(norm=True):
    return nn.Sequential(
        Residual(4, 6, norm), Residual(6, 6, norm), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
    )


def shapes(model):
    return [(key, t.shape) for key, t in model.state_dict().items()]


# ---- each layer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("package", [nn, bn])
@pytest.mark.parametrize("layer", CONVS, ids=str)
def test_into_the_layer_before_whose_bias_comes_back(layer, package, affine):
    x = input_for(layer)
    out = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    norm = getattr(package, NORMS[x.dim()])(out, affine=affine)
    removed = assert_removed(shaken(nn.Sequential(copy.deepcopy(layer), norm, nn.Tanh())), x)
    assert [type(child) for child in removed] == [type(layer), nn.Tanh]
    assert removed.batchnorm_report == [("1", "removed", "into 0, before it")]
    assert isinstance(removed[0].bias, nn.Parameter)
    assert removed[0].bias.requires_grad
    scale = (norm.weight if affine else 1) / (norm.running_var + norm.eps).sqrt()
    bias = (norm.bias if affine else 0) + scale * ((0 if layer.bias is None else layer.bias) - norm.running_mean)
    torch.testing.assert_close(removed[0].bias.detach(), bias.detach())


def test_a_fresh_network_has_the_weights_it_was_initialized_with():
    model = resnet().double()
    removed = assert_removed(model, X)
    assert shapes(removed) == shapes(resnet(norm=False))
    state = removed.state_dict()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            expected = layer.weight.detach() / (1 + 1e-5) ** 0.5
            torch.testing.assert_close(state[f"{name}.weight"], expected, rtol=1e-12, atol=0)
            assert not state[f"{name}.bias"].any()
    assert torch.equal(state["4.weight"], model[4].weight)


def test_it_trains_as_the_network_that_was_written_without():
    removed, written = bn.remove(shaken(resnet()).train(), X), resnet(norm=False).double()
    written.load_state_dict(removed.state_dict())
    assert repr(removed) == repr(written)
    for model in (removed, written):
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(X).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(removed.state_dict(), written.state_dict(), rtol=0, atol=0)


def test_memory_format_and_frozen_weights_stay():
    model = shaken(resnet()).to(memory_format=torch.channels_last)
    model[0].conv1.requires_grad_(False)
    removed = assert_removed(model, X.to(memory_format=torch.channels_last))
    assert removed[1].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert not removed[0].conv1.weight.requires_grad
    assert removed[1].conv1.weight.requires_grad


# ---- the places ------------------------------------------------------------------------------------------------------


def test_a_sequential_that_counts_its_children_counts_anew_and_names_stay():
    counted = shaken(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)))
    removed = assert_removed(counted, X)
    assert [name for name, _ in removed.named_children()] == ["0", "1", "2"]
    assert len(removed.append(nn.ReLU())) == 4  # in a Sequential with gaps, torch would write over a child here
    named = shaken(nn.Sequential())
    for name, child in (("conv", nn.Conv2d(4, 4, 1)), ("norm", nn.BatchNorm2d(4)), ("act", nn.ReLU())):
        named.add_module(name, child)
    assert [name for name, _ in assert_removed(named.double(), X).named_children()] == ["conv", "act"]


def test_a_name_that_a_forward_calls_is_a_function():
    removed = assert_removed(shaken(resnet()), X)
    assert removed[0].bn1 is passed_on
    assert "bn1" not in dict(removed[0].named_children())
    for other in (
        copy.deepcopy(removed),
        pickle.loads(pickle.dumps(removed)),
        torch.jit.script(removed),
        torch.fx.symbolic_trace(removed),
        torch.export.export(removed, (X,)).module(),
    ):
        torch.testing.assert_close(other(X), removed(X))
    removed[0].bn1 = nn.BatchNorm2d(6).double()  # and can be one again
    assert "bn1" in dict(removed[0].named_children())


def test_a_traced_program_calls_the_function_too():
    model = torch.fx.symbolic_trace(shaken(resnet()))
    removed = assert_removed(model, X)
    for other in (copy.deepcopy(removed), torch.fx.symbolic_trace(removed), pickle.loads(pickle.dumps(removed))):
        torch.testing.assert_close(other(X), removed(X))


def test_each_module_keeps_its_mode():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Dropout(), nn.Tanh(), nn.BatchNorm2d(4)).double()
    model.train()[2].eval()
    assert [m.training for m in bn.remove(model, X).modules()] == [True, True, False, True, True]


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return x


class Walked(nn.Module):
    """As perceptual losses walk through VGG: the places are counted."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))

    def forward(self, x):
        found = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in (0, 2):
                found.append(x)
        return torch.cat([*found[1:], x])


class Indexed(nn.Module):
    """Called as a whole, and a child is read by its place: the last one would be another."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Tanh())

    def forward(self, x):
        return self.features[2](self.features(x) - 0.1)


@pytest.mark.parametrize("kind", [Listed, Walked, Indexed])
def test_where_places_are_counted_a_module_that_does_nothing_stays(kind):
    model = shaken(kind())
    removed = assert_removed(model, X)
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)]
    assert [name for name, layer in removed.named_modules() if type(layer) is Removed] == names


class OnlyInTrain(Indexed):
    def forward(self, x):
        x = self.features(x)
        return self.features[2](x - 0.1) if self.training else x


def test_places_that_are_counted_in_train_alone():
    assert type(assert_removed(shaken(OnlyInTrain()), X).features[1]) is Removed


# ---- what a layer of ours did besides --------------------------------------------------------------------------------


@pytest.mark.parametrize(("activation", "kind"), [("relu", nn.ReLU), (("leaky_relu", 0.3), nn.LeakyReLU)])
def test_an_activation_stays_as_torchs_module(activation, kind):
    removed = assert_removed(shaken(nn.Sequential(nn.Conv2d(4, 4, 1), bn.BatchNorm2d(4, activation=activation))), X)
    assert type(removed[1]) is kind
    assert getattr(removed[1], "negative_slope", 0.3) == 0.3


class WithResidual(nn.Module):
    def __init__(self, first):
        super().__init__()
        self.first, self.norm = first, bn.BatchNorm2d(4, activation="silu")

    def forward(self, x):
        return self.norm(self.first(x), x)


@pytest.mark.parametrize("first", [nn.Conv2d(4, 4, 1), nn.Tanh()], ids=str)
def test_a_residual_stays(first):
    removed = assert_removed(shaken(WithResidual(first)), X)
    assert isinstance(removed.norm, ChannelAffineThen) == isinstance(first, nn.Tanh)


class BatchNormAct(nn.BatchNorm2d):
    """As timm has it."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


@pytest.mark.parametrize("first", [nn.Conv2d(4, 4, 1), nn.Tanh()], ids=str)
def test_another_packages_activation_stays(first):
    model = shaken(nn.Sequential(first, BatchNormAct(4)))
    removed = bn.remove(model, X)
    torch.testing.assert_close(removed(X), model(X))
    kinds = [type(m) for m in removed[1].modules() if not isinstance(m, nn.Sequential)]
    assert kinds == ([nn.ReLU] if isinstance(first, nn.Conv2d) else [ChannelAffine, nn.ReLU])


def test_what_from_torch_fused_is_given_back():
    model = shaken(resnet())
    fused = bn.from_torch(model, example=X)
    assert len(fused.batchnorm_report.of("fused")) == 4
    assert repr(assert_removed(fused, X)) == repr(bn.remove(model, X))


# ---- what folds into none --------------------------------------------------------------------------------------------


class Dense(nn.Module):
    """As DenseNet: batch normalization of a concatenation, before its activation."""

    def __init__(self, track=True):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.other = nn.BatchNorm2d(8, affine=False, track_running_stats=track)

    def forward(self, x):
        return self.other(torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)).relu()


def test_a_weight_and_a_bias_per_channel_where_there_is_no_layer():
    model = shaken(Dense())
    removed = assert_removed(model, X)
    assert [(row.layer, row.done) for row in removed.batchnorm_report] == [("norm", "replaced"), ("other", "replaced")]
    assert removed.batchnorm_report[0].why.startswith("by a weight and a bias per channel: it reads the model's input")
    assert type(removed.norm) is ChannelAffine
    assert {n for n, _ in removed.named_parameters()} == {"norm.weight", "norm.bias", "conv.weight", "conv.bias"}
    assert {n for n, _ in removed.named_buffers()} == {"other.weight", "other.bias"}  # which the layer did not train
    expected = model.norm.weight / (model.norm.running_var + 1e-5).sqrt()
    torch.testing.assert_close(removed.norm.weight, expected)
    torch.testing.assert_close(torch.jit.script(removed)(X), removed(X))


def test_no_running_statistics_is_left_alone_with_the_reason():
    removed = assert_removed(shaken(Dense(track=False)), X, left=["other"])
    why = "it has no running statistics: it normalizes by each batch in eval too"
    assert removed.batchnorm_report[1] == ("other", "left alone", why)


class Twice(nn.Module):
    def __init__(self, convs, norms):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(convs))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(norms))

    def forward(self, x):
        for i in range(2):
            x = self.norms[i % len(self.norms)](self.convs[i % len(self.convs)](x)).relu()
        return x


@pytest.mark.parametrize(("convs", "norms", "kind"), [(1, 1, Removed), (1, 2, ChannelAffine), (2, 1, ChannelAffine)])
def test_layers_that_are_called_twice(convs, norms, kind):
    removed = assert_removed(shaken(Twice(convs, norms)), X)
    assert {type(layer) for layer in removed.norms} == {kind}


def test_a_tied_weight_stays_tied():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model[3].weight = model[0].weight
    removed = assert_removed(shaken(model), X)
    assert removed[3].weight is removed[0].weight
    assert {type(removed[1]), type(removed[4])} == {ChannelAffine}


def test_hooks_see_in_eval_what_they_saw():
    model, seen = shaken(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())), []
    model[1].register_forward_hook(lambda layer, x, y: seen.append(y.clone()))
    removed = assert_removed(model, X)
    assert type(removed[1]) is ChannelAffine
    seen.clear()
    model(X), removed(X)
    torch.testing.assert_close(*seen)


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.unreached = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x, other=False):
        return (self.unreached if other else self.norm)(self.conv(x))


def test_a_layer_that_the_example_does_not_reach():
    model = shaken(Branch())
    removed = assert_removed(model, X)
    assert removed.batchnorm_report.of("replaced") == ["unreached"]


class Asks(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)) * self.norm.weight.view(-1, 1, 1)


def test_a_layer_whose_attributes_a_forward_reads_is_left_alone():
    removed = assert_removed(shaken(Asks()), X, left=["norm"])
    assert removed.batchnorm_report == [("norm", "left alone", "the forward of the model reads its weight")]


@pytest.mark.parametrize("first", [nn.Conv2d(4, 4, 1), nn.Tanh()], ids=str)
def test_synchronized_and_16_bit_layers(first):
    model = shaken(nn.Sequential(copy.deepcopy(first), nn.SyncBatchNorm(4)))
    assert_removed(model.train(), X)
    removed = assert_removed(model.bfloat16().eval(), X.bfloat16(), error=0.05)
    assert {p.dtype for p in removed.parameters()} == {torch.bfloat16}


def test_16_bit_inputs_beside_float32_parameters_keep_their_dtype():
    layer = ChannelAffine(shaken(nn.BatchNorm2d(4), torch.float32))
    x = X.bfloat16()
    expected = x.float() * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)
    assert torch.equal(layer(x), expected.bfloat16())


def test_the_model_may_be_a_layer():
    assert type(assert_removed(shaken(nn.BatchNorm2d(4)), X)) is ChannelAffine


# ---- refused ---------------------------------------------------------------------------------------------------------


def test_lazy_layers_and_broken_statistics_are_refused_by_name():
    with pytest.raises(ValueError, match=r"remove: 1 \(LazyBatchNorm2d\) does not know its shapes yet"):
        bn.remove(nn.Sequential(nn.Conv2d(4, 4, 1), nn.LazyBatchNorm2d()), X)
    for first in (nn.Conv2d(4, 4, 1), nn.Tanh()):
        model = nn.Sequential(first, nn.BatchNorm2d(4)).double()
        model[1].running_var[2] = -1
        with pytest.raises(ValueError, match=r"^remove: running_var of layer '1' has negative values in 1 of 4"):
            bn.remove(model, X)
    with pytest.raises(ValueError, match=r"^remove: tolerance must be 0 or more"):
        bn.remove(resnet().double(), X, tolerance=-1)
    with pytest.raises(ValueError, match=r"^remove refused: .* remove in a wider dtype, or raise the tolerance"):
        bn.remove(shaken(resnet(), torch.float32), X.float(), tolerance=0)


# ---- the way back from insert, and to it -----------------------------------------------------------------------------


def small():
    return nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5), nn.GELU(), nn.Linear(5, 2))


ROUND = {
    "sequential": (small, X),
    "mlp": (mlp, torch.randn(3, 784, dtype=torch.float64)),
    "inception": (inception, torch.randn(3, 1, 28, 28, dtype=torch.float64)),
    "resnet": (lambda: resnet(norm=False), X),
}


@pytest.mark.parametrize("name", ROUND)
def test_undoes_insert(name):
    make, x = ROUND[name]
    model = make().double().eval()
    for p in model.parameters():
        if p.dim() == 1:
            nn.init.normal_(p, std=0.1)
    inserted = bn.insert(model, x, batches=[x])
    assert inserted.batchnorm_report.of("normalized")
    back = assert_removed(inserted, x)
    assert (repr(back), shapes(back)) == (repr(model), shapes(model))
    assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
    torch.testing.assert_close(back(x), model(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(back.state_dict(), model.state_dict(), rtol=1e-9, atol=1e-9)
    again = bn.insert(back, x)
    assert again.batchnorm_report == inserted.batchnorm_report


def test_insert_finds_the_places_that_batch_normalization_had():
    model = shaken(resnet())
    found = bn.insert(bn.remove(model, X), X).batchnorm_report.of("normalized")
    assert found == ["0.conv1", "0.conv2", "0.downsample.0", "1.conv1", "1.conv2"]
    assert len(found) == sum(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())


def test_what_accelerate_says_of_training_goes_with_it():
    fast = bn.accelerate(small().double(), X)
    assert not hasattr(bn.remove(fast, X), "batchnorm_recipe")


# ---- networks that nobody here wrote ---------------------------------------------------------------------------------

FOREIGN = ("resnet18, smaller", "mobilenetv1, smaller", "mobilenetv2", "segformer's decode head",
           "monai's resnet10, smaller", "monai's AttentionUnet", "monai's BasicUNet")  # fmt: skip


@pytest.mark.parametrize("name", [*FOREIGN, *marked(["levit", "monai's DenseNet121", "monai's SEResNet50"])])
def test_foreign_networks(name):
    make, example, folds, _, _ = CASES[name]
    model = networks.shaken(make())
    norms = [n for n, m in model.named_modules() if isinstance(m, _BatchNorm)]
    removed = bn.remove(model, example)
    report = removed.batchnorm_report
    assert (len(report.of("removed")), len(report.of("replaced"))) == (folds, len(norms) - folds)
    assert not [n for n, m in removed.named_modules() if isinstance(m, _BatchNorm | Removed)]
    assert sum(type(m) is nn.Identity for m in removed.modules()) == sum(
        type(m) is nn.Identity for m in model.modules()
    )
    assert networks.error(model, removed, example) < 1e-9
