"""recipe/muon.py: updates beside the singular value decomposition, norms that stay, state that comes back."""

import copy
import io
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from processes import on_ranks
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers
from torch.utils._python_dispatch import TorchDispatchMode

from batchnorm.recipe.muon import STEPS, Muon, orthogonalized

CONVERGENT = [(15 / 8, -10 / 8, 3 / 8)] * 25  # the quintic whose fixed point 1 attracts to third order


class Network(nn.Module):
    """One of each: a convolution, a grouped, a depthwise, a transposed one, a linear layer; BN behind; a classifier."""

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(3, 8, 3),
                nn.Conv2d(8, 8, 3, groups=2),
                nn.Conv2d(8, 8, 3, groups=8),
                nn.ConvTranspose2d(8, 4, 2, groups=2),
                nn.Conv2d(4, 8, 1, bias=False),
                nn.Conv2d(8, 8, 1, bias=False),
            ]
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(c, eps=eps) for c in (8, 8, 8, 4, 8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.relu(norm(layer(x)))
        return self.head(x.mean((2, 3)))


def network(seed: int = 0, **options: Any) -> Network:
    torch.manual_seed(seed)
    return Network(**options)


def muon(model: Any, **group: Any) -> Muon:
    layers = [*model.layers]
    weights = {"params": [layer.weight for layer in layers], "blocks": [layer.groups for layer in layers]}
    mine = {id(p) for p in weights["params"]}
    others = {"params": [p for p in model.parameters() if id(p) not in mine], "orthogonalize": False}
    return Muon([weights | group, others])


X = torch.randn(16, 3, 9, 9, generator=torch.Generator().manual_seed(1))
Y = torch.randint(3, (16,), generator=torch.Generator().manual_seed(2))


def train(model: nn.Module, optimizer: Any, steps: int, x: Tensor = X, y: Tensor = Y) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x).float(), y).backward()
        optimizer.step()


def polar(x: Tensor) -> Tensor:
    U, _, V = torch.linalg.svd(x, full_matrices=False)
    return U @ V


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (7, 7), (1, 9), (4, 5, 8), (2, 3, 8, 5)], ids=str)
def test_with_steps_that_converge_it_is_the_polar_factor(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(orthogonalized(x, CONVERGENT), polar(x), rtol=1e-9, atol=1e-9)
    assert torch.equal(orthogonalized(torch.zeros(shape)), torch.zeros(shape))


@pytest.mark.parametrize("scale", [1e-12, 1, 1e12])
def test_five_steps_move_singular_values_as_their_polynomial_says(scale: float) -> None:
    """And leave the singular vectors; the band that the docstring names is the polynomial's."""
    x = torch.randn(3, 12, 20, generator=torch.Generator().manual_seed(0))
    U, S, V = torch.linalg.svd(x.double(), full_matrices=False)

    def moved(s: Tensor) -> Tensor:
        for a, b, c in STEPS:
            s = a * s + b * s**3 + c * s**5
        return s

    wanted = moved(S / torch.linalg.vector_norm(S, dim=-1, keepdim=True))
    found = orthogonalized(x * scale)
    torch.testing.assert_close(found.double(), U @ torch.diag_embed(wanted) @ V, rtol=1e-4, atol=1e-5)
    band = moved(torch.linspace(0.01, 1, 100_000, dtype=torch.float64))
    assert 0.68 < band.min() < 0.69
    assert 1.13 < band.max() < 1.14
    assert 1.20 < moved(torch.linspace(0, 1, 100_000, dtype=torch.float64)).max() < 1.21


def written_out(p: Tensor, blocks: int, grads: list[Tensor], lr: float, momentum: float, keep_norm: bool) -> Tensor:
    """The docstring's two lines, a matrix at a time."""
    W, V, norm = p.double(), torch.zeros_like(p).double(), p.double().norm()
    for gradient in grads:
        V = momentum * V + gradient.double()
        ahead = gradient.double() + momentum * V
        D = torch.cat([orthogonalized(part.flatten(1)).view_as(part) for part in ahead.chunk(blocks)])
        W = W - lr * norm * D / D.norm()
        W = W * (norm / W.norm() if keep_norm else 1)
    return W


@pytest.mark.parametrize("keep_norm", [True, False])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
def test_steps_are_the_equation_matrix_by_matrix_and_sgds(keep_norm: bool, last: bool) -> None:
    model, generator = network(), torch.Generator().manual_seed(3)
    if last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = muon(model, keep_norm=keep_norm)
    optimizer.param_groups[1] |= {"weight_decay": 0.01, "clip": 0.0}
    twin = copy.deepcopy(model)
    sgd = torch.optim.SGD(twin.parameters(), lr=0.5, momentum=0.9, nesterov=True, weight_decay=0.01)
    before = {name: (p.detach().clone(), p.stride()) for name, p in model.named_parameters()}
    grads: dict[str, list[Tensor]] = {name: [] for name in before}
    for _ in range(3):
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
            q.grad = p.grad.clone()
            grads[name].append(p.grad.clone())
        optimizer.step()
        sgd.step()
    weights = {f"layers.{i}.weight": layer.groups for i, layer in enumerate(model.layers)}
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        start, stride = before[name]
        assert p.stride() == stride
        wanted: Tensor = q
        if name in weights:
            wanted = written_out(start, weights[name], grads[name], 0.03, 0.9, keep_norm).float()
            assert (abs(p.norm() / start.norm() - 1) < 1e-6) == keep_norm
        torch.testing.assert_close(p, wanted, rtol=2e-5, atol=2e-6)


def test_a_step_turns_the_weight_by_at_most_the_angle_that_lr_says() -> None:
    model = network()
    before = [layer.weight.detach().clone().double() for layer in model.layers]
    train(model, muon(model, lr=0.1), 1)
    for layer, old in zip(model.layers, before, strict=True):
        new = layer.weight.detach().double()
        angle = 2 * math.asin(float((new / new.norm() - old / old.norm()).norm()) / 2)
        assert 0.5 * math.asin(0.1) < angle < math.asin(0.1) + 1e-6


@pytest.mark.parametrize("make", [muon, lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9)])
def test_the_scale_of_weights_does_nothing_in_training(make: Any) -> None:
    """BN((aW)u) = BN(Wu), Section 3.3: here with the gradients of it, momentum and steps. Not so of SGD."""
    model = network(eps=1e-30).double()
    scaled, start, scales = copy.deepcopy(model), copy.deepcopy(model), [10.0, 0.1, 10.0, 0.1, 10.0, 0.1]
    with torch.no_grad():
        for layer, scale in zip(scaled.layers, scales, strict=True):
            layer.weight.mul_(scale)
    for each in (model, scaled):
        train(each, make(each), 5, X.double())
    weights = [layer.weight for layer in model.layers]
    same = [
        torch.allclose(layer.weight / scale, weight, rtol=1e-8, atol=1e-10)
        for layer, scale, weight in zip(scaled.layers, scales, weights, strict=True)
    ]
    same.append(torch.allclose(scaled(X.double()), model(X.double()), rtol=1e-8, atol=1e-10))
    assert same == [make is muon] * 7
    moved = [(new - old.weight).norm() / old.weight.norm() for new, old in zip(weights, start.layers, strict=True)]
    assert min(moved) > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_saved_goes_on_with_the_same_bits(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    optimizer = muon(model)
    train(model, optimizer, 3, X.to(dtype))
    stream = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), stream)
    stream.seek(0)
    weights, state = torch.load(stream, weights_only=True)
    again = network(seed=7).to(dtype)
    other = muon(again, lr=1.0)
    again.load_state_dict(weights)
    other.load_state_dict(state)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert optimizer.state[p].keys() == other.state[q].keys()
        assert all(torch.equal(optimizer.state[p][key], other.state[q][key]) for key in optimizer.state[p])
    train(model, optimizer, 3, X.to(dtype))
    train(again, other, 3, X.to(dtype))
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
    copied = copy.deepcopy(optimizer)
    copied.add_param_group({"params": [nn.Parameter(torch.ones(2))], "orthogonalize": False})
    assert copied.param_groups[2]["lr"] == 0.5


def test_bfloat16_weights_keep_their_norm_up_to_rounding() -> None:
    model = network().bfloat16()
    before = [layer.weight.float().norm() for layer in model.layers]
    train(model, muon(model), 30, X.bfloat16())
    after = [layer.weight.float().norm() for layer in model.layers]
    torch.testing.assert_close(after, before, rtol=2**-8, atol=0)  # one rounding of the norm and of values


def test_schedulers_serve_both_kinds_of_groups() -> None:
    optimizer = muon(network())
    by_half = schedulers.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    by_half.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.015, 0.25]
    optimizer = muon(network())
    cycle = schedulers.OneCycleLR(optimizer, max_lr=[0.03, 0.5], total_steps=10, pct_start=0.3)
    for _ in range(2):
        optimizer.step()
        cycle.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.03, 0.5])
    assert [group["momentum"] for group in optimizer.param_groups] == pytest.approx([0.85, 0.85])
    still, model = network(), network()
    optimizer = muon(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, 2)
    torch.testing.assert_close([*model.parameters()], [*still.parameters()], rtol=1e-6, atol=0)


def test_parameters_without_a_gradient_and_gradients_of_zero() -> None:
    model = network()
    model.layers[1].weight.requires_grad_(False)
    optimizer = muon(model)
    before = copy.deepcopy(model)
    train(model, optimizer, 1)
    assert torch.equal(model.layers[1].weight, before.layers[1].weight)
    assert model.layers[1].weight not in optimizer.state
    model.layers[1].weight.requires_grad_(True)
    train(model, optimizer, 1)
    assert not torch.equal(model.layers[1].weight, before.layers[1].weight)
    weight = nn.Parameter(torch.randn(3, 4))
    start, weight.grad = weight.detach().clone(), torch.zeros(3, 4)
    assert Muon([weight]).step(lambda: 5.0) == 5.0
    torch.testing.assert_close(weight.detach(), start)


def on_rank(rank: int, world: int) -> Any:
    model = network(seed=rank)  # DistributedDataParallel gives all ranks those of rank 0
    optimizer = muon(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    train(wrapped, optimizer, 3, X.chunk(world)[rank], Y.chunk(world)[rank])
    parameters = [p.detach().clone() for p in model.parameters()]
    return parameters, [p.grad.clone() for p in model.parameters()], optimizer.state_dict()["state"]


def test_ranks_have_the_same_bits() -> None:
    (weights, grads, state), (others, other_grads, other_state) = on_ranks(2, on_rank)
    start = [*network(seed=0).parameters()]
    assert all(torch.equal(a, b) for a, b in zip(grads, other_grads, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(weights, start, strict=True) if a.ndim > 1)
    assert state.keys() == other_state.keys()
    for key, values in state.items():
        assert all(torch.equal(values[name], other_state[key][name]) for name in values)


def test_refused() -> None:
    matrix, vector = nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(4))
    for group, message in (
        ({"params": [vector]}, r"one of shape \(4,\) has shape \(4,\): put gamma, beta and biases in a group with"),
        ({"params": [("norm.weight", vector)]}, r"orthogonalizes matrices, and norm\.weight has"),
        ({"params": [matrix], "weight_decay": 0.1}, "weight decay changes the norm of a weight"),
        ({"params": [matrix], "clip": 0.1}, r"clip is for groups with orthogonalize=False \(got 0.1\)"),
        ({"params": [matrix], "lr": -1.0}, r"lr must be at least 0 \(got -1.0\)"),
        ({"params": [vector], "orthogonalize": False, "clip": -1.0}, r"clip must be at least 0 \(got -1.0\)"),
        ({"params": [matrix], "blocks": [3]}, r"has no 3 equal blocks"),
        ({"params": [matrix], "blocks": [1, 1]}, r"one number for each of 1 weights \(got 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            Muon([group])
    with pytest.raises(RuntimeError, match="does not support complex parameters"):
        Muon([nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))])
    zero = nn.Parameter(torch.zeros(4, 6))
    zero.grad = matrix.grad = torch.ones(4, 6)
    with pytest.raises(ValueError, match=r"and that of layer\.weight is 0: initialize it otherwise"):
        Muon([("matrix", matrix), ("layer.weight", zero)]).step()
    assert torch.equal(matrix.detach(), torch.ones(4, 6))  # before anything was changed
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = Muon([{"params": table.parameters(), "orthogonalize": False}])
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()


class Products(TorchDispatchMode):
    """What matrix products have given."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default):
            self.found.append(out)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_units_that_are_dead_do_not_slow_the_others(dtype: torch.dtype) -> None:
    """Their momentum falls through all magnitudes; subnormal numbers in a product make it 40 times as slow on a CPU."""
    x = torch.randn(6, 6, dtype=dtype, generator=torch.Generator().manual_seed(0))
    tiny, alive = torch.finfo(dtype).tiny, orthogonalized(x[1:])
    for power in range(1, 46 if dtype == torch.float32 else 325, 2):
        dying = torch.cat([x[:1] * 10.0**-power, x[1:]])
        with Products() as products:
            y = orthogonalized(dying)
        assert len(products.found) == 15
        assert not any(((z != 0) & (z.abs() < tiny)).any() for z in products.found), power
        if power > 8:
            assert y[1:].sub(alive).abs().max() < 1e-6
            assert y[0].abs().max() < 1e-5
