"""How the experiments' pictures look: one message in the title, units on the axes, one color per thing throughout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# (color, dash): lightness and dash tell them apart in grey. As in the race.
WITH, WITHOUT = ("#1f77b4", "-"), ("#444444", "--")
OTHER, THIRD = ("#c8102e", "-."), ("#b0a060", ":")


def axes_of(figure: Figure, title: str, x: str, y: str, **options: Any) -> Any:
    """The one set of axes of a figure, with its message."""
    figure.set_size_inches(8, 4.8)
    figure.set_layout_engine("constrained")
    axes = figure.subplots(**options)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if y.startswith(("accuracy", "share")):
        from matplotlib.ticker import PercentFormatter

        axes.yaxis.set_major_formatter(PercentFormatter(1))
    finish(axes)
    return axes


def legend_beside(axes: Any) -> None:
    """The legend beside the axes, for axes that data fills."""
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def finish(axes: Any) -> None:
    """A light grid, no box."""
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
