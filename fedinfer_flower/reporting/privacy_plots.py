"""The figures on differential privacy: accuracy by epsilon, and epsilon by queries.

As in `plots`: cleaned results in, a matplotlib Figure out, markers and dashes repeat colours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedinfer_flower.reporting.axes import (
    BLACK,
    BLUE,
    GREEN,
    GRID,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    legend_below,
    new_figure,
    percent_axis,
    short_label,
)
from fedinfer_flower.reporting.contents import points_by_protection
from fedinfer_flower.reporting.formats import as_epsilon, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "MAX_EPSILON_LINES",
    "epsilon_lines",
    "epsilon_plot",
    "meter_line",
    "meter_plot",
]

MAX_EPSILON_LINES = 6
_MAX_TICKS = 12
_HEADROOM = 1.08
_MAX_LINEAR_RATIO = 20

# No plain "--": that is the reference.
_STYLES: tuple[tuple[str, str, Any], ...] = (
    (BLUE, "o", "-"),
    (VERMILLION, "s", "-."),
    (GREEN, "^", ":"),
    (ORANGE, "D", (0, (7, 2, 1, 2, 1, 2))),
    (PURPLE, "v", (0, (2, 1))),
    (SKY, "P", (0, (9, 1))),
)


def _on_log_axis(value: float) -> bool:
    return math.isfinite(value) and value > 0


def epsilon_lines(results: Mapping[str, Any]) -> dict[str, list[tuple[float, Mapping[str, Any]]]]:
    """Return the lines of `epsilon_plot`: protection to points by growing epsilon.

    Points without place on a logarithmic axis, and protections beyond the first
    `MAX_EPSILON_LINES`, are in the table only.
    """
    lines = {}
    for name, points in points_by_protection(results).items():
        shown = [(epsilon, point) for epsilon, point in points.items() if _on_log_axis(epsilon)]
        if shown:
            lines[name] = sorted(shown, key=lambda pair: pair[0])
    return dict(list(lines.items())[:MAX_EPSILON_LINES])


def _log_ticks(axis: Axes, values: Sequence[float]) -> None:
    """Put ticks at measured values, far enough apart to be read."""
    gap = math.log(max(values) / min(values)) / _MAX_TICKS
    shown: list[float] = []
    for value in sorted(set(values)):
        if not shown or math.log(value / shown[-1]) >= gap:
            shown.append(value)
    axis.set_xscale("log")
    axis.set_xticks(shown, [f"{value:.6g}" for value in shown])
    axis.set_xticks([], minor=True)


def epsilon_plot(results: Mapping[str, Any]) -> Figure:
    """Draw accuracy over epsilon a query, a line a protection, and accuracy without noise."""
    figure, (axis,) = new_figure(3.7)
    lines = epsilon_lines(results)
    reference = results["epsilon_reference"]
    if reference is not None:
        axis.axhline(
            number(reference["accuracy"]),
            color=BLACK,
            linestyle="--",
            linewidth=1,
            label=short_label(reference["label"]),
        )
    for (name, points), (colour, marker, dashes) in zip(lines.items(), _STYLES, strict=False):
        x = [epsilon for epsilon, _ in points]
        low, y, high = (
            [number(point[key]) for _, point in points] for key in ("low", "accuracy", "high")
        )
        axis.vlines(x, low, high, color=colour, linewidth=1, alpha=0.6)
        axis.plot(
            x,
            y,
            color=colour,
            marker=marker,
            markersize=5,
            linestyle=dashes,
            linewidth=1.5,
            label=short_label(name),
        )
    _log_ticks(axis, [epsilon for points in lines.values() for epsilon, _ in points])
    percent_axis(axis, along="y")
    axis.set_xlabel("epsilon a query (small: more noise)")
    axis.set_ylabel("accuracy and 95 % interval")
    legend_below(figure, axis, 2)
    return figure


def meter_line(results: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Return the points of `meter_plot`: distinct queries and epsilon, by growing queries."""
    meter = results["epsilon_meter"]
    points = [
        (number(point["queries"]), number(point["epsilon"]))
        for point in (meter["points"] if meter else ())
    ]
    return sorted(
        (queries, epsilon)
        for queries, epsilon in points
        if _on_log_axis(queries) and math.isfinite(epsilon)
    )


def _spending_axis(axis: Axes, values: Sequence[float], cap: float) -> None:
    """Let y begin at zero, or be logarithmic where the cap would else lie on the floor."""
    low, high = min(values), max(values)
    if not (low > 0 and high > _MAX_LINEAR_RATIO * cap):
        axis.set_ylim(0, _HEADROOM * high or 1)
        axis.set_ylabel("epsilon in total")
        return
    axis.set_yscale("log")
    decades = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    # Own labels: matplotlib would write its powers as formulas.
    axis.set_yticks([10.0**n for n in decades], [f"{10.0**n:g}" for n in decades])
    axis.set_yticks([], minor=True)
    axis.set_ylabel("epsilon in total (logarithmic)")


def meter_plot(results: Mapping[str, Any]) -> Figure:
    """Draw the epsilon that one site has spent over distinct queries, and its cap."""
    figure, (axis,) = new_figure(3.2)
    points = meter_line(results)
    queries, spent = [n for n, _ in points], [epsilon for _, epsilon in points]
    axis.plot(queries, spent, "o-", color=BLUE, markersize=4, label="spent by one site")
    cap = number(results["epsilon_meter"]["cap"])
    if math.isfinite(cap):
        axis.axhline(cap, color=VERMILLION, linestyle="--", label=f"cap: {as_epsilon(cap)}")
    _spending_axis(axis, [value for value in (*spent, cap) if math.isfinite(value)], cap)
    _log_ticks(axis, queries)
    axis.grid(axis="y", color=GRID, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.set_xlabel("distinct queries (logarithmic)")
    legend_below(figure, axis, 2)
    return figure
