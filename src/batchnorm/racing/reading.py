"""Which examples each step takes, and how they get here: in this process, or ahead of it by reading processes."""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from batchnorm.racing.errors import RaceError
from batchnorm.racing.examples import Examples, Loader, may_have_children
from batchnorm.racing.seeds import Key, seed_of

Wanted = tuple[Key, Tensor]  # seed and epoch; indices


class Order:
    """The batches of a seed: the same for every contender, reshuffled each epoch."""

    def __init__(self, seed: int, examples: int, batch_size: int) -> None:
        self.seed, self.examples, self.batch_size = seed, examples, batch_size
        self._last = (-1, torch.empty(0, dtype=torch.int64))

    def epoch(self, epoch: int) -> Tensor:
        """Indices of all examples, in the order of an epoch."""
        if self._last[0] != epoch:
            generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
            self._last = (epoch, torch.randperm(self.examples, generator=generator))
        return self._last[1]

    def batch(self, number: int) -> Tensor:
        """Indices of a batch."""
        epoch, position = divmod(number, self.examples // self.batch_size)
        return self.epoch(epoch)[position * self.batch_size :][: self.batch_size]

    def shares(self, number: int, rank: int, ranks: int) -> Iterator[Wanted]:
        """Without end, a rank's share of each batch from this one on."""
        while True:
            epoch = number // (self.examples // self.batch_size)
            yield (self.seed, epoch), self.batch(number)[rank::ranks]
            number += 1


def stream(loader: Loader, seed: int, number: int) -> Generator[Any]:
    """Without end, the batches of a user's DataLoader from this one on.

    An epoch has as many as the loader's length says: one that gives fewer is read again until they are there.
    """
    epoch, skip = divmod(number, loader.batches)
    while True:
        place = 0
        while place < loader.batches:
            before = place
            for batch in islice(loader.epoch(seed, epoch), loader.batches - place):
                place += 1
                if place > skip:
                    yield batch
            if place == before:
                raise RaceError(f"{loader.what} has a length of {loader.batches} batches, and gave none.")
        epoch, skip = epoch + 1, 0


def read(examples: Examples, batches: Iterable[Wanted], *, readers: int = 0, pin: bool = False) -> Generator[Any]:
    """The batch of each of the wanted, in their order.

    Args:
        examples: as ``examples_of`` gives them.
        batches: keys and tensors of indices.
        readers: processes that read ahead; 0, or in a process of ``pool.py`` (which fills the cores with runs, and may
            have no children): this process reads each batch when it is asked for.
        pin: put what is read into memory that a GPU copies from.
    """
    if not readers or not may_have_children():
        for key, indices in batches:
            yield examples.batch(indices, key)
        return
    lists: Any = ((key, indices.tolist()) for key, indices in batches)
    loader: Any = DataLoader(
        _Shown(examples),  # type: ignore[arg-type]  # it asks for __getitem__ alone
        batch_size=None,
        sampler=lists,
        num_workers=readers,
        collate_fn=_as_it_is,
        worker_init_fn=_deaf_to_ctrl_c,
        pin_memory=pin,
        generator=torch.Generator(),  # of its own: dropout's random numbers must not hang on when reading began
    )
    for batch in loader:
        if isinstance(batch, RaceError):
            raise batch
        yield batch


class _Shown:
    """The view of reading processes. An error comes back as a value: raised there, it would arrive with their stack."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __getitem__(self, wanted: tuple[Key, list[int]]) -> Any:
        try:
            return self.examples.batch(torch.tensor(wanted[1]), wanted[0])
        except RaceError as error:
            return error


def _as_it_is(batch: Any) -> Any:
    return batch


def _deaf_to_ctrl_c(reader: int) -> None:
    """It ends with the process that it reads for, which says what is to be said."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
