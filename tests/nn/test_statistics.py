"""Masks, ghost batches and Batch Renormalization: against the same thing written down with torch alone."""

import copy
import pickle

import pytest
import torch
from cases import ACTIVATIONS, SLOPE
from helpers import arrange, stock_activation, ulps
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm import ops

SHAPES = ((9, 3), (6, 3, 7), (5, 4, 6, 3), (3, 2, 3, 2, 5))
KINDS = {2: bn.BatchNorm1d, 3: bn.BatchNorm1d, 4: bn.BatchNorm2d, 5: bn.BatchNorm3d}


def layer_for(x, **options):
    """A layer in float64 or x's dtype, with affine parameters that are not 1 and 0."""
    layer = KINDS[x.dim()](x.shape[1], dtype=x.dtype if x.dtype.itemsize > 2 else torch.float32, **options)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
        layer.bias.normal_()
    return layer


def run(layer, x, residual=None, mask=None, dy=None):
    """(y, gradients of x, residual, weight, bias), and dy."""
    x, residual = x.detach().requires_grad_(), None if residual is None else residual.detach().requires_grad_()
    y = layer(x, residual, mask)
    dy = torch.randn_like(y) if dy is None else dy
    wanted = [t for t in (x, residual, layer.weight, layer.bias) if t is not None]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy)], dy


def rows(t, mask):
    """(n, C) of the places that count."""
    return t.movedim(1, -1)[mask]


@pytest.fixture(params=["kernels", "equations"])
def served(request, monkeypatch):
    """With our kernels, and without: a device that has none."""
    if request.param == "equations":
        monkeypatch.setattr(ops, "dtypes_served", lambda device_type: ())
    return request.param


# ---- mask: padding pollutes statistics -------------------------------------------------------------------------------


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masked_places_might_as_well_not_be_there(shape, layout, activation):
    for with_residual in (False, True):
        x = arrange(torch.randn(shape, dtype=torch.float64) * 3 + 5, layout)
        residual = torch.randn(shape, dtype=torch.float64) if with_residual else None
        mask = torch.rand(shape[:1] + shape[2:]) > 0.4
        x.movedim(1, -1)[~mask] = torch.nan  # whatever is there
        layer = layer_for(x, activation=activation)
        alone = bn.BatchNorm1d(shape[1], dtype=torch.float64, activation=activation)
        alone.load_state_dict(layer.state_dict())
        found, dy = run(layer, x, residual, mask if layout != "transposed" else mask[:, None])
        expected, _ = run(
            alone, rows(x, mask), None if residual is None else rows(residual, mask), None, rows(dy, mask)
        )
        for a, b in zip(found, expected, strict=True):
            if a.dim() > 1:
                assert (rows(a, ~mask) == 0).all()  # output and gradients
                a = rows(a, mask)
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-11)
        torch.testing.assert_close(layer.state_dict(), alone.state_dict(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_masked_statistics_keep_their_digits_far_from_zero(dtype):
    x = (torch.randn(64, 3, 50) + (1e3 if dtype == torch.float32 else 30)).to(dtype)
    mask = torch.rand(64, 50) > 0.7
    layer, alone = layer_for(x), layer_for(x.double())
    alone.load_state_dict(layer.state_dict())
    found, dy = run(layer, x, None, mask)
    expected, _ = run(alone, rows(x.double(), mask)[..., None], None, None, rows(dy.double(), mask)[..., None])
    assert ulps(rows(found[0], mask), expected[0][..., 0]) < 4
    assert ulps(rows(found[1], mask), expected[1][..., 0]) < 4
    torch.testing.assert_close(layer.running_var.double(), alone.running_var, rtol=1e-6, atol=0)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_evaluation_looks_at_no_masked_place(activation):
    x, mask = torch.randn(4, 3, 6), torch.rand(4, 6) > 0.5
    layer = layer_for(x, activation=activation).eval()
    layer.running_mean.normal_()
    expected = layer(x).movedim(1, -1)[mask]
    x.movedim(1, -1)[~mask] = torch.inf
    (y, dx, dweight, dbias), _ = run(layer, x, None, mask)
    torch.testing.assert_close(rows(y, mask), expected, rtol=0, atol=0)
    assert (rows(y, ~mask) == 0).all()
    assert (rows(dx, ~mask) == 0).all()
    assert all(t.isfinite().all() for t in (dx, dweight, dbias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_batch_without_any_place_leaves_no_trace(momentum, dtype):
    x = torch.randn(4, 300, 6, dtype=dtype)
    layer = layer_for(x, momentum=momentum)
    layer.running_mean.normal_(), layer.running_var.uniform_(0.1, 5)
    before = copy.deepcopy(layer.state_dict())
    (y, dx, dweight, dbias), _ = run(layer, x, None, torch.zeros(4, 6, dtype=torch.bool))
    assert not any(t.any() for t in (y, dx, dweight, dbias))
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    layer(x, mask=torch.ones(4, 6, dtype=torch.bool))
    assert layer.num_batches_tracked == 1
    assert layer.running_mean.isfinite().all()


def test_one_place_that_counts_moves_the_mean_alone():
    x, mask = torch.randn(4, 3, 6, dtype=torch.float64), torch.zeros(4, 6, dtype=torch.bool)
    mask[1, 2] = True
    layer = layer_for(x)
    (y, dx, *_), _ = run(layer, x, None, mask)
    torch.testing.assert_close(layer.running_mean, 0.1 * x[1, :, 2])
    assert (layer.running_var == 1).all()
    torch.testing.assert_close(y[1, :, 2], layer.bias.detach())
    assert dx.abs().max() < 1e-12


def test_the_functional_form_takes_a_mask_and_returns_statistics():
    x, mask = torch.randn(6, 3, 5), torch.rand(6, 5) > 0.3
    mean, var = torch.zeros(3), torch.ones(3)
    y, new_mean, new_var = bn.batch_norm(x, mean, var, training=True, mask=mask, return_statistics=True)
    assert (mean == 0).all()
    torch.testing.assert_close(new_mean, 0.1 * rows(x, mask).mean(0))
    torch.testing.assert_close(new_var, 0.9 + 0.1 * rows(x, mask).var(0))
    torch.testing.assert_close(bn.batch_norm(x, mean, var, training=True, mask=mask), y)  # in place now
    torch.testing.assert_close(mean, new_mean)


def test_what_a_mask_must_be():
    x, layer = torch.randn(4, 3, 6), bn.BatchNorm1d(3)
    with pytest.raises(
        ValueError, match=r"mask must be \(4, 6\) or \(4, 1, 6\) for input \(4, 3, 6\), got \(4, 3, 6\)"
    ):
        layer(x, mask=torch.ones(4, 3, 6, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"mask must be bool, True where a place counts, got torch.float32"):
        layer(x, mask=torch.ones(4, 6))
    with pytest.raises(TypeError, match="mask must be a bool tensor, True where a place counts, got list"):
        layer(x, mask=[True] * 4)
    with pytest.raises(ValueError, match=r"mask must be on the device of input, cpu, got meta"):
        layer(x, mask=torch.ones(4, 6, dtype=torch.bool, device="meta"))
    with pytest.raises(ValueError, match=r"residual must have the shape of input, \(4, 3, 6\), got \(4, 3, 1\)"):
        layer(x, x[..., :1], mask=torch.ones(4, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"Expected more than 1 value per channel .* got input \(1, 3\)"):
        layer(x[:1, :, 0], mask=torch.ones(1, dtype=torch.bool))
    with pytest.raises(
        RuntimeError, match=r"running_mean should contain 4 elements not 3.*channels are in dimension 1"
    ):
        layer(torch.randn(2, 4, 6), mask=torch.ones(2, 6, dtype=torch.bool))


# ---- ghost batches: pains 25 and 30 ----------------------------------------------------------------------------------


def by_hand(layer, x, residual, dy, size):
    """Each group through a copy of the layer with ordinary statistics, the gradients of parameters added up."""
    starts = list(range(0, len(x), size))
    if len(x[starts[-1] :]) * x[0, 0].numel() == 1:
        starts.pop()
    cuts = [slice(a, b) for a, b in zip(starts, [*starts[1:], None], strict=True)]
    plain = copy.deepcopy(layer)
    plain.statistics = bn.Batch()
    parts = [run(plain, x[c], None if residual is None else residual[c], None, dy[c])[0] for c in cuts]
    *of_examples, dweight, dbias = zip(*parts, strict=True)
    return [*(torch.cat(t) for t in of_examples), sum(dweight), sum(dbias)]


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("activation", [None, "relu", "silu", ("leaky_relu", -SLOPE)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every_second"])
@pytest.mark.parametrize(("shape", "size"), [((17, 3), 4), ((11, 3, 7), 4), ((10, 4, 6, 3), 5), ((9, 2, 3, 2, 5), 1)])
def test_every_group_is_normalized_by_itself_whatever_is_left(shape, size, layout, activation):
    for with_residual in (False, True):
        x = arrange(torch.randn(shape, dtype=torch.float64), layout)
        residual = torch.randn(shape, dtype=torch.float64) if with_residual else None
        layer = layer_for(x, activation=activation, statistics=bn.Ghost(size))
        found, dy = run(layer, x, residual)
        for a, b in zip(found, by_hand(layer, x, residual, dy, size), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_groups_give_the_bits_of_a_small_batch(layout, dtype):
    x = arrange(torch.randn(50, 16, 14, 14).to(dtype), layout)
    layer = layer_for(x, activation="relu", statistics=bn.Ghost(16))
    small = copy.deepcopy(layer)
    small.statistics = bn.Batch()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums are cut by threads
    try:
        y = layer(x)
        assert all(torch.equal(y[i : i + 16], small(x[i : i + 16])) for i in (0, 16, 32, 48))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("size", [3, 8, 20, 40])
def test_running_statistics_are_those_of_the_whole_batch(size):
    x = torch.randn(20, 3, 5, dtype=torch.float64) + torch.arange(20.0)[:, None, None]
    ghost, whole = layer_for(x, statistics=bn.Ghost(size)), layer_for(x)
    ghost(x), whole(x)
    torch.testing.assert_close(ghost.running_mean, whole.running_mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(ghost.running_var, whole.running_var, rtol=1e-13, atol=0)


def test_shuffled_groups_are_others_in_every_step_and_stay_in_place():  # batch leakage
    x = torch.randn(12, 3, 5, dtype=torch.float64)
    residual, mask = torch.randn_like(x), torch.rand(12, 5) > 0.3
    layer = layer_for(x, activation="relu", statistics=bn.Ghost(4, shuffle=True))
    plain = copy.deepcopy(layer)
    plain.statistics = bn.Ghost(4)
    outputs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        (y, dx, dresidual, *_), dy = run(layer, x, residual, mask)
        torch.manual_seed(seed)
        order = torch.randperm(12)
        expected, _ = run(plain, x[order], residual[order], mask[order], dy[order])
        for a, b in zip((y, dx, dresidual), expected[:3], strict=True):
            torch.testing.assert_close(a[order], b, rtol=1e-12, atol=1e-12)
        outputs.append(y)
    assert not torch.allclose(*outputs)


@pytest.mark.usefixtures("served")
def test_ghost_groups_with_a_mask():
    x, mask = torch.randn(11, 3, 7, dtype=torch.float64), torch.rand(11, 7) > 0.3
    mask[4:8] = False  # a group without any place that counts
    layer, whole = layer_for(x, statistics=bn.Ghost(4)), layer_for(x)
    whole.load_state_dict(layer.state_dict())
    found, dy = run(layer, x, None, mask)
    parts = [run(whole, x[c], None, mask[c], dy[c])[0] for c in (slice(4), slice(4, 8), slice(8, None))]
    for i in (0, 1):
        torch.testing.assert_close(found[i], torch.cat([part[i] for part in parts]), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(layer.running_mean, 0.1 * rows(x, mask).mean(0))
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * rows(x, mask).var(0))


def test_what_a_ghost_batch_must_be():
    for size in (0, -3, 2.5, True):
        with pytest.raises(ValueError, match="Ghost takes the number of examples in a group, at least 1"):
            bn.Ghost(size)
    with pytest.raises(ValueError, match=r"Expected more than 1 value per channel .*Ghost\(1\) of \(5, 3\)"):
        bn.BatchNorm1d(3, statistics=bn.Ghost(1))(torch.randn(5, 3))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        bn.BatchNorm1d(3, statistics=bn.Ghost(4))(torch.randn(1, 3))
    with pytest.raises(TypeError, match=r"statistics takes a value, Batch\(\), .*Ghost\(size\).* got <class"):
        bn.BatchNorm1d(3, statistics=bn.Ghost)
    with pytest.raises(RuntimeError, match="running_mean should contain 4 elements not 3"):
        bn.BatchNorm1d(3, statistics=bn.Ghost(2))(torch.randn(8, 4))
    assert bn.BatchNorm1d(3, statistics=bn.Ghost(4))(torch.randn(0, 3)).shape == (0, 3)


# ---- Batch Renormalization: tiny batches -----------------------------------------------------------------------------

NOW = ((0, 0), (0, 0))  # no ramp


def renormalized(x, running_mean, running_var, weight, bias, r_max, d_max, eps=1e-5):
    """The paper's Algorithm 1, with torch alone."""
    dims = [d for d in range(x.dim()) if d != 1]

    def wide(t):
        return t.reshape(-1, *[1] * (x.dim() - 2))

    mu, sigma = x.mean(dims), (x.var(dims, correction=0) + eps).sqrt()
    sigma_run = (running_var + eps).sqrt()
    r = (sigma / sigma_run).clamp(1 / r_max, r_max).detach()
    d = ((mu - running_mean) / sigma_run).clamp(-d_max, d_max).detach()
    return wide(weight) * ((x - wide(mu)) / wide(sigma) * wide(r) + wide(d)) + wide(bias)


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize(("r_max", "d_max"), [(1, 0), (1.2, 0.3), (3, 5), (100, 100)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_renorm_is_the_papers_algorithm(shape, r_max, d_max, activation):
    x = torch.randn(shape, dtype=torch.float64) * 2 + 1
    layer = layer_for(x, activation=activation, statistics=bn.Renorm(r_max, d_max, NOW))
    layer.running_mean.normal_(), layer.running_var.uniform_(0.1, 5)
    leaf = x.detach().requires_grad_()
    expected = stock_activation(
        renormalized(
            leaf, *(layer.running_mean.clone(), layer.running_var.clone(), layer.weight, layer.bias), r_max, d_max
        ),
        activation,
    )
    plain = layer_for(x)
    plain.load_state_dict(layer.state_dict(), strict=False)
    found, dy = run(layer, x)
    for a, b in zip(
        found, [expected.detach(), *torch.autograd.grad(expected, [leaf, layer.weight, layer.bias], dy)], strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    plain(x)
    torch.testing.assert_close(layer.running_var, plain.running_var)  # moved as ever
    torch.testing.assert_close(layer.running_mean, plain.running_mean)


def test_without_clipping_train_gives_what_eval_gives():
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    layer = layer_for(x, statistics=bn.Renorm(1e6, 1e6, NOW))
    expected = copy.deepcopy(layer).eval()(x)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(("steps", "r_max", "d_max"), [(0, 1, 0), (10, 1, 0), (20, 1.5, 2.5), (30, 2, 5), (90, 3, 5)])
def test_the_ramp_is_counted_in_steps(steps, r_max, d_max):
    x = torch.randn(3, 2, 4, dtype=torch.float64) * 10 + 7
    layer = layer_for(x, statistics=bn.Renorm(3, 5, ((10, 50), (10, 30))))
    layer.renorm_steps.fill_(steps)
    constant = copy.deepcopy(layer)
    constant.statistics = bn.Renorm(r_max, d_max, NOW)
    torch.testing.assert_close(layer(x), constant(x))
    assert layer.renorm_steps == steps + 1
    layer.eval()(x)
    assert layer.renorm_steps == steps + 1


def test_the_count_of_steps_is_saved_and_may_be_missing():
    layer = bn.BatchNorm1d(3, statistics=bn.Renorm())
    layer(torch.randn(4, 3))
    again = bn.BatchNorm1d(3, statistics=bn.Renorm())
    again.load_state_dict(layer.state_dict())
    assert again.renorm_steps == 1
    again.load_state_dict(
        torch.nn.BatchNorm1d(3).state_dict()
    )  # of a model trained without: the ramp starts where it is
    assert again.renorm_steps == 1
    bn.BatchNorm1d(3).load_state_dict(layer.state_dict())
    torch.nn.BatchNorm1d(3).load_state_dict(bn.BatchNorm1d(3).state_dict())
    assert "renorm_steps" not in bn.BatchNorm1d(3, statistics=bn.Ghost(2)).state_dict()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("source", [bn.Ghost(2), bn.Renorm(3, 5, NOW)], ids=repr)
def test_activation_checkpointing_changes_nothing(source, use_reentrant):
    x = torch.randn(6, 3, 5, dtype=torch.float64, requires_grad=True)
    layer = layer_for(x, statistics=source)
    plain = copy.deepcopy(layer)
    for _ in range(2):
        checkpoint(layer, x, use_reentrant=use_reentrant).square().sum().backward()
    found, x.grad = x.grad, None
    for _ in range(2):
        plain(x).square().sum().backward()
    torch.testing.assert_close(found, x.grad)
    torch.testing.assert_close(layer.state_dict(), plain.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_repeated_forwards_in_any_order_correct_towards_what_the_first_did(use_reentrant):
    x = [torch.randn(6, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    layer = layer_for(x[0], statistics=bn.Renorm(3, 5, NOW))
    plain = copy.deepcopy(layer)
    found = [checkpoint(lambda t: layer(layer(t)), t, use_reentrant=use_reentrant).square().sum() for t in x]
    expected = [plain(plain(t)).square().sum() for t in x]
    for i in (0, 2, 1):
        (a,), (b,) = (
            torch.autograd.grad(found[i], x[i], retain_graph=True)
            if not use_reentrant
            else ((found[i].backward(), x[i].grad.clone())[1:]),
            torch.autograd.grad(expected[i], x[i]),
        )
        torch.testing.assert_close(a, b)


def test_renorm_without_limits():
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    for schedule in (NOW, ((5, 10), (5, 10)), ((0, 10), (0, 10))):
        layer = layer_for(x, statistics=bn.Renorm(torch.inf, torch.inf, schedule))
        for steps in (0, 5, 7, 20):
            layer.renorm_steps.fill_(steps)
            assert layer(x).isfinite().all()


def test_renorm_leaves_nothing_behind_that_cannot_be_copied():
    layer = bn.BatchNorm1d(3, statistics=bn.Renorm())
    x = torch.randn(4, 3)
    parameters, buffers = torch.func.stack_module_state([layer, copy.deepcopy(layer)])
    each = torch.func.vmap(lambda p, b: torch.func.functional_call(layer, (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(each[0], copy.deepcopy(layer)(x))
    layer(x)
    again = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    assert again.renorm_steps == 1
    with torch.device("meta"):
        model = bn.BatchNorm1d(3, statistics=bn.Renorm())
    model.to_empty(device="cpu").renorm_steps.fill_(77)
    model.reset_parameters()
    assert model.renorm_steps == 0
    with torch.device("meta"):
        model = bn.BatchNorm1d(3, statistics=bn.Renorm())
    model.load_state_dict(torch.nn.BatchNorm1d(3).state_dict(), assign=True)
    assert model(x).isfinite().all()


def test_all_masked_batches_are_no_steps():
    layer, x = bn.BatchNorm1d(3, statistics=bn.Renorm()), torch.randn(4, 3, 5)
    layer(x, mask=torch.zeros(4, 5, dtype=torch.bool))
    assert layer.renorm_steps == layer.num_batches_tracked == 0


def test_a_source_can_be_set_on_a_layer_that_is_there():
    layer = bn.from_torch(torch.nn.Sequential(torch.nn.BatchNorm1d(3)))[0]
    layer.statistics = bn.Renorm()
    assert layer(torch.randn(4, 3)).shape == (4, 3)
    assert "renorm_steps" in layer.state_dict()
    layer.statistics = bn.Batch()
    assert "renorm_steps" not in layer.state_dict()
    with pytest.raises(TypeError, match=r"statistics takes a value, .* got <class"):
        layer.statistics = bn.Ghost


@pytest.mark.parametrize("masked", [False, True])
def test_layouts_are_kept_where_groups_join_the_channels(masked):
    for x in (torch.randn(7, 4, 5, 6).to(memory_format=torch.channels_last), torch.randn(7, 4, 5, 6)):
        residual = x.double() if not masked else None  # another dtype: no loop over groups
        mask = torch.ones(7, 5, 6, dtype=torch.bool) if masked else None
        assert bn.BatchNorm2d(4, statistics=bn.Ghost(3))(x, residual, mask).stride() == x.stride()


@pytest.mark.parametrize("source", [bn.Batch(), bn.Ghost(3), bn.Renorm()], ids=repr)
def test_what_is_kept_for_backward(source):
    x, residual = torch.randn(7, 4, 50, requires_grad=True), torch.randn(7, 4, 50)
    for activation, others in ((None, 0), ("relu", 1), ("silu", 1)):  # beside x: nothing, y, the residual
        kept = {}

        def pack(t, kept=kept):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            bn.BatchNorm1d(4, activation=activation, statistics=source)(x, residual)
        assert sum(kept.values()) < (1 + others) * x.nbytes + 2000


def test_what_renorm_must_be():
    with pytest.raises(ValueError, match=r"r_max of at least 1 and d_max of at least 0 \(got 0.5, 5.0\)"):
        bn.Renorm(0.5)
    with pytest.raises(ValueError, match=r"r_max of at least 1 and d_max of at least 0 \(got 3, nan\)"):
        bn.Renorm(3, float("nan"))
    for schedule in (5, (5, 6), "no", ((0, 1),), ((5, 1), (0, 1)), ((-1, 1), (0, 1))):
        with pytest.raises(ValueError, match="the steps between which r_max and d_max grow"):
            bn.Renorm(schedule=schedule)
    with pytest.raises(ValueError, match=r"r_max of at least 1 and d_max of at least 0 \(got None, 5.0\)"):
        bn.Renorm(None)
    with pytest.raises(ValueError, match="it needs track_running_stats=True"):
        bn.BatchNorm1d(3, track_running_stats=False, statistics=bn.Renorm())
    with pytest.raises(ValueError, match=r"Expected more than 1 value per channel .* got input \(1, 3\)"):
        bn.BatchNorm1d(3, statistics=bn.Renorm())(torch.randn(1, 3))
    assert bn.BatchNorm1d(3, statistics=bn.Renorm())(torch.randn(1, 3, 5)).shape == (1, 3, 5)  # a batch of one


# ---- all of them -----------------------------------------------------------------------------------------------------

SOURCES = [bn.Batch(), bn.Ghost(3), bn.Renorm(1.5, 1.0, NOW)]
SHUFFLED = bn.Ghost(3, shuffle=True)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("source", [*SOURCES, SHUFFLED], ids=repr)
def test_second_derivatives_are_right(source, masked):
    x = torch.randn(7, 2, 3, dtype=torch.float64, requires_grad=True)
    residual = torch.randn_like(x, requires_grad=True)
    mask = torch.rand(7, 3) > 0.3 if masked else None
    layer = layer_for(x, activation="tanh", statistics=source)
    layer.momentum = 0.0

    def function(x, residual, weight, bias):
        torch.manual_seed(0)
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x, residual, mask))

    inputs = (x, residual, layer.weight, layer.bias)
    if isinstance(source, bn.Renorm):  # whose gradient is not that of the function, by definition
        dy, known = torch.randn_like(x), (layer.running_mean.clone(), layer.running_var.clone())
        places = slice(None) if mask is None else mask
        found, expected = [], []
        for into in (found, expected):
            if into is found:
                y = function(*inputs)
            else:
                y = torch.zeros_like(x).movedim(1, -1)
                z = renormalized(rows(x, places).reshape(-1, 2), *known, layer.weight, layer.bias, 1.5, 1.0)
                y[places] = (z.view(*rows(x, places).shape) + rows(residual, places)).tanh()
                y = y.movedim(-1, 1)
            into += torch.autograd.grad(y, inputs, dy, create_graph=True)
            into += torch.autograd.grad(sum(t.square().sum() for t in into), inputs)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
    else:
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("source", SOURCES, ids=repr)
def test_compile_and_functorch_agree_with_eager(source, masked):  # pains 14 and 15
    x, mask = torch.randn(7, 3, 5), (torch.rand(7, 5) > 0.3 if masked else None)
    eager = layer_for(x, activation="relu", statistics=source)
    compiled = copy.deepcopy(eager)
    expected, dy = run(eager, x, None, mask)
    found, _ = run(torch.compile(compiled, backend="aot_eager", fullgraph=True), x, None, mask, dy)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled.state_dict(), eager.state_dict())
    if not isinstance(source, bn.Renorm):
        functional = layer_for(x, activation="relu", statistics=source, track_running_stats=False)
        functional.load_state_dict(eager.state_dict(), strict=False)
        dx = torch.func.grad(lambda x: (functional(x, None, mask) * dy).sum())(x)
        torch.testing.assert_close(dx, expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("source", SOURCES[1:], ids=repr)
def test_torchs_converter_refuses_to_drop_them(source):
    with pytest.raises(TypeError, match=r"use batchnorm\.convert_sync_batchnorm"):
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(torch.nn.Sequential(bn.BatchNorm1d(3, statistics=source)))


@pytest.mark.parametrize("source", SOURCES, ids=repr)
def test_a_batch_that_is_not_finite_leaves_running_statistics_alone(source):
    x = torch.randn(7, 3, 5)
    layer = layer_for(x, statistics=source)
    layer(x, mask=torch.ones(7, 5, dtype=torch.bool))
    before = copy.deepcopy(layer.state_dict())
    x[2, 1, 0] = torch.inf
    layer(x, mask=torch.ones(7, 5, dtype=torch.bool))
    with pytest.warns(UserWarning, match="1 batches were not finite in 1 channels"):
        after = layer.state_dict()
    assert after["running_var"].isfinite().all()
    assert after["running_mean"][1] == before["running_mean"][1]
    assert after["running_mean"][0] != before["running_mean"][0]


@pytest.mark.parametrize("source", SOURCES, ids=repr)
def test_mixed_residual_promotes_as_torch_does(source):
    x, residual = torch.randn(7, 3, 5).bfloat16(), torch.randn(7, 3, 5)
    layer = layer_for(x, statistics=source)
    y = layer(x, residual, torch.ones(7, 5, dtype=torch.bool))
    assert y.dtype == torch.float32
    wide = copy.deepcopy(layer)
    wide.reset_running_stats()
    if isinstance(source, bn.Renorm):
        wide.renorm_steps.zero_()
    torch.testing.assert_close(y, wide(x.float(), residual), rtol=1e-5, atol=1e-5)
