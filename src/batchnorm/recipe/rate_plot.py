"""The plot of a learning-rate range test."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from batchnorm.recipe.range_test import RateTest

BLUE, GREY = "#0072b2", "#999999"


def draw(found: RateTest, axes: Axes) -> None:
    """Each batch's loss as a dot, the smoothed loss as a line, the suggested rate named."""
    axes.plot(found.rates, found.losses, ".", color=GREY, markersize=4)
    axes.plot(found.rates, found.smoothed, color=BLUE, linewidth=2)
    axes.axvline(found.rate, color="black", linewidth=1)
    axes.set_xscale("log")
    fallen = found.smoothed.index(min(found.smoothed)) + 1  # what comes behind may be many times that
    top, bottom = max(found.smoothed[:fallen]), min(found.losses)
    axes.set_ylim(bottom - 0.05 * (top - bottom), top + 0.15 * (top - bottom))
    axes.annotate(
        f"{found.rate:.2g} ", (found.rate, 0.98), xycoords=("data", "axes fraction"), ha="right", va="top",
        fontweight="bold",
    )  # fmt: skip
    axes.set_title(f"The loss falls fastest at a learning rate of {found.rate:.2g}", loc="left")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss of a batch (line: moving average)")
    axes.spines[["top", "right"]].set_visible(False)


def save(found: RateTest, path: str | os.PathLike[str]) -> None:
    """The plot as a file, in the format of its suffix."""
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    draw(found, figure.add_subplot())
    figure.savefig(path)
