"""torch.fx, TorchScript, quantization and functionalize on models with our layers."""

import copy
import io
import sys
import warnings

import onnx
import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace
from torch.fx.experimental import optimization

import batchnorm as bn

X = torch.randn(2, 3, 8, 8)
OPTIONS = [{}, {"activation": "relu"}, {"activation": ("leaky_relu", 0.2)}, {"momentum": None}]


def network(**options):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), bn.BatchNorm2d(4, **options), nn.ReLU())
    model(X)
    return model


class Residual(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.inner = nn.Sequential(bn.BatchNorm2d(3, **options))
        self.outer = bn.BatchNorm2d(3, activation="silu")

    def forward(self, x):
        y = self.inner(x)
        return self.outer(self.inner[0](y), residual=x)


# ---- torch.fx --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("train", [True, False])
def test_a_trace_computes_the_same_and_leaves_the_model(options, train):
    model = Residual(**options)
    model(X)
    model.train(train)
    before = repr(model)
    traced = symbolic_trace(copy.deepcopy(model))
    assert {node.target for node in traced.graph.nodes if node.op == "call_module"} == {"inner.0", "outer"}
    torch.testing.assert_close(traced(X), model(X))
    torch.testing.assert_close(dict(traced.state_dict()), dict(model.state_dict()))
    assert repr(model) == before
    assert type(model.inner[0]) is bn.BatchNorm2d


class Doubled(bn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "options", [*OPTIONS, {"affine": False}, {"bias": False, "track_running_stats": False}], ids=str
)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("make", [bn.BatchNorm2d, Doubled, lambda *a, **k: nn.Sequential(Doubled(*a, **k))])
def test_a_root_and_a_subclass_are_traced_as_functions(make, train, options):
    model = make(3, **options).train(train)
    traced = symbolic_trace(copy.deepcopy(model))
    for _ in range(2):
        torch.testing.assert_close(traced(X), model(X))
    torch.testing.assert_close({name: model.state_dict()[name] for name in traced.state_dict()}, traced.state_dict())
    if type(model) is bn.BatchNorm2d:
        residual, mask = torch.randn_like(X), torch.rand(2, 8, 8) > 0.5
        torch.testing.assert_close(traced(X, residual, mask), model(X, residual, mask))


def test_a_function_refuses_other_statistics():
    with pytest.raises(TypeError, match=r"as a function here.*Ghost\(size=1.*as a child"):
        symbolic_trace(bn.BatchNorm2d(3, statistics=bn.Ghost(1)))


@pytest.mark.parametrize("train", [True, False])
def test_a_residual_alone_is_traced(train):
    class OfBuffer(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = bn.BatchNorm2d(3)
            self.register_buffer("given", torch.randn(2, 3, 8, 8))

        def forward(self, x):
            return self.bn(self.given, residual=x)

    model = OfBuffer().train(train)
    torch.testing.assert_close(symbolic_trace(model)(X), model(X))


def test_fuse_finds_a_plain_layer_and_leaves_an_activation():
    model = network().eval()
    fused = optimization.fuse(copy.deepcopy(model))
    assert [type(m) for m in fused.children()] == [nn.Conv2d, nn.ReLU]
    torch.testing.assert_close(fused(X), model(X))
    model = network(activation="silu").eval()
    fused = optimization.fuse(copy.deepcopy(model))
    torch.testing.assert_close(fused(X), model(X))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_optimize_for_inference(options):
    model = network(**options).eval()
    torch.testing.assert_close(optimization.optimize_for_inference(copy.deepcopy(model))(X), model(X))


def test_a_trace_is_written_to_a_folder(tmp_path, monkeypatch):
    model = network().eval()
    symbolic_trace(model).to_folder(tmp_path / "written_by_fx", "Written")
    monkeypatch.syspath_prepend(tmp_path)
    written = __import__("written_by_fx").Written().eval()
    sys.modules.pop("written_by_fx")
    torch.testing.assert_close(written(X), model(X))


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook"])
@pytest.mark.parametrize("train", [True, False])
def test_hooks_that_would_run_twice_are_named(kind, train):
    model = network().train(train)
    hook = getattr(model[1], f"register_{kind}")(lambda *arguments: None)
    with pytest.raises(TypeError, match=r"1, a BatchNorm2d, has forward hooks.*register them on the result"):
        symbolic_trace(model)
    hook.remove()
    symbolic_trace(model)


@pytest.mark.parametrize("options", [{}, {"activation": "relu"}])
def test_quantization_refuses_by_name(options):
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_fx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mapping = get_default_qconfig_mapping("fbgemm")
        with pytest.raises(TypeError, match=r"finds batch normalization by its exact type.*to_torch\(model\)"):
            prepare_fx(network(**options).eval(), mapping, (X,))


def test_quantization_of_modules_refuses_by_name_too():
    from torch.ao.quantization import get_default_qconfig, prepare

    model = network().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.qconfig = get_default_qconfig("fbgemm")
        with pytest.raises(TypeError, match=r"finds batch normalization by its exact type.*to_torch\(model\)"):
            prepare(model)
        model[1].qconfig = None
        prepare(model)(X)


# ---- TorchScript -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_script_computes_and_counts_the_same(options, train):
    model = Residual(**options).train(train)
    scripted = torch.jit.script(copy.deepcopy(model))
    for _ in range(2):
        torch.testing.assert_close(scripted(X), model(X))
    torch.testing.assert_close(dict(scripted.state_dict()), dict(model.state_dict()))
    torch.jit.save(scripted, io.BytesIO())


@pytest.mark.parametrize(
    "activation", [None, "relu", "relu6", ("leaky_relu", 0.3), "silu", "hardswish", "sigmoid", "tanh"], ids=str
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_scripts_know_every_activation(activation):
    layer = bn.BatchNorm2d(3, activation=activation)
    torch.testing.assert_close(torch.jit.script(copy.deepcopy(layer))(X * 4), layer(X * 4))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_script_of_a_frozen_layer_stays_frozen():
    layer = bn.BatchNorm2d(3)
    bn.freeze(layer)
    scripted = torch.jit.script(copy.deepcopy(layer)).train()
    torch.testing.assert_close(scripted(X), layer(X))
    assert scripted.num_batches_tracked == 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_script_refuses_other_statistics():
    with pytest.raises(TypeError, match=r"torch.jit.script knows nothing of statistics=Ghost"):
        torch.jit.script(nn.Sequential(bn.BatchNorm2d(3, statistics=bn.Ghost(2))))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_traces_of_torch_jit(options):
    model = network(**options).eval()
    traced = torch.jit.trace(model, X)
    torch.testing.assert_close(traced(X + 1), model(X + 1))
    torch.jit.save(traced, io.BytesIO())
    model.train()
    traced = torch.jit.trace(copy.deepcopy(model), X, check_trace=False)
    before = int(traced.state_dict()["1.num_batches_tracked"])
    traced(X)
    assert int(traced.state_dict()["1.num_batches_tracked"]) == before + 1


class Masked(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.norm = bn.BatchNorm2d(3, **options)

    def forward(self, x, mask=None):
        return self.norm(x, residual=x, mask=mask)


@pytest.mark.parametrize(
    "options", [{}, {"statistics": bn.Ghost(4)}, {"statistics": bn.Ghost(3)}, {"statistics": bn.Renorm()}], ids=str
)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_traces_of_training_with_masks_and_other_statistics(options, masked):
    x = torch.randn(8, 3, 4, 4)
    given = (torch.rand(8, 4, 4) > 0.3,) if masked else ()
    model = Masked(activation="silu", **options)
    traced = torch.jit.trace(copy.deepcopy(model), (x, *given), check_trace=False)
    assert {node.kind().split("::")[0] for node in traced.inlined_graph.nodes()} <= {"aten", "prim"}
    assert "PythonOp" not in str(traced.inlined_graph)
    model(x, *given)  # tracing was the first step
    for _ in range(2):
        x = torch.randn_like(x)
        mine, theirs = (x.clone().requires_grad_() for _ in range(2))
        y, z = traced(mine, *given), model(theirs, *given)
        torch.testing.assert_close(y, z)
        torch.testing.assert_close(*(torch.autograd.grad((t * x).sum(), by)[0] for t, by in ((y, mine), (z, theirs))))
    torch.testing.assert_close(dict(traced.state_dict()), dict(model.state_dict()))
    torch.jit.save(traced, io.BytesIO())
    file, training = io.BytesIO(), torch.onnx.TrainingMode.TRAINING
    torch.onnx.export(model, (x, *given), file, dynamo=False, training=training, do_constant_folding=False)
    assert {node.domain for node in onnx.load_from_string(file.getvalue()).graph.node} == {""}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_trace_of_training_refuses_synchronized_statistics():
    layer = bn.BatchNorm2d(3, statistics=bn.Synced())
    with pytest.raises(RuntimeError, match=r"cannot be traced by torch.jit.trace.*in eval, or .*revert_sync_batchnorm"):
        torch.jit.trace(layer, X)
    torch.jit.trace(layer.eval(), X)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.filterwarnings("ignore")
def test_the_exporter_by_torchscript(options):
    file = io.BytesIO()
    torch.onnx.export(network(**options).eval(), (X,), file, dynamo=False)
    names = {node.op_type for node in onnx.load_from_string(file.getvalue()).graph.node}
    assert names <= {"Conv", "BatchNormalization", "Relu", "LeakyRelu"}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_script_refuses_to_lose_a_subclass():
    with pytest.raises(TypeError, match=r"would lose what Doubled.forward does.*torch.jit.trace"):
        torch.jit.script(nn.Sequential(Doubled(3)))


# ---- torch.func and other layouts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("train", [True, False])
def test_functionalize(train, momentum):
    layers = [kind(3, momentum=momentum).train(train) for kind in (bn.BatchNorm2d, nn.BatchNorm2d)]
    for x in (X, X + 1):
        torch.testing.assert_close(*(torch.func.functionalize(layer)(x) for layer in layers))
    torch.testing.assert_close(*(dict(layer.state_dict()) for layer in layers))


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacfwd, lambda f: torch.vmap(f)])
def test_functionalize_around_other_transforms(transform):
    layers = bn.BatchNorm2d(3).eval(), nn.BatchNorm2d(3).eval()
    x = X[None] if transform not in (torch.func.grad, torch.func.jacfwd) else X
    torch.testing.assert_close(
        *(torch.func.functionalize(transform(lambda x, f=layer: f(x).square().sum()))(x) for layer in layers)
    )


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("which", ["weight", "bias", "both"])
@pytest.mark.parametrize("return_statistics", [True, False])
def test_vmap_over_parameters_alone(train, which, return_statistics):
    x, weights, biases = torch.randn(4, 3), torch.rand(5, 3) + 0.5, torch.randn(5, 3)
    dims = {"weight": (0, None), "bias": (None, 0), "both": (0, 0)}[which]
    rows = [(weights[i] if dims[0] == 0 else weights[0], biases[i] if dims[1] == 0 else biases[0]) for i in range(5)]

    def run(function, weight, bias, **options):
        return function(x, torch.zeros(3), torch.ones(3), weight, bias, train, **options)

    given = (weights if dims[0] == 0 else weights[0], biases if dims[1] == 0 else biases[0])
    options = {"return_statistics": True} if return_statistics else {}
    found = torch.vmap(
        lambda w, b: run(bn.batch_norm, w, b, **options), dims, out_dims=(0, None, None) if options else 0
    )(*given)
    y = found[0] if options else found
    torch.testing.assert_close(y, torch.stack([run(nn.functional.batch_norm, *row) for row in rows]))
    if options:
        mean, var = torch.zeros(3), torch.ones(3)
        nn.functional.batch_norm(x, mean, var, training=train)
        torch.testing.assert_close(found[1:], (mean, var))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("mask", [None, torch.ones(4, dtype=torch.bool)])
def test_running_statistics_have_no_gradient_and_that_is_said(train, name, mask):
    x, statistics = torch.randn(4, 3), {"running_mean": torch.zeros(3), "running_var": torch.ones(3)}
    statistics[name].requires_grad_()
    with pytest.raises(RuntimeError, match=f"not differentiable with respect to argument '{name}'"):
        bn.batch_norm(x, **statistics, training=train, mask=mask)
    with torch.no_grad():
        bn.batch_norm(x, **{key: t.detach() for key, t in statistics.items()}, training=train, mask=mask)


@pytest.mark.parametrize("train", [True, False])
def test_tensors_in_mkldnns_own_layout(train):
    layers = bn.BatchNorm2d(3).train(train), nn.BatchNorm2d(3).train(train)
    outputs = [layer(X.to_mkldnn()).to_dense() for layer in layers]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(dict(layer.state_dict()) for layer in layers))


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("masked", [False, True])
def test_one_program_for_every_length(dynamic, masked):
    from torch._dynamo.testing import CompileCounter

    def programs(layer):
        torch._dynamo.reset()
        counter, twin = CompileCounter(), copy.deepcopy(layer)
        run = torch.compile(layer, backend=counter, dynamic=dynamic, fullgraph=True)
        for length in range(5, 12):
            x = torch.randn(4, 3, length)
            options = {"mask": torch.rand(4, length) > 0.3} if masked else {}
            torch.testing.assert_close(run(x, **options), twin(x, **options))
        torch.testing.assert_close(dict(layer.state_dict()), dict(twin.state_dict()))
        return counter.frame_count

    assert programs(bn.BatchNorm1d(3)) <= (1 if dynamic else 2)


def test_export_with_a_mask_for_every_length():
    layer, auto = bn.BatchNorm1d(3).eval(), torch.export.Dim.AUTO
    sizes = {"input": {0: auto, 2: auto}, "mask": {0: auto, 1: auto}}
    given = (torch.randn(4, 3, 7),), {"mask": torch.rand(4, 7) > 0.3}
    program = torch.export.export(layer, *given, dynamic_shapes=sizes).module()
    x, mask = torch.randn(5, 3, 9), torch.rand(5, 9) > 0.3
    torch.testing.assert_close(program(x, mask=mask), layer(x, mask=mask))


def test_a_mask_on_tensors_without_values():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        layer = bn.BatchNorm1d(3)
        y = layer(torch.randn(4, 3, 5), mask=torch.ones(4, 5, dtype=torch.bool))
        y.sum().backward()
    assert y.shape == (4, 3, 5)
