"""Random numbers that hang on a key (seed, epoch, example or place) alone, not on what came before."""

from __future__ import annotations

import random
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Key = tuple[int, ...]  # what the random numbers of an example or a batch hang on: seed, epoch, place


class Seeded:
    """A map-style dataset whose examples draw from generators seeded by a key and their index, in whatever process."""

    def __init__(self, given: Any, key: Key) -> None:
        self.given, self.key = given, key

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, index: Any) -> Any:
        with own_random_numbers() as seeded:
            seeded((*self.key, _number_of(index)))
            return self.given[index]

    def __getitems__(self, indices: list[Any]) -> Drawn:
        several = getattr(self.given, "__getitems__", None)  # torch's protocol; a Subset has it, and passes it on
        items = Drawn()
        with own_random_numbers() as seeded:
            for index in indices:
                seeded((*self.key, _number_of(index)))
                items.append(several([index])[0] if several else self.given[index])
        items.key = (*self.key, *map(_number_of, indices))
        return items


class Drawn(list[Any]):
    """Examples, and what their batch's own random numbers hang on."""

    key: Key = ()


class Collated:
    """A function that collates, which may draw too, as MixUp does."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, items: Any) -> Any:
        if not isinstance(items, Drawn):
            return self.collate(items)
        with own_random_numbers() as seeded:
            seeded(items.key)
            return self.collate([*items])


def _number_of(index: Any) -> int:
    return index if isinstance(index, int) else zlib.crc32(repr(index).encode())


def seed_of(*numbers: int) -> int:
    """A seed of its own for each tuple; torch's generator on the CPU looks at the low 32 bits alone."""
    found = 0
    for number in numbers:
        found = (found * 1_000_003 + number) % 2**32
    return found


def seed_all(number: int, seed_torch: Callable[[int], Any] = torch.manual_seed) -> None:
    """Torch's generators, Python's and, where it is there, NumPy's."""
    seed_torch(number)
    random.seed(number)
    numpy: Any = sys.modules.get("numpy")
    if numpy:
        numpy.random.seed(number)


@contextmanager
def own_random_numbers() -> Iterator[Callable[[Key], None]]:
    """Seed torch's, Python's and NumPy's generators by a key inside; restore them afterwards."""
    numpy: Any = sys.modules.get("numpy")
    before = torch.get_rng_state(), random.getstate(), numpy and numpy.random.get_state()
    try:
        yield lambda key: seed_all(seed_of(*key), torch.default_generator.manual_seed)
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        if numpy:
            numpy.random.set_state(before[2])
