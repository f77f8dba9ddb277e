"""The compiled kernels against the reference: values, gradients, layouts, dtypes, threads, instruction sets."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from cases import ACTIVATIONS, FLOAT_DTYPES, HALF_DTYPES, LAYOUTS, REFERENCE_SUM_ULP, SHAPES, SLOPE
from helpers import arrange, channel_tensors, parameter_dtype, through_ops, ulps
from hypothesis import given, settings
from hypothesis import strategies as st

import batchnorm as bn
from batchnorm import ops
from batchnorm.functional import parse_activation
from batchnorm.ops import autograd, reference
from batchnorm.ops.activations import ROWS
from batchnorm.ops.arguments import Affine

# Beside the reference, which computes float32 in float64: a kernel rounds x - mu, its product and the sum to float32.
KERNEL_ULP = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 4, torch.float64: 64}

OP = torch.ops.batchnorm
NONE, RELU, RELU6, LEAKY, SILU = (0, 0.0, 0.0), (1, 0.0, 0.0), (2, 0.0, 0.0), (3, SLOPE, 0.0), (4, 0.0, 0.0)


@pytest.fixture
def poisoned():
    """Memory that nothing was written to holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def test_the_kernels_are_built():  # all else here would test torch's own otherwise
    assert torch.float64 in ops.dtypes_served("cpu")


def compare(x, residual, activation, training, mixed=False):
    """Output, gradients and buffers of ours beside the reference's: the largest error of each over the allowed one."""
    channels, dtype = x.shape[1], x.dtype
    tensors = channel_tensors(channels, parameter_dtype(dtype) if mixed else dtype)
    g = parse_activation(activation)
    d_y = torch.randn(x.shape).to(dtype)
    results = []
    for function in (through_ops, reference.batch_norm):
        leaf, other = x.detach().requires_grad_(), None if residual is None else residual.detach().requires_grad_()
        mean, var, weight, bias = (t.detach().clone().requires_grad_(t.requires_grad) for t in tensors)
        y = function(leaf, mean, var, weight, bias, training, 0.1, 1e-5, g, other)
        inputs = [t for t in (leaf, weight, bias, other) if t is not None]
        results.append([y.detach(), *torch.autograd.grad(y, inputs, d_y), mean, var])
    if residual is not None and dtype in HALF_DTYPES and g.code:
        # Backward looks at the rounded y (as torch's does), which may lie on the other side of a kink.
        kept = results[0][0] if g.result_tells else residual
        mean, var, weight, bias = (t.detach() for t in tensors)
        results[1][1:5] = autograd.reference_backward(d_y, x, mean, var, Affine(weight, bias, kept, 1e-5, *g), training)
    allowed = [
        KERNEL_ULP[dtype] if t.dim() > 1 else max(KERNEL_ULP[t.dtype], REFERENCE_SUM_ULP[dtype]) for t in results[0]
    ]
    root = (x.numel() / channels) ** 0.5  # what a sum of m terms of size 1 comes to
    least = [1.0 if t.dim() > 1 else root for t in results[0]]
    return [ulps(a, b, least=of) / most for a, b, of, most in zip(*results, least, allowed, strict=True)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_every_fusion_is_the_reference_in_every_layout(dtype, activation, with_residual, training):
    for shape in SHAPES:
        for layout in LAYOUTS:
            x = arrange(torch.randn(shape).to(dtype), layout)
            residual = torch.randn(shape).to(dtype) if with_residual else None
            if layout == "expanded" and training:
                continue  # the reference's own gradient of a tensor with few different values is mostly rounding
            errors = compare(x, residual, activation, training, mixed=True)
            assert max(errors) <= 1, (shape, layout, errors)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", ["relu", "silu"])  # y is kept, the residual is kept
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_split_ops_have_the_bits_of_the_fused_ones(dtype, activation, with_residual):
    g = parse_activation(activation)
    for shape in SHAPES:
        for layout in LAYOUTS:
            x, d_y = arrange(torch.randn(shape).to(dtype), layout), torch.randn(shape).to(dtype)
            r = torch.randn(shape).to(dtype) if with_residual else None
            affine = [t.detach() for t in channel_tensors(shape[1], parameter_dtype(dtype))[2:]]
            y, mean, var = OP.forward(x, *affine, r, 1e-5, *g)
            assert all(map(torch.equal, OP.statistics(x), (mean, var)))
            assert torch.equal(OP.normalize(x, mean, var, *affine, r, 1e-5, *g), y)
            given = (d_y, x, mean, var, *affine, None if r is None else y if activation == "relu" else r)
            dx, dweight, dbias, dresidual = OP.backward(*given, 1e-5, *g, True)
            sums = OP.gradient_sums(*given, 1e-5, *g)
            assert all(map(torch.equal, (t.to(dbias.dtype) for t in sums), (dbias, dweight)))
            means = (t / (x.numel() // shape[1]) for t in sums)
            assert all(map(torch.equal, OP.input_gradient(*given, 1e-5, *g, *means), (dx, dresidual)))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_ops_on_groups_are_those_on_each_group(dtype, activation, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for shape, size, groups in (
            ((33, 17), 5, 7),
            ((11, 16, 33, 35), 4, 3),
            ((9, 3, 5), 8, 1),
            ((9, 4, 6, 3), 2, 4),
        ):
            for layout in ("contiguous", "channels_last", "transposed"):
                check_groups(arrange(torch.randn(shape).to(dtype), layout), size, groups, activation)
    finally:
        torch.set_num_threads(before)


def check_groups(x, size, groups, activation):
    """To one unit of rounding: the threads that share a group cut its sums elsewhere."""
    g, channels = parse_activation(activation), x.shape[1]
    d_y, r = torch.randn(x.shape).to(x.dtype), torch.randn(x.shape).to(x.dtype)
    affine = [t.detach() for t in channel_tensors(channels, parameter_dtype(x.dtype))[2:]]
    y, mean, var = OP.forward_groups(x, *affine, r, 1e-5, *g, size, groups)
    assert y.stride() == torch.ops.batchnorm.forward(x, *affine, r, 1e-5, *g)[0].stride()
    kept = None if activation is None else y if activation == "relu" else r
    dx, dweight, dbias, dresidual = OP.backward_groups(d_y, x, mean, var, *affine, kept, 1e-5, *g, size, groups)
    parts = []
    for i in range(groups):
        part = slice(i * size, None if i == groups - 1 else (i + 1) * size)
        expected, *moments = OP.forward(x[part], *affine, r[part], 1e-5, *g)
        assert ulps(y[part], expected) <= 1
        assert all(ulps(a[i], b, torch.float32) <= 1 for a, b in zip((mean, var), moments, strict=True))
        given = (d_y[part], x[part], mean[i], var[i], *affine, None if kept is None else kept[part])
        parts.append(OP.backward(*given, 1e-5, *g, True))
    for found, each in ((dx, 0), (dresidual, 3)):
        expected = torch.cat([p[each] for p in parts])
        assert ulps(found, expected, least=1.0) <= 1 if found.numel() else not expected.numel()
    assert ulps(dweight, sum(p[1].double() for p in parts)) <= groups
    assert ulps(dbias, sum(p[2].double() for p in parts)) <= groups


def test_split_ops_on_parts_of_a_batch_make_the_whole():
    x, d_y, *affine = (torch.randn(s, dtype=torch.float64) for s in ((11, 5, 6, 7), (11, 5, 6, 7), (5,), (5,)))
    y, mean, var = OP.forward(x, *affine, None, 1e-5, *RELU)
    parts, m = x.split([3, 7, 1]), 11 * 6 * 7
    counts = [part.numel() // 5 for part in parts]
    each = [OP.statistics(part) for part in parts]
    merged = sum(n * mu for n, (mu, _) in zip(counts, each, strict=True)) / m
    spread = sum(n * (v + (mu - merged) ** 2) for n, (mu, v) in zip(counts, each, strict=True)) / m
    torch.testing.assert_close((merged, spread), (mean, var), rtol=1e-12, atol=1e-12)
    normalized = [OP.normalize(part, merged, spread, *affine, None, 1e-5, *RELU) for part in parts]
    torch.testing.assert_close(torch.cat(normalized), y)
    given = [(g, part, merged, spread, *affine, None) for g, part in zip(d_y.split([3, 7, 1]), parts, strict=True)]
    sums = [sum(s) / m for s in zip(*(OP.gradient_sums(*g, 1e-5, *RELU) for g in given), strict=True)]
    dx = torch.cat([OP.input_gradient(*g, 1e-5, *RELU, *sums)[0] for g in given])
    torch.testing.assert_close(dx, OP.backward(d_y, x, mean, var, *affine, None, 1e-5, *RELU, True)[0])


@st.composite
def tensors(draw):
    """A tensor of any rank, sizes around the widths of vectors and rows, any order in memory, any float dtype."""
    rank = draw(st.integers(2, 5))
    shape = [draw(st.sampled_from((1, 2, 3, 5, 8, 17))), draw(st.sampled_from((1, 2, 3, 7, 16, 33, 70)))]
    shape += [draw(st.sampled_from((1, 2, 3, 5, 8, 19))) for _ in range(rank - 2)]
    if shape[0] * torch.Size(shape[2:]).numel() < 4:
        shape[0] = 6
    x = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    x = x.to(draw(st.sampled_from(FLOAT_DTYPES)))
    order = draw(st.permutations(range(rank)))
    return x.permute(order).contiguous().permute([order.index(d) for d in range(rank)])


@given(
    x=tensors(),
    activation=st.sampled_from(ACTIVATIONS),
    with_residual=st.booleans(),
    training=st.booleans(),
    mixed=st.booleans(),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_anything_is_the_reference(x, activation, with_residual, training, mixed):
    torch.manual_seed(0)
    residual = torch.randn(x.shape).to(x.dtype) if with_residual else None
    errors = compare(x, residual, activation, training, mixed)
    assert max(errors) <= 1, errors


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(16, 5, 16, 16), (4096, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_where_a_first_look_misleads_or_squares_overflow_sums_are_in_double(dtype, shape, layout):
    x = torch.randn(shape).to(dtype)
    far, large = x.clone(), x * 1e25
    first_places = (slice(None, None, len(x) // 4), slice(None), *[0] * (x.dim() - 2))  # what is looked at first
    far[first_places] = -1e4

    def channels(t):
        return t.double().movedim(1, 0).flatten(1)

    for case in (far, large):
        _, mean, var = OP.forward(arrange(case, layout), None, None, None, 1e-5, *NONE)
        torch.testing.assert_close(mean, channels(case).mean(1), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(var, channels(case).var(1, correction=0), rtol=1e-11, atol=0)
    d_y = x * 1e20
    dweight, dbias = OP.backward(
        arrange(d_y, layout), arrange(large, layout), mean, var, *[None] * 3, 1e-5, *NONE, False
    )[1:3]
    terms = channels(d_y) * (channels(large) - mean[:, None]) * (var + 1e-5).rsqrt()[:, None]
    torch.testing.assert_close(dweight.double(), terms.sum(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(dbias.double() / 1e20, channels(d_y).sum(1) / 1e20, rtol=1e-4, atol=1e-4)


def test_large_tensors_are_cut_into_groups_and_threads_without_a_seam():
    for layout in ("contiguous", "channels_last"):
        x = arrange(torch.randn(16, 96, 40, 40), layout)
        assert max(compare(x, torch.randn_like(x), "relu", True)) <= 1


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_results_written_past_the_caches_have_the_bits_of_small_ones(layout, dtype):
    for n, *others in ((48, 40, 67, 69), (48, 48, 64, 80), (120000, 48)):  # the first with rows that begin anywhere
        shape = (max(24, n * 2 // dtype.itemsize), *others)
        x, r, d_y = (arrange(torch.randn(shape).to(dtype), layout) for _ in range(3))
        mean, var, weight, bias = (t.detach() for t in channel_tensors(shape[1], torch.float32))

        def results(x, r, d_y, statistics=(mean, var, weight, bias)):
            y = OP.normalize(x, *statistics, r, 1e-5, *SILU)
            return y, *(OP.backward(d_y, x, *statistics, r, 1e-5, *SILU, False)[i] for i in (0, 3))

        assert x.nbytes > 10 << 20 > x[: shape[0] // 24].nbytes
        parts = [results(*part) for part in zip(*(t.chunk(24) for t in (x, r, d_y)), strict=True)]
        for whole, small in zip(results(x, r, d_y), zip(*parts, strict=True), strict=True):
            assert torch.equal(whole, torch.cat(small))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_from_run_to_run_and_rounding_alone_between_numbers_of_threads(layout):
    x, d_y = arrange(torch.randn(8, 48, 33, 31), layout), torch.randn(8, 48, 33, 31)

    def run(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            y, mean, var = OP.forward(x, None, None, None, 1e-5, *RELU)
            return y, mean, var, *OP.backward(d_y, x, mean, var, None, None, None, 1e-5, *RELU, True)[:3]
        finally:
            torch.set_num_threads(before)

    one, two, again = run(1), run(2), run(2)
    for a, b, c in zip(one, two, again, strict=True):
        assert torch.equal(b, c)
        assert ulps(b, a, torch.float32) <= 1


# The sets below the best that this processor has; all other tests run on that one.
NARROWER = {"AVX512": ("generic", "avx2", "avx512")}.get(torch.backends.cpu.get_cpu_capability(), ("generic",))


@pytest.mark.parametrize("instructions", NARROWER)
def test_every_instruction_set_that_this_processor_has(instructions):
    env = os.environ | {"BATCHNORM_INSTRUCTIONS": instructions}
    tests = f"{__file__}::test_every_fusion_is_the_reference_in_every_layout"
    select = "float32-relu or bfloat16-silu or float16-tanh or float64-hardswish"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", tests, "-k", select]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout


X, CHANNELS, LESS = torch.randn(4, 3, 5, 5), torch.ones(3), torch.ones(2)
WRONG = {
    "one dimension": ("forward", (CHANNELS, None, None, None, 1e-5, *NONE), r"must be \(N, C, ...\), got \(3\)"),
    "integer x": ("forward", (X.long(), None, None, None, 1e-5, *NONE), "expected float32"),
    "activation": ("forward", (X, None, None, None, 1e-5, 99, 0.0, 0.0), "unknown activation 99"),
    "weight": ("forward", (X, LESS, None, None, 1e-5, *NONE), r"weight must be \(3,\).*got \(2\)"),
    "2-D bias": ("normalize", (X, CHANNELS, CHANNELS, None, CHANNELS[None], None, 1e-5, *NONE), r"bias.*got \(1, 3\)"),
    "mean": ("normalize", (X, LESS, CHANNELS, None, None, None, 1e-5, *NONE), "mean must be"),
    "residual": ("forward", (X, None, None, X[:1], 1e-5, *NONE), r"residual must.* \(4, 3, 5, 5\), got \(1, 3,"),
    "dtype of residual": ("forward", (X, None, None, X.double(), 1e-5, *NONE), "residual must have x's dtype"),
    "dy": ("backward", (X[:2], X, CHANNELS, CHANNELS, None, None, None, 1e-5, *RELU, True), "dy must have x's shape"),
    "kept": ("backward", (X, X, CHANNELS, CHANNELS, None, None, X[:2], 1e-5, *RELU, True), "kept must have x's shape"),
    "dz_mean": ("input_gradient", (X, X, *[CHANNELS] * 2, *[None] * 3, 1e-5, *RELU, LESS, CHANNELS), "dz_mean must"),
    "dy of sums": ("gradient_sums", (X[:2], X, *[CHANNELS] * 2, *[None] * 3, 1e-5, *RELU), "dy must have x's shape"),
    "running_mean": ("train", (X, None, None, None, 1e-5, *NONE, LESS, CHANNELS, None, None, 0.1), "running_mean"),
    "one of two": ("train", (X, None, None, None, 1e-5, *NONE, CHANNELS, None, None, None, 0.1), "given together"),
    "batches": ("update_running_", (CHANNELS, CHANNELS, CHANNELS, None, 0.1, CHANNELS, CHANNELS, 9), "one int64"),
    "no momentum": ("update_running_", (CHANNELS, CHANNELS, None, None, None, CHANNELS, CHANNELS, 9), "number of"),
    "groups": ("forward_groups", (X, None, None, None, 1e-5, *NONE, 2, 3), "3 groups of 2 examples do not fit into 4"),
    "size of groups": ("forward_groups", (X, None, None, None, 1e-5, *NONE, 0, 1), "1 groups of 0 examples"),
    "a row for each": (
        "backward_groups", (X, X, *[CHANNELS] * 2, *[None] * 3, 1e-5, *NONE, 2, 2), r"mean must be \(2, 3\).*got \(3\)"
    ),
    "skipped": ("update_running_", (*[CHANNELS] * 2, None, LESS.long(), 0.1, *[CHANNELS] * 2, 9), r"skipped must"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_ops_refuse_what_does_not_fit_and_say_what_arrived(case):
    op, arguments, words = WRONG[case]
    with pytest.raises(RuntimeError, match=words):
        getattr(OP, op).default(*arguments)
    assert CHANNELS.eq(1).all()  # and nothing was changed


# ---- ops as torch sees them ------------------------------------------------------------------------------------------


def op_calls():
    x, r = torch.randn(4, 3, 5, 6), torch.randn(4, 3, 5, 6)
    mean, var, weight, bias = (t.detach() for t in channel_tensors(3, torch.float32))
    wide = (mean.double(), var.double())
    rows = [t.expand(2, 3).contiguous() for t in wide]
    cl = x.contiguous(memory_format=torch.channels_last)
    return {
        "forward": (OP.forward, (x, weight, bias, None, 1e-5, *RELU)),
        "forward residual": (OP.forward, (cl, None, None, r, 1e-5, *SILU)),
        "forward (N, C)": (OP.forward, (torch.randn(6, 3).bfloat16(), weight, bias, None, 1e-5, *NONE)),
        "train": (
            OP.train,
            (x, weight, bias, None, 1e-5, *RELU, mean, var, torch.tensor(2), torch.zeros(3).long(), 0.1),
        ),
        "train without running statistics": (
            OP.train,
            (x, weight, bias, r, 1e-5, *RELU, None, None, None, None, None),
        ),
        "normalize": (OP.normalize, (x, mean, var, weight, bias, r, 1e-5, *RELU6)),
        "backward": (OP.backward, (r, x, *wide, weight, bias, None, 1e-5, *RELU, True)),
        "backward residual": (OP.backward, (r, cl, *wide, weight, bias, r, 1e-5, *LEAKY, False)),
        "statistics": (OP.statistics, (cl,)),
        "gradient_sums": (OP.gradient_sums, (r, x, *wide, weight, bias, None, 1e-5, *RELU)),
        "gradient_sums residual": (OP.gradient_sums, (r, cl, *wide, weight, bias, r, 1e-5, *SILU)),
        "input_gradient": (OP.input_gradient, (r, x, *wide, weight, bias, None, 1e-5, *RELU, *wide)),
        "input_gradient residual": (OP.input_gradient, (r, cl, *wide, weight, None, r, 1e-5, *SILU, *wide)),
        "forward_groups": (OP.forward_groups, (cl, weight, None, r, 1e-5, *SILU, 3, 2)),
        "backward_groups": (OP.backward_groups, (r, x, *rows, weight, bias, None, 1e-5, *RELU, 3, 2)),
        "backward_groups residual": (OP.backward_groups, (r, cl, *rows, weight, bias, r, 1e-5, *SILU, 3, 2)),
        "update": (OP.update_running_, (mean, var, torch.tensor(2), None, 0.1, *wide, 120)),
        "update average": (OP.update_running_, (mean, var, torch.tensor(2), torch.zeros(3).long(), None, *wide, 120)),
    }


@pytest.mark.parametrize("call", op_calls())
def test_opcheck(call):
    op, arguments = op_calls()[call]
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op.default, arguments, test_utils=tests)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 40), (0, 3, 5, 5), (4, 0), (4, 0, 40), (4, 3, 0)], ids=str)
def test_ops_on_nothing(shape):
    for layout in ("contiguous", "channels_last"):
        x, channels = arrange(torch.randn(shape), layout), torch.ones(shape[1])
        assert all(t.isnan().all() for t in (*OP.statistics(x), *OP.forward(x, None, None, None, 1e-5, *RELU)[1:]))
        assert OP.normalize(x, channels, channels, None, None, x, 1e-5, *SILU).shape == shape
        given = (x, x, channels.double(), channels.double(), channels, None, x)
        assert not any(t.any() for t in OP.gradient_sums(*given, 1e-5, *SILU))
        assert OP.input_gradient(*given, 1e-5, *SILU, channels, channels)[0].shape == shape
        assert [t.numel() for t in OP.backward(*given, 1e-5, *SILU, True)] == [0, shape[1], shape[1], 0]
        groups = (3, 1 if shape[0] == 0 else 2)
        assert OP.forward_groups(x, None, None, None, 1e-5, *SILU, *groups)[1].shape == (groups[1], shape[1])
        rows = [t.expand(groups[1], -1).contiguous() for t in given[2:4]]
        assert not any(t.any() for t in OP.backward_groups(x, x, *rows, None, None, x, 1e-5, *SILU, *groups))


def test_layout_of_results_is_that_of_the_input():
    x = torch.randn(4, 3, 5, 6)
    for layout in LAYOUTS:
        y = through_ops(arrange(x, layout), None, None, None, None, True, 0.1, 1e-5)
        assert y.is_contiguous(
            memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
        )


def kept_bytes(activation, residual):
    """What a call keeps for backward, beside its input and (C,) values."""
    x, kept = torch.randn(4, 3, 8, 8, requires_grad=True), {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        bn.batch_norm(x, training=True, activation=activation, residual=residual)
    kept.pop(x.untyped_storage().data_ptr())
    return sum(size for size in kept.values() if size > 1024)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_nothing_but_the_input_is_kept_without_a_residual_and_one_tensor_with_one(activation):
    residual = torch.randn(4, 3, 8, 8)
    assert kept_bytes(activation, None) == 0
    assert kept_bytes(activation, residual) == (0 if activation is None else residual.nbytes)


def test_two_forwards_before_one_backward():
    layer, x = bn.BatchNorm2d(3, activation="silu"), torch.randn(2, 4, 3, 5, 5)
    (layer(x[0]).sum() + layer(x[1]).square().sum()).backward()
    both = layer.weight.grad.clone()
    apart = []
    for part, loss in ((x[0], lambda y: y.sum()), (x[1], lambda y: y.square().sum())):
        layer.weight.grad = None
        loss(layer(part)).backward()
        apart.append(layer.weight.grad)
    torch.testing.assert_close(both, sum(apart))


def test_changing_y_in_place_raises_where_backward_needs_it():
    layer, x = bn.BatchNorm2d(3, activation="relu"), torch.randn(4, 3, 5, 5, requires_grad=True)
    layer(x).add_(1).sum().backward()  # without a residual y is not kept
    y = layer(x, residual=torch.randn_like(x))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.add_(1).sum().backward()


def test_eval_is_safe_from_a_train_step_before_its_backward():  # torch reads the changed buffers
    layer, x = bn.BatchNorm2d(3).eval(), torch.randn(4, 3, 5, 5, requires_grad=True)
    expected = torch.autograd.grad(layer(x).sum(), x)[0]
    y = layer(x)
    layer.train()(torch.randn(4, 3, 5, 5) * 9 + 5)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], expected)


# ---- the shared object -----------------------------------------------------------------------------------------------


def test_the_shared_object_needs_torchs_stable_interface_alone_and_no_python():
    file = Path(ops.__file__).with_name("_kernels.so")
    listed = subprocess.run(["nm", "-D", "--undefined-only", file], capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1].split("@")[0] for line in listed.splitlines()}
    assert not {name for name in names if name.startswith(("Py", "_Py"))}
    torchs = {name for name in names if "torch" in name or "c10" in name or "at3" in name or "N2at" in name}
    assert torchs
    assert all(name.startswith(("aoti_torch_", "torch_")) for name in torchs), torchs


def test_without_kernels_the_package_says_how_to_build_them_and_works(tmp_path):
    code = (
        "import importlib.machinery as m, warnings; find = m.PathFinder.find_spec\n"
        "m.PathFinder.find_spec = staticmethod("
        "lambda name, *rest: None if name == '_kernels' else find(name, *rest))\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import batchnorm as bn, torch\n"
        "assert len([w for w in caught if 'not built' in str(w.message)]) == 1, caught\n"
        "bn.BatchNorm2d(3, activation='relu')(torch.randn(2, 3, 4, 4)).sum()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_without_triton_cuda_has_torchs_kernels_and_that_is_said_once(monkeypatch):
    monkeypatch.setattr(ops, "_SERVED", {})
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it fails
    monkeypatch.delitem(sys.modules, "batchnorm.ops.cuda", raising=False)
    monkeypatch.delattr(ops, "cuda", raising=False)
    with pytest.warns(UserWarning, match="Triton does not run here .*pip install triton"):
        assert ops.dtypes_served("cuda") == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ops.dtypes_served("cuda") == ()


def test_kernels_may_be_loaded_while_a_model_is_compiled(monkeypatch):
    served = ops.dtypes_served("cpu")
    monkeypatch.setattr(ops, "_SERVED", {})
    monkeypatch.setitem(ops._LOADERS, "cpu", lambda: served)
    layer, x = bn.BatchNorm2d(3), torch.randn(4, 3, 5, 5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_rows_of_activations_are_those_of_the_kernels():
    header = (Path(ops.__file__).parent / "csrc" / "kernels.h").read_text()
    rows = re.findall(r"_\((\w+), (\w+)\)", header.split("#define FOR_EACH_ACTIVATION(_)")[1].split("#define")[0])
    assert rows == [("none", "always"), *((row.name, row.result_tells.__name__) for row in ROWS.values())]


def test_every_activation_is_tested():
    assert [parse_activation(activation).name for activation in ACTIVATIONS] == [None, *ROWS]
