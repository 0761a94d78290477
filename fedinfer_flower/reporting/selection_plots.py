"""The figure of the selection section: accuracy against sites asked."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from typing import TYPE_CHECKING, Any

from fedinfer_flower.reporting.axes import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    legend_below,
    new_figure,
)
from fedinfer_flower.reporting.extra import import_extra
from fedinfer_flower.reporting.formats import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["frontier_lines", "frontier_plot"]

_COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, GREY)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h")


def frontier_lines(results: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Return the points of each selector, by the number of sites asked."""
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for point in results["selection"]["points"]:
        lines.setdefault(point["selector"], []).append(point)
    return {
        name: sorted(points, key=lambda p: number(p["sites_asked"]))
        for name, points in lines.items()
    }


def frontier_plot(results: Mapping[str, Any]) -> Figure:
    """Draw accuracy over the mean number of sites asked, one line a selector."""
    lines = frontier_lines(results)
    figure, (axis,) = new_figure(3.6 + 0.1 * len(lines))
    for (name, points), colour, marker in zip(
        lines.items(), cycle(_COLOURS), cycle(_MARKERS), strict=False
    ):
        axis.plot(
            [number(point["sites_asked"]) for point in points],
            [number(point["accuracy"]) for point in points],
            "-",
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=1,
            label=name,
        )
    everyone = [point for point in lines.get("all", ()) if point["accuracy"] is not None]
    if everyone:
        axis.axhline(number(everyone[0]["accuracy"]), color=BLACK, linestyle="--", linewidth=0.8)
    axis.set_xlim(left=0)
    axis.set_xlabel("sites asked a row, on average")
    # Not from zero: selectors differ by points.
    axis.yaxis.set_major_formatter(import_extra("matplotlib.ticker").PercentFormatter(1.0))
    axis.set_ylabel("accuracy")
    legend_below(figure, axis, 3)
    return figure
