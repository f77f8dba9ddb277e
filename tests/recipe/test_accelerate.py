"""recipe/accelerate.py: batch normalization in, dropout out, the model given as it was."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm as bn


class Network(nn.Module):
    """Dropout as modules, in attention, in an LSTM, and as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop, self.drop1d = nn.Linear(4, 8), nn.Dropout(0.4), nn.Dropout1d(0.2)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        self.lstm = nn.LSTM(8, 8, 2, dropout=0.3, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop1d(self.drop(F.relu(self.linear(x))))
        y = self.lstm(self.attention(y, y, y)[0])[0]
        return self.head(F.dropout(y, 0.5, self.training)[:, -1])


X = torch.randn(3, 5, 4)  # (N, L, C)


def test_dropout_goes_where_it_can_be_reached_and_the_rest_is_named() -> None:
    model = Network()
    text, state = repr(model), copy.deepcopy(model.state_dict())
    accelerated = bn.accelerate(model, X)
    rows = {row.layer: (row.done, row.why) for row in accelerated.batchnorm_report}
    assert rows["linear"] == ("normalized", "before relu()")
    assert rows["drop"] == ("dropout", "0.4 becomes 0")
    assert rows["drop1d"] == ("dropout", "0.2 becomes 0")
    assert rows["attention"] == ("dropout", "0.1 becomes 0")
    assert rows["lstm"] == ("dropout", "0.3 becomes 0")
    assert rows["the model"] == ("left alone", "it calls dropout() itself: set its probability there")
    assert (accelerated.drop.p, accelerated.attention.dropout, accelerated.lstm.dropout) == (0, 0, 0)
    assert accelerated.batchnorm_recipe is bn.RECIPES["paper"]
    assert repr(model) == text
    assert (model.drop.p, model.attention.dropout, model.lstm.dropout) == (0.4, 0.1, 0.3)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert not hasattr(model, "batchnorm_report")


def test_a_dropout_that_was_changed_is_not_told_as_left_alone() -> None:
    """Though with half of its probability it still calls dropout()."""
    report = bn.accelerate(Network(), X, bn.Recipe(dropout=0.5)).batchnorm_report
    rows = [(row.layer, row.why) for row in report if row.done == "dropout" or "itself" in row.why]
    assert rows == [
        ("drop", "0.4 becomes 0.2"),
        ("drop1d", "0.2 becomes 0.1"),
        ("attention", "0.1 becomes 0.05"),
        ("lstm", "0.3 becomes 0.15"),
        ("the model", "it calls dropout() itself: set its probability there"),
    ]


def test_without_dropout_training_passes_are_alike() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 2))
    accelerated = bn.accelerate(model, X[0])
    assert torch.equal(accelerated(X[0]), accelerated(X[0]))


def test_recipes_by_name_by_value_and_edited() -> None:
    half = replace(bn.RECIPES["fast"], name="half", dropout=0.5)
    accelerated = bn.accelerate(Network(), X, half)
    assert accelerated.drop.p == 0.2
    assert bn.accelerate(Network(), X, bn.Recipe()).drop.p == 0.4
    again = pickle.loads(pickle.dumps(accelerated))
    assert again.batchnorm_recipe == copy.deepcopy(accelerated).batchnorm_recipe == half


def test_it_trains_as_the_recipe_says() -> None:
    torch.manual_seed(0)
    x = torch.randn(512, 4)
    y = (x[:, 0] * x[:, 1] > 0).long()
    model = bn.accelerate(nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 2)), x[:2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    model.batchnorm_recipe.apply(optimizer, scheduler)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)  # a sixth of 600 steps
    assert (model.eval()(x).argmax(1) == y).float().mean() > 0.97


class Drops(nn.Module):
    """Dropout where only train shows it, in a module without children, within attention."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.leaf, self.dropout = nn.Linear(4, 8), Leaf(), 0.1

    def forward(self, x: Tensor) -> Tensor:
        y = self.leaf(F.relu(self.linear(x)))
        y = F.dropout(y, 0.0)
        p = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(y, y, y, dropout_p=p)


class Leaf(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.alpha_dropout(x, 0.2, True) if self.training else x


def test_every_call_that_drops_in_train_is_named() -> None:
    rows = bn.accelerate(Drops(), X).batchnorm_report
    assert [(row.layer, row.why.split("()")[0]) for row in rows if "itself" in row.why] == [
        ("leaf", "it calls alpha_dropout"),
        ("the model", "it calls scaled_dot_product_attention"),
    ]


def test_dropout_before_a_nonlinearity_is_not_in_the_way() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.ReLU(), nn.Linear(8, 2))
    assert bn.accelerate(model, X[0]).batchnorm_report.of("normalized") == ["0"]
    assert bn.insert(model, X[0]).batchnorm_report.of("normalized") == []


def test_refused() -> None:
    with pytest.raises(ValueError, match=r"there is no layer to normalize.\nlayer .*\n0 .*goes to the model's output"):
        bn.accelerate(nn.Sequential(nn.Linear(4, 8)), X)
    normalized = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(
        ValueError, match=r'already. .*, then batchnorm.RECIPES\["paper"\].apply\(optimizer, scheduler, m'
    ):
        bn.accelerate(normalized, X[0])
    with pytest.raises(ValueError, match=r"already. .*, then recipe.apply\(optimizer, scheduler, model\); multiply"):
        bn.accelerate(normalized, X[0], replace(bn.RECIPES["paper"], learning_rate=30))
    with pytest.raises(ValueError, match=r'unknown recipe "quick". Known: paper, sgd, fast; or a batchnorm.Recipe'):
        bn.accelerate(Network(), X, "quick")
    with pytest.raises(TypeError, match=r"recipe must be a name or a batchnorm\.Recipe, got dict"):
        bn.accelerate(Network(), X, {})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"takes a torch.nn.Module"):
        bn.accelerate(len, X)  # type: ignore[type-var]
