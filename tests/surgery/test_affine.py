"""surgery/affine.py: layers of other packages, registered or not, and weights that several modules share."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from surgery.test_fold import assert_same, shaken
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import batchnorm as bn
from batchnorm.surgery.affine import ROWS, Affine, register, shared


class GraphLinear(nn.Module):
    """As torch_geometric has it: no subclass of torch's."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(outputs, inputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@pytest.fixture
def registered() -> Iterator[None]:
    before = dict(ROWS)
    register(Conv1D, Affine(bn.BatchNorm1d, -1, transposed=True, needs_bias=True))
    register(GraphLinear, Affine(bn.BatchNorm1d, -1))
    yield
    ROWS.clear()
    ROWS.update(before)


MAKERS: list[Any] = [lambda i, o: Conv1D(o, i), GraphLinear]


@pytest.mark.parametrize("make", MAKERS, ids=["transformers' Conv1D", "torch_geometric's Linear"])
def test_a_registered_layer_folds_both_ways(make: Any, registered: None) -> None:
    x = torch.randn(5, 3, dtype=torch.float64)
    model = nn.Sequential(make(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.BatchNorm1d(4), make(4, 2))
    folded = bn.fold(shaken(model), x)
    assert [row.why for row in folded.batchnorm_report] == ["into 0, before it", "into 4, after it"]
    assert_same(model, folded, x)


@pytest.mark.parametrize("make", MAKERS, ids=["transformers' Conv1D", "torch_geometric's Linear"])
def test_a_registered_layer_is_normalized_and_folded_again(make: Any, registered: None) -> None:
    x = torch.randn(4, 5, 3)  # features last, as in GPT-2's MLP
    plain = nn.Sequential(make(3, 8), nn.GELU(), make(8, 3)).eval()
    fresh: Any = bn.insert(plain, x)
    assert [row.why for row in fresh.batchnorm_report] == ["before 1", "its output goes to the model's output"]
    fresh.train()(x).sum().backward()
    trained = bn.insert(plain.double(), x.double(), batches=[x.double()])
    torch.testing.assert_close(trained(x.double()), plain(x.double()), rtol=1e-12, atol=1e-12)
    folded: Any = bn.fold(trained, x.double())
    assert folded.batchnorm_report == [("0.batch_norm", "folded", "into 0")]
    assert type(folded[0]) is type(plain[0])
    torch.testing.assert_close(folded(x.double()), plain(x.double()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", MAKERS, ids=["transformers' Conv1D", "torch_geometric's Linear"])
def test_a_layer_that_is_not_registered_is_left_alone_by_its_true_name(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(ROWS, Conv1D, raising=False)  # as the docs' code registers it
    x = torch.randn(5, 3, dtype=torch.float64)
    name = type(make(3, 4)).__name__
    model = shaken(nn.Sequential(make(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4)))
    folded = bn.fold(model, x)
    assert [row.why for row in folded.batchnorm_report] == ["into 2, after it", "into 2, before it"]
    model = shaken(nn.Sequential(make(3, 4), nn.BatchNorm1d(4), nn.ReLU()))
    (row,) = bn.fold(model, x).batchnorm_report
    assert row.why.startswith(f"it reads 0, a {name}: batchnorm.surgery.affine.register says what it is; ")
    (row,) = bn.insert(nn.Sequential(make(3, 4), nn.ReLU()).double(), x).batchnorm_report
    assert row == ("0", "left alone", f"a {name}: batchnorm.surgery.affine.register says what it is")


def test_what_cannot_be_registered() -> None:
    with pytest.raises(TypeError, match=r"register takes a class of torch.nn.Module, got Linear\("):
        register(nn.Linear(2, 2), Affine(bn.BatchNorm1d, -1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"takes an Affine\(...\), which says what a GraphLinear computes, got None"):
        register(GraphLinear, None)  # type: ignore[arg-type]


class Tied(nn.Module):
    """Each of ``ways`` ties the first layer's weight to something else; the second layer is nobody's."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.first, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.second, self.norm2 = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.decoder = nn.Linear(4, 4)
        if way == "parameter":
            self.decoder.weight = self.first.weight
        elif way == "bias":
            self.decoder.bias = self.first.bias
        elif way == "embedding":
            self.table = nn.Embedding(4, 4)
            self.table.weight = self.first.weight
        elif way == "memory":
            self.double()
            self.decoder.weight = nn.Parameter(self.first.weight.detach().t())
        elif way == "attribute":
            self.kept = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.norm2(self.second(torch.relu(self.norm(self.first(x))))))
        if self.way == "function":
            return F.linear(y, self.first.weight.t())
        return self.decoder(y)


WAYS = {
    "parameter": "the weight of first is decoder.weight too",
    "bias": "the bias of first is decoder.bias too",
    "embedding": "the weight of first is table.weight too",
    "memory": "the weight of first is decoder.weight too",
    "attribute": "the weight of first is kept too",
    "function": "t() reads the weight of first too",
}


@pytest.mark.parametrize("way", WAYS)
def test_a_weight_that_others_share_is_never_changed(way: str) -> None:
    x = torch.randn(5, 4, dtype=torch.float64)
    model = shaken(Tied(way))
    folded: Any = bn.fold(model, x)
    assert [(row.layer, row.done) for row in folded.batchnorm_report] == [("norm", "left alone"), ("norm2", "folded")]
    assert folded.batchnorm_report[0].why.split(";")[0] == WAYS[way]
    torch.testing.assert_close(folded.first.weight, model.first.weight, rtol=0, atol=0)
    assert len({*folded.parameters()}) == len({*model.parameters()}) - 2  # those of norm2
    assert_same(model, folded, x)


@pytest.mark.parametrize("way", WAYS)
def test_ties_stay_when_batch_normalization_is_inserted_and_folded_again(way: str) -> None:
    x = torch.randn(5, 4, dtype=torch.float64)
    plain = Tied(way).double().eval()
    plain.norm, plain.norm2 = nn.Identity(), nn.Identity()  # type: ignore[assignment]
    inserted: Any = bn.insert(plain, x, batches=[x])
    assert [row.done for row in inserted.batchnorm_report][:2] == ["normalized"] * 2
    torch.testing.assert_close(inserted.first.weight, plain.first.weight, rtol=0, atol=0)
    torch.testing.assert_close(inserted(x), plain(x), rtol=1e-10, atol=1e-10)
    shaken(inserted)
    folded = bn.fold(inserted, x)
    gone = way in ("bias", "memory")  # with the bias; with the copy
    assert folded.batchnorm_report[0].why == ("into first" if gone else WAYS[way])
    assert folded.batchnorm_report[1] == ("second.batch_norm", "folded", "into second")
    torch.testing.assert_close(folded(x), inserted(x), rtol=1e-10, atol=1e-10)


def test_who_shares_memory() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2), nn.LSTM(2, 2), nn.Linear(3, 4))
    assert shared(model) == {}
    flat = torch.randn(18)  # as optimizers of other packages lay weights out: side by side in one storage
    model[0].weight.data, model[3].weight.data = flat[:6].view(3, 2), flat[6:].view(4, 3)
    assert shared(model) == {}
    model[1].weight = nn.Parameter(flat[3:9].view(2, 3))
    assert shared(model) == {
        "0.weight": "1.weight", "1.weight": "0.weight", "3.weight": "1.weight",
    }  # fmt: skip


@pytest.mark.parametrize("verb", [bn.insert, bn.fold])
def test_what_no_row_can_say_is_not_told_to_register(verb):
    model = nn.Sequential(nn.Embedding(5, 4), nn.ReLU() if verb is bn.insert else nn.BatchNorm1d(4)).eval()
    why = verb(model, torch.arange(5)).batchnorm_report[0].why
    assert "a Embedding, which is not affine in one input" in why
    assert "register" not in why
