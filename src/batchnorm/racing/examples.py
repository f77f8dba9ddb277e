"""A task's examples, of every kind, as batches: the same ones for every contender of a seed, and for a resumed run.

Random augmentation inside them draws from generators that are seeded per seed, epoch and example.
"""

from __future__ import annotations

import copy
import hashlib
import math
import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Subset, TensorDataset, default_collate

from batchnorm.common.errors import one_line
from batchnorm.racing.errors import RaceError
from batchnorm.racing.seeds import Collated, Key, Seeded, own_random_numbers, seed_of


class Examples(Protocol):
    """Examples that are read by their indices."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, key: Key) -> Any:
        """The batch of these examples; ``key``: seed and epoch."""

    def part(self, indices: Tensor, *, test: bool) -> Examples:
        """Some of them; ``test``: to score on, not to train on."""

    def fingerprint(self) -> str:
        """Tells them from others, without reading what is augmented at random."""


def examples_of(what: str, given: Any, collate: Callable[[list[Any]], Any] | None = None) -> Examples | Loader:
    """A user's examples as one of the classes below.

    Raises:
        RaceError: it is none of them, or empty, or its first examples cannot be read.
    """
    if isinstance(given, Whole | Items | Loader):
        return given
    if isinstance(given, DataLoader):
        return Loader(what, lambda: given)
    if isinstance(given, IterableDataset):
        raise RaceError(f"{what} is an IterableDataset, which needs a DataLoader: DataLoader(dataset, batch_size=...).")
    if callable(given) and not hasattr(given, "__getitem__"):
        return Loader(what, given)
    if isinstance(given, type):
        raise RaceError(f"{what} must be a dataset, not its class: {given.__name__}(...).")
    if not (hasattr(given, "__len__") and hasattr(given, "__getitem__")):
        raise RaceError(
            f"{what} must be a dataset with a length (torch.utils.data.Dataset), a DataLoader or a function that makes "
            f"one (got {type(given).__name__})."
        )
    if len(given) == 0:
        raise RaceError(f"{what} is empty.")
    found: Examples = Whole(given) if collate is None and _gives_batches(given) else Items(given, collate)
    try:
        found.batch(torch.arange(min(2, len(given))), (0, 0))
    except RaceError:
        raise
    except Exception as error:
        raise RaceError(
            f"{what}: its first two examples make no batch ({one_line(error)}). Examples are tensors, "
            "arrays, numbers, or tuples and dicts of them; for others pass collate=, as to a DataLoader."
        ) from None
    return found


def _gives_batches(given: Any) -> bool:
    """Whether ``given[tensor of indices]`` is a batch: tensors in memory, and what has ``part``, as folders do."""
    if isinstance(given, Subset):
        return type(given) is Subset and _gives_batches(given.dataset)
    return type(given) is TensorDataset or callable(getattr(given, "part", None))


class Whole:
    """Examples in memory, or that say themselves how a batch is read: ``given[indices]`` is a batch."""

    def __init__(self, given: Any, indices: Tensor | None = None) -> None:
        while isinstance(given, Subset):
            own = torch.as_tensor(list(given.indices))
            indices, given = own if indices is None else own[indices], given.dataset
        self.given, self.indices = given, indices

    def __len__(self) -> int:
        return len(self.given if self.indices is None else self.indices)

    def batch(self, indices: Tensor, key: Key) -> Any:
        return self.given[indices if self.indices is None else self.indices[indices]]

    def part(self, indices: Tensor, *, test: bool) -> Whole:
        own = indices if self.indices is None else self.indices[indices]
        given = self.given
        return Whole(given.part(own, test=test)) if callable(getattr(given, "part", None)) else Whole(given, own)

    def fingerprint(self) -> str:
        if callable(getattr(self.given, "fingerprint", None)):
            return f"{self.given.fingerprint()} {_of_tensor(self.indices)}"
        some = torch.arange(0, len(self), max(1, len(self) // 100))
        return f"{len(self)} {[_of_tensor(part) for part in self.batch(some, (0, 0))]}"


class Items:
    """Any map-style dataset: read example by example, each with random numbers of its own, and collated."""

    def __init__(self, given: Any, collate: Callable[[list[Any]], Any] | None = None) -> None:
        self.given, self.collate = given, collate or default_collate

    def __len__(self) -> int:
        return len(self.given)

    def batch(self, indices: Tensor, key: Key) -> Any:
        return Collated(self.collate)(Seeded(self.given, key).__getitems__(indices.tolist()))

    def part(self, indices: Tensor, *, test: bool) -> Items:
        return Items(Subset(self.given, indices.tolist()), self.collate)

    def fingerprint(self) -> str:
        return _of_dataset(self.given)


class Loader:
    """A DataLoader of the user's, or a function that makes one: its batches are a step's, in its own order.

    At the beginning of each epoch its generators are seeded, and before each example of a map-style dataset, else
    before each batch, all others, so that order and augmentation are the same for every contender, and for a run that
    goes on in the middle of an epoch: what came before is read again, and dropped. Samplers that have ``set_epoch`` are
    told. Each epoch has its own reading processes, if any: those of ``persistent_workers`` serve one epoch at a time,
    with random numbers left by the last.
    """

    def __init__(self, what: str, make: Callable[[], Any]) -> None:
        self.what, self.make = what, make
        loader = self._made()
        try:
            self.batches = len(loader)
        except TypeError:
            raise RaceError(f"{what}: its DataLoader has no length, which tells how long an epoch is.") from None
        if self.batches == 0:
            raise RaceError(f"{what} is empty.")
        dataset: Any = getattr(loader, "dataset", None)
        size = getattr(loader, "batch_size", None) or 1
        self.examples = len(dataset) if hasattr(dataset, "__len__") else self.batches * size
        self.batch_size = max(1, self.examples // self.batches) if size == 1 else size

    def __len__(self) -> int:
        return self.examples

    def _made(self) -> Any:
        loader = self.make()
        if not hasattr(loader, "__iter__"):
            raise RaceError(f"{self.what} gave a {type(loader).__name__}, not a DataLoader or the like.")
        if isinstance(loader, DataLoader):
            loader = copy.copy(loader)
            loader._iterator = None
            if not may_have_children():
                loader.num_workers, loader.timeout = 0, 0
        return loader

    def epoch(self, seed: int, epoch: int, most: int | None = None) -> Iterator[Any]:
        """The batches of an epoch; of a map-style dataset those of about so many examples, all over the epoch."""
        with own_random_numbers() as seeded:
            seeded((seed, epoch))
            loader = self._made()
            sampler = getattr(loader, "batch_sampler", None)
            inner = sampler.sampler if isinstance(sampler, BatchSampler) else getattr(loader, "sampler", None)
            for holder in (loader, sampler, inner):
                if isinstance(getattr(holder, "generator", None), torch.Generator):
                    holder.generator.manual_seed(seed_of(seed, epoch))  # type: ignore[union-attr]
                if callable(getattr(holder, "set_epoch", None)):
                    holder.set_epoch(epoch)  # type: ignore[union-attr]
            if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
                given = "sampler" if loader.batch_sampler is None else "batch_sampler"
                order = [*islice(getattr(loader, given), self.batches)]  # reading processes make it begin twice
                wanted = len(order) if most is None else min(len(order), math.ceil(most / self.batch_size))
                order = [order[i * len(order) // wanted] for i in range(wanted)]  # they may be sorted by class
                own = {"dataset": Seeded(loader.dataset, (seed, epoch)), "collate_fn": Collated(loader.collate_fn)}
                loader.__dict__.update(own | {given: order})  # of a copy: a DataLoader refuses a new dataset
            batches = iter(loader)
        for place in range(self.batches):
            with own_random_numbers() as seeded:
                seeded((seed, epoch, place))
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield batch

    def last_of_one(self) -> Any:
        """The batch of one example that ends each epoch, where the loader has such; else None."""
        loader = self._made()
        sampler = getattr(loader, "batch_sampler", None)
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            return None
        if type(sampler) is not BatchSampler or sampler.drop_last or not hasattr(sampler.sampler, "__len__"):
            return None
        if sampler.batch_size == 1 or len(sampler.sampler) % sampler.batch_size != 1:  # type: ignore[arg-type]
            return None
        return Collated(loader.collate_fn)(Seeded(loader.dataset, (0, 0)).__getitems__([next(iter(sampler.sampler))]))

    def fingerprint(self) -> str:
        return f"{self.batches} {_of_dataset(getattr(self._made(), 'dataset', None))}"


def reads_the_same(examples: Examples | Loader) -> bool:
    """Whether the first examples, read again from the same seed, are the same ones."""

    def first() -> Any:
        if isinstance(examples, Loader):
            return next(examples.epoch(0, 0), None)
        return examples.batch(torch.arange(min(2, len(examples))), (0, 0))

    return bool(_told(first()) == _told(first()))


def may_have_children() -> bool:
    """Whether processes that read can be started here: not in those of ``pool.py``, which fill the cores with runs."""
    return not multiprocessing.current_process().daemon


def _of_dataset(dataset: Any) -> str:
    """By its class, length and what it holds in tensors and arrays; no example is read, which may be augmented."""
    if callable(getattr(dataset, "fingerprint", None)):
        return str(dataset.fingerprint())
    held: list[Any] = [type(dataset).__qualname__, len(dataset) if hasattr(dataset, "__len__") else None]
    for name, value in sorted(getattr(dataset, "__dict__", {}).items()):
        if name == "_fingerprint":  # of Hugging Face's datasets
            held.append(value)
        elif name in ("dataset", "datasets"):
            held += [_of_dataset(each) for each in (value if isinstance(value, list | tuple) else [value])]
        elif name == "tensors":
            held += [_of_tensor(each) for each in value]
        elif isinstance(value, Tensor | list | range) or hasattr(value, "__array__"):
            held.append((name, _of_tensor(value)))
    return hashlib.sha256(repr(held).encode()).hexdigest()


def _of_tensor(values: Any) -> str:
    """By its length and a hundred of its entries."""
    if values is None or not hasattr(values, "__len__") or (hasattr(values, "ndim") and values.ndim == 0):
        return repr(values)
    some = values[:: max(1, len(values) // 100)]
    listed = some.tolist() if hasattr(some, "tolist") else _told(some)
    return hashlib.sha256(f"{len(values)} {listed!r}".encode()).hexdigest()


def _told(value: Any) -> Any:
    """A value that is the same in every process: numbers, texts, arrays, lists and dicts of them; else the class."""
    if isinstance(value, tuple | list | range):
        return [_told(each) for each in value]
    if isinstance(value, Mapping):
        return {str(key): _told(each) for key, each in value.items()}
    if isinstance(value, Tensor) or hasattr(value, "__array__"):
        return _of_tensor(value)
    return value if isinstance(value, int | float | str) else type(value).__qualname__
