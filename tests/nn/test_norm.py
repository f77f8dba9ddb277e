"""The layers: what a subclass of torch's must keep, and what it adds."""

import copy
import inspect
import io
import pickle
import re

import pytest
import torch
from cases import ACTIVATIONS, ATEN_ULP
from helpers import stock_activation, ulps
from torch import nn

import batchnorm as bn

KINDS = {
    "BatchNorm1d": ((8, 3), (8, 3, 5)),
    "BatchNorm2d": ((8, 3, 5, 4),),
    "BatchNorm3d": ((4, 3, 2, 3, 2),),
}
KIND_SHAPES = [(kind, shape) for kind, shapes in KINDS.items() for shape in shapes]


def pair(kind, *args, **kwargs):
    """Our layer and torch's, with the same state."""
    ours, stock = getattr(bn, kind)(3, *args, **kwargs), getattr(nn, kind)(3, *args, **kwargs)
    for tensor in (t for t in stock.state_dict().values() if t.is_floating_point()):
        tensor.uniform_(0.5, 2)
    ours.load_state_dict(stock.state_dict())
    return ours, stock


@pytest.mark.parametrize("kind", KINDS)
def test_is_torchs_class_with_torchs_arguments_first(kind):
    ours, stock = getattr(bn, kind), getattr(nn, kind)
    (*a,), (*b,) = (
        [(p.name, p.default, p.kind) for p in inspect.signature(layer).parameters.values()] for layer in (ours, stock)
    )
    assert issubclass(ours, stock)
    assert a[:7] == b[:7]  # all that torch takes by position
    assert {p[0] for p in a} - {p[0] for p in b} <= {"bias", "activation", "statistics"}  # torch 2.10 has no bias
    assert all(p[2] is inspect.Parameter.KEYWORD_ONLY for p in a[7:])
    assert ours._version == stock._version


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"affine": False},
        *([{"bias": False}] if "bias" in inspect.signature(nn.BatchNorm1d).parameters else []),  # not in torch 2.10
        {"track_running_stats": False},
        {"momentum": None, "dtype": torch.float64},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_state_and_repr_are_torchs(kind, options):
    ours, stock = getattr(bn, kind)(3, **options), getattr(nn, kind)(3, **options)
    assert repr(ours) == repr(stock)
    assert {k: (v.dtype, v.shape) for k, v in ours.state_dict().items()} == {
        k: (v.dtype, v.shape) for k, v in stock.state_dict().items()
    }
    with_activation = getattr(bn, kind)(3, activation=nn.LeakyReLU(0.1), **options)
    assert repr(with_activation) == repr(stock)[:-1] + ", activation=('leaky_relu', 0.1))"
    assert list(with_activation.state_dict()) == list(stock.state_dict())
    assert not list(with_activation.children())


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_go_both_ways(kind):
    ours, stock = pair(kind)
    for source, target in ((ours, nn), (stock, bn)):
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        loaded = getattr(target, kind)(3)
        loaded.load_state_dict(torch.load(file))
        torch.testing.assert_close(dict(loaded.state_dict()), dict(source.state_dict()), rtol=0, atol=0)


def test_checkpoints_from_before_num_batches_tracked_load():
    state = nn.BatchNorm2d(3).state_dict()
    del state["num_batches_tracked"]
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        bn.BatchNorm2d(3).load_state_dict(state)
    state._metadata[""]["version"] = 1
    layer = bn.BatchNorm2d(3)
    layer.load_state_dict(state)
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize(("kind", "shape"), KIND_SHAPES, ids=str)
def test_trains_and_evaluates_as_torchs_layer_residual_and_activation(kind, shape, activation, with_residual, options):
    ours, stock = pair(kind, **options)
    ours.activation = bn.BatchNorm1d(3, activation=activation).activation
    for training in (True, True, False):
        x, residual = torch.randn(2, *shape)
        y = ours.train(training)(x, residual) if with_residual else ours.train(training)(x)
        expected = stock.train(training)(x)
        expected = stock_activation(expected + residual if with_residual else expected, activation)
        assert ulps(y, expected) <= ATEN_ULP[torch.float32]
    for name, tensor in stock.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor)


def test_running_variance_is_unbiased_while_normalization_is_biased():
    layer, x = bn.BatchNorm1d(3, momentum=1.0, eps=1e-30), torch.randn(5, 3)
    y = layer(x)
    torch.testing.assert_close(layer.running_var, x.var(0, correction=1))
    torch.testing.assert_close(y, (x - x.mean(0)) / x.var(0, correction=0).sqrt())


def test_momentum_none_averages_all_batches_and_skips_empty_ones():
    layer, batches = bn.BatchNorm1d(3, momentum=None), torch.randn(4, 20, 3)
    for x in batches:
        layer(x)
    torch.testing.assert_close(layer.running_mean, batches.mean((0, 1)))
    torch.testing.assert_close(layer.running_var, batches.var(1).mean(0))
    before = layer.running_var.clone()
    assert layer(batches[0, :0]).shape == (0, 3)
    torch.testing.assert_close(layer.running_var, before, rtol=0, atol=0)
    assert layer.num_batches_tracked == 5  # as torch counts


def test_momentum_none_without_a_counter_leaves_the_statistics_as_torch_does():
    ours, stock = pair("BatchNorm1d", momentum=None)
    ours.num_batches_tracked = stock.num_batches_tracked = None
    x = torch.randn(8, 3)
    torch.testing.assert_close(ours(x), stock(x))
    torch.testing.assert_close(dict(ours.state_dict()), dict(stock.state_dict()), rtol=0, atol=0)


def test_tracking_switched_off_later_keeps_statistics_and_counter_as_torch_does():
    ours, stock = pair("BatchNorm1d")
    ours.track_running_stats = stock.track_running_stats = False
    for training in (True, False):
        x = torch.randn(8, 3)
        assert ulps(ours.train(training)(x), stock.train(training)(x)) <= ATEN_ULP[torch.float32]
    torch.testing.assert_close(dict(ours.state_dict()), dict(stock.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "shape", "words"),
    [
        ("BatchNorm1d", (4,), "(got 1D input): BatchNorm1d takes (N, C) or (N, C, L), got (4,); reshape"),
        ("BatchNorm1d", (2, 3, 4, 4), "got (2, 3, 4, 4); use BatchNorm2d."),
        ("BatchNorm2d", (9, 6), "(got 2D input): BatchNorm2d takes (N, C, H, W), got (9, 6); use BatchNorm1d."),
        ("BatchNorm2d", (1, 3, 1, 1), "drop_last=True"),
        ("BatchNorm2d", (2, 5, 4, 4), "num_features"),
        ("BatchNorm3d", (2, 3, 4, 4), "got (2, 3, 4, 4); use BatchNorm2d."),
    ],
)
def test_errors_are_torchs_with_advice(kind, shape, words):
    x = torch.randn(shape)
    with pytest.raises((ValueError, RuntimeError)) as torchs:
        getattr(nn, kind)(3)(x)
    with pytest.raises(type(torchs.value), match=re.escape(words)) as ours:
        getattr(bn, kind)(3)(x)
    assert str(ours.value).startswith(str(torchs.value))


def test_one_value_per_channel_is_fine_in_evaluation():
    ours, stock = pair("BatchNorm2d")
    x = torch.randn(1, 3, 1, 1)
    assert ulps(ours.eval()(x), stock.eval()(x)) <= ATEN_ULP[torch.float32]


@pytest.mark.parametrize("activation", [None, "relu", ("leaky_relu", 0.2)], ids=str)
@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_and_pickles(clone, activation):
    layer = bn.BatchNorm1d(3, activation=activation)
    twin, x = clone(layer), torch.randn(8, 3)
    assert repr(twin) == repr(layer)
    torch.testing.assert_close(twin.eval()(x), layer.eval()(x), rtol=0, atol=0)


def test_a_torch_layer_whose_class_is_changed_is_a_layer_of_ours():
    layer, x = nn.BatchNorm1d(3), torch.randn(8, 3)
    expected = copy.deepcopy(layer)(x)
    layer.__class__ = bn.BatchNorm1d
    assert ulps(layer(x), expected) <= ATEN_ULP[torch.float32]
    assert repr(layer) == repr(nn.BatchNorm1d(3))


class Block(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.before = bn.BatchNorm2d(3)
        self.bn = bn.BatchNorm2d(3, activation="relu", **options)

    def forward(self, x):
        return self.bn(self.before(x), residual=x)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_default_torch_fx_traces_models_and_train_and_eval_stay_live(momentum):
    model, x = Block(momentum=momentum), torch.randn(4, 3, 5, 5)
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    traced.graph.lint()
    for again in (traced, pickle.loads(pickle.dumps(traced)), torch.fx.symbolic_trace(traced)):
        twin, again = copy.deepcopy(model), copy.deepcopy(again)
        assert list(again.state_dict()) == list(twin.state_dict())
        for training in (True, False):
            torch.testing.assert_close(again.train(training)(x), twin.train(training)(x), rtol=0, atol=0)
        torch.testing.assert_close(dict(again.state_dict()), dict(twin.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_compiles_where_the_residual_is_the_input(training):
    layer, stock = (kind(3).train(training) for kind in (bn.BatchNorm2d, nn.BatchNorm2d))
    x, twin = (torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    layer.activation = "silu"
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, residual=x)
    expected = nn.SiLU()(stock(twin) + twin)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
def test_compiles_to_one_graph(training, momentum):  # torch's own breaks with momentum=None
    model = Block(momentum=momentum).double().train(training)  # the convolution's gradient cancels: rounding in float32
    twin, x = copy.deepcopy(model), torch.randn(4, 3, 5, 5, dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        outputs = compiled(x), twin(x)
        for output in outputs:
            output.square().sum().backward()
        torch.testing.assert_close(*outputs)
    torch.testing.assert_close(dict(model.state_dict()), dict(twin.state_dict()))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_compiles_to_one_graph_with_a_residual_of_another_dtype():  # as under autocast
    layer, x = bn.BatchNorm2d(3, activation="relu"), torch.randn(4, 3, 5, 5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(x.bfloat16(), x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, layer(x.bfloat16(), x))


@pytest.mark.slow
def test_compiles_to_native_code():
    model, x = Block(), torch.randn(4, 3, 5, 5)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), twin(x))
    torch.testing.assert_close(dict(model.state_dict()), dict(twin.state_dict()))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
def test_exports_to_torchs_own_ops(training, momentum):  # an exported model must not need this package
    model, x = Block(momentum=momentum).train(training), torch.randn(4, 3, 5, 5)
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(copy.deepcopy(model), (x,), dynamic_shapes=(batch,))
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert {target.namespace for target in targets if isinstance(target, torch._ops.OpOverload)} == {"aten"}
    assert torch.ops.aten.batch_norm.default in targets
    exported = program.module()
    for size in (4, 7):
        x = torch.randn(size, 3, 5, 5)
        torch.testing.assert_close(exported(x), model(x))
    torch.testing.assert_close(dict(exported.state_dict()), dict(model.state_dict()))


def test_torchs_sync_converter_takes_plain_layers():
    layer = nn.Sequential(bn.BatchNorm2d(3))
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(layer)[0]) is nn.SyncBatchNorm


def test_torchs_sync_converter_raises_where_it_would_drop_the_activation():
    model = nn.Sequential(bn.BatchNorm2d(3, activation="relu"))
    with pytest.raises(TypeError, match=r"eps of BatchNorm2d\(activation='relu'\) cannot be read.*drop the"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)


def test_the_trap_for_the_converter_is_not_seen_elsewhere():
    layer = bn.BatchNorm2d(3)
    assert not hasattr(layer, "qconfig")
    assert "qconfig" not in dict(inspect.getmembers(layer))
    with pytest.raises(AttributeError, match="'BatchNorm2d' object has no attribute 'qconfig'"):
        layer.qconfig  # noqa: B018
    for settable in (layer, bn.BatchNorm2d(3, activation="relu")):
        settable.qconfig = None  # as quantization marks what stays in float
        assert settable.qconfig is None
        with pytest.raises(TypeError, match="quantization finds batch normalization by its exact type"):
            settable.qconfig = "mine"
        del settable.qconfig
        assert "qconfig" not in vars(settable)
