"""racing/examples.py: every kind of examples, the same for every contender of a seed and for a resumed run."""

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from racing import toy
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, random_split

import batchnorm as bn
from batchnorm.racing.contenders import CONTENDERS
from batchnorm.racing.errors import RaceError
from batchnorm.racing.events import Evaluation, Resumed, Run
from batchnorm.racing.examples import Items, Loader, Whole, examples_of
from batchnorm.racing.trainer import Trainer, train


class Noisy(Dataset[Any]):
    """Items of 8 numbers, augmented by all three generators; notes what was read."""

    def __init__(self, n: int = 1000, form: str = "tuple") -> None:
        self.x, self.y = toy.examples(n, 0).tensors
        self.form, self.read = form, 0

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        self.read += 1
        x = self.x[index] + 0.1 * torch.randn(8) + 0.1 * random.gauss(0, 1)
        x = x.numpy() + 0.1 * np.random.randn(8).astype("float32")
        y = int(self.y[index])
        if self.form == "dict":
            return {"x": x, "label": y}
        if self.form == "object":
            return Example(torch.from_numpy(x), y)
        return x, y


class Endless(torch.utils.data.IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(int, 1)


@dataclass
class Example:
    x: torch.Tensor
    y: int


@dataclass
class Batch:
    x: torch.Tensor
    y: torch.Tensor


def collated(items: list[Example]) -> Batch:
    return Batch(torch.stack([item.x for item in items]), torch.tensor([item.y for item in items]))


def scores(task: bn.Task, contender: str = "baseline", checkpoint: Path | None = None, stop: int = 10**9) -> list[Any]:
    found: list[Any] = []
    for event in train(task, Run(CONTENDERS[contender], 0, 0.05, 60, 5), checkpoint):
        found += [e for e in (event.curve if isinstance(event, Resumed) else [event]) if isinstance(e, Evaluation)]
        if event.step > stop:
            break
    return [(e.step, e.epochs, e.loss, e.score) for e in found]


def tensors(batch: Any) -> list[torch.Tensor]:
    return [*(batch.values() if isinstance(batch, dict) else batch)]


LOADERS: dict[str, Any] = {
    "loader": lambda: DataLoader(Noisy(), batch_size=20, shuffle=True, drop_last=True),
    "loader with a generator": lambda: DataLoader(
        Noisy(), 20, shuffle=True, generator=torch.Generator().manual_seed(7)
    ),
}
KINDS: dict[str, dict[str, Any]] = {
    "tensors": {"train": toy.examples(1000, 0)},
    "subset": {"train": random_split(toy.examples(1200, 0), [1000, 200], torch.Generator().manual_seed(0))[0]},
    "items": {"train": Noisy()},
    "subset of items": {"train": Subset(Noisy(1200), range(100, 1100))},
    "dicts": {
        "train": Noisy(form="dict"),
        "forward": lambda model, batch: model(batch["x"] if isinstance(batch, dict) else batch[0]),
    },
    "list of pairs": {"train": [(x, int(y)) for x, y in zip(*toy.examples(1000, 0).tensors, strict=True)]},
    "loader": {"train": LOADERS["loader"]},
    "loader with a generator": {"train": LOADERS["loader with a generator"]},
    "a loader itself": {"train": LOADERS["loader"]()},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_numbers_again_and_after_being_stopped_anywhere(kind: str, tmp_path: Path) -> None:
    task = replace(toy.task(), **KINDS[kind])
    whole = scores(task)
    assert whole[-1][3] > whole[0][3]
    random.random()  # whatever was drawn before
    assert scores(replace(toy.task(), **KINDS[kind])) == whole
    scores(task, checkpoint=tmp_path / "state.pt", stop=23)
    assert (tmp_path / "state.pt").exists()
    assert scores(task, checkpoint=tmp_path / "state.pt") == whole


@pytest.mark.parametrize("kind", ["items", "dicts", "loader", "loader with a generator"])
def test_augmentation_is_the_same_for_every_contender_whatever_it_draws_itself(kind: str) -> None:
    """Dropout of the baseline draws from the same generator."""
    seen: dict[str, list[torch.Tensor]] = {}
    for name in ("baseline", "bn-x5"):
        trainer = Trainer(replace(toy.task(), **KINDS[kind]), Run(CONTENDERS[name], 3, 0.05, 60, 5))
        trainer.network.register_forward_pre_hook(
            lambda _, inputs, name=name: seen.setdefault(name, []).append(tensors(inputs[0])[0])
        )
        for _ in range(4):
            trainer.seed_noise()
            trainer.step()
        trainer.close()
    assert all(torch.equal(a, b) for a, b in zip(seen["baseline"], seen["bn-x5"], strict=True))


def test_an_example_is_augmented_anew_in_each_epoch_and_seed_and_alike_in_any_batch() -> None:
    items = Items(Noisy())
    both, alone, again, other = (
        items.batch(torch.tensor(indices), key)[0]
        for indices, key in (([4, 9], (0, 0)), ([9], (0, 0)), ([9], (0, 1)), ([9], (1, 0)))
    )
    assert torch.equal(both[1], alone[0])
    assert not torch.equal(alone, again)
    assert not torch.equal(alone, other)
    assert not torch.equal(both[0] - items.given.x[4], both[1] - items.given.x[9])


def test_reading_leaves_all_generators_as_they_were() -> None:
    before = torch.rand(1, generator=None), random.random(), np.random.rand()
    del before
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[union-attr, index]
    Items(Noisy()).batch(torch.arange(5), (0, 0))
    next(iter(Loader("t", LOADERS["loader"]).epoch(0, 0)))
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[union-attr, index]
    assert torch.equal(states[0], after[0])
    assert states[1:] == after[1:]


def test_fingerprint_reads_nothing_that_is_augmented_and_tells_data_apart() -> None:
    data = Noisy()
    task = replace(toy.task(), train=data)
    data.read = 0
    first = task.fingerprint()
    assert data.read == 0
    assert first == replace(toy.task(), train=Noisy()).fingerprint()
    changed = Noisy()
    changed.x = changed.x + 1
    prints = {replace(toy.task(), train=train).fingerprint() for train in (
        data, changed, Subset(Noisy(), range(500)), Subset(Noisy(), range(500, 1000)), LOADERS["loader"],
    )}  # fmt: skip
    assert len(prints) == 5


def test_subsets_of_tensors_are_read_whole_and_their_parts_are_the_right_ones() -> None:
    data = toy.examples(100, 0)
    inner = Subset(data, list(range(50, 100)))
    found = examples_of("train", Subset(inner, [3, 1, 4]))
    assert isinstance(found, Whole)
    assert torch.equal(found.batch(torch.tensor([2, 0]), (0, 0))[0], data.tensors[0][[54, 53]])
    part = found.part(torch.tensor([1, 2]), test=True)
    assert torch.equal(part.batch(torch.arange(2), (0, 0))[0], data.tensors[0][[51, 54]])


def test_batches_that_are_objects_with_a_collate_of_the_users() -> None:
    task = bn.Task(
        "objects", toy.model, Noisy(form="object"), Noisy(100, form="object"), collate=collated, batch_size=20,
        forward=lambda model, batch: model(batch.x), steps=60,
    )  # fmt: skip
    assert scores(task)[-1][3] > 0.4
    assert scores(replace(task, model=toy.plain().model), "bn-x5")[-1][3] > 0.3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (7, r"train must be a dataset with a length .*DataLoader.*\(got int\)"),
        (TensorDataset(torch.zeros(0, 8)), "train is empty"),
        (Noisy(form="object"), r"its first two examples make no batch \(TypeError: .*pass collate="),
        (lambda: 3, "train gave a int, not a DataLoader"),
        (lambda: DataLoader(Endless()), "train: its DataLoader has no length"),
    ],
)
def test_what_is_no_data_is_said_in_one_line(given: Any, message: str) -> None:
    with pytest.raises(RaceError, match=message) as error:
        examples_of("train", given)
    assert "\n" not in str(error.value)
