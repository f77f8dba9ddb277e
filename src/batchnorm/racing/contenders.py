"""The contenders: what each changes against the training as it is, and nothing more. A new contender is one row.

Data only: no loops here.
Source of bn, bn-x5, bn-x30 and bn-x5-sigmoid: Ioffe & Szegedy 2015, Section 4.2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import nn

from batchnorm.racing.changes import CHANGES
from batchnorm.racing.errors import RaceError
from batchnorm.recipe.recipe import FAST, PAPER, SGD, Recipe


@dataclass(frozen=True)
class Contender:
    """A way to train the task's network: what it changes of the training as it is.

    Args:
        name: for tables and plots.
        change: what becomes of the network: a name of ``changes.CHANGES``, or ``change(model, example)``, which returns
            another model.
        recipe: what else changes, as ``batchnorm.accelerate`` has it; ``learning_rate`` is times the task's.
        network: keywords for the task's model function, on top of its defaults.
        tuned: its learning rate is its own, chosen by ``--tune``; the recipe's holds until then.
        speeds: the recipe's ``decay_speed`` in a mode where it is another; of built-in tasks ``tuned.json`` has some.
        recalibrate: training examples for the population statistics, re-estimated before each evaluation; 0: none.
        control: name of the contender without batch normalization that it is held against (docs/race.md, rule 9); of
            such a one, the same in more steps.

    Raises:
        RaceError: (a ValueError) an unknown change.

    Example:
        >>> from batchnorm import RECIPES, Recipe
        >>> Contender("x10", "with-bn", recipe=Recipe(learning_rate=10, decay_speed=4)).budget
        0.25
    """

    name: str
    change: str | Callable[[nn.Module, Any], nn.Module] = "nothing"
    recipe: Recipe = field(default_factory=Recipe)
    network: dict[str, Any] = field(default_factory=dict)
    tuned: bool = False
    speeds: dict[str, float] = field(default_factory=dict)
    recalibrate: int = 0
    control: str | None = None

    def __post_init__(self) -> None:
        if not (callable(self.change) or self.change in CHANGES):
            raise RaceError(
                f"contender {self.name!r}: unknown change {self.change!r}. Known: {', '.join(CHANGES)}; or a function "
                "of model and example."
            )

    @property
    def budget(self) -> float:
        """Steps, as a share of the baseline's; the learning rate decays over them."""
        return 1 / self.recipe.decay_speed

    @property
    def is_the_same(self) -> bool:
        """Whether it is the training as it is but for its kernels: then its steps are the baseline's, to noise."""
        return self.change == "fused" and self.recipe == Recipe()

    def at_speed(self, decay_speed: float | None) -> Contender:
        """The same, decaying faster or slower; None: as it is."""
        return self if decay_speed is None else replace(self, recipe=replace(self.recipe, decay_speed=decay_speed))

    def values(self) -> dict[str, Any]:
        """Itself as JSON has it; a function by its name."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        found["recipe"] = {f.name: getattr(self.recipe, f.name) for f in fields(Recipe)}
        if callable(self.change):
            found["change"] = name_of_function(self.change)
        return found


def name_of_function(value: Any) -> str:
    """Of a function or class, or what else JSON cannot tell, its name."""
    return str(getattr(value, "__qualname__", type(value).__name__))


SIGMOID: dict[str, Any] = {"network": {"activation": "sigmoid"}}
ESTIMATED: dict[str, Any] = {"change": "with-bn", "recalibrate": 2_000}  # population statistics, Algorithm 2
OWN: dict[str, Any] = {"tuned": True, "speeds": {"quick": 2.5}}
MUON = replace(FAST, decay_speed=6)

CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("baseline", tuned=True),
        Contender("short", **OWN, recipe=Recipe(decay_speed=6)),
        Contender("bn", **ESTIMATED),
        Contender("bn-x5", **ESTIMATED, recipe=PAPER, control="short"),
        Contender("bn-x30", **ESTIMATED, recipe=replace(PAPER, learning_rate=30)),
        Contender("sigmoid", **SIGMOID),
        Contender("bn-x5-sigmoid", **ESTIMATED, **SIGMOID, recipe=PAPER),
        Contender("sgd", **ESTIMATED, **OWN, recipe=SGD, control="short"),
        Contender("fast", **ESTIMATED, **OWN, recipe=MUON, control="fast-without-bn"),
        Contender("fast-without-bn", "without-bn", **OWN, recipe=MUON, control="muon-without-bn"),
        Contender("muon-without-bn", "without-bn", recipe=replace(MUON, decay_speed=1), tuned=True),
        # Of a network that has batch normalization already.
        Contender("as-is", tuned=True),
        Contender("without-bn", "without-bn", tuned=True),
        Contender("paper", **ESTIMATED, recipe=PAPER, control="without-bn"),
        Contender("ghost", "ghost"),
        Contender("renorm", "renorm"),
        Contender("group-norm", "group-norm", tuned=True),
        Contender("layer-norm", "layer-norm", tuned=True),
        Contender("fused", "fused"),
    )
}
PLAIN = {
    "quick": ("baseline", "sgd", "short"),
    "default": ("baseline", "short", "bn-x5", "sgd", "fast", "fast-without-bn"),
    "full": (
        "baseline", "short", "bn", "bn-x5", "bn-x30", "sigmoid", "bn-x5-sigmoid", "sgd", "fast", "fast-without-bn",
        "muon-without-bn",
    ),
}  # fmt: skip
NORMALIZED = {
    "quick": ("as-is", "without-bn", "fast"),
    "default": ("as-is", "without-bn", "paper", "fast", "fast-without-bn", "fused"),
    "full": ("as-is", "without-bn", "paper", "fast", "fast-without-bn", "ghost", "renorm", "group-norm", "layer-norm",
             "fused"),
}  # fmt: skip
BASELINES = ("baseline", "as-is")
