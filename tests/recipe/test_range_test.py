"""recipe/range_test.py: the rate of the steepest fall, on a copy."""

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import batchnorm as bn
from batchnorm.recipe.range_test import smooth


def quadratic(curvature: float) -> tuple[nn.Module, list[Any], Any]:
    """Loss = curvature / 2 * w^2: plain gradient descent is stable below a rate of 2 / curvature."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    return model, [(torch.ones(1, 1), torch.zeros(1, 1))], lambda y, t: curvature / 2 * (y - t).square().mean()


def test_the_rate_scales_with_the_curvature_and_lies_below_the_largest_stable_one() -> None:
    found = {}
    for curvature in (0.1, 1.0, 10.0):
        model, batches, loss = quadratic(curvature)
        test = bn.find_learning_rate(
            model, batches, loss, optimizer=torch.optim.SGD, lowest=1e-4 / curvature, highest=100 / curvature
        )
        found[curvature] = test.rate * curvature
        assert 0.01 < test.rate * curvature < 2
        assert test.rate < test.highest
    assert found[0.1] == pytest.approx(found[1.0]) == pytest.approx(found[10.0])


def test_ends_where_the_loss_is_four_times_its_lowest() -> None:
    model, batches, loss = quadratic(1.0)
    test = bn.find_learning_rate(model, batches, loss, optimizer=torch.optim.SGD, highest=1e6, steps=30)
    assert len(test.rates) < 30
    assert test.losses[-1] > 4 * min(test.smoothed[:-1])
    assert test.rates[0] == 1e-5
    assert len(test.rates) == len(test.losses) == len(test.smoothed)


def test_the_model_and_random_numbers_are_as_before() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 2)).eval()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    x = torch.randn(96, 4, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), 32)
    with torch.no_grad():
        test = bn.find_learning_rate(model, loader, optimizer=partial(torch.optim.SGD, momentum=0.5), steps=40)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert "the loss falls fastest there" in str(test)


def test_smoothing_has_no_bias_to_zero() -> None:
    assert smooth([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])


def test_plots_into_a_file_and_into_axes(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    model, batches, loss = quadratic(1.0)
    test = bn.find_learning_rate(model, batches, loss)
    test.plot(tmp_path / "rates.png")
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")
    axes = Figure().add_subplot()
    test.plot(axes)
    assert axes.get_xscale() == "log"
    assert f"{test.rate:.2g}" in axes.get_title(loc="left")


def nan(y: Tensor, t: Tensor) -> Tensor:
    return y.sum() * math.nan


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lowest": 1.0, "highest": 0.1}, r"lowest < highest \(got 1 and 0.1\)"),
        ({"steps": 5}, "steps must be at least 10"),
        ({"batches": []}, "batches yielded nothing, and the range test takes 100"),
        ({"batches": iter(quadratic(1.0)[1])}, "batches yielded 1, and the range test takes 100: pass a DataLoader"),
        ({"loss": nan}, r"not finite at step 1 of the range test, at a learning rate of 1e-05"),
        ({"loss": lambda y, t: 1 + 0 * y.sum()}, "the loss did not fall at learning rates from 1e-05"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    model, batches, loss = quadratic(1.0)
    arguments = {"model": model, "batches": batches, "loss": loss} | changes
    with pytest.raises(ValueError, match=message):
        bn.find_learning_rate(**arguments)
    with pytest.raises(TypeError, match=r"takes a torch.nn.Module"):
        bn.find_learning_rate(len, batches)  # type: ignore[arg-type]
