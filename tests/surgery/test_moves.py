"""surgery/moves.py, by what fold makes of it: channels that stay channels on the way between two layers, or do not."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from surgery.test_fold import assert_same, shaken
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.surgery.moves import moved, noted


class Through(nn.Module):
    """Two layers and a function between them."""

    def __init__(self, first: nn.Module, between: Any, second: nn.Module, then: Any = lambda x: x) -> None:
        super().__init__()
        self.first, self.between, self.second, self.then = first, between, second, then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.second(self.between(self.first(x))))


class Transpose(nn.Module):
    """As time-series libraries have it."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(*self.dims).contiguous()


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2) * 1.5


BEFORE: dict[str, tuple[nn.Module, Any, nn.Module, tuple[int, ...]]] = {
    "transposed": (nn.Linear(5, 6), lambda y: y.transpose(1, 2), nn.BatchNorm1d(6), (2, 7, 5)),
    "a module that transposes": (nn.Linear(5, 6), Transpose(1, 2), nn.BatchNorm1d(6), (2, 7, 5)),
    "permuted, reshaped with a copy": (
        nn.Linear(5, 6), lambda y: y.permute(0, 2, 1).reshape(2, 6, 7, 1), nn.BatchNorm2d(6), (2, 7, 5),
    ),
    "x.mT": (nn.Linear(5, 6), lambda y: y.mT, nn.BatchNorm1d(6), (2, 7, 5)),
    "rows": (nn.Linear(5, 6), lambda y: y.view(-1, y.shape[-1]), nn.BatchNorm1d(6), (2, 7, 5)),
    "rows of four dimensions": (nn.Linear(5, 6), lambda y: y.flatten(0, 2), nn.BatchNorm1d(6), (2, 3, 4, 5)),
    "squeezed": (nn.Conv2d(1, 6, (4, 1)), lambda y: y.squeeze(2), nn.BatchNorm1d(6), (2, 1, 4, 9)),
    "places flattened": (nn.Conv2d(3, 6, 3), lambda y: y.flatten(2), nn.BatchNorm1d(6), (2, 3, 5, 5)),
    "unsqueezed": (nn.Conv1d(3, 6, 3), lambda y: y.unsqueeze(-1), nn.BatchNorm2d(6), (2, 3, 5)),
    "indexed with None": (nn.Conv1d(3, 6, 3), lambda y: y[:, :, None], nn.BatchNorm2d(6), (2, 3, 5)),
    "transposed convolution": (
        nn.ConvTranspose1d(4, 6, 3, groups=2), lambda y: y[..., None].squeeze(-1), nn.BatchNorm1d(6), (2, 4, 5),
    ),
    "as DCGAN begins: several channels are one": (
        nn.Linear(5, 24), lambda y: y.view(-1, 6, 2, 2), nn.BatchNorm2d(6), (2, 5),
    ),
    "places dropped": (nn.Conv1d(3, 6, 3), lambda y: y[:, :, 0], nn.BatchNorm1d(6), (2, 3, 5)),
    "channels dropped": (nn.Conv1d(3, 8, 3), lambda y: y[:, 1:7], nn.BatchNorm1d(6), (2, 3, 5)),
    "channels shuffled": (
        nn.Conv1d(3, 6, 3), lambda y: y.unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2), nn.BatchNorm1d(6),
        (2, 3, 5),
    ),
    "dropout in eval": (
        nn.Conv1d(3, 6, 3), lambda y: F.dropout(y, 0.5, training=False), nn.BatchNorm1d(6), (2, 3, 5),
    ),
    "dropout modules": (
        nn.Conv1d(3, 6, 3), nn.Sequential(nn.Dropout(0.5), nn.Identity(), nn.Dropout(0.0)), nn.BatchNorm1d(6),
        (2, 3, 5),
    ),
    "batch normalization": (nn.Conv2d(3, 6, 1), bn.BatchNorm2d(6), nn.BatchNorm2d(6), (2, 3, 4, 4)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", BEFORE)
def test_into_the_layer_before(case: str, dtype: torch.dtype) -> None:
    first, between, second, shape = BEFORE[case]
    model, x = shaken(Through(first, between, second, torch.tanh), dtype), torch.randn(shape, dtype=dtype)
    folded = bn.fold(model, x)
    assert folded.batchnorm_report.of("folded") == [row.layer for row in folded.batchnorm_report]
    assert folded.batchnorm_report[-1].why == "into first, before it"
    assert_same(model, folded, x, {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.15}[dtype])


AFTER: dict[str, tuple[nn.Module, Any, nn.Module, tuple[int, ...]]] = {
    "transposed": (nn.BatchNorm1d(6), lambda y: y.transpose(1, 2), nn.Linear(6, 3), (2, 6, 5)),
    "flattened": (nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(54, 3), (2, 6, 3, 3)),
    "pooled by an index": (nn.BatchNorm1d(6), lambda y: y[:, :, -1], nn.Linear(6, 3), (2, 6, 5)),
    "repeated": (nn.BatchNorm1d(6), lambda y: y[:, :, None].expand(-1, -1, 4), nn.Conv1d(6, 3, 2), (2, 6)),
    "batch normalization": (nn.BatchNorm1d(6), nn.BatchNorm1d(6), nn.Conv1d(6, 4, 3, groups=2), (2, 6, 5)),
}


@pytest.mark.parametrize("case", AFTER)
def test_into_the_layer_after(case: str) -> None:
    first, between, second, shape = AFTER[case]
    model, x = shaken(Through(first, between, second)), torch.randn(shape, dtype=torch.float64)
    folded = bn.fold(model, x)
    assert all(row.why == "into second, after it" for row in folded.batchnorm_report)
    assert_same(model, folded, x)


NOT: dict[str, tuple[nn.Module, Any, nn.Module, tuple[int, ...], str]] = {
    "a product": (nn.Linear(5, 6), Scaled(), nn.BatchNorm1d(6), (2, 7, 5), "it reads between, which has no weights"),
    "ReLU of values that happen to be positive": (
        nn.Linear(5, 6), lambda y: F.relu(y), nn.BatchNorm1d(6), (2, 5), r"it reads relu\(\), which has no weights",
    ),
    "a maximum": (
        nn.Conv1d(3, 6, 1), lambda y: F.max_pool1d(y, 1, 2), nn.BatchNorm1d(6), (2, 3, 5), "",
    ),
    "a larger maximum": (
        nn.Conv1d(3, 6, 1), lambda y: F.max_pool1d(y, 2), nn.BatchNorm1d(6), (2, 3, 5), r"it reads max_pool1d\(\)",
    ),
    "sorted": (nn.Conv1d(3, 6, 1), lambda y: y.sort(2)[0], nn.BatchNorm1d(6), (2, 3, 5), r"it reads sort\(\)"),
    "padded": (nn.Conv1d(3, 6, 1), lambda y: F.pad(y, (1, 1)), nn.BatchNorm1d(6), (2, 3, 5), r"it reads pad\(\)"),
    "places are channels": (
        nn.Linear(5, 6), lambda y: y, nn.BatchNorm1d(7), (2, 7, 5), "a channel of first before it goes to several",
    ),
    "mixed": (
        nn.Conv1d(3, 6, 1), lambda y: y.reshape(2, 5, 6), nn.BatchNorm1d(5), (2, 3, 5), "goes to several of its own",
    ),
    "rounded": (
        nn.Linear(5, 6), lambda y: y.bfloat16().double(), nn.BatchNorm1d(6), (2, 5), r"it reads bfloat16\(\)",
    ),
    "random": (
        nn.Linear(5, 6), lambda y: F.dropout(y, 0.5, training=True) * 0 + 1, nn.BatchNorm1d(6), (2, 5), r"it reads add",
    ),
    "several tensors": (
        nn.Linear(5, 12), lambda y: torch.chunk(y, 2, 1)[0], nn.BatchNorm1d(6), (2, 5), r"it reads chunk\(\)",
    ),
    "filled where something is": (
        nn.Linear(5, 6), lambda y: torch.where(y > -1e9, y, torch.zeros_like(y)), nn.BatchNorm1d(6), (2, 5), "where",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT)
def test_what_does_more_than_move_values(case: str) -> None:
    first, between, second, shape, why = NOT[case]
    model, x = shaken(Through(first, between, second)), torch.rand(shape, dtype=torch.float64)
    state = torch.get_rng_state()
    folded = bn.fold(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    (row,) = folded.batchnorm_report
    assert row.done == ("left alone" if why else "folded")
    assert re.search(why, row.why)
    assert_same(model, folded, x)


class ReadTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(5, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x).transpose(1, 2)
        return self.norm(y) + y


def test_what_is_read_on_the_way_is_said() -> None:
    model, x = shaken(ReadTwice()), torch.randn(2, 7, 5, dtype=torch.float64)
    folded = bn.fold(model, x)
    assert folded.batchnorm_report[0].why == "transpose() before it is read by add() too; its output goes to add()"
    assert_same(model, folded, x)


def test_modules_with_hooks_on_the_way_are_left_alone() -> None:
    model = shaken(nn.Sequential(nn.Linear(5, 6), nn.Identity(), nn.BatchNorm1d(6)))
    seen: list[Tensor] = []
    model[1].register_forward_hook(lambda module, args, out: seen.append(out))
    folded = bn.fold(model, torch.randn(2, 5, dtype=torch.float64))
    assert folded.batchnorm_report[0].why.startswith("it reads 1, which has no weights to fold into")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_where_each_value_came_from(dtype: torch.dtype) -> None:
    """More places than a narrow dtype has whole numbers."""
    shape = (3, 70, 40)
    found = moved(torch.transpose, noted((torch.zeros(shape), 1, 2), {}), shape, dtype)
    assert torch.equal(found, torch.arange(3 * 70 * 40).view(shape).transpose(1, 2))
    assert moved(torch.neg, noted((torch.zeros(shape),), {}), shape, dtype) is None
    assert noted((torch.zeros(2), object()), {}) is None
