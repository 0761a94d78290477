"""The figures of the report, one function each, without pyplot and its global state.

Every function takes cleaned results and returns a matplotlib Figure. Colours are those of
Okabe and Ito, which colour-blind readers tell apart; markers and dashes repeat what the
colours say. Figures are narrow, so that they stay readable on a phone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedinfer_flower.reporting.contents import summary_rows
from fedinfer_flower.reporting.extra import import_extra
from fedinfer_flower.reporting.formats import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
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
_MAX_LABEL = 30
_MAX_LEVEL = 4
_MAX_TICKS = 20
_MAX_NUMBERED_CLASSES = 12
_WIDTH = 5.2

_BLACK, _GREY = "#000000", "#767676"
_BLUE, _VERMILLION, _GREEN, _ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
_SKY, _PURPLE = "#56B4E9", "#CC79A7"
_LINES = (
    (_BLUE, "o"),
    (_VERMILLION, "s"),
    (_GREEN, "^"),
    (_ORANGE, "D"),
    (_PURPLE, "v"),
    (_SKY, "P"),
)
_GROUPS = {
    "site": ("a site alone", _GREY, "o"),
    "baseline": ("mean and best site", _BLACK, "D"),
    "rule": ("all sites, in clear", _SKY, "s"),
    "joint": ("all sites, protected", _BLUE, "P"),
    "bound": ("central bound", _VERMILLION, "^"),
}


def _figure(height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Return an empty figure of the page's width and its axes, side by side."""
    figure = import_extra("matplotlib.figure").Figure(
        figsize=(_WIDTH, max(height, 1.6)), layout="constrained"
    )
    axes = figure.subplots(1, columns, squeeze=False, sharey=columns > 1)
    return figure, list(axes[0])


def _short(label: str) -> str:
    flat = " ".join(label.split())
    return flat if len(flat) <= _MAX_LABEL else f"{flat[: _MAX_LABEL - 1]}…"


def _rows_on_y(axis: Axes, labels: Sequence[str]) -> None:
    axis.set_yticks(range(len(labels)), [_short(label) for label in labels])
    axis.set_ylim(max(len(labels), 1) - 0.4, -0.6)


def _percent_axis(axis: Axes, *, along: str) -> None:
    ticks = [0, 0.25, 0.5, 0.75, 1]
    texts = ["0 %", "25 %", "50 %", "75 %", "100 %"]
    if along == "x":
        axis.set_xlim(-0.02, 1.02)
        axis.set_xticks(ticks, texts)
    else:
        axis.set_ylim(-0.02, 1.02)
        axis.set_yticks(ticks, texts)
    axis.grid(axis="x" if along == "x" else "y", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)


def _legend_below(figure: Figure, axis: Axes, columns: int) -> None:
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def accuracy_plot(results: Mapping[str, Any]) -> Figure:
    """Draw the accuracy of every way to answer, with 95 % intervals and baselines."""
    rows = summary_rows(results)
    del rows[MAX_SITES : len(results["sites"])]
    figure, (axis,) = _figure(1.2 + 0.21 * len(rows))
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
    axis.axvline(best, color=_BLACK, linestyle="--", linewidth=0.8, label="best site's accuracy")
    _rows_on_y(axis, [row.label for row in rows])
    for text, row in zip(axis.get_yticklabels(), rows, strict=True):
        text.set_fontweight("bold" if row.chosen else "normal")
    _percent_axis(axis, along="x")
    axis.set_xlabel("accuracy and 95 % interval")
    _legend_below(figure, axis, 2)
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
    figure, (axis,) = _figure(1.1 + 0.26 * n_rows)
    # The root keeps a handful of examples visible next to thousands; zero stays white.
    image = axis.imshow(np.sqrt(counts), cmap="Blues", aspect="auto", vmin=0)
    if n_classes <= _MAX_NUMBERED_CLASSES:
        dark = 0.6 * np.sqrt(counts.max())
        for (y, x), count in np.ndenumerate(counts):
            colour = "white" if np.sqrt(count) > dark else "black"
            axis.text(x, y, f"{count:.0f}", ha="center", va="center", color=colour, fontsize=8)
    else:
        most = int(counts.max())
        bar = figure.colorbar(image, ax=axis, ticks=np.sqrt([0, most / 4, most]))
        bar.ax.set_yticklabels(["0", f"{most / 4:.0f}", f"{most}"])
    step = -(-n_classes // _MAX_TICKS)
    shown = [_short(str(name)) for name in classes[::step]]
    turned = any(len(name) > _MAX_LEVEL for name in shown)
    axis.set_xticks(range(0, len(classes), step), shown, rotation=90 if turned else 0)
    axis.set_yticks(
        range(len(results["sites"][:MAX_SITES])),
        [_short(site["name"]) for site in results["sites"][:MAX_SITES]],
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
    figure, (axis,) = _figure(3.9)
    x = range(len(points))
    for (key, label), style in zip(
        (("central", "central bound"), ("best_site", "best site"), ("mean_site", "mean site")),
        ("-.", "--", ":"),
        strict=True,
    ):
        axis.plot(x, [number(point[key]) for point in points], style, color=_BLACK, label=label)
    for name, (colour, marker) in zip(plotted_rules(results), _LINES, strict=False):
        axis.plot(
            x,
            [number(point["rules"].get(name)) for point in points],
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=2.2 if name == results["rule"] else 1.1,
            label=_short(name),
        )
    axis.set_xticks(x, [f"{point['alpha']}" for point in points])
    axis.set_xlabel("alpha (small: each site knows few classes)")
    axis.set_ylabel("accuracy")
    _percent_axis(axis, along="y")
    _legend_below(figure, axis, 2)
    return figure


def cost_plot(results: Mapping[str, Any]) -> Figure:
    """Draw bytes a query and seconds of every protection, on logarithmic axes."""
    entries = results["protections"]
    figure, axes = _figure(0.9 + 0.26 * len(entries), columns=2)
    for axis, key, title in zip(
        axes, ("bytes_per_query", "seconds"), ("bytes a query", "seconds"), strict=True
    ):
        values = [number(entry[key]) for entry in entries]
        # A logarithmic axis has no place for zero.
        shown = [value if value > 0 else float("nan") for value in values]
        if not all(np.isnan(shown)):
            axis.set_xscale("log")
        axis.plot(shown, range(len(shown)), "s", color=_BLUE, markersize=6)
        axis.margins(x=0.2)
        axis.grid(axis="x", color="#dddddd", linewidth=0.6)
        axis.set_xlabel(title)
    _rows_on_y(axes[0], [entry["label"] for entry in entries])
    return figure


def reliability_plot(results: Mapping[str, Any]) -> Figure:
    """Draw how often the joint answer is right against how sure it says it is."""
    bins = [entry for entry in results["reliability"]["bins"] if entry["count"]]
    figure, (axis,) = _figure(3.6)
    axis.plot([0, 1], [0, 1], "--", color=_BLACK, linewidth=0.8, label="as sure as right")
    if bins:
        most = max(entry["count"] for entry in bins)
        axis.plot(
            [number(entry["confidence"]) for entry in bins],
            [number(entry["accuracy"]) for entry in bins],
            color=_BLUE,
            linewidth=1,
        )
        axis.scatter(
            [number(entry["confidence"]) for entry in bins],
            [number(entry["accuracy"]) for entry in bins],
            s=[15 + 120 * entry["count"] / most for entry in bins],
            color=_BLUE,
            label="joint answer (larger: more queries)",
        )
    _percent_axis(axis, along="y")
    _percent_axis(axis, along="x")
    axis.grid(axis="both", color="#dddddd", linewidth=0.6)
    axis.set_xlabel("probability given to the answer")
    axis.set_ylabel("share that is right")
    _legend_below(figure, axis, 1)
    return figure
