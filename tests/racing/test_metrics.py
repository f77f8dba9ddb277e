"""racing/metrics.py: a score is that of all test examples, in whatever batches and on however many ranks they come."""

from collections import UserDict
from dataclasses import make_dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import on_ranks
from racing import toy
from torch import Tensor, nn
from torchmetrics import MeanMetric, MeanSquaredError
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MultilabelAUROC

import batchnorm as bn
from batchnorm.racing.calls import NotCalled, arguments_of, target_of
from batchnorm.racing.errors import RaceError
from batchnorm.racing.metrics import Mean, accuracy, count_of, metric_of


def outputs_and_targets(n: int = 103) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 4, generator=generator), torch.randint(4, (n,), generator=generator)


def hits(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(1) == target).double().mean()


def worst(outputs: Tensor, targets: Tensor) -> float:
    """Not a mean of batches: the examples must be there at once."""
    return float(nn.functional.cross_entropy(outputs, targets, reduction="none").median())


METRICS: dict[str, Any] = {
    "accuracy": "accuracy",
    "loss": "loss",
    "function": worst,
    "lambda": lambda outputs, targets: {"a": float(outputs.sum())}["a"],
    "torchmetrics, counts": MulticlassAccuracy(4, average="micro"),
    "torchmetrics, keeps all": MulticlassAUROC(4),
}


def score(given: Any, batches: list[tuple[Tensor, Tensor]]) -> float:
    metric = metric_of(given, nn.functional.cross_entropy)
    for output, target in batches:
        metric.update(output, target)
    return float(metric.compute())


def cut(sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    output, target = outputs_and_targets()
    return list(zip(output.split(sizes), target.split(sizes), strict=True))


def expected(name: str) -> float:
    output, target = outputs_and_targets()
    values = {
        "accuracy": hits(output, target),
        "torchmetrics, counts": hits(output, target),
        "loss": nn.functional.cross_entropy(output, target),
        "function": worst(output, target),
        "lambda": output.sum(),
        "torchmetrics, keeps all": MulticlassAUROC(4)(output, target),
    }
    return float(values[name])


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("sizes", [[103], [50, 50, 3], [1, 102]], ids=str)
def test_of_all_examples_whatever_the_last_batch_is(name: str, sizes: list[int]) -> None:
    assert score(METRICS[name], cut(sizes)) == pytest.approx(expected(name), abs=2e-6)


@pytest.mark.parametrize("name", METRICS)
def test_an_evaluation_begins_anew(name: str) -> None:
    """Also of a metric object that its owner has used."""
    given = METRICS[name]
    if name.startswith("torchmetrics"):
        given = given.clone()
        given.update(torch.eye(4), torch.tensor([1, 2, 3, 0]))
    assert score(given, cut([103])) == score(given, cut([103])) == pytest.approx(expected(name), abs=2e-6)


def scores_of_a_rank(rank: int, ranks: int, names: list[str]) -> dict[str, float]:
    output, target = outputs_and_targets()
    output, target = output[rank::ranks], target[rank::ranks]  # 52 and 51, in batches of 20
    batches = list(zip(output.split(20), target.split(20), strict=True))
    return {name: score(METRICS[name], batches) for name in names}


def test_every_rank_gets_what_one_process_would_of_all_examples() -> None:
    first, second = on_ranks(2, scores_of_a_rank, list(METRICS))
    assert first == second
    assert first == pytest.approx({name: expected(name) for name in METRICS}, abs=2e-6)


def race_score_of_a_rank(rank: int, ranks: int, kind: str) -> float:
    from batchnorm.racing.contenders import CONTENDERS
    from batchnorm.racing.events import Run
    from batchnorm.racing.trainer import Trainer

    return Trainer(task_scored_by(kind), Run(CONTENDERS["baseline"], 0, 0.1, 10, 2)).evaluate()


class Dicts(nn.Module):
    """Outputs as transformers' models have them, in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = toy.model(dropout=0.0)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"hidden": x, "logits": self.inner(x)}


def task_scored_by(kind: str) -> bn.Task:
    parts: dict[str, Any] = {
        "default": {},
        "of dicts": {"model": Dicts},
        "torchmetrics": {"metric": MulticlassAUROC(4)},
        "function": {"metric": worst},
    }
    model = parts[kind].pop("model", lambda: toy.model(dropout=0.0))
    return bn.Task("toy", model, toy.examples(200, 0), toy.examples(501, 1), batch_size=20, steps=10, **parts[kind])


@pytest.mark.parametrize("kind", ["default", "of dicts", "torchmetrics", "function"])
def test_two_ranks_score_a_network_as_one_process_does(kind: str) -> None:
    """501 test examples: the ranks' shares are not of one size."""
    first, second = on_ranks(2, race_score_of_a_rank, kind)
    assert first == second == pytest.approx(race_score_of_a_rank(0, 1, kind), abs=2e-6)


def test_dicts_of_outputs_and_targets_are_joined_by_key() -> None:
    output, target = outputs_and_targets()
    seen: list[Any] = []
    metric = metric_of(lambda outputs, targets: seen.append((outputs, targets)) or 0.0, nn.functional.cross_entropy)
    for o, t in zip(output.split(50), target.split(50), strict=True):
        metric.update({"a": o, "b": (o, o.sum())}, {"c": t, "names": [str(n) for n in t.tolist()]})
    metric.compute()
    outputs, targets = seen[0]
    assert torch.equal(outputs["a"], output)
    assert torch.equal(outputs["b"][0], output)
    assert outputs["b"][1].shape == (3,)
    assert torch.equal(targets["c"], target)
    assert targets["names"] == [str(n) for n in target.tolist()]


@pytest.mark.parametrize("sizes", [[4, 4], [4, 4, 1]], ids=str)
@pytest.mark.parametrize("kind", [list, tuple])
def test_lists_of_an_entry_per_example_become_one_list(kind: Any, sizes: list[int]) -> None:
    """As detection has them: boxes, as many as there are in an image; the form must not hang on the last batch."""
    boxes = [{"boxes": torch.full((n % 3, 4), float(n))} for n in range(sum(sizes))]
    seen: list[Any] = []
    metric = metric_of(lambda outputs, targets: seen.append((outputs, targets)) or 0.0, nn.functional.cross_entropy)
    for start, size in zip((0, 4, 8), sizes, strict=False):
        metric.update(kind(boxes[start : start + size]), boxes[start : start + size])
        assert count_of(boxes[start : start + size]) == size
    metric.compute()
    for joined in seen[0]:
        assert [len(one["boxes"]) for one in joined] == [len(one["boxes"]) for one in boxes]


@pytest.mark.parametrize(
    ("given", "loss", "name", "falls"),
    [
        (None, None, "accuracy", False),
        (None, nn.CrossEntropyLoss(), "loss", True),
        ("loss", None, "loss", True),
        ("accuracy", nn.CrossEntropyLoss(), "accuracy", False),
        (worst, None, "worst", False),
        (lambda outputs, targets: 0.0, None, "metric", False),
        (MulticlassAUROC(4), None, "MulticlassAUROC", False),
        (MultilabelAUROC(4), nn.BCEWithLogitsLoss(), "MultilabelAUROC", False),
        (MeanSquaredError(), nn.MSELoss(), "MeanSquaredError", True),
        (MeanMetric(), None, "MeanMetric", False),  # torchmetrics does not tell
    ],
)
def test_what_is_scored_by_default_and_which_way_is_better(given: Any, loss: Any, name: str, falls: bool) -> None:
    task = bn.Task("toy", toy.model, toy.examples(100, 0), toy.examples(50, 1), loss, given)
    assert (task.score_name, task.score_falls) == (name, falls)
    both = {"metric_name": "mine", "lower_is_better": not falls}
    task = bn.Task("toy", toy.model, toy.examples(100, 0), toy.examples(50, 1), loss, given, **both)
    assert (task.score_name, task.score_falls) == ("mine", not falls)


@pytest.mark.parametrize("given", ["f1", 3, ["accuracy"]], ids=repr)
def test_what_is_no_metric_is_said_by_name(given: Any) -> None:
    with pytest.raises(ValueError, match=r"Task 'toy': metric (is|must be)"):
        bn.Task("toy", toy.model, toy.examples(100, 0), toy.examples(50, 1), metric=given)


def test_a_batchs_examples_and_targets() -> None:
    x, y = torch.zeros(3, 2), torch.tensor([1, 2, 3])
    assert count_of((x, y)) == count_of({"a": "name", "b": x}) == count_of([torch.tensor(1.0), x]) == 3
    assert count_of("none") == 1
    assert count_of(UserDict(ids=x)) == count_of((UserDict(ids=x), y)) == 3  # transformers' BatchEncoding is one
    assert count_of(make_dataclass("Pair", ["a", "b"])("name", x)) == 3
    assert count_of(SimpleNamespace(num_graphs=4, x=x)) == 4
    assert target_of((x, y)) is y
    assert target_of({"x": x, "label": y}) is y
    assert target_of((x, y, y)) == (y, y)
    assert target_of({"x": x, "labels": y, "y": x}) is y


@pytest.mark.parametrize("value", [0.25, 3.25e-7, -1.5e-10, 1234.5, 0.0, 1.0, float("inf"), float("-inf")])
def test_small_losses_are_not_rounded_away(value: float) -> None:
    metric = Mean(lambda output, target: torch.tensor(value))
    metric.update(torch.zeros(3), torch.zeros(3))
    assert metric.compute() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(
    ("output", "target"),
    [((6, 1), (6, 1)), ((6,), (6,)), ((4, 2, 8, 8), (4, 1, 8, 8)), ((4, 4), (4, 4))],
    ids=str,
)
def test_accuracy_compares_nothing_that_only_broadcasts(output: Any, target: Any) -> None:
    with pytest.raises(RaceError, match=r"accuracy is of outputs \(N, classes, ...\).*give another metric="):
        accuracy(torch.zeros(output), torch.zeros(target))


def test_equal_counts_give_equal_scores() -> None:
    """Sums of float32 means must not tell 50 + 53 from 103."""
    output, target = outputs_and_targets()
    found = set()
    for size in (7, 10, 50, 103):
        metric = Mean(lambda o, t: (o.argmax(1) == t).float().mean())
        for o, t in zip(output.split(size), target.split(size), strict=True):
            metric.update(o, t)
        found.add(metric.compute())
    assert len(found) == 1


class Scaled(nn.Module):
    def forward(self, x: Tensor, /, y: Tensor | None = None, **more: Tensor) -> Tensor:
        return x


class Named(nn.Module):
    def forward(self, x: Tensor, *, scale: float = 1.0, **more: Tensor) -> Tensor:
        return x * scale


def test_what_a_model_is_called_with_is_an_example_in_any_form_that_can_be_one() -> None:
    x, y = torch.zeros(2), torch.ones(2)
    model = Named()
    assert arguments_of(model, lambda: model(x)) is x
    assert arguments_of(model, lambda: model(x, scale=2.0, mask=y)) == {"x": x, "scale": 2.0, "mask": y}
    other = Scaled()
    assert arguments_of(other, lambda: other(x, y)) == (x, y)
    with pytest.raises(NotCalled, match="with keywords beside x, which cannot be one: pass all in order"):
        arguments_of(other, lambda: other(x, y=y))
