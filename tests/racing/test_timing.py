"""racing/timing.py: contenders take turns."""

from typing import Any

import pytest
from racing import toy

from batchnorm.racing.contenders import CONTENDERS
from batchnorm.racing.events import Run
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
    plan = make_plan(toy.task(), spec="racing.toy:task", seeds=1, contenders=["baseline", "sgd", "bn-x5"])
    times = time_steps(toy.task(), plan.runs(), rounds=3, steps=2)
    names = [run.contender.name for run in plan.runs()]
    assert order[len(names) * WARM_UP :] == [name for _ in range(3) for name in names for _ in range(2)]
    for time in times.values():
        assert time.steps == 6
        assert 0 < time.quartiles[0] <= time.median <= time.quartiles[1]
    assert times["baseline"].preparation < times["sgd"].preparation  # which re-estimates statistics


@pytest.mark.parametrize(("budget", "taken"), [(2, 2), (8, 8), (60, 60), (110, 110), (5000, 110)])
def test_timing_takes_no_more_steps_than_training(budget: int, taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, preparations = [], []
    monkeypatch.setattr(Trainer, "step", lambda trainer: steps.append(trainer))
    monkeypatch.setattr(Trainer, "prepare", lambda trainer: preparations.append(trainer))
    runs = [Run(CONTENDERS[name], 0, 0.1, budget, 2) for name in ("baseline", "sigmoid")]
    times = time_steps(toy.task(), runs, rounds=10, steps=10)
    assert taken - 8 < len(steps) / 2 <= taken
    assert len(preparations) == 2 * 4
    assert times["baseline"].steps >= 2
