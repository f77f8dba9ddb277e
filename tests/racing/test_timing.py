"""racing/timing.py: contenders take turns."""

from typing import Any

import pytest
from racing import toy

from batchnorm.racing.plan import make_plan
from batchnorm.racing.timing import WARM_UP, time_steps
from batchnorm.racing.trainer import Trainer


def test_contenders_take_turns_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    step = Trainer.step

    def watched(trainer: Trainer) -> Any:
        order.append(trainer.run.contender.name)
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", watched)
    plan = make_plan(toy.task(), spec="racing.toy:task", seeds=1)
    times = time_steps(toy.task(), plan.runs(), rounds=3, steps=2)
    names = [run.contender.name for run in plan.runs()]
    assert order[len(names) * WARM_UP :] == [name for _ in range(3) for name in names for _ in range(2)]
    for time in times.values():
        assert time.steps == 6
        assert 0 < time.quartiles[0] <= time.median <= time.quartiles[1]
    assert times["baseline"].preparation < times["accelerated"].preparation  # which re-estimates statistics
