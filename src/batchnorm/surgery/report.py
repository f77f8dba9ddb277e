"""Reports of changes to a model, layer by layer, with the layers left alone: ``model.batchnorm_report``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Row(NamedTuple):
    """``layer``: its name in the model; ``done``: what became of it; ``why``: with what, or why it was left alone."""

    layer: str
    done: str
    why: str


class Report(list[Row]):
    """Rows, printable as a table; ``norms``: of affine layers, the batch normalization layer that follows, by names."""

    def __init__(self, rows: Iterable[Row] = (), norms: Mapping[str, str] | None = None) -> None:
        super().__init__(rows)
        self.norms = dict(norms or {})

    def of(self, done: str) -> list[str]:
        """The layers of which this became."""
        return [row.layer for row in self if row.done == done]

    def __str__(self) -> str:
        rows = [Row("layer", "done", "why"), *self]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        return "\n".join(f"{row.layer:{widths[0]}}  {row.done:{widths[1]}}  {row.why}" for row in rows)


LEFT = "left alone"
