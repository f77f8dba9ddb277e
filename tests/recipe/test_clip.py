"""recipe/clip.py, and what it is for: ``fast`` trains with any loss, at any scale of the targets."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.recipe.clip import clipped
from batchnorm.recipe.muon import Muon

FAST = bn.RECIPES["fast"]
SHAPES = [(5, 7), (4, 3, 2, 2), (6,), (), (1,), (0,), (3, 1)]


def drawn(scale: float, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(shape, generator=generator)).to(dtype) for shape in SHAPES]


def written_out(p: Tensor, gradient: Tensor, share: float) -> Tensor:
    """The docstring's line, a unit at a time."""
    if p.ndim == 0:
        return written_out(p[None], gradient[None], share)[0]
    found = gradient.double().clone()
    for W, G in zip(p.double(), found, strict=True):
        G.mul_(min(1.0, share * max(float(W.norm()), 1) / float(G.norm())))
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_each_unit_is_cut_to_a_share_of_its_length(dtype: torch.dtype, scale: float) -> None:
    params, grads = drawn(3.0, dtype), drawn(scale, dtype, seed=1)
    params[1] = params[1].to(memory_format=torch.channels_last)
    before = [g.clone() for g in grads]
    found = clipped(params, grads, 0.05)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-6}[dtype]
    for p, gradient, as_it_was, new in zip(params, grads, before, found, strict=True):
        assert (new.shape, new.dtype, new.stride()) == (gradient.shape, dtype, gradient.stride())
        torch.testing.assert_close(new.double(), written_out(p, gradient, 0.05), rtol=tolerance, atol=0)
        assert torch.equal(gradient, as_it_was)
        assert torch.equal(new, gradient) or scale > 1e-3


def test_what_begins_at_zero_moves_and_a_gradient_of_zero_stays() -> None:
    zeros, ones = [torch.zeros(shape) for shape in SHAPES], [torch.ones(shape) for shape in SHAPES]
    assert all(torch.equal(new, old) for new, old in zip(clipped(ones, zeros, 0.1), zeros, strict=True))
    matrix, *_, vector = clipped([torch.zeros(2, 4), torch.zeros(3)], [torch.ones(2, 4), -torch.ones(3)], 0.1)
    torch.testing.assert_close(matrix, torch.full((2, 4), 0.05))
    torch.testing.assert_close(vector, torch.full((3,), -0.1))


def mlp(outputs: int) -> nn.Sequential:
    hidden = [nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(32, outputs))


def convolutions(outputs: int) -> nn.Sequential:
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 16, outputs))


def table(outputs: int) -> tuple[Tensor, Tensor]:
    """Friedman's function of 10 columns, five of them idle; with several outputs, shifted: mean 0, deviation 1."""
    x = torch.rand(2_000, 10, generator=torch.Generator().manual_seed(0))
    shifted = [x.roll(i, 1) for i in range(outputs)]
    y = torch.stack(
        [
            10 * torch.sin(torch.pi * z[:, 0] * z[:, 1]) + 20 * (z[:, 2] - 0.5) ** 2 + 10 * z[:, 3] + 5 * z[:, 4]
            for z in shifted
        ],
        1,
    )
    return 2 * x - 1, (y - y.mean(0)) / y.std(0)


def blobs() -> tuple[Tensor, Tensor, Tensor]:
    """Images (N, 1, 8, 8) with a blob, its centre and radius (N, 3), and which places it covers (N, 8, 8)."""
    draw, places = torch.Generator().manual_seed(0), torch.arange(8.0)
    centre, radius = 1.5 + 5 * torch.rand(1_000, 2, generator=draw), 1 + 1.5 * torch.rand(1_000, generator=draw)
    distance = (places[:, None] - centre[:, 0, None, None]) ** 2 + (places - centre[:, 1, None, None]) ** 2
    x = torch.exp(-distance / radius[:, None, None] ** 2)
    y = torch.cat([centre, radius[:, None]], 1)
    return x[:, None], (y - y.mean(0)) / y.std(0), (distance < radius[:, None, None] ** 2).long()


def trained(
    model: nn.Module, x: Tensor, y: Tensor, loss: Callable[..., Tensor], recipe: bn.Recipe = FAST, steps: int = 300
) -> Tensor:
    """Outputs, in train mode, of a network that had so many steps in batches of 64."""
    torch.manual_seed(0)
    accelerated: Any = bn.accelerate(model, x[:4], recipe)
    optimizer = recipe.optimizer(accelerated)
    scheduler = recipe.scheduler(optimizer, steps)
    for _ in range(steps):
        some = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        loss(accelerated(x[some]), y[some]).backward()
        optimizer.step()
        scheduler.step()
    with torch.no_grad():
        return accelerated(x)  # type: ignore[no-any-return]


def unexplained(outputs: Tensor, targets: Tensor) -> float:
    """The squared error, over that of predicting the mean."""
    return float((outputs - targets).square().mean() / (targets - targets.mean(0)).square().mean())


@pytest.mark.parametrize("scale", [0.1, 1, 10, 100])
@pytest.mark.parametrize("outputs", [1, 10])
def test_fast_trains_a_regression_at_every_scale_of_its_targets(outputs: int, scale: float) -> None:
    """Ends below a 20th (of ten outputs a 6th) of the loss of predicting the mean."""
    torch.manual_seed(0)
    x, y = table(outputs)
    found = trained(mlp(outputs), x, scale * y, F.mse_loss)
    assert unexplained(found, scale * y) < 1 / (20 if outputs == 1 else 6)


def squared_sum(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs, targets, reduction="sum")


@pytest.mark.parametrize("loss", [squared_sum, F.huber_loss, F.l1_loss], ids=["sum", "huber", "l1"])
def test_fast_trains_a_regression_whatever_the_loss(loss: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    x, y = table(1)
    assert unexplained(trained(mlp(1), x, y, loss), y) < 1 / 20


def test_without_the_clip_such_a_regression_diverges() -> None:
    """So that the tests above protect something."""
    torch.manual_seed(0)
    x, y = table(1)
    error = unexplained(trained(mlp(1), x, 10 * y, F.mse_loss, replace(FAST, clip=0)), 10 * y)
    assert not error < 0.9


@pytest.mark.parametrize("scale", [1, 30])
def test_fast_trains_convolutions_to_tell_where_a_blob_is(scale: float) -> None:
    torch.manual_seed(0)
    x, y, _ = blobs()
    assert unexplained(trained(convolutions(3), x, scale * y, F.mse_loss), scale * y) < 1 / 20


def test_fast_trains_an_autoencoder() -> None:
    torch.manual_seed(0)
    x = blobs()[0].flatten(1)
    model = nn.Sequential(
        nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 6), nn.ReLU(), nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 64)
    )
    assert unexplained(trained(model, x, x, F.mse_loss), x) < 1 / 5


def test_fast_trains_several_labels_and_a_segmentation() -> None:
    torch.manual_seed(0)
    x, y = table(10)
    labels = (y > 0).float()
    found = trained(mlp(10), x, labels, F.binary_cross_entropy_with_logits)
    assert F.binary_cross_entropy_with_logits(found, labels) < 0.4 * math.log(2)

    def overlap(outputs: Tensor, targets: Tensor) -> Tensor:
        """Dice of the covered places."""
        p_N, t_N = outputs.softmax(1)[:, 1].flatten(1), targets.float().flatten(1)
        return (2 * (p_N * t_N).sum(1) / (p_N.sum(1) + t_N.sum(1))).mean()

    images, _, covered = blobs()
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(8, 2, 1))
    masks = trained(
        model, images, covered, lambda outputs, t: F.cross_entropy(outputs, t) + 1 - overlap(outputs, t), steps=100
    )
    assert overlap(masks, covered) > 0.9


def test_a_state_from_before_it_goes_on_unclipped() -> None:
    model = nn.Linear(3, 2)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "orthogonalize": False}]
    optimizer = Muon(groups)
    assert [group["clip"] for group in optimizer.param_groups] == [0, 0.02]
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[1]["clip"] == 0.02
    for group in state["param_groups"]:
        del group["clip"]
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[1]["clip"] == 0
    model(torch.ones(4, 3)).sum().backward()
    bias = model.bias.detach().clone()
    optimizer.step()
    torch.testing.assert_close(model.bias.detach(), bias - 0.5 * 1.9 * 4)
