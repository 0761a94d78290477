"""The figures of the report, one function each, without pyplot and its global state.

Every function takes cleaned results and returns a matplotlib Figure. Markers and
dashes repeat what the colours say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fedinfer_flower.reporting.axes import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    GRID,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    legend_below,
    new_figure,
    percent_axis,
    rows_on_y,
    short_label,
)
from fedinfer_flower.reporting.contents import summary_rows
from fedinfer_flower.reporting.formats import as_bytes, as_seconds, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "MAX_LINES",
    "MAX_SITES",
    "accuracy_plot",
    "alpha_plot",
    "class_plot",
    "cost_plot",
    "plotted_rules",
    "reliability_plot",
]

MAX_SITES = 40
MAX_LINES = 6
_MAX_LEVEL = 4
_MAX_TICKS = 20
_MAX_NUMBERED_CLASSES = 12

_LINES = (
    (BLUE, "o"),
    (VERMILLION, "s"),
    (GREEN, "^"),
    (ORANGE, "D"),
    (PURPLE, "v"),
    (SKY, "P"),
)
_GROUPS = {
    "site": ("a site alone", GREY, "o"),
    "baseline": ("mean and best site", BLACK, "D"),
    "rule": ("all sites, by rule", SKY, "s"),
    "joint": ("rule of the run, by protection", BLUE, "P"),
    "bound": ("central bound", VERMILLION, "^"),
}


def accuracy_plot(results: Mapping[str, Any]) -> Figure:
    """Draw the accuracy of every way to answer, with 95 % intervals and baselines."""
    rows = summary_rows(results)
    del rows[MAX_SITES : len(results["sites"])]
    figure, (axis,) = new_figure(1.2 + 0.21 * len(rows))
    for group, (label, colour, marker) in _GROUPS.items():
        picked = [
            (position, number(row.accuracy), number(row.low), number(row.high))
            for position, row in enumerate(rows)
            if row.group == group
        ]
        if picked:
            y, x, low, high = np.array(picked).T
            axis.hlines(y, low, high, color=colour, linewidth=1.4)
            axis.plot(x, y, marker, color=colour, markersize=5, label=label)
    best = number(results["best_site"]["accuracy"])
    axis.axvline(best, color=BLACK, linestyle="--", linewidth=0.8, label="best site's accuracy")
    rows_on_y(axis, [row.short or row.label for row in rows])
    for text, row in zip(axis.get_yticklabels(), rows, strict=True):
        text.set_fontweight("bold" if row.chosen else "normal")
    percent_axis(axis, along="x")
    axis.set_xlabel("accuracy and 95 % interval")
    legend_below(figure, axis, 2)
    return figure


def _class_counts(results: Mapping[str, Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return counts of shape (n_sites, n_classes); classes that a site leaves out are 0."""
    sites, n_classes = results["sites"][:MAX_SITES], len(results["classes"])
    counts = np.zeros((max(len(sites), 1), max(n_classes, 1)))
    for row, site in zip(counts, sites, strict=False):
        known = site["class_counts"][:n_classes]
        row[: len(known)] = known
    return counts


def class_plot(results: Mapping[str, Any]) -> Figure:
    """Draw how many training examples of each class each site has."""
    counts = _class_counts(results)
    classes, (n_rows, n_classes) = results["classes"], counts.shape
    figure, (axis,) = new_figure(1.1 + 0.26 * n_rows)
    # The root keeps a handful of examples visible next to thousands; none at all is white.
    shades = np.sqrt(np.where(counts > 0, counts, np.nan))
    image = axis.imshow(
        shades, cmap="Blues", aspect="auto", vmin=0, vmax=max(counts.max(), 1) ** 0.5
    )
    if n_classes <= _MAX_NUMBERED_CLASSES:
        dark = 0.6 * np.sqrt(counts.max())
        for (y, x), count in np.ndenumerate(counts):
            colour = "white" if np.sqrt(count) > dark else "black"
            axis.text(x, y, f"{count:.0f}", ha="center", va="center", color=colour, fontsize=8)
    else:
        most = max(int(counts.max()), 1)
        bar = figure.colorbar(image, ax=axis, ticks=np.sqrt([0, most / 4, most]))
        bar.ax.set_yticklabels(["0", f"{most / 4:.0f}", f"{most}"])
    step = -(-n_classes // _MAX_TICKS)
    shown = [short_label(str(name)) for name in classes[::step]]
    turned = any(len(name) > _MAX_LEVEL for name in shown)
    axis.set_xticks(range(0, len(classes), step), shown, rotation=90 if turned else 0)
    axis.set_yticks(
        range(len(results["sites"][:MAX_SITES])),
        [short_label(site["name"]) for site in results["sites"][:MAX_SITES]],
    )
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    axis.set_xlabel("class")
    return figure


def plotted_rules(results: Mapping[str, Any]) -> list[str]:
    """Return the rules that get a line: the one in use, then the best on average."""
    names = list(dict.fromkeys(name for point in results["by_alpha"] for name in point["rules"]))

    def average(name: str) -> float:
        values = [number(point["rules"].get(name)) for point in results["by_alpha"]]
        known = [value for value in values if not np.isnan(value)]
        return sum(known) / len(known) if known else 0.0

    ranked = sorted(names, key=lambda name: (name != results["rule"], -average(name)))
    return ranked[:MAX_LINES]


def alpha_plot(results: Mapping[str, Any]) -> Figure:
    """Draw accuracy over alpha for the rule in use, the best other rules and the baselines."""
    points = results["by_alpha"]
    figure, (axis,) = new_figure(3.9)
    x = range(len(points))
    for (key, label), style in zip(
        (("central", "central bound"), ("best_site", "best site"), ("mean_site", "mean site")),
        ("-.", "--", ":"),
        strict=True,
    ):
        axis.plot(x, [number(point[key]) for point in points], style, color=BLACK, label=label)
    for name, (colour, marker) in zip(plotted_rules(results), _LINES, strict=False):
        axis.plot(
            x,
            [number(point["rules"].get(name)) for point in points],
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=2.2 if name == results["rule"] else 1.1,
            label=short_label(name),
        )
    axis.set_xticks(x, [f"{point['alpha']}" for point in points])
    axis.set_xlabel("alpha (small: each site knows few classes)")
    axis.set_ylabel("accuracy")
    percent_axis(axis, along="y")
    legend_below(figure, axis, 2)
    return figure


def cost_plot(results: Mapping[str, Any]) -> Figure:
    """Draw bytes a query and seconds of every protection, on logarithmic axes."""
    entries = results["protections"]
    figure, axes = new_figure(0.9 + 0.26 * len(entries), columns=2)
    costs = (("bytes_per_query", "bytes a query", as_bytes), ("seconds", "seconds", as_seconds))
    for axis, (key, title, as_text) in zip(axes, costs, strict=True):
        values = [number(entry[key]) for entry in entries]
        # A logarithmic axis has no place for zero.
        shown = [value if value > 0 else float("nan") for value in values]
        if not all(np.isnan(shown)):
            axis.set_xscale("log")
        axis.plot(shown, range(len(shown)), "s", color=BLUE, markersize=6)
        for y, x in enumerate(shown):
            if not np.isnan(x):
                axis.annotate(as_text(x), (x, y), (6, 0), textcoords="offset points", va="center")
        # Room on the right for the number beside the last dot.
        low, high = np.nanmin([*shown, 1e300]), np.nanmax([*shown, 1e-300])
        if low < high:
            axis.set_xlim(low / (high / low) ** 0.15, high * (high / low) ** 0.9)
        axis.set_xticks([], minor=False)
        axis.set_xticks([], minor=True)
        axis.set_xlabel(title)
    rows_on_y(axes[0], [entry["label"] for entry in entries])
    return figure


def reliability_plot(results: Mapping[str, Any]) -> Figure:
    """Draw how often the joint answer is right against how sure it says it is."""
    bins = [entry for entry in results["reliability"]["bins"] if entry["count"]]
    figure, (axis,) = new_figure(3.6)
    axis.plot([0, 1], [0, 1], "--", color=BLACK, linewidth=0.8, label="as sure as right")
    if bins:
        most = max(entry["count"] for entry in bins)
        axis.plot(
            [number(entry["confidence"]) for entry in bins],
            [number(entry["accuracy"]) for entry in bins],
            color=BLUE,
            linewidth=1,
        )
        axis.scatter(
            [number(entry["confidence"]) for entry in bins],
            [number(entry["accuracy"]) for entry in bins],
            s=[15 + 120 * entry["count"] / most for entry in bins],
            color=BLUE,
            label="joint answer (larger: more queries)",
        )
    percent_axis(axis, along="y")
    percent_axis(axis, along="x")
    axis.grid(axis="both", color=GRID, linewidth=0.6)
    axis.set_xlabel("probability given to the answer")
    axis.set_ylabel("share that is right")
    legend_below(figure, axis, 1)
    return figure
