"""An experiment: a claim of the paper, independent runs, and the conclusion from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cell = dict[str, Any]  # the settings of one run, a seed among them where chance matters: plain values
Record = dict[str, Any]  # a cell, and what was measured in it


@dataclass(frozen=True)
class Claim:
    """``sentence``: what is claimed; ``where``: in the paper, or who else; ``confirmed_if``: fixed before any run."""

    name: str
    sentence: str
    where: str
    confirmed_if: str


@dataclass(frozen=True)
class Result:
    """The outcome of an experiment.

    ``confirmed``: whether ``Claim.confirmed_if`` held; ``headline``: the finding with its numbers, in one sentence;
    ``rows``: a table, its keys the headings; ``draw``: draws the picture into an empty figure; ``notes``: what else a
    reader must know.
    """

    confirmed: bool
    headline: str
    rows: Sequence[dict[str, str]]
    draw: Callable[[Figure], None]
    notes: Sequence[str] = ()

    @property
    def verdict(self) -> str:
        return "confirmed" if self.confirmed else "not confirmed"


@dataclass(frozen=True)
class Experiment:
    """``cells(quick, seeds)``: the runs; ``measure(**cell)``: one of them; ``conclude(records)``: what they show.

    ``alone(cell)``: whether it takes times, so that nothing else may run beside it.
    """

    claim: Claim
    cells: Callable[[bool, int], list[Cell]]
    measure: Callable[..., Record]
    conclude: Callable[[list[Record]], Result]
    alone: Callable[[Cell], bool] = lambda cell: False
