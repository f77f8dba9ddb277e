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


def test_ends_where_the_smoothed_loss_is_far_above_its_lowest() -> None:
    model, batches, loss = quadratic(1.0)
    test = bn.find_learning_rate(model, batches, loss, optimizer=torch.optim.SGD, highest=1e6, steps=30)
    assert len(test.rates) < 30
    assert test.smoothed[-1] > min(test.smoothed) + 3 * test.smoothed[0]
    assert test.smoothed[-2] <= min(test.smoothed) + 3 * test.smoothed[0]
    assert test.rates[0] == 1e-5
    assert len(test.rates) == len(test.losses) == len(test.smoothed)


@pytest.mark.parametrize("shift", [1.0, 10.0])
def test_a_loss_may_be_negative(shift: float) -> None:
    model, batches, loss = quadratic(1.0)
    options = {"optimizer": torch.optim.SGD, "highest": 100.0}
    test = bn.find_learning_rate(model, batches, lambda y, t: loss(y, t) - shift, **options)
    assert test.rate == bn.find_learning_rate(model, batches, loss, **options).rate
    assert max(test.smoothed[:-1]) <= 3 * shift  # it ends where it diverges here too
    assert len(test.rates) < 100


def test_one_bad_batch_does_not_end_it() -> None:
    model, batches, loss = quadratic(1.0)
    weights = [torch.ones(1, 1)] * 100
    weights[50] = torch.full((1, 1), 3.0)  # 9 times the loss
    test = bn.find_learning_rate(model, [(w, batches[0][1]) for w in weights], loss, highest=0.1)
    assert len(test.rates) == 100


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        y: Tensor = self.linear(a + b)
        return y


@pytest.mark.parametrize("kind", ["tuple", "dict", "forward"])
def test_batches_of_several_inputs(kind: str) -> None:
    torch.manual_seed(0)
    a, b, target, model = torch.randn(8, 1), torch.randn(8, 1), torch.ones(8, 1), Sum()
    expected = bn.find_learning_rate(model.linear, [(a + b, target)], nn.functional.mse_loss).losses
    batch: Any = {"tuple": ([a, b], target), "dict": ({"b": b, "a": a}, target), "forward": {"a": a, "b": b}}[kind]

    def forward(trained: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        return nn.functional.mse_loss(trained(**inputs), target)

    found = bn.find_learning_rate(
        model, [batch], nn.functional.mse_loss, forward=forward if kind == "forward" else None
    )
    assert found.losses == expected


@pytest.mark.parametrize("batch", [{"x": torch.ones(1, 1)}, torch.ones(2, 1), (1, 2, 3)], ids=["dict", "tensor", "3"])
def test_batches_that_are_no_pairs_are_refused(batch: Any) -> None:
    with pytest.raises(TypeError, match=r"a batch is \(inputs, targets\), got a \w+( of 3)?: for others pass forward"):
        bn.find_learning_rate(nn.Linear(1, 1), [batch])


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


class Trainer:
    """Has the model, and runs its own."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.other = model, copy.deepcopy(model)

    def step(self, model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def third(self, model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.other(batch[0]), batch[1])

    def late(self, model: nn.Module, batch: Any) -> Tensor:
        once = not hasattr(self, "ran")
        self.ran = True
        return nn.functional.cross_entropy((model if once else self.model)(batch[0]), batch[1])

    def penalty(self, y: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(y, targets) + sum(p.square().sum() for p in self.model.parameters())

    def own(self, parameters: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": self.model.parameters()}, {"params": parameters}], lr=lr)

    def others(self, parameters: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.other.parameters(), lr=lr)


@pytest.mark.parametrize(
    ("argument", "method", "words"),
    [
        (
            "forward",
            "step",
            r"forward uses another \(0.weight of the model itself got a gradient\): use the model that",
        ),
        ("forward", "third", r"forward uses another \(no parameter of the copy got a gradient\): use the model that"),
        ("forward", "late", r"forward uses another \(0.weight of the model itself"),
        ("loss", "penalty", r"loss uses another \(0.weight .*goes into forward=, which is given the copy"),
        ("optimizer", "own", r"holds the model's own parameters, .*: use the parameters that it is given"),
        ("optimizer", "others", r"holds parameters of another model, .*: use the parameters that it is given"),
    ],
)
def test_who_reaches_the_model_past_its_copy_is_refused_and_the_model_is_as_before(
    argument: str, method: str, words: str
) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    model[0].weight.grad = kept = torch.ones(8, 4)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=words):
        bn.find_learning_rate(
            model, [(torch.randn(8, 4), torch.arange(8) % 2)], **{argument: getattr(Trainer(model), method)}
        )
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert model[0].weight.grad is kept
    assert kept.eq(1).all()
    assert all(p.grad is None for p in [*model.parameters()][1:])


def test_another_model_may_be_read() -> None:
    """A teacher: the model itself, say, whose running statistics are as before too."""
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    state, x = copy.deepcopy(model.state_dict()), torch.randn(64, 4)

    def forward(trained: nn.Module, batch: Tensor) -> Tensor:
        return nn.functional.mse_loss(trained(batch), model(batch).detach() + 1)

    assert bn.find_learning_rate(model, [x], forward=forward).rate > 0
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


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
        ({"lowest": 5.0, "highest": 5e4}, r"the loss diverged at step \d of the range test, at a learning rate of"),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS needs a closure"),
        (
            {"model": nn.Sequential(nn.LazyLinear(1))},
            r"0 \(LazyLinear\) does not know .*run the model once",
        ),
        (
            {"model": nn.Linear(1, 1).requires_grad_(False)},
            r"no parameter that requires a gradient.* model.requires_grad_\(\) first",
        ),
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


class Output:
    """As of transformers' models."""

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.loss = logits, logits.square().mean()


class Returns(nn.Module):
    """Its output in a container."""

    def __init__(self, pack: Any) -> None:
        super().__init__()
        self.linear, self.pack = nn.Linear(1, 1), pack

    def forward(self, x: Tensor) -> Any:
        return self.pack(self.linear(x))


PAIR = (torch.ones(8, 1), torch.zeros(8, 1))
mse = nn.functional.mse_loss


@pytest.mark.parametrize(
    ("pack", "options", "error", "words"),
    [
        (Output, {"loss": mse}, TypeError, "model returned a Output, which the loss does not take.*pass loss="),
        (lambda y: {"logits": y}, {"loss": mse}, TypeError, "model returned a dict, which.*output.logits"),
        (lambda y: (y, y), {"loss": mse}, TypeError, r"model returned a tuple, which.*output\[0\]"),
        (Output, {"forward": lambda m, b: m(b[0])}, TypeError, "got a Output: return its .loss"),
        (Output, {"forward": lambda m, b: m(b[0]).loss.item()}, TypeError, "got a float: return a tensor"),
        (Output, {"forward": lambda m, b: m(b[0]).loss.detach()}, ValueError, "no gradient flows"),
        (lambda y: y, {"loss": partial(mse, reduction="none")}, ValueError,
         r"one number, got one of shape \(8, 1\): pass reduction=.mean."),
        (lambda y: y, {"forward": lambda m, b: m(b[0])}, ValueError,
         r"forward returns is one number, got one of shape \(8, 1\): .*of outputs, return the loss of them, as lambda"),
        (lambda y: {"loss": mse(y, PAIR[1])}, {"forward": lambda m, b: m(b[0])}, TypeError,
         r'got a dict: return its \["loss"\]'),
        (lambda y: (y, y), {"forward": lambda m, b: m(b[0])}, TypeError, "got a tuple: return the loss of them"),
        (lambda y: y, {"loss": "mse"}, TypeError, r"function of \(outputs, targets\), got 'mse': pass torch.nn.func"),
        (lambda y: y, {"loss": nn.MSELoss}, TypeError, r"got the class MSELoss: make one, MSELoss\(\)"),
        (lambda y: y, {"forward": 3}, TypeError, r"forward is a function of \(model, batch\), got 3"),
        (lambda y: y, {"steps": 30.0}, TypeError, r"steps is a whole number of batches, got 30.0"),
        (lambda y: y, {"optimizer": torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1)}, TypeError,
         r"optimizer is a function of \(parameters, lr=...\).* got a SGD: pass torch.optim.SGD, or"),
        (lambda y: y, {"optimizer": lambda parameters, lr: None}, TypeError, "returned a NoneType, no optimizer"),
    ],
)  # fmt: skip
def test_losses_that_no_step_can_be_made_on(pack: Any, options: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        bn.find_learning_rate(Returns(pack), [PAIR], **options)


def test_outputs_and_losses_that_are_read_by_the_user() -> None:
    torch.manual_seed(0)
    plain = Returns(lambda y: y)
    expected = bn.find_learning_rate(plain, [PAIR], mse).losses
    for pack, options in (
        (Output, {"loss": lambda output, targets: mse(output.logits, targets)}),
        (Output, {"forward": lambda model, batch: model(batch[0]).loss}),
        (lambda y: (y,), {"loss": lambda output, targets: mse(output[0], targets).reshape(1)}),
    ):
        model = Returns(pack)
        model.load_state_dict(plain.state_dict())
        assert bn.find_learning_rate(model, [PAIR], **options).losses == pytest.approx(expected)
