"""Scopes and recalibrate between a forward pass and its backward: gradients are those of the tensors of the forward."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from processes import on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import batchnorm as bn

KINDS = [nn.BatchNorm1d, bn.BatchNorm1d]


class Scaled(nn.Module):
    """Its backward needs a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((6,), 2.0).double())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x * self.scale
        return y


def network(kind: type[nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), Scaled(), kind(6), nn.ReLU(), nn.Linear(6, 6), kind(6)).double()
    model(torch.randn(32, 4).double())
    return model


X = torch.randn(12, 4, generator=torch.Generator().manual_seed(1)).double()


def preserve(model: nn.Module) -> None:
    with bn.preserve_state(model):
        model.train()(X * 3 + 1)
        model[1].scale.mul_(2)


def accumulate(model: nn.Module) -> None:
    with bn.accumulate_statistics(model.train()):
        for part in (X * 3 + 1).split(4):
            model(part)


def recalibrate(model: nn.Module) -> None:
    bn.recalibrate(model, (X * 3 + 1).split(4), upstream="population")


@pytest.mark.parametrize("between", [preserve, accumulate, recalibrate])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_two_forwards_the_scope_then_one_backward(
    kind: type[nn.Module], training: bool, between: Callable[[nn.Module], None]
) -> None:
    model = network(kind).train(training)
    gradients = []
    for scope in (lambda _: None, between):
        twin = copy.deepcopy(model)
        buffers = list(twin.buffers()) if twin[1].eval() else []
        loss = twin(X).square().sum() + twin(X + 1).square().sum()
        scope(twin)
        loss.backward()
        gradients.append([p.grad for p in twin.parameters()])
        assert all(a is b for a, b in zip(twin.buffers(), buffers, strict=True))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_inside_and_its_backward_outside(kind: type[nn.Module]) -> None:
    model = network(kind)
    twin = copy.deepcopy(model)
    labeled = model(X)
    statistics = copy.deepcopy(model.state_dict())
    with bn.preserve_state(model):
        unlabeled = model(X + 1)
        model.eval()
        guess = model(X - 1)
    (labeled.square().sum() + unlabeled.square().sum() + guess.square().sum()).backward()
    torch.testing.assert_close(model.state_dict(), statistics, rtol=0, atol=0)
    assert model.training
    expected = twin(X).square().sum() + twin(X + 1).square().sum()
    (expected + twin.eval()(X - 1).square().sum()).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_what_others_hold_is_changed_in_place_where_no_backward_needs_it(kind: type[nn.Module]) -> None:
    """A CUDA graph reads memory, not objects."""
    layer, x = kind(4).double(), X
    memory = layer.running_mean.data_ptr()
    bn.recalibrate(layer, [x])
    with bn.accumulate_statistics(layer), torch.no_grad():
        layer(x)
    with bn.preserve_state(layer):
        layer(x * 9)
    assert layer.running_mean.data_ptr() == memory
    torch.testing.assert_close(layer.running_mean, x.mean(0))


@pytest.mark.parametrize("kind", KINDS)
def test_in_inference_mode_the_model_stays_one_that_can_be_trained(kind: type[nn.Module]) -> None:
    layer = kind(4).double()
    pending = layer(X)
    with torch.inference_mode():
        recalibrate(layer)
        with bn.preserve_state(layer):
            layer(X)
    pending.sum().backward()
    layer(X).sum().backward()
    assert not any(t.is_inference() for t in layer.buffers())
    torch.testing.assert_close(layer.running_mean, 0.9 * (X * 3 + 1).mean(0) + 0.1 * X.mean(0))


def test_buffers_that_modules_share_stay_shared() -> None:
    net = nn.Sequential(nn.BatchNorm1d(4).double())
    ours = bn.from_torch(net)  # has the buffers of net
    both = nn.ModuleList([net, ours])
    with bn.preserve_state(both):
        net(X)
        torch.testing.assert_close(ours[0].running_mean, 0.1 * X.mean(0))
    with bn.preserve_state(ours):  # the other model changes them meanwhile
        net(X)
        ours(X)
    assert ours[0].running_mean is net[0].running_mean
    assert net[0].running_mean.eq(0).all()
    with bn.accumulate_statistics(ours):
        for part in X.split(4):
            ours(part)
    torch.testing.assert_close(net[0].running_mean, 0.1 * X.mean(0))


def _under_ddp(rank: int, world: int, kind: str) -> list[Tensor]:
    inner = network(KINDS[kind == "ours"])
    model = DistributedDataParallel(inner)
    model(X[rank::world]).sum().backward()
    pending = model(X[rank::world]).square().sum()
    buffers, before = list(model.buffers()), copy.deepcopy(model.state_dict())
    with bn.preserve_state(model), torch.no_grad():
        model.train()(X * (rank + 2))  # sends the buffers of rank 0
    for key, t in model.state_dict().items():
        torch.testing.assert_close(t, before[key], rtol=0, atol=0)
    report = bn.recalibrate(model, X.split(6) if rank == 0 else [], process_group=dist.group.WORLD)
    assert [row.values for row in report] == [12, 12]
    bn.recalibrate(model, X.split(4)[rank:])  # by itself: no communication, so other numbers of batches too
    pending.backward()
    assert all(a is b for a, b in zip(model.buffers(), buffers, strict=True))
    model(X[rank::world]).sum().backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("kind", ["torch", "ours"])
def test_under_distributed_data_parallel(kind: str) -> None:
    """Ranks with other numbers of batches, or none, do not wait for each other; gradients are still averaged."""
    one, two = on_ranks(2, _under_ddp, kind)
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize(
    "use",
    [
        lambda net: bn.recalibrate(net, [X]),
        lambda net: bn.accumulate_statistics(net).__enter__(),
        lambda net: bn.preserve_state(net).__enter__(),
        bn.freeze,
    ],
    ids=["recalibrate", "accumulate_statistics", "preserve_state", "freeze"],
)
def test_lazy_layers_that_were_not_run_are_named(use: Callable[[nn.Module], object]) -> None:
    net = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match=r"1 \(LazyBatchNorm1d\) does not know its shapes yet: run the model once"):
        use(net)
    assert net.training
    assert isinstance(net(X.float()), Tensor)
    with bn.preserve_state(net):
        net(X.float())
