"""racing/examples.py: every kind of examples, the same for every contender of a seed and for a resumed run."""

import random
import warnings
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from racing import toy
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate, random_split

import batchnorm as bn
from batchnorm.racing.contenders import CONTENDERS
from batchnorm.racing.errors import RaceError
from batchnorm.racing.events import Evaluation, Resumed, Run
from batchnorm.racing.examples import Items, Loader, Whole, examples_of
from batchnorm.racing.plan import make_plan
from batchnorm.racing.reading import stream
from batchnorm.racing.trainer import Trainer
from batchnorm.racing.training import train
from batchnorm.racing.trial import try_contenders


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


class InOrder(torch.utils.data.IterableDataset[Any]):
    """Says that it is as long as it is, or longer."""

    def __init__(self, length: int) -> None:
        self.data, self.length = Noisy(300), length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Any:
        return (self.data[index] for index in range(300))


class Buckets(torch.utils.data.Sampler[list[int]]):
    """A batch sampler with a generator of its own, and an epoch."""

    def __init__(self) -> None:
        self.generator, self.epochs = torch.Generator(), [0]

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __len__(self) -> int:
        return 50

    def __iter__(self) -> Any:
        return iter(torch.randperm(1000, generator=self.generator).view(50, 20).tolist())


class Nothing(torch.utils.data.IterableDataset[int]):
    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Any:
        return iter(())


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
    "a loader with its own batches": {"train": DataLoader(Noisy(), batch_sampler=Buckets())},
    "a loader of a stream": {"train": DataLoader(InOrder(300), 20)},
    "a loader of a stream that ends early": {"train": DataLoader(InOrder(400), 20)},
    "a loader with persistent workers": {
        "train": DataLoader(Noisy(200), 20, shuffle=True, num_workers=1, persistent_workers=True)
    },
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


def mixed(items: list[Any]) -> Any:
    """Batches that are augmented, as MixUp does."""
    x, y = default_collate(items)
    return x * torch.rand(()), y


@pytest.mark.parametrize("own_order", [True, False])
def test_batches_are_the_same_with_reading_processes_and_without(own_order: bool) -> None:
    """The command reads in its training processes; ``bn.race`` as the loader says."""

    def batches(workers: int) -> list[torch.Tensor]:
        order: dict[str, Any] = {"batch_sampler": Buckets()} if own_order else {"batch_size": 20, "shuffle": True}
        data = Subset(Noisy(), range(1000))
        loader = Loader("t", lambda: DataLoader(data, num_workers=workers, collate_fn=mixed, **order))
        return [batch[0] for batch in islice(loader.epoch(3, 1), 4)]

    here, there = batches(0), batches(2)
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
    assert not torch.equal(here[0], here[1])


def test_population_statistics_do_not_disturb_reading_that_has_begun() -> None:
    """Persistent workers serve one epoch at a time."""
    task = replace(toy.plain(), **KINDS["a loader with persistent workers"])
    trainers = [Trainer(task, Run(CONTENDERS[name], 0, 0.05, 60, 5)) for name in ("baseline", "bn-x5")]
    for _ in range(7):
        batches = [next(trainer.stream) for trainer in trainers]
        assert torch.equal(batches[0][0], batches[1][0])
        trainers[1].evaluate(2)
    for trainer in trainers:
        trainer.close()


def test_samplers_are_told_the_epoch_and_a_stream_without_batches_ends() -> None:
    sampler = Buckets()
    batches = stream(Loader("t", lambda: DataLoader(Noisy(), batch_sampler=sampler)), 0, 0)
    for _ in range(101):
        next(batches)
    assert sampler.epochs == [0, 0, 1, 2]
    with pytest.raises(RaceError, match="has a length of 3 batches, and gave none"):
        next(stream(Loader("t", lambda: DataLoader(Nothing(), 1)), 0, 0))


@pytest.mark.parametrize("kind", ["a loader of a stream", "a loader with its own batches", "loader with a generator"])
def test_loaders_of_every_kind_pass_the_trial_before_a_race(kind: str, tmp_path: Path) -> None:
    """Which asks for the last batch of an epoch, where there can be one of one example."""
    task = replace(toy.task(), **KINDS[kind])
    results = bn.race(task, ["baseline", "bn-x5"], seeds=1, steps=12, out=tmp_path / "o")
    assert [row["name"] for row in results["contenders"]] == ["baseline", "bn-x5"]


def test_a_test_loader_is_read_until_the_examples_are_there() -> None:
    trainer = Trainer(
        replace(toy.task(), test=DataLoader(toy.examples(500, 1), 64)), Run(CONTENDERS["baseline"], 0, 0.1, 9, 2)
    )
    assert [sum(len(y) for _, y in trainer._test_batches(most)) for most in (2, 100, 2_500, None)] == [
        64,
        128,
        500,
        500,
    ]


def test_fingerprint_is_the_same_in_another_process_whatever_a_dataset_holds() -> None:
    """Objects are told by their addresses, which are not."""

    class Pictures(Noisy):
        def __init__(self, n: int = 50) -> None:
            super().__init__(n)
            self.samples = [(object(), int(y), x) for x, y in zip(self.x, self.y, strict=True)]
            self.part = "train"  # an attribute of theirs, not the method of ours

    first, second, other = (replace(toy.task(), train=data) for data in (Pictures(), Pictures(), Pictures(49)))
    assert isinstance(first.training, Items)
    assert first.facts() == second.facts() != other.facts()


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
    first = task.facts()
    assert data.read == 0
    assert first == replace(toy.task(), train=Noisy()).facts()
    changed = Noisy()
    changed.x = changed.x + 1
    prints = {replace(toy.task(), train=train).facts()["training data"] for train in (
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
        (InOrder(300), r"train is an IterableDataset, which needs a DataLoader"),
        (Noisy, r"train must be a dataset, not its class: Noisy\(\.\.\.\)"),
        (lambda: 3, "train gave a int, not a DataLoader"),
        (lambda: DataLoader(Endless()), "train: its DataLoader has no length"),
    ],
)
def test_what_is_no_data_is_said_in_one_line(given: Any, message: str) -> None:
    with pytest.raises(RaceError, match=message) as error:
        examples_of("train", given)
    assert "\n" not in str(error.value)


def test_some_of_a_loaders_examples_are_from_all_over_it() -> None:
    """They may be sorted by class."""
    data = TensorDataset(torch.arange(640.0)[:, None], torch.arange(640) // 64)
    task = replace(toy.task(), test=DataLoader(data, 20))
    trainer = Trainer(task, Run(CONTENDERS["baseline"], 0, 0.1, 10, 2))
    labels = torch.cat([batch[1] for batch in trainer._test_batches(200)])
    assert len(labels) == 200
    assert {*labels.tolist()} == {*range(10)}


@pytest.mark.parametrize("where", ["dataset", "sampler", None])
def test_examples_that_are_others_each_time_are_told(where: str | None) -> None:
    class Own(Noisy):
        generator = np.random.default_rng()

        def __getitem__(self, index: int) -> Any:
            return self.x[index] + float(self.generator.normal()), int(self.y[index])

    class Mine(torch.utils.data.Sampler[int]):
        generator = np.random.default_rng()

        def __len__(self) -> int:
            return 1000

        def __iter__(self) -> Any:
            return iter(self.generator.permutation(1000).tolist())

    train: Any = {"dataset": Own(), "sampler": DataLoader(Noisy(), 20, sampler=Mine()), None: Noisy()}[where]
    task = replace(toy.task(), train=train)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try_contenders(task, make_plan(task, spec="toy", contenders=["baseline"]))
    assert ["read again from the same seed" in str(w.message) for w in caught] == [True] * (where is not None)
