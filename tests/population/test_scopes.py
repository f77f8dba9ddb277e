"""preserve_state leaves no trace; accumulate_statistics updates once, as from one large batch."""

import contextlib
import copy
import copyreg
import functools
import io
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn

KINDS = [nn.BatchNorm1d, bn.BatchNorm1d]


def network(kind=bn.BatchNorm1d):
    return nn.Sequential(nn.Linear(4, 6), kind(6, momentum=0.3), nn.ReLU(), kind(6)).double()


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_preserve_state_brings_buffers_and_modes_back(kind, fails):
    model = network(kind)
    model[1].eval()
    before, modes, buffers = state(model), [m.training for m in model.modules()], list(model.buffers())
    try:
        with bn.preserve_state(model) as inside:
            assert inside is model
            model.train()(torch.randn(8, 4).double())
            model.eval()
            model[0].register_buffer("new", torch.zeros(1))
            model[3].running_mean = torch.ones(6).double()
            assert not same(state(model), before)
            if fails:
                raise OSError
    except OSError:
        assert fails
    assert same(state(model), before)
    assert [m.training for m in model.modules()] == modes
    assert all(a is b for a, b in zip(model.buffers(), buffers, strict=True))


def test_statistics_of_several_domains_are_kept_apart():  # as docs/statistics.md shows it
    model, domains = network(), {"a": torch.randn(50, 4).double(), "b": torch.randn(50, 4).double() * 3 + 2}
    kept = {}
    for name, x in domains.items():
        bn.recalibrate(model, [x])
        kept[name] = {key: value.clone() for key, value in model.state_dict().items() if "running" in key}
    with bn.preserve_state(model):
        model.load_state_dict(kept["a"], strict=False)
        torch.testing.assert_close(model[1].running_mean, model[0](domains["a"]).mean(0))
    torch.testing.assert_close(model[1].running_mean, model[0](domains["b"]).mean(0))


@pytest.mark.parametrize("momentum", [0.3, 1.0, None])
@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_update_as_one_large_batch(kind, momentum):
    layer, large = kind(4, momentum=momentum).double(), kind(4, momentum=momentum).double()
    for step in range(3):
        x = torch.randn(24, 4).double() * (step + 1) + step
        with bn.accumulate_statistics(layer):
            outputs = [layer(part) for part in x.split([4, 8, 12])]
        large(x)
        torch.testing.assert_close(dict(layer.named_buffers()), dict(large.named_buffers()), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(outputs[0].mean(0), torch.zeros(4).double(), rtol=0, atol=1e-12)  # each by its own
    assert layer.momentum == momentum
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


def test_an_exception_discards_what_was_seen():
    model = network()
    before = state(model)

    def train():
        with bn.accumulate_statistics(model):
            model(torch.randn(8, 4).double())
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        train()
    assert same(state(model), before)
    assert model[1].momentum == 0.3


def test_nothing_seen_in_eval_or_frozen_and_nothing_that_is_not_finite():
    for prepare in (lambda m: m.eval(), lambda m: bn.freeze(m), lambda m: None):
        model = network()
        prepare(model)
        before = state(model)
        with bn.accumulate_statistics(model):
            if model.training and not model[1].frozen_statistics:
                model(torch.full((8, 4), torch.inf).double())
            else:
                model(torch.randn(8, 4).double())
        after = state(model)
        assert all(torch.equal(after[key], before[key]) for key in before if "running" in key)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_counts_once(reentrant):
    layer, twin, x = bn.BatchNorm1d(4), bn.BatchNorm1d(4), torch.randn(8, 4, requires_grad=True)
    with bn.accumulate_statistics(layer):
        for part in x.split(4):
            checkpoint(layer, part, use_reentrant=reentrant).square().sum().backward()
    with bn.accumulate_statistics(twin):
        for part in x.split(4):
            twin(part)
    torch.testing.assert_close(dict(layer.named_buffers()), dict(twin.named_buffers()))


# ---- what is not finite ----------------------------------------------------------------------------------------------


def broken(x, channel=1, value=torch.inf):
    x = x.clone()
    x[-1, channel] = value
    return x


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 1e30])  # squares of the last: beyond float32
@pytest.mark.parametrize("momentum", [0.3, 1.0, None])
@pytest.mark.parametrize("kind", KINDS)
def test_a_channel_that_would_not_be_finite_keeps_mean_and_variance(kind, momentum, value):
    layer, clean, x = kind(3, momentum=momentum), kind(3, momentum=momentum), torch.randn(3, 12, 3)
    for step, batch in enumerate(x):
        with bn.accumulate_statistics(layer):
            for part in (broken(batch, value=value) if step == 1 else batch).split(4):
                layer(part)
        if step != 1:
            clean(batch)
    kept, others = [1], [0, 2]
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(layer, name)[kept], getattr(clean, name)[kept])
    large = clean  # in the plain average, which has one count for all channels, the batch enters in none
    if momentum is not None:
        large = kind(3, momentum=momentum)
        for batch in x:
            large(batch)
    torch.testing.assert_close(layer.running_var[others], large.running_var[others])
    assert layer.running_mean.isfinite().all()
    assert layer.running_var.isfinite().all()
    assert layer.num_batches_tracked == large.num_batches_tracked
    if kind is bn.BatchNorm1d:
        assert layer.skipped_batches.tolist() == [0, 1, 0]


def test_mean_and_variance_wait_together():
    layer = bn.BatchNorm1d(2, momentum=0.5).half()
    x = torch.tensor(
        [[-400.0, 1.0], [400.0, 3.0]]
    ).half()  # a mean of 0 fits into float16, a variance of 320,000 does not
    layer.running_mean.fill_(4)
    with bn.accumulate_statistics(layer):
        layer(x)
    assert layer.running_mean.tolist() == [4, 3]
    assert layer.running_var.tolist() == [1, 1.5]
    assert layer.skipped_batches.tolist() == [1, 0]


def test_what_was_skipped_is_said_once():
    layer, x = bn.BatchNorm1d(3), torch.randn(8, 3)
    for batch, skipped, said in ((broken(x), 1, True), (x, 1, False), (broken(x), 2, True), (broken(x, 0), 2, False)):
        with bn.accumulate_statistics(layer.train()):
            layer(x)
            layer(batch)
        assert layer.skipped_batches.max() == skipped
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            layer.eval().train().eval()
        assert len(warned) == said


def test_an_exception_leaves_the_count_too():
    layer, counts = bn.BatchNorm1d(3), [2, 0, 0]
    layer.skipped_batches.copy_(torch.tensor(counts))

    def train():
        with bn.accumulate_statistics(layer):
            layer(broken(torch.randn(8, 3)))
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        train()
    assert layer.skipped_batches.tolist() == counts


# ---- scopes within one another ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_look_while_statistics_accumulate_is_not_counted(kind):
    layer, x = kind(3).double(), torch.randn(12, 3).double()
    with bn.accumulate_statistics(layer):
        layer(x[:4])
        with bn.preserve_state(layer):
            layer(x * 9 + 5)
            torch.testing.assert_close(layer.running_mean, 0.1 * (x * 9 + 5).mean(0))  # by its own momentum
            y = layer.eval()(x)
            torch.testing.assert_close(y, (x - layer.running_mean) / (layer.running_var + layer.eps).sqrt())
        layer(x[4:])
    torch.testing.assert_close(layer.running_mean, 0.1 * x.mean(0))
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_and_recalibrate_while_statistics_accumulate(kind):
    layer, x, other = kind(3).double(), torch.randn(12, 3).double(), torch.randn(9, 3).double() + 4
    layer(x)
    layer.running_mean.fill_(2)
    with bn.accumulate_statistics(layer):
        layer(x[:4])
        torch.testing.assert_close(layer.eval()(x), (x - 2) / (layer.running_var + layer.eps).sqrt())
        bn.recalibrate(layer, [other])
        torch.testing.assert_close(layer.running_mean, other.mean(0))
        layer.train()(x[4:])
    torch.testing.assert_close(layer.running_mean, 0.9 * other.mean(0) + 0.1 * x.mean(0))
    assert layer.num_batches_tracked == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_within_a_block_adds_to_the_outer_one(kind):
    layer, x = kind(3).double(), torch.randn(12, 3).double()
    with bn.accumulate_statistics(layer):
        layer(x[:4])
        with bn.accumulate_statistics(layer):
            layer(x[4:])
        assert layer.running_mean.eq(0).all()
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * x.var(0))
    assert (layer.momentum, layer.num_batches_tracked) == (0.1, 1)
    with bn.preserve_state(layer), bn.preserve_state(layer):
        layer(x)
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_trial_of_accumulation_is_as_the_real_thing_and_leaves_no_trace(kind, around):
    model, x = network(kind), torch.randn(12, 4).double()
    before, hidden, used = state(model), model[0](x).detach(), torch.randn(8, 4).double() + 1
    with bn.accumulate_statistics(model) if around else contextlib.nullcontext():
        with bn.preserve_state(model):
            with bn.accumulate_statistics(model):
                for part in x.split(4):
                    model(part)
                assert same(state(model), before)
                with bn.preserve_state(model):  # and a look inside the trial
                    model(x * 9)
            torch.testing.assert_close(model[1].running_mean, 0.3 * hidden.mean(0))
            torch.testing.assert_close(model[1].running_var, 0.7 + 0.3 * hidden.var(0))
            assert model[1].num_batches_tracked == 1
        assert same(state(model), before)
        if around:
            model(used)
    if around:
        torch.testing.assert_close(model[1].running_mean, 0.3 * model[0](used).mean(0))
    assert not any(hooks for m in model.modules() for name, hooks in vars(m).items() if "_hooks" in name)


def test_blocks_that_end_out_of_order_write_nothing():
    model = network()
    before = state(model)
    preserved, accumulated = bn.preserve_state(model), bn.accumulate_statistics(model)
    preserved.__enter__()
    accumulated.__enter__()
    model(torch.randn(8, 4).double())
    preserved.__exit__(None, None, None)
    accumulated.__exit__(None, None, None)
    assert same(state(model), before)


@pytest.mark.parametrize("upstream", ["batch", "population"])
@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_inside_recalibrate_is_left_to_recalibrate(kind, upstream):
    """A forward= that is a step of training, say."""
    model, x = network(kind), torch.randn(12, 4).double()
    expected = copy.deepcopy(model)
    bn.recalibrate(expected, x.split(4), upstream=upstream)

    def forward(model, batch):
        with bn.preserve_state(model), bn.accumulate_statistics(model):
            model(batch * 9)
        with bn.accumulate_statistics(model):
            for part in batch.split(4):
                model(part)

    bn.recalibrate(model, x.split([4, 8]), forward=forward, upstream=upstream)
    for key, value in model.state_dict().items():
        if "running" in key:
            torch.testing.assert_close(value, expected.state_dict()[key])


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_that_fails_and_is_caught_counts_nothing(kind):
    """Out of memory, say: the batch is left out, and training goes on."""
    layer, x = kind(3).double(), torch.randn(12, 3).double()
    with bn.accumulate_statistics(layer):
        with pytest.raises(ValueError, match="more than 1 value"):
            layer(x[:1])
        assert layer.running_var.eq(1).all()
        layer(x)
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * x.var(0))


@pytest.mark.parametrize("momentum", [0.3, None])
def test_compiled_before_the_block(momentum):
    for kind in KINDS if momentum else [bn.BatchNorm1d]:  # torch's has no full graph of an average
        torch._dynamo.reset()
        model, x = network(kind), torch.randn(12, 4).double()
        model[1].momentum = momentum
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        compiled(x)
        model[1].reset_running_stats()
        with bn.accumulate_statistics(model):
            for part in x.split(6):
                compiled(part).sum().backward()
        torch.testing.assert_close(model[1].running_mean, (momentum or 1) * model[0](x).mean(0))
        assert model[1].num_batches_tracked == 1


@pytest.mark.parametrize(
    "change",
    [
        bn.freeze,
        lambda layer: bn.freeze(layer, affine=True),
        bn.unfreeze,
        lambda layer: setattr(layer, "statistics", bn.Renorm()),
        lambda layer: setattr(layer, "statistics", bn.Ghost(4)),
        lambda layer: setattr(layer, "momentum", None),
        lambda layer: setattr(layer, "track_running_stats", False),
        lambda layer: layer.bias.requires_grad_(True),
        lambda layer: layer(torch.full((8, 3), torch.nan)),
    ],
    ids=["freeze", "affine", "unfreeze", "Renorm", "Ghost", "momentum", "track", "requires_grad", "nan"],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_settings_come_back(change, frozen):
    layer, twin, x = bn.BatchNorm1d(3), bn.BatchNorm1d(3), torch.randn(8, 3)
    for one in (layer, twin):
        one.bias.requires_grad_(False)
        if frozen:
            bn.freeze(one, affine=True)
    with bn.preserve_state(layer):
        change(layer)
        layer(x)
    assert repr(layer) == repr(twin)
    for one in (layer, twin):
        one.train()(x)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict(), rtol=0, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing was skipped
        layer.eval()
    for one in (layer, twin):
        bn.unfreeze(one)
    assert [p.requires_grad for p in layer.parameters()] == [p.requires_grad for p in twin.parameters()]


# ---- what is done to the model inside --------------------------------------------------------------------------------


def moved(model):
    model.float()


def loaded(model):
    model.load_state_dict(state(model), assign=True)


def faster(model):
    model[1].momentum = 0.5


@pytest.mark.parametrize("change", [moved, loaded, faster])
@pytest.mark.parametrize("kind", KINDS)
def test_statistics_go_on_accumulating_whatever_is_done_inside(kind, change):
    model, x = network(kind), torch.randn(12, 4).double()
    expected = nn.BatchNorm1d(6, momentum=0.5 if change is faster else 0.3).double()
    expected(model[0](x))
    with bn.accumulate_statistics(model):
        model(x[:6])
        change(model)
        with bn.preserve_state(model):
            change(model)
            model(x[6:].to(model[0].weight.dtype) + 5)
        model(x[6:].to(model[0].weight.dtype))
    torch.testing.assert_close(model[1].running_mean.double(), expected.running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[1].running_var.double(), expected.running_var, rtol=1e-5, atol=1e-6)
    assert (model[1].momentum, model[1].num_batches_tracked) == (expected.momentum, 1)


def without_tracking(layer):
    layer.track_running_stats = False


def without_mean_and_variance(layer):
    layer.running_mean = layer.running_var = None


STOPS = [without_tracking, without_mean_and_variance]


@pytest.mark.parametrize(
    ("kind", "stop"), [*((kind, stop) for kind in KINDS for stop in STOPS), (bn.BatchNorm1d, bn.freeze)]
)
def test_layers_stopped_inside_do_not_move_at_the_end(kind, stop):
    layer = kind(3)
    with bn.accumulate_statistics(layer):
        layer(torch.randn(8, 3) + 5)
        stop(layer)
    assert layer.running_mean is None or layer.running_mean.eq(0).all()


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("momentum", [0.25, None])
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_made_inside_is_a_model_of_its_own(kind, copied, momentum):
    """A teacher, say, or a checkpoint of the whole model."""
    layer, x = kind(3, momentum=momentum), torch.randn(12, 3)
    expected = nn.BatchNorm1d(3, momentum=momentum)
    with bn.accumulate_statistics(layer), bn.accumulate_statistics(layer):
        layer(x[:6])
        assert layer.momentum == momentum
        assert repr(layer) == repr(kind(3, momentum=momentum))
        teacher = copied(layer)
        layer(x[6:])
        for one in (teacher, expected):
            one(x + 2)
    assert (teacher.momentum, layer.momentum) == (momentum, momentum)
    torch.testing.assert_close(teacher.running_mean, expected.running_mean)
    torch.testing.assert_close(layer.running_mean, (momentum or 1) * x.mean(0))


def accumulating(model, x, look):
    with bn.accumulate_statistics(model):
        model(x)
        with bn.accumulate_statistics(model):
            look()
        model(x)


def within_a_forward_pass(model, x, look):
    with bn.accumulate_statistics(model), bn.accumulate_statistics(model):
        model[1].forward = looking(model[1].forward, look)
        model(x)
        del model[1].forward


def looking(forward, look):
    def looks_and_runs(x):
        forward_of_his = vars(layer := forward.__self__).pop("forward")
        look()
        layer.forward = forward_of_his
        return forward(x)

    return looks_and_runs


def preserving(model, x, look):
    with bn.preserve_state(model):
        look()


def recalibrating(model, x, look, **options):
    def forward(model, batch):
        model(batch)
        look()

    bn.recalibrate(model, [x, x + 1], forward=forward, **options)


def recalibrating_by_depth(model, x, look):
    recalibrating(model, x, look, upstream="population")


def held_by(layer):
    """All that is set on it, but for its mode."""
    return {k: v for k, v in vars(layer).items() if k not in ("_parameters", "_buffers", "training", "skipped_batches")}


class Marked(bn.BatchNorm1d):
    """Taken apart in a way of its own."""

    def __getstate__(self):
        return self.__dict__ | {"mark": 1}


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])
@pytest.mark.parametrize(
    "inside", [accumulating, within_a_forward_pass, preserving, recalibrating, recalibrating_by_depth]
)
@pytest.mark.parametrize("kind", [*KINDS, Marked, functools.partial(bn.BatchNorm1d, statistics=bn.Renorm())])
def test_a_copy_has_nothing_of_what_is_on_the_layers_inside(kind, inside, copied):
    model, x, found = network(kind), torch.randn(12, 4).double(), []

    def look():
        found.append([(state(one), held_by(one)) for one in (copied(model[1]), copied(model[3]))])

    model(x)
    users, taken_apart = model[1].register_forward_hook(of_the_users), dict(copyreg.dispatch_table)
    look()
    inside(model, x, look)
    assert copyreg.dispatch_table == taken_apart
    (expected, *others) = found
    for layers in others:
        for (buffers, held), (own_buffers, own) in zip(layers, expected, strict=True):
            torch.testing.assert_close(buffers, own_buffers, rtol=0, atol=0)
            assert held == own
    assert others
    users.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model)


def of_the_users(*_):
    """A hook."""


class Copying(bn.BatchNorm1d):
    """In a way of its own, hooks and all."""

    def __deepcopy__(self, memo):
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made


@pytest.mark.parametrize("inside", [accumulating, recalibrating])
def test_hooks_that_a_class_copies_itself_do_nothing(inside):
    model, x, copies = network(Copying), torch.randn(12, 4).double(), []
    inside(model, x, lambda: copies.append(copy.deepcopy(model)))
    for made in copies:
        expected = network()
        expected.load_state_dict(made.state_dict())
        expected[1].momentum = made[1].momentum
        torch.testing.assert_close(made.train()(x), expected(x))
        torch.testing.assert_close(made[1].state_dict(), expected[1].state_dict())


@pytest.mark.parametrize("take", [bn.fold, torch.fx.symbolic_trace, torch.jit.script])
@pytest.mark.parametrize("inside", [accumulating, recalibrating])
def test_tools_take_a_copy_made_inside(inside, take):
    model, x, copies = network(), torch.randn(12, 4).double(), []
    inside(model, x, lambda: copies.append(copy.deepcopy(model).eval()))
    taken = take(copies[0], x) if take is bn.fold else take(copies[0])
    torch.testing.assert_close(taken(x), copies[0](x))
    if take is bn.fold:
        assert not any(isinstance(m, bn.BatchNorm1d) for m in list(taken)[:2])


@pytest.mark.parametrize("kind", KINDS)
def test_buffers_follow_a_model_that_moves_inside(kind):
    model = network(kind)
    model(torch.randn(8, 4).double())
    before, mine = state(model), model[1].running_mean
    with bn.preserve_state(model):
        model.bfloat16()(torch.randn(8, 4).bfloat16())
    for key, t in model.named_buffers():
        assert torch.equal(t, before[key].to(t.dtype))
    assert model.eval()(torch.randn(8, 4).bfloat16()).dtype == torch.bfloat16
    assert torch.equal(mine, before["1.running_mean"])
    with bn.preserve_state(model):  # of a buffer alone nothing is left
        model[1].running_mean = model[1].running_mean.double()
    assert model[1].running_mean.dtype == torch.bfloat16


RENORM = bn.Renorm(schedule=((0, 0), (0, 0)))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_with_renorm_corrects_towards_its_own_statistics(copied):
    layer, x = bn.BatchNorm1d(3, statistics=RENORM), torch.randn(12, 3) * 3 + 5
    with bn.accumulate_statistics(layer):
        teacher = copied(layer)
    for _ in range(3):
        torch.testing.assert_close(teacher(x), layer(x))


@pytest.mark.parametrize("change", ["recalibrate", "load"])
def test_renorm_corrects_towards_what_was_put_there_inside(change):
    x, other = torch.randn(12, 3), bn.BatchNorm1d(3, statistics=RENORM)
    layer = copy.deepcopy(other)
    bn.recalibrate(other, [x * 2 + 3])
    with bn.accumulate_statistics(layer):
        if change == "load":
            layer.load_state_dict(other.state_dict())
        else:
            bn.recalibrate(layer, [x * 2 + 3])
        torch.testing.assert_close(layer(x), other(x))


@pytest.mark.parametrize(("before", "after"), [(bn.Batch(), RENORM), (RENORM, bn.Batch())])
def test_another_source_of_statistics_inside(before, after):
    layer, x = bn.BatchNorm1d(3, statistics=before), torch.randn(12, 3)
    with bn.accumulate_statistics(layer):
        layer(x[:4])
        layer.statistics = after
        layer(x[4:8])
        layer(x[8:])
    torch.testing.assert_close(layer.running_mean, 0.1 * x.mean(0))
    assert layer._buffers.get("renorm_steps") == (1 if after is RENORM else None)


# ---- layers that do not update ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("use", ["accumulate_statistics", "recalibrate"])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_do_not_update_are_left_alone(kind, use, stop):
    """As virtual adversarial training and adaptation at test time switch them off."""
    model, x = network(kind), torch.randn(24, 4).double()
    model(x)
    stop(model[1])
    before = {key: t for key, t in state(model[1]).items() if "running" in key}
    expected = nn.BatchNorm1d(6).double()
    model[1].train(use != "recalibrate")  # which runs it as in evaluation
    hidden = model[:3](x)
    model.train()
    expected.load_state_dict(model[3].state_dict())
    if use == "recalibrate":
        assert [row.layer for row in bn.recalibrate(model, [x])] == ["3"]
        torch.testing.assert_close(model[3].running_mean, hidden.mean(0))
    else:
        with bn.accumulate_statistics(model):
            for part in x.split(24):
                model(part)
        expected(hidden)
        torch.testing.assert_close(model[3].running_mean, expected.running_mean)
    assert same({key: t for key, t in state(model[1]).items() if "running" in key}, before)
