"""A forward that repeats another one moves no running statistics; a first one does, wherever it runs."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import batchnorm as bn
from batchnorm import ops


def block(**options):
    return nn.Sequential(nn.Linear(3, 3), bn.BatchNorm1d(3, **options))


def batch():
    return torch.randn(8, 3, requires_grad=True)


def assert_moved_once(layers, x):
    """By the batch that its first forward saw."""
    expected = 0.1 * layers[0](x).detach().double().mean(0)
    assert layers[1].num_batches_tracked == 1
    torch.testing.assert_close(layers[1].running_mean.double(), expected)


class Again(torch.autograd.Function):
    """Checkpointing as other libraries write it."""

    @staticmethod
    def forward(ctx, x, layers):
        ctx.save_for_backward(x)
        ctx.layers = layers
        return layers(x).detach()

    @staticmethod
    def backward(ctx, dy):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            ctx.layers(x).backward(dy)
        return x.grad, None


WAYS = {
    "reentrant": lambda layers, x: checkpoint(layers, x, use_reentrant=True),
    "not reentrant": lambda layers, x: checkpoint(layers, x, use_reentrant=False),
    "somebody's function": lambda layers, x: Again.apply(x, layers),
    "nested": lambda layers, x: checkpoint(lambda z: checkpoint(layers, z, use_reentrant=True), x, use_reentrant=False),
    "nested the other way": lambda layers, x: checkpoint(
        lambda z: checkpoint(layers, z, use_reentrant=False), x, use_reentrant=True
    ),
}


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"statistics": bn.Ghost(4)}], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_a_repetition_moves_nothing(way, options, compile):
    layers, x = block(**options), batch()
    run = torch.compile(layers, backend="aot_eager") if compile else layers
    WAYS[way](run, x).sum().backward()
    assert_moved_once(layers, x)


@pytest.mark.parametrize("way", ["reentrant", "not reentrant"])
def test_without_kernels_too(way, monkeypatch):
    monkeypatch.setitem(ops._SERVED, "cpu", ())
    layers, x = block(), batch()
    WAYS[way](layers, x).sum().backward()
    assert_moved_once(layers, x)


def test_tensors_that_wait_elsewhere_are_no_repetition():
    layers, x = block(), batch()

    def offloaded(z):
        with save_on_cpu():
            return layers(z)

    checkpoint(offloaded, x, use_reentrant=False).sum().backward()
    assert_moved_once(layers, x)


@pytest.mark.parametrize("compile", [False, True])
def test_a_first_forward_in_a_hook_counts(compile):
    layers, seen, x = block(), batch(), batch()
    run = torch.compile(layers, backend="aot_eager") if compile else layers
    x.register_hook(lambda gradient: (run(seen), gradient)[1])
    x.sum().backward()
    assert_moved_once(layers, seen)


class LookInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layers, seen):
        ctx.layers, ctx.seen = layers, seen
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        with torch.enable_grad():
            ctx.layers(ctx.seen)
        return dy, None, None


def test_a_first_forward_in_somebodys_backward_counts():
    layers, seen, x = block(), batch(), batch()
    LookInBackward.apply(x, layers, seen).sum().backward()
    assert_moved_once(layers, seen)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_first_forward_in_a_hook_within_a_repetition_counts(use_reentrant):
    """The hook runs while a block is computed again around it; its layer is another one, seen for the first time."""
    layers, other, seen, x = block(), block(), batch(), batch()
    x.register_hook(lambda gradient: (other(seen), gradient)[1])
    checkpoint(lambda z: layers(z), x * 1, use_reentrant=use_reentrant).sum().backward()
    assert_moved_once(other, seen)
    assert layers[1].num_batches_tracked == 1


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_that_begins_in_backward_moves_once(use_reentrant):
    layers, seen, x = block(), batch(), batch()

    def hook(gradient):
        with torch.enable_grad():
            checkpoint(layers, seen, use_reentrant=use_reentrant).sum().backward()
        return gradient

    x.register_hook(hook)
    x.sum().backward()
    assert_moved_once(layers, seen)


def test_a_function_that_ran_another_layer_does_not_vouch_for_this_one():
    class Two(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, first, second):
            ctx.second = second
            return first(x).detach()

        @staticmethod
        def backward(ctx, dy):
            ctx.second(dy)
            return dy, None, None

    first, second, x = block(), block(), batch()
    Two.apply(x, first, second).sum().backward()
    assert (first[1].num_batches_tracked, second[1].num_batches_tracked) == (1, 1)


# ---- Functions as others write them ----------------------------------------------------------------------------------


def first(ctx, x, layers):
    ctx.save_for_backward(x)
    ctx.layers = layers
    return layers(x).detach()


def again(ctx, dy):
    return Again.backward(ctx, dy)


class WithSetup(Again):
    @staticmethod
    def forward(x, layers):
        return layers(x).detach()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.layers = inputs[1]


class OtherNames(torch.autograd.Function):
    forward, backward = staticmethod(first), staticmethod(again)


class Stars(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        return first(*args)

    @staticmethod
    def vjp(*args):
        return again(*args)


class ForAmp(Again):
    forward = staticmethod(torch.amp.custom_fwd(first, device_type="cpu"))
    backward = staticmethod(torch.amp.custom_bwd(again, device_type="cpu"))


FUNCTIONS = [Again, WithSetup, OtherNames, Stars, ForAmp]


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_however_they_are_written(function, compile):
    layers, x = block(), batch()
    run = torch.compile(layers, backend="aot_eager") if compile else layers
    function.apply(x, run).sum().backward()
    assert_moved_once(layers, x)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_within_a_checkpoint(function, use_reentrant):
    layers, x = block(), batch()
    checkpoint(lambda z: function.apply(z * 1, layers), x, use_reentrant=use_reentrant).sum().backward()
    assert_moved_once(layers, x)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_that_begin_in_backward(function):
    layers, seen, x = block(), batch(), batch()

    def hook(gradient):
        with torch.enable_grad():
            function.apply(seen, layers).sum().backward()
        return gradient

    x.register_hook(hook)
    x.sum().backward()
    assert_moved_once(layers, seen)


# ---- selective checkpointing -----------------------------------------------------------------------------------------

KEPT = {
    "all": lambda ctx, op, *args, **kwargs: CheckpointPolicy.MUST_SAVE,
    "none": lambda ctx, op, *args, **kwargs: CheckpointPolicy.PREFER_RECOMPUTE,
    "products and ours": [torch.ops.aten.addmm.default, torch.ops.batchnorm.train.default],
}


@pytest.mark.parametrize("options", [{}, {"activation": "silu"}, {"momentum": None}], ids=str)
@pytest.mark.parametrize(
    ("policy", "served"), [("all", True), *((p, s) for p in list(KEPT)[1:] for s in (True, False))]
)
def test_selective_checkpointing(policy, options, served, monkeypatch):
    if not served:
        monkeypatch.setitem(ops._SERVED, "cpu", ())
    layers = nn.Sequential(block(**options), block(**options))
    twin, x = copy.deepcopy(layers), batch()
    contexts = functools.partial(create_selective_checkpoint_contexts, KEPT[policy])
    checkpoint(layers, x, use_reentrant=False, context_fn=contexts).square().sum().backward()
    given = x.detach().requires_grad_()
    twin(given).square().sum().backward()
    torch.testing.assert_close(x.grad, given.grad)
    torch.testing.assert_close(dict(layers.state_dict()), dict(twin.state_dict()))


def test_renorm_is_repeated_on_tensors_without_values():
    with FakeTensorMode():
        layers, x = block(statistics=bn.Renorm()), batch()
        checkpoint(layers, x, use_reentrant=False).sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("way", ["reentrant", "not reentrant", "somebody's function"])
def test_compiled_renorm_counts_a_step_once(way, backend):
    torch._dynamo.reset()
    layers = block(statistics=bn.Renorm())
    run = torch.compile(layers, backend=backend)
    for _ in range(2):
        WAYS[way](run, batch()).sum().backward()
    assert layers[1].renorm_steps == layers[1].num_batches_tracked == 2
