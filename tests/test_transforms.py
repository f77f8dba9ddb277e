"""The layer inside what users wrap around it: torch.compile, ONNX, torch.func, checkpointing, autocast."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, vjp, vmap
from torch.utils.checkpoint import checkpoint

import batchnorm as bn


class Block(nn.Module):
    """conv -> BN + residual + activation: every fusion at once."""

    def __init__(self, activation="relu", momentum=0.1):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.bn = bn.BatchNorm2d(3, momentum=momentum, activation=activation)

    def forward(self, x):
        return self.bn(self.conv(x), residual=x)


def step(model, x, call=None):
    """Output, gradients and state after one training step's forward and backward."""
    x = x.detach().requires_grad_()
    y = (model if call is None else call)(x)
    y.square().sum().backward()
    gradients = [x.grad, *(p.grad.clone() for p in model.parameters())]
    return y.detach(), gradients, dict(model.state_dict())


@pytest.mark.parametrize("activation", ["relu", "silu"])  # y is kept, the residual is kept
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_outputs_gradients_and_statistics(reentrant, activation):
    model, x = Block(activation), torch.randn(4, 3, 6, 6)
    twin = copy.deepcopy(model)
    expected = step(twin, x)
    y, gradients, state = step(model, x, lambda x: checkpoint(model, x, use_reentrant=reentrant))
    torch.testing.assert_close((y, gradients), expected[:2])
    torch.testing.assert_close(state, expected[2])  # running statistics are updated once
    assert state["bn.num_batches_tracked"] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_statistics_in_float32(dtype):
    model, x = Block(), torch.randn(8, 3, 6, 6)
    expected = step(copy.deepcopy(model), x)
    with torch.autocast("cpu", dtype=dtype):
        y = model(x)
        assert model.bn.running_mean.dtype == torch.float32
        assert y.dtype == torch.float32  # the residual's
    y.square().sum().backward()
    assert model.bn.weight.grad.dtype == torch.float32
    torch.testing.assert_close(y, expected[0], rtol=0.05, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_inductor_trains_as_eager_does(layout, training):
    model, x = Block().train(training), torch.randn(4, 3, 6, 6).contiguous(memory_format=layout)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    for _ in range(2):
        got, expected = step(model, x, compiled), step(twin, x)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("activation", ["relu", "silu", ("leaky_relu", 0.2)], ids=str)
def test_onnx_export_in_eval_holds_no_node_of_ours(activation, tmp_path):
    onnx = pytest.importorskip("onnx")
    model, file = Block(activation).eval(), tmp_path / "block.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (torch.randn(2, 3, 6, 6),), file, dynamo=True, verbose=False)
    nodes = {(node.domain, node.op_type) for node in onnx.load(file).graph.node}
    assert ("", "BatchNormalization") in nodes or ("", "Conv") in nodes
    assert {domain for domain, _ in nodes} == {""}


def func_loss(parameters, x, residual):
    y = bn.batch_norm(x, weight=parameters[0], bias=parameters[1], training=True, activation="silu", residual=residual)
    return y.square().sum()


def test_torch_func_grad_is_autograds():
    x, r, w, b = torch.randn(5, 3, 4), torch.randn(5, 3, 4), torch.randn(3), torch.randn(3)
    leaves = [t.clone().requires_grad_() for t in (w, b, x, r)]
    expected = torch.autograd.grad(func_loss(leaves[:2], *leaves[2:]), leaves)
    (gw, gb), gx, gr = torch.func.grad(func_loss, argnums=(0, 1, 2))((w, b), x, r)
    torch.testing.assert_close((gw, gb, gx, gr), expected)


def test_jvp_is_the_transpose_of_vjp():
    x, r, w, b = (torch.randn(s, dtype=torch.float64) for s in ((5, 3, 4), (5, 3, 4), (3,), (3,)))

    def f(x, w):
        return bn.batch_norm(x, weight=w, bias=b, training=True, activation="tanh", residual=r)

    tangents, cotangent = (torch.randn_like(x), torch.randn_like(w)), torch.randn_like(x)
    _, forward = torch.func.jvp(f, (x, w), tangents)
    _, pullback = torch.func.vjp(f, x, w)
    backward = sum((t * g).sum() for t, g in zip(tangents, pullback(cotangent), strict=True))
    torch.testing.assert_close((forward * cotangent).sum(), backward)


def test_per_sample_gradients_of_an_ensemble():
    x, w, b = torch.randn(2, 5, 3, 4), torch.randn(2, 3), torch.randn(2, 3)
    got = torch.func.vmap(torch.func.grad(func_loss))((w, b), x, x)
    each = [torch.func.grad(func_loss)((w[i], b[i]), x[i], x[i]) for i in range(2)]
    torch.testing.assert_close(got, tuple(torch.stack(g) for g in zip(*each, strict=True)))


@pytest.mark.parametrize("activation", [None, "relu", "silu", "tanh"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives_are_right(training, with_residual, activation):
    shape = (4, 2, 3)
    x, r = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w, b = (torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mean, var = torch.randn(2, dtype=torch.float64), torch.rand(2, dtype=torch.float64) + 0.5

    def f(x, w, b, *r):
        statistics = (None, None) if training else (mean, var)
        return bn.batch_norm(x, *statistics, w, b, training, activation=activation, residual=r[0] if r else None)

    assert torch.autograd.gradgradcheck(f, (x, w, b, *([r] if with_residual else [])))


TRANSFORMED = {
    "input": lambda layer, p, x: grad(lambda x: layer(x).pow(3).sum())(x),
    "weight": lambda layer, p, x: grad(lambda w: called(layer, p | {"weight": w}, x).pow(3).sum())(p["weight"]),
    "per sample": lambda layer, p, x: vmap(grad(lambda x: layer(x[None]).pow(3).sum()))(x),
    "jacobian": lambda layer, p, x: jacrev(lambda x: layer(x).pow(3).sum(0))(x),
    "twice": lambda layer, p, x: grad(lambda x: grad(lambda x: layer(x).pow(3).sum())(x).pow(2).sum())(x),
    "vjp": lambda layer, p, x: vjp(lambda x: layer(x).pow(3), x)[1](x)[0],
}


def called(layer, tensors, x):
    """The layer with new tensors, in train too: torch.func lets nobody change those of outside."""
    buffers = {name: b.clone() for name, b in layer.named_buffers()}
    return functional_call(layer, tensors | buffers, (x,))


@pytest.mark.parametrize("what", TRANSFORMED)
@pytest.mark.parametrize(
    ("trained", "options"),
    [(True, {}), (False, {}), (False, {"bias": False}), (False, {"activation": "silu"})],
    ids=str,
)
def test_compiled_gradients_of_torch_func(what, trained, options):
    layer, x = bn.BatchNorm1d(3, **options).double().eval().requires_grad_(trained), torch.randn(4, 3).double()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: TRANSFORMED[what](layer, parameters, x), backend="aot_eager")(x)
    torch.testing.assert_close(compiled, TRANSFORMED[what](layer, parameters, x))
    assert compiled.abs().max() > 1e-3


@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"statistics": bn.Ghost(2)}, {"statistics": bn.Renorm()}], ids=str
)
@pytest.mark.parametrize("masked", [False, True])
def test_compiled_gradients_of_torch_func_in_training(options, masked):
    layer, x = bn.BatchNorm1d(3, **options).double(), torch.randn(4, 3, 5).double()
    mask = torch.rand(4, 5) > 0.2 if masked else None

    def gradient(weight):
        def loss(weight):
            buffers = {name: b.clone() for name, b in layer.named_buffers()}
            return functional_call(layer, {"weight": weight} | buffers, (x,), {"mask": mask}).pow(3).sum()

        return grad(loss)(weight)

    given = layer.weight.detach() * 2
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(gradient, backend="aot_eager")(given), gradient(given))
