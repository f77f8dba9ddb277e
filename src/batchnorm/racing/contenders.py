"""The contenders: what each changes against ``baseline``, and nothing more. A new contender is one row.

Goes to: ``trainer.py``, which trains them, and to the printed rules. Data only: no loops here.
Source of bn, bn-x5, bn-x30 and bn-x5-sigmoid: Ioffe & Szegedy 2015, Section 4.2.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Contender:
    """A way to train the task's network.

    Args:
        name: as on the command line.
        network: keywords for the task's model function, on top of its defaults.
        learning_rate: initial learning rate, times the baseline's.
        tuned: its learning rate is its own, chosen by ``--tune``; ``learning_rate`` holds until then.
        weight_decay: L2 penalty, times the task's.
        nesterov: Nesterov's momentum in place of the classical one.
        schedule: name of a row of ``trainer.SCHEDULES``.
        budget: steps, as a share of the baseline's; the learning rate decays over them, to zero in the linear schedule.
        plateau_budget: the same under ``--full``, where the baseline runs to its plateau; default: ``budget``.
        average: decay per step of an exponential average of the weights, which is what is evaluated; 0: none.
        recalibrate: training examples for the population statistics, re-estimated before each evaluation; 0: none.
    """

    name: str
    network: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 1.0
    tuned: bool = False
    weight_decay: float = 1.0
    nesterov: bool = False
    schedule: str = "linear"
    budget: float = 1.0
    plateau_budget: float | None = None
    average: float = 0.0
    recalibrate: int = 0


BN: dict[str, Any] = {"batch_norm": True}  # before each nonlinearity
POPULATION: dict[str, Any] = {"recalibrate": 2_000}  # what BN is evaluated with, Algorithm 2
PAPER: dict[str, Any] = {"weight_decay": 1 / 5, "budget": 1 / 6} | POPULATION  # Section 4.2.1: decay 6 times faster
FAST: dict[str, Any] = {
    "tuned": True,
    "nesterov": True,
    "weight_decay": 10.0,
    "budget": 0.18,
    "plateau_budget": 0.07,
}

CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("baseline", tuned=True),
        Contender("bn", BN, plateau_budget=0.5, **POPULATION),
        Contender("bn-x5", BN | {"dropout": False}, learning_rate=5, **PAPER),
        Contender("bn-x30", BN | {"dropout": False}, learning_rate=30, **PAPER),
        Contender("sigmoid", {"activation": "sigmoid"}, plateau_budget=0.5),
        Contender("bn-x5-sigmoid", BN | {"dropout": False, "activation": "sigmoid"}, learning_rate=5, **PAPER),
        Contender("accelerated", BN | {"dropout": False}, learning_rate=2, **FAST, **POPULATION),
        Contender("accelerated-without-bn", {"dropout": False}, learning_rate=1 / 4, **FAST),
    )
}
DEFAULT = ("baseline", "bn-x5", "accelerated")
