"""The contenders: what each changes against ``baseline``, and nothing more. A new contender is one row.

Goes to: ``trainer.py``, which trains them, and to the printed rules. Data only: no loops here.
Source of bn, bn-x5, bn-x30 and bn-x5-sigmoid: Ioffe & Szegedy 2015, Section 4.2.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from batchnorm.recipe.recipe import PAPER, Recipe
from batchnorm.recipe.recipe import SGD as FAST


@dataclass(frozen=True)
class Contender:
    """A way to train the task's network.

    Args:
        name: as on the command line.
        batch_norm: ``batchnorm.insert`` puts it into the task's network.
        recipe: what else changes, as ``batchnorm.accelerate`` has it; ``learning_rate`` is times the baseline's.
        network: keywords for the task's model function, on top of its defaults.
        tuned: its learning rate is its own, chosen by ``--tune``; the recipe's holds until then.
        plateau_speed: the recipe's ``decay_speed`` under ``--full``, where the baseline runs to its plateau.
        schedule: name of a row of ``trainer.SCHEDULES``.
        average: decay per step of an exponential average of the weights, which is what is evaluated; 0: none.
        recalibrate: training examples for the population statistics, re-estimated before each evaluation; 0: none.
    """

    name: str
    batch_norm: bool = False
    recipe: Recipe = field(default_factory=Recipe)
    network: dict[str, Any] = field(default_factory=dict)
    tuned: bool = False
    plateau_speed: float | None = None
    schedule: str = "linear"
    average: float = 0.0
    recalibrate: int = 0

    @property
    def budget(self) -> float:
        """Steps, as a share of the baseline's; the learning rate decays over them."""
        return 1 / self.recipe.decay_speed

    def at_speed(self, decay_speed: float | None) -> Contender:
        """The same, decaying faster or slower; None: as it is."""
        return self if decay_speed is None else replace(self, recipe=replace(self.recipe, decay_speed=decay_speed))


BN: dict[str, Any] = {"batch_norm": True, "recalibrate": 2_000}  # evaluated with population statistics, Algorithm 2
SIGMOID: dict[str, Any] = {"network": {"activation": "sigmoid"}}
OWN: dict[str, Any] = {"tuned": True, "plateau_speed": 1 / 0.07}

CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("baseline", tuned=True),
        Contender("bn", **BN, plateau_speed=2),
        Contender("bn-x5", **BN, recipe=PAPER),
        Contender("bn-x30", **BN, recipe=replace(PAPER, learning_rate=30)),
        Contender("sigmoid", **SIGMOID, plateau_speed=2),
        Contender("bn-x5-sigmoid", **BN, **SIGMOID, recipe=PAPER),
        Contender("accelerated", **BN, **OWN, recipe=FAST),
        Contender("accelerated-without-bn", **OWN, recipe=replace(FAST, learning_rate=1)),
    )
}
DEFAULT = ("baseline", "bn-x5", "accelerated")
