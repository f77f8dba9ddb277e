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


class Expanded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1).double().expand(4))
        self.norm = nn.BatchNorm1d(4).double()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x * self.scale)
        return y


def test_an_expanded_buffer_comes_back() -> None:
    model = Expanded()
    with bn.preserve_state(model):
        model.scale.zero_()
        model(X)
    bn.recalibrate(model, [X])
    assert model.scale.tolist() == [1.0] * 4
    assert model.scale.stride() == (0,)


class Cached(nn.Module):
    """Positions, made when they are first needed, and anew for longer inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.longest, self.norm = 0, nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] > self.longest:
            self.longest = x.shape[-1]
            self.register_buffer("places", torch.arange(self.longest).float(), persistent=False)
        y: Tensor = self.norm(x + self.places[: x.shape[-1]])
        return y


def test_recalibrate_keeps_buffers_that_a_forward_makes() -> None:
    model = Cached()
    for length in (6, 9):
        bn.recalibrate(model, [torch.randn(8, 3, length)])
        model(torch.randn(8, 3, length))
    assert "places" not in model.state_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_inference_mode_can_be_preserved_and_recalibrated(kind: type[nn.Module]) -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 4), kind(4)).eval()
    with torch.no_grad(), bn.preserve_state(model):
        model.train()(X.float())
    assert not model.training
    assert model[1].running_mean.eq(0).all()
    bn.recalibrate(model, [X.float()])
    assert model[1].running_mean.ne(0).all()


@pytest.mark.parametrize("scope", [recalibrate, accumulate])
@pytest.mark.parametrize("kind", KINDS)
def test_memory_that_others_share_stays_shared_with_a_backward_pending(
    kind: type[nn.Module], scope: Callable[[nn.Module], None]
) -> None:
    model = network(kind)
    flat = torch.cat([model[2].running_mean, model[2].running_var]).share_memory_()
    model[2].running_mean, model[2].running_var = flat[:6], flat[6:]
    pending, before = model(X).square().sum(), flat.clone()
    scope(model)
    pending.backward()
    assert not torch.isclose(flat, before).any()
    assert torch.equal(flat, torch.cat([model[2].running_mean, model[2].running_var]))
    assert model[2].running_var.is_shared()


def test_parts_without_parameters_follow_too() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False))
    with bn.preserve_state(model):
        model[1].double()(X)
    assert model[1].running_mean.dtype == torch.float64
    assert model[1].running_var.eq(1).all()


def test_the_shift_of_a_constant_channel_is_none_or_infinite() -> None:
    layer, x = nn.BatchNorm1d(3), torch.randn(16, 3)
    x[:, 0] = 2.0
    assert bn.recalibrate(layer, [x])[0].mean_shift == torch.inf
    (row,) = bn.recalibrate(layer, [x])
    assert row.mean_shift < 1e-3
    assert row.variance_ratio == pytest.approx((1, 1))
