"""What the figures share: size, colours, axes.

Colours are those of Okabe and Ito, which colour-blind readers tell apart. Figures are narrow,
so that they stay readable on a phone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedinfer_flower.reporting.extra import import_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "BLACK",
    "BLUE",
    "GREEN",
    "GREY",
    "GRID",
    "ORANGE",
    "PURPLE",
    "SKY",
    "VERMILLION",
    "legend_below",
    "new_figure",
    "percent_axis",
    "rows_on_y",
    "short_label",
]

BLACK, GREY, GRID = "#000000", "#767676", "#dddddd"
BLUE, VERMILLION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
SKY, PURPLE = "#56B4E9", "#CC79A7"
_MAX_LABEL = 30
_WIDTH = 5.2


def new_figure(height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Return an empty figure of the page's width and its axes, side by side."""
    figure = import_extra("matplotlib.figure").Figure(
        figsize=(_WIDTH, max(height, 1.6)), layout="constrained"
    )
    axes = figure.subplots(1, columns, squeeze=False, sharey=columns > 1)
    return figure, list(axes[0])


def short_label(label: str) -> str:
    """Fit a name into the margin, on one line."""
    flat = " ".join(label.split())
    if len(flat) <= _MAX_LABEL:
        return flat
    # Long names of sites tend to differ at their ends.
    half = _MAX_LABEL // 2
    return f"{flat[:half]}…{flat[1 - half :]}"


def rows_on_y(axis: Axes, labels: Sequence[str]) -> None:
    """Name the rows of an axis, from the top."""
    axis.set_yticks(range(len(labels)), [short_label(label) for label in labels])
    axis.set_ylim(max(len(labels), 1) - 0.4, -0.6)


def percent_axis(axis: Axes, *, along: str) -> None:
    """Make `along`, "x" or "y", run from 0 to 100 %."""
    ticks = [0, 0.25, 0.5, 0.75, 1]
    texts = ["0 %", "25 %", "50 %", "75 %", "100 %"]
    if along == "x":
        axis.set_xlim(-0.02, 1.02)
        axis.set_xticks(ticks, texts)
    else:
        axis.set_ylim(-0.02, 1.02)
        axis.set_yticks(ticks, texts)
    axis.grid(axis="x" if along == "x" else "y", color=GRID, linewidth=0.6)
    axis.set_axisbelow(True)


def legend_below(figure: Figure, axis: Axes, columns: int) -> None:
    """Put the legend under everything, in so many columns."""
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)
