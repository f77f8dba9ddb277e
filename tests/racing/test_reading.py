"""racing/reading.py: the same examples in the same order, whoever reads them."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from racing import toy

from batchnorm.racing.contenders import CONTENDERS
from batchnorm.racing.errors import UnreadableFile
from batchnorm.racing.events import Run
from batchnorm.racing.examples import Whole
from batchnorm.racing.reading import Order, read
from batchnorm.racing.trainer import Trainer


class Numbers:
    """Examples that say who read them; -1 cannot be read."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if (indices == 13).any():
            raise UnreadableFile("thirteen cannot be read")
        info = torch.utils.data.get_worker_info()
        return indices * 10, torch.full_like(indices, -1 if info is None else info.id)


def batches() -> Iterator[Any]:
    yield from (((0, 0), part) for part in torch.arange(20, 50).split(5))


def test_reading_processes_give_what_this_process_would() -> None:
    alone, ahead = (list(read(Whole(Numbers()), batches(), readers=readers)) for readers in (0, 2))
    assert torch.equal(torch.cat([x for x, _ in alone]), torch.arange(20, 50) * 10)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(alone, ahead, strict=True))
    assert {int(who[0]) for _, who in alone} == {-1}
    assert {int(who[0]) for _, who in ahead} == {0, 1}


@pytest.mark.parametrize("readers", [0, 1])
def test_what_cannot_be_read_ends_in_its_own_words(readers: int) -> None:
    stream = read(Whole(Numbers()), [((0, 0), part) for part in torch.arange(10, 20).split(2)], readers=readers)
    assert next(stream)[0].tolist() == [100, 110]
    with pytest.raises(UnreadableFile, match=r"^thirteen cannot be read$"):
        next(stream)


def test_reading_ahead_leaves_random_numbers_alone() -> None:
    """Dropout must draw the same, whenever reading began: else a resumed run would differ."""
    before = torch.random.get_rng_state()
    next(read(Whole(Numbers()), batches(), readers=1))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_process_of_the_pool_reads_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have no children."""
    import multiprocessing

    monkeypatch.setattr(multiprocessing.current_process(), "_config", {"daemon": True})
    assert [int(who[0]) for _, who in read(Whole(Numbers()), batches(), readers=2)] == [-1] * 6


def test_ranks_share_each_batch_and_begin_where_they_are_told() -> None:
    order = Order(seed=5, examples=50, batch_size=8)
    for step, *parts in zip(range(4, 12), *(order.shares(4, rank, 2) for rank in (0, 1)), strict=False):
        batch = order.batch(step)
        assert [key for key, _ in parts] == [(5, step // 6)] * 2
        assert torch.equal(torch.stack([part for _, part in parts], 1).flatten(), batch)
        assert torch.equal(batch, order.epoch(step // 6)[8 * (step % 6) :][:8])


def curve(readers: int, steps: int, state: dict[str, Any] | None = None) -> tuple[list[float], dict[str, Any]]:
    trainer = Trainer(replace(toy.task(), readers=readers), Run(CONTENDERS["bn-x5"], 0, 0.1, 10, 5))
    if state is not None:
        trainer.load_state_dict(copy.deepcopy(state))
    trainer.seed_noise()
    losses = [trainer.step() for _ in range(steps)]
    return [*losses, trainer.evaluate()], trainer.state_dict()


def test_with_readers_the_numbers_are_those_without_also_when_resumed() -> None:
    plain, state = curve(0, 6)
    assert curve(2, 6)[0] == plain
    assert curve(2, 4, state)[0] == curve(0, 4, state)[0]
