"""The Triton kernels against the reference, over the cases of the CPU kernels: on a GPU, or interpreted on the CPU.

Triton reads TRITON_INTERPRET when a kernel is decorated, so these are two runs: `make test` does both. Interpreted, the
kernels of CUDA take the place of the CPU's (BATCHNORM_TRITON_ON_CPU).
"""

import os

import pytest
import torch
from cases import (
    ACTIVATIONS,
    ADVERSARIAL,
    ADVERSARIAL_ULP,
    HALF_DTYPES,
    LAYOUTS,
    REFERENCE_SUM_ULP,
    SHAPES,
    SLOPE,
)
from helpers import arrange, channel_tensors, through_ops, ulps
from test_kernels import KERNEL_ULP, NONE, RELU, SILU, WRONG, op_calls

import batchnorm as bn
from batchnorm import ops
from batchnorm.functional import parse_activation
from batchnorm.ops import autograd, reference
from batchnorm.ops.arguments import Affine

INTERPRETED = os.environ.get("TRITON_INTERPRET") == os.environ.get("BATCHNORM_TRITON_ON_CPU") == "1"
GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.skipif(not GPU and not INTERPRETED, reason="no GPU here; `make test` runs them interpreted")
on_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")

DTYPES = (torch.float32, *HALF_DTYPES)
# Sums are in float32 here: squares beyond it are infinite, as torch's are on CUDA.
FINITE_IN_FLOAT32 = [case for case in ADVERSARIAL if case[0] != "squares beyond float32"]
OP = torch.ops.batchnorm


@pytest.fixture(autouse=True)
def round_as_gpus_do(monkeypatch):
    """The interpreter cuts float32 off to bfloat16; GPUs round to the nearest, ties to even."""
    if INTERPRETED:
        from triton.language import bfloat16, float32
        from triton.runtime import interpreter

        convert = interpreter._convert_float

        def rounding(data, source, target, mode):
            if (source, target) == (float32, bfloat16):
                return torch.from_numpy(data.copy()).bfloat16().view(torch.uint16).numpy()
            return convert(data, source, target, mode)

        monkeypatch.setattr(interpreter, "_convert_float", rounding)


@pytest.fixture(params=["one program", "parts"])
def strategy(request, monkeypatch):
    """A channel's values in one program, or in several whose sums are merged."""
    from batchnorm.ops import cuda

    monkeypatch.setattr(cuda, "FEW", 1 << 30 if request.param == "one program" else 0)
    monkeypatch.setattr(cuda, "MANY", 0)
    monkeypatch.setattr(cuda, "TILE", 1024)  # several tiles of small tensors
    monkeypatch.setattr(cuda, "PLACES", 256)
    cuda._cut.cache_clear()
    yield
    cuda._cut.cache_clear()


@pytest.fixture
def poisoned():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_it_is_triton_that_is_tested():
    assert set(ops.dtypes_served(DEVICE)) == set(DTYPES)


def compare(x, residual, activation, training):
    """Output, gradients and buffers beside the reference in float64: the largest error of each over the allowed one."""
    channels, dtype = x.shape[1], x.dtype
    tensors = channel_tensors(channels, torch.float32)
    g = parse_activation(activation)
    d_y, results = torch.randn(x.shape).to(dtype), []
    for function, device, wide in ((through_ops, DEVICE, False), (reference.batch_norm, "cpu", True)):

        def on(t, device=device, wide=wide):
            return t.detach().to(device, torch.float64 if wide else None, copy=True).requires_grad_(t.requires_grad)

        leaf, other = on(x).requires_grad_(), None if residual is None else on(residual).requires_grad_()
        mean, var, weight, bias = map(on, tensors)
        y = function(leaf, mean, var, weight, bias, training, 0.1, 1e-5, g, other)
        inputs = [t for t in (leaf, weight, bias, other) if t is not None]
        results.append([t.cpu() for t in (y.detach(), *torch.autograd.grad(y, inputs, on(d_y)), mean, var)])
    if residual is not None and g.code:
        # Backward looks at the rounded y (as torch's does), which may lie on the other side of a kink.
        kept = results[0][0] if g.result_tells else residual
        mean, var, weight, bias, kept = (t.detach().double() for t in (*tensors, kept))
        affine = Affine(weight, bias, kept, 1e-5, *g)
        results[1][1:5] = autograd.reference_backward(d_y.double(), x.double(), mean, var, affine, training)
    allowed = [
        KERNEL_ULP[dtype] if t.dim() > 1 else max(KERNEL_ULP[t.dtype], REFERENCE_SUM_ULP[dtype]) for t in results[0]
    ]
    root = (x.numel() / channels) ** 0.5  # what a sum of m terms of size 1 comes to
    least = [1.0 if t.dim() > 1 else root for t in results[0]]
    return [ulps(a, b, least=of) / most for a, b, of, most in zip(*results, least, allowed, strict=True)]


# Every fusion in one dtype, every activation in each; all of them, in every layout, are slow.
FUSIONS = [
    (DTYPES[(number + with_residual + 2 * training) % 3], activation, with_residual, training)
    for number, activation in enumerate(ACTIVATIONS)
    for with_residual in (False, True)
    for training in (True, False)
]


@pytest.mark.usefixtures("poisoned", "strategy")
@pytest.mark.parametrize(("dtype", "activation", "with_residual", "training"), FUSIONS, ids=str)
def test_every_fusion_is_the_reference(dtype, activation, with_residual, training):
    for shape, layout in (((4, 5, 6, 3), "contiguous"), ((5, 3, 7), "channels_last")):
        x, residual = arrange(torch.randn(shape).to(dtype), layout), torch.randn(shape).to(dtype)
        errors = compare(x, residual if with_residual else None, activation, training)
        assert max(errors) <= 1, (shape, layout, errors)


@pytest.mark.usefixtures("poisoned", "strategy")
@pytest.mark.parametrize("turn", [0, *(pytest.param(turn, marks=pytest.mark.slow) for turn in (1, 2))])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 70, 5, 4), (150, 70), (2, 4, 24, 24)], ids=str)
def test_every_shape_and_layout_is_the_reference(shape, turn):
    """Layouts take turns with dtypes; in three turns each has had all."""
    for number, layout in enumerate(LAYOUTS[:2] if max(shape) > 10 else LAYOUTS[:4]):
        dtype = DTYPES[(number + len(shape) + turn) % 3]
        x = arrange(torch.randn(shape).to(dtype), layout)
        errors = compare(x, torch.randn(shape).to(dtype), "silu", True)
        assert max(errors) <= 1, (shape, layout, errors)


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned", "strategy")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_fusion_is_the_reference_in_every_layout(dtype, activation, with_residual, training):
    for shape in SHAPES:
        for layout in LAYOUTS:
            if layout == "expanded" and training:
                continue
            x, residual = arrange(torch.randn(shape).to(dtype), layout), torch.randn(shape).to(dtype)
            errors = compare(x, residual if with_residual else None, activation, training)
            assert max(errors) <= 1, (shape, layout, errors)


@pytest.mark.usefixtures("strategy")
@pytest.mark.parametrize(("name", "dtype", "mean", "deviation", "m"), FINITE_IN_FLOAT32, ids=str)
def test_adversarial_batches(name, dtype, mean, deviation, m):
    for layout in ("contiguous", "channels_last"):
        x = arrange((torch.randn(m // 16, 2, 16, dtype=torch.float64) * deviation + mean).to(dtype), layout)
        exact = x.double().movedim(1, 0).flatten(1)
        mu, var = (t.cpu() for t in OP.statistics(x.to(DEVICE)))
        expected = exact.mean(1), exact.var(1, correction=0)
        spread = expected[1].sqrt().clamp(min=torch.finfo(dtype).eps * abs(mean)) + 1e-45
        assert ((mu - expected[0]).abs() / spread).max() <= ADVERSARIAL_ULP * torch.finfo(torch.float32).eps * 16
        y = OP.normalize(x.to(DEVICE), mu.to(DEVICE), var.to(DEVICE), None, None, None, 1e-5, *NONE).cpu()
        right = reference.normalize(x.double(), *expected, None, None, 1e-5)
        aten = torch.nn.functional.batch_norm(x, None, None, training=True)
        assert ulps(y, right, least=1e-30) <= max(ADVERSARIAL_ULP, ulps(aten, right, least=1e-30))


@pytest.mark.usefixtures("strategy")
def test_split_ops_make_the_fused_ones():
    for shape, layout in (((4, 5, 6, 3), "contiguous"), ((9, 3, 7), "channels_last")):
        x, d_y, r = (arrange(torch.randn(shape), layout).to(DEVICE) for _ in range(3))
        affine = [t.detach().to(DEVICE) for t in channel_tensors(shape[1], torch.float32)[2:]]
        y, mean, var = OP.forward(x, *affine, r, 1e-5, *SILU)
        torch.testing.assert_close(OP.statistics(x), (mean, var), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(OP.normalize(x, mean, var, *affine, r, 1e-5, *SILU), y)
        given = (d_y, x, mean, var, *affine, r, 1e-5, *SILU)
        dx, dweight, dbias, dresidual = OP.backward(*given, True)
        dz, dz_xhat = OP.gradient_sums(*given)
        torch.testing.assert_close((dz.float(), dz_xhat.float()), (dbias, dweight))
        m = x.numel() // shape[1]
        got = OP.input_gradient(*given, dz / m, dz_xhat / m)
        torch.testing.assert_close(got, (dx, dresidual))


@pytest.mark.usefixtures("strategy")
def test_same_bits_from_run_to_run():
    x, d_y = torch.randn(8, 20, 9, 9).to(DEVICE), torch.randn(8, 20, 9, 9).to(DEVICE)

    def run():
        y, mean, var = OP.forward(x, None, None, None, 1e-5, *RELU)
        return y, mean, var, *OP.backward(d_y, x, mean, var, None, None, None, 1e-5, *RELU, True)[:3]

    assert all(map(torch.equal, run(), run()))


def test_running_statistics_are_the_reference_for_any_momentum():
    for momentum in (0.1, 1.0, None):
        layer = bn.BatchNorm2d(5, momentum=momentum).to(DEVICE)
        mean, var = torch.zeros(5), torch.ones(5)
        for count in range(1, 4):
            x = torch.randn(4, 5, 3, 3) * count + count
            layer(x.to(DEVICE))
            batch = reference.statistics(x.double())
            mean, var = reference.update_running(mean, var, *batch, 36, momentum, count)
        torch.testing.assert_close((layer.running_mean.cpu(), layer.running_var.cpu()), (mean, var))
        assert layer.num_batches_tracked == 3


@pytest.mark.usefixtures("strategy")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_what_is_not_finite_stays_out_of_the_running_statistics(momentum, layout):
    layer, clean = (bn.BatchNorm2d(3, momentum=momentum).to(DEVICE) for _ in range(2))
    batches = [arrange(torch.randn(9, 3, 5, 5), layout).to(DEVICE) for _ in range(3)]
    for x in (batches[0], batches[2]):
        clean(x)
    batches[1][4, 1, 2, 2] = torch.inf
    for x in batches:
        layer(x)
    torch.testing.assert_close(layer.running_mean[1], clean.running_mean[1])
    torch.testing.assert_close(layer.running_var[1], clean.running_var[1])
    assert layer.running_mean.isfinite().all()
    assert layer.skipped_batches.tolist() == [0, 1, 0]


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (4, 0, 3, 3), (4, 3, 0), (0, 3)], ids=str)
def test_ops_take_empty_tensors(shape):  # as an empty rank has them
    x, c = torch.empty(shape, device=DEVICE), torch.ones(shape[1], device=DEVICE)
    assert all(t.isnan().all() for t in OP.statistics(x))
    y, mean, var = OP.forward(x, c, c, x, 1e-5, *RELU)
    assert y.shape == OP.normalize(x, c, c, c, c, None, 1e-5, *RELU).shape == shape
    assert mean.shape == var.shape == c.shape
    given = (x, x, c, c, c, c, x, 1e-5, *RELU)
    dx, dweight, dbias, _ = OP.backward(*given, True)
    assert dx.shape == OP.input_gradient(*given, c, c)[0].shape == shape
    assert not dweight.any()
    assert not dbias.any()
    assert not any(t.any() for t in OP.gradient_sums(*given))


def test_empty_batches_and_one_channel():
    layer = bn.BatchNorm2d(1, activation="relu").to(DEVICE)
    assert layer(torch.empty(0, 1, 3, 3, device=DEVICE)).shape == (0, 1, 3, 3)
    x = torch.randn(3, 1, 5, 5)
    y = bn.batch_norm(x.to(DEVICE), training=True).cpu()
    torch.testing.assert_close(y, torch.nn.functional.batch_norm(x, None, None, training=True))


def test_float64_takes_torchs_own_kernels():
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    y = bn.batch_norm(x.to(DEVICE), training=True, activation="tanh").cpu()
    torch.testing.assert_close(
        y, reference.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, parse_activation("tanh"))
    )


SOURCES = (bn.Batch(), bn.Ghost(3), bn.Renorm(2, 1, ((0, 0), (0, 0))))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("source", SOURCES, ids=repr)
def test_every_source_of_statistics_on_these_kernels(source, masked):
    x = torch.randn(7, 4, 5, 6, device=DEVICE) * 2 + 3
    residual, dy = torch.randn_like(x), torch.randn_like(x)
    mask = torch.rand(7, 5, 6, device=DEVICE) > 0.4 if masked else None
    found = []
    for dtype in (torch.float32, torch.float64):  # which has no kernel here
        layer = bn.BatchNorm2d(4, activation="silu", statistics=source, device=DEVICE, dtype=dtype)
        inputs = [t.to(dtype).requires_grad_() for t in (x, residual)]
        y = layer(*inputs, mask)
        gradients = torch.autograd.grad(y, [*inputs, layer.weight, layer.bias], dy.to(dtype))
        found.append([y, *gradients, layer.running_mean, layer.running_var])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [name for name, (op, *_) in WRONG.items() if "groups" not in op])
def test_ops_refuse_what_does_not_fit_in_the_words_of_the_cpu(case):
    op, arguments, words = WRONG[case]
    arguments = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in arguments]
    with pytest.raises(RuntimeError, match=words):
        getattr(OP, op).default(*arguments)


@pytest.mark.parametrize("call", [name for name in op_calls() if "groups" not in name])
def test_opcheck(call):
    op, arguments = op_calls()[call]
    arguments = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in arguments]
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op.default, arguments, test_utils=tests)


def test_second_derivatives_and_checkpointing_go_through():
    layer, x = bn.BatchNorm2d(3, activation="silu").to(DEVICE), torch.randn(4, 3, 5, 5, device=DEVICE)
    x.requires_grad_()
    gradient = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)[0]
    second = torch.autograd.grad(gradient.square().sum(), x)[0]
    twin = x.detach().double().requires_grad_()
    y = reference.batch_norm(twin, None, None, None, None, True, 0.1, 1e-5, parse_activation("silu"))
    right = torch.autograd.grad(torch.autograd.grad(y.square().sum(), twin, create_graph=True)[0].square().sum(), twin)[
        0
    ]
    torch.testing.assert_close(second.double(), right, rtol=1e-3, atol=1e-3)
    again = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    torch.testing.assert_close(again, layer(x))


def test_slopes_of_leaky_relu():
    x = torch.randn(6, 4, 8)
    for slope in (SLOPE, -SLOPE):
        assert max(compare(x, torch.randn_like(x), ("leaky_relu", slope), True)) <= 1


# ---- on a GPU alone --------------------------------------------------------------------------------------------------


@on_gpu
def test_a_training_step_is_captured_in_a_graph():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), bn.BatchNorm2d(8, activation="relu")).cuda()
    x = torch.randn(4, 3, 9, 9, device="cuda")

    def step():
        model.zero_grad(set_to_none=True)
        y = model(x)
        y.square().sum().backward()
        return y

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    before = model[1].num_batches_tracked.item()
    x.copy_(torch.randn_like(x) * 3)
    graph.replay()
    assert model[1].num_batches_tracked.item() == before + 1
    torch.testing.assert_close(y, model(x))


@on_gpu
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((40, 2, 30_000_000), "contiguous"),
        ((1 << 31, 2), "contiguous"),
        ((2, 2, 600_000_000), "channels_last"),
        ((1, 1, 3_000_000_000), "contiguous"),
    ],
)
def test_tensors_of_more_than_2_to_the_31_values(shape, layout):
    if torch.cuda.mem_get_info()[0] < 45 << 30:
        pytest.skip("needs 45 GB of GPU memory")
    x = arrange(torch.randn(shape, device="cuda", dtype=torch.bfloat16), layout).mul_(3).add_(5)
    d_y = torch.ones_like(x)
    y, mean, var = OP.forward(x, None, None, None, 1e-5, *RELU)
    torch.testing.assert_close((mean, var), (torch.full_like(mean, 5), torch.full_like(var, 9)), rtol=1e-2, atol=1e-2)
    dx, _, dbias, _ = OP.backward(d_y, x, mean, var, None, None, None, 1e-5, *RELU, False)
    for part in (slice(None, 1), slice(-1, None)):  # in examples and, where there are some, in places
        for places in (slice(None, 1000), slice(-1000, None)) if x.dim() > 2 else (slice(None),):
            at = (part, slice(None), places)[: x.dim()]
            z = (x[at].double() - 5) / 3
            torch.testing.assert_close(y[at].double(), z.clamp(min=0), rtol=0.02, atol=0.02)
            sure = z.abs() > 0.02
            torch.testing.assert_close(dx[at].double()[sure], (z > 0).double()[sure] / 3, rtol=0.02, atol=0)
    torch.testing.assert_close(dbias.double(), torch.full_like(mean, x.numel() / shape[1] / 2), rtol=0.01, atol=0)


@on_gpu
def test_nothing_waits_for_the_device():
    layer, x = bn.BatchNorm2d(8, activation="relu").cuda(), torch.randn(4, 8, 9, 9, device="cuda", requires_grad=True)
    mask = torch.rand(4, 9, 9, device="cuda") > 0.5
    others = [bn.BatchNorm2d(8, statistics=source).cuda() for source in SOURCES]
    for each in (layer, *others):
        each(x, mask=mask).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x, residual=x).sum().backward()
        for each in (layer, *others):
            each(x, mask=mask).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
