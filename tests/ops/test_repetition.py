"""A forward that repeats another one moves no running statistics; a first one does, wherever it runs."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

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
