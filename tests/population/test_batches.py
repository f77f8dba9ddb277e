"""Batches of every kind go to the device and into the model as training has them."""

import dataclasses
from collections import OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import TensorDataset
from transformers import BatchEncoding

import batchnorm as bn
from batchnorm.population.batches import call_with_inputs, placed

META = torch.device("meta")  # a device that every machine has
X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))


class Graph:
    """As of PyG: an object of the user's, with ``to``."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: Any) -> "Graph":
        return Graph(self.x.to(device))


class Moves(Graph):
    """Moves itself, and returns nothing."""

    def to(self, device: Any) -> None:  # type: ignore[override]
        self.x = self.x.to(device)


class Pair(NamedTuple):
    x: Tensor
    label: Any


@dataclasses.dataclass(frozen=True)
class Example:
    x: Tensor
    name: str = "a"


class Two(tuple[Any, ...]):
    """Is not made from a sequence."""

    def __new__(cls, a: Any, b: Any) -> "Two":
        return super().__new__(cls, (a, b))


class ReadOnly(Mapping[str, Tensor]):
    def __init__(self, **items: Tensor) -> None:
        self.items_ = items

    def __getitem__(self, key: str) -> Tensor:
        return self.items_[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.items_)

    def __len__(self) -> int:
        return len(self.items_)


@pytest.mark.parametrize(
    ("batch", "inner"),
    [
        (X, lambda b: b),
        ([X, 1], lambda b: b[0]),
        ((X, None), lambda b: b[0]),
        ({"x": X, "y": "text"}, lambda b: b["x"]),
        (OrderedDict(x=X), lambda b: b["x"]),
        (defaultdict(list, x=X), lambda b: b["x"]),
        (UserDict(x=X), lambda b: b["x"]),
        (BatchEncoding({"x": X}), lambda b: b["x"]),
        (Pair(X, 3), lambda b: b.x),
        (Example(X), lambda b: b.x),
        (Graph(X), lambda b: b.x),
        (Moves(X), lambda b: b.x),
        (pack_sequence([X]), lambda b: b.data),
        (X.max(0), lambda b: b.values),
        (Two(X, 1), lambda b: b[0]),
        (deque([X], 3), lambda b: b[0]),
        ({"deep": [(Pair(Example(X), Graph(X)),)]}, lambda b: b["deep"][0][0].x.x),
        ([{"deep": Graph(X)}], lambda b: b[0]["deep"].x),
    ],
    ids=lambda v: type(v).__name__,
)
def test_everything_in_a_batch_that_can_be_moved_is(batch: Any, inner: Callable[[Any], Tensor]) -> None:
    moved = placed(batch, META)
    assert inner(moved).device == META
    assert type(moved) is type(batch)
    if not isinstance(batch, Moves | BatchEncoding):  # which move themselves
        assert inner(batch) is X or inner(batch).device == X.device


def test_a_mapping_that_cannot_be_changed_becomes_a_dict() -> None:
    batch = ReadOnly(x=X)
    assert placed(batch, META)["x"].device == META
    assert batch["x"] is X


class ByName(nn.Module):
    """As transformers' models are called."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = bn.BatchNorm1d(4)

    def forward(self, x: Tensor, mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        y: Tensor = self.norm(x if mask is None else x[mask])
        return y


class AsItIs(ByName):
    """As many training scripts have it."""

    def forward(self, batch: Any) -> Tensor:  # type: ignore[override]
        y: Tensor = self.norm(batch["x"] if isinstance(batch, Mapping) else batch.x)
        return y


WHERE = torch.arange(12) > 4


@pytest.mark.parametrize(
    "wrap", [lambda m: m, torch.optim.swa_utils.AveragedModel, torch.compile], ids=["plain", "averaged", "compiled"]
)
@pytest.mark.parametrize("kind", [dict, BatchEncoding, UserDict])
def test_a_mapping_is_given_by_name_where_forward_takes_its_keys(
    kind: Callable[..., Any], wrap: Callable[[nn.Module], nn.Module]
) -> None:
    batch = kind({"x": X, "mask": WHERE})
    for batches in ([batch], [(batch, "label")]):
        model = ByName()
        wrapped = wrap(model) if wrap is not torch.compile else torch.compile(model, backend="eager")
        bn.recalibrate(wrapped, batches)
        norm = wrapped.module.norm if wrap is torch.optim.swa_utils.AveragedModel else model.norm
        torch.testing.assert_close(norm.running_mean, X[WHERE].mean(0))
    model = AsItIs()
    bn.recalibrate(wrap(model) if wrap is not torch.compile else model, [kind({"x": X, "mask": WHERE})])


@pytest.mark.parametrize(
    "batch",
    [Graph(X), Example(X), {"x": X, "other": 1}, {"x": X, 3: 1}, (Example(X), 1), UserDict(x=X)],
    ids=["object", "dataclass", "other key", "number as key", "pair", "mapping"],
)
def test_other_batches_are_given_as_they_are(batch: Any) -> None:
    model = AsItIs()
    bn.recalibrate(model, (b for b in [batch]), device="cpu")
    torch.testing.assert_close(model.norm.running_mean, X.mean(0))


@pytest.mark.parametrize("made", [torch.jit.script, lambda m: torch.jit.trace(m, X)])
def test_programs_take_mappings_too(made: Callable[[nn.Module], nn.Module]) -> None:
    """They tell less about their arguments."""

    class InProgram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.program, self.norm = made(nn.Linear(4, 4)), bn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(self.program(x))
            return y

    model = InProgram()
    bn.recalibrate(model, [{"x": X}])
    torch.testing.assert_close(model.norm.running_mean, model.program(X).mean(0))
    program = made(nn.Linear(4, 4))
    torch.testing.assert_close(call_with_inputs(program, (X, 1)), program(X))
    with pytest.raises(RuntimeError, match="forward"):
        call_with_inputs(program, {"image": X})  # the program says what it takes


def test_loaders_without_a_length() -> None:
    class Stream(torch.utils.data.IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            return iter(X)

    for batches in (torch.utils.data.DataLoader(Stream(), batch_size=5), (part for part in X.split(5))):
        layer = bn.BatchNorm1d(4)
        bn.recalibrate(layer, batches, progress=True)
        torch.testing.assert_close(layer.running_mean, X.mean(0))


def test_named_tuples_and_packed_sequences() -> None:
    model = nn.Sequential(bn.BatchNorm1d(4))
    bn.recalibrate(model, [Pair(X, "label")])
    torch.testing.assert_close(model[0].running_mean, X.mean(0))

    class Packed(ByName):
        def forward(self, packed: Any) -> Tensor:  # type: ignore[override]
            y: Tensor = self.norm(packed.data)
            return y

    for batch in (pack_sequence([X]), (pack_sequence([X]), 1)):
        packed = Packed()
        bn.recalibrate(packed, [batch], device="cpu")
        torch.testing.assert_close(packed.norm.running_mean, X.mean(0))


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"x": X, "y": 1}, r"the batch has x, y, and ByName.forward takes x, mask, labels .*unexpected.*"
                           r"lambda model, batch: model\(x=batch\['x'\]\)"),
        ({"mask": WHERE}, r"missing a required argument: 'x'"),
    ],
)  # fmt: skip
def test_keys_that_forward_does_not_take_are_named(batch: Any, words: str) -> None:
    model = ByName()
    with pytest.raises(TypeError, match=words):
        bn.recalibrate(model, [batch])
    assert model.norm.running_mean.eq(0).all()


def fit(batches: Any) -> object:
    return bn.find_learning_rate(ByName(), batches)


class OfTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        return self.net(x + y) * scale


class OfAPair(OfTwo):
    def forward(self, pair: Any) -> Tensor:  # type: ignore[override]
        x, y = pair.values() if isinstance(pair, Mapping) else pair
        return self.net(x + y)


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        (OfTwo, (X, X)),
        (OfTwo, [X, X]),
        (OfTwo, {"x": X, "y": X}),
        (OfAPair, (X, X)),
        (OfAPair, [X, X]),
        (OfAPair, {"x": X, "y": X}),
        (OfAPair, Pair(X, X)),
        (OfAPair, UserDict(x=X, y=X)),
    ],
)
def test_inputs_are_given_alike_by_every_tool(kind: Callable[[], Any], inputs: Any) -> None:
    model, batches = kind(), [(inputs, torch.randint(2, (len(X),)))]
    bn.recalibrate(model, batches)
    torch.testing.assert_close(model.net[1].running_mean, model.net[0](2 * X).mean(0))
    bn.find_learning_rate(model, batches, steps=20)


@pytest.mark.parametrize("use", [lambda batches: bn.recalibrate(ByName(), batches), fit], ids=["recalibrate", "rate"])
@pytest.mark.parametrize(
    ("batches", "words"),
    [
        (X, r"batches is a Tensor of shape \(12, 4\), whose rows .* pass \[tensor\] .* tensor.split\(size\)"),
        (nn.Parameter(X), r"is a Parameter of shape \(12, 4\), whose rows"),
        (X.numpy(), r"is a ndarray of shape \(12, 4\), whose rows"),
        ({"x": X}, r"is a dict, whose keys .* pass \[batch\]"),
        (BatchEncoding({"x": X}), "is a BatchEncoding, whose keys"),
        ("train.pt", "is a str, whose letters"),
        (TensorDataset(X), r"is a TensorDataset, whose single examples .* pass torch.utils.data.DataLoader"),
    ],
    ids=["tensor", "parameter", "array", "dict", "encoding", "text", "dataset"],
)
def test_a_batch_in_place_of_batches_is_refused(use: Callable[[Any], object], batches: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        use(batches)
