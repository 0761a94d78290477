"""The figures of the refinement report, one function each.

Every function takes the results of a run and returns a matplotlib Figure. Markers repeat what
the colours say; lines through markers are 95 % intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fedinfer_flower.reporting.axes import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    GRID,
    ORANGE,
    PURPLE,
    VERMILLION,
    legend_below,
    new_figure,
    percent_axis,
    rows_on_y,
)
from fedinfer_flower.reporting.extra import import_extra
from fedinfer_flower.reporting.formats import as_bytes, number
from fedinfer_flower.reporting.svg import render_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "bytes_plot",
    "control_plot",
    "drawn",
    "kept_plot",
    "pairs_plot",
    "sharers_plot",
    "time_plot",
    "write_figures",
]

Results = Mapping[str, Any]
_STYLES: Final = {
    "alone": ("receiver alone", GREY, "o"),
    "text": ("text", VERMILLION, "s"),
    "text-both": ("text from both", VERMILLION, "s"),
    "cache": ("cache", BLUE, "D"),
    "cache-both": ("cache from both", BLUE, "D"),
    "cache, gated": ("cache, gated", GREEN, "P"),
    "cache-gated": ("cache from both, gated", GREEN, "P"),
    "control": ("caches of other questions", PURPLE, "v"),
}
_SETTINGS: Final = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "legend.frameon": False,
    "text.parse_math": False,
}
_DOTS_PER_INCH: Final = 160


def sharers_plot(results: Results) -> Figure:
    """Draw accuracy by number of sharers and medium."""
    figure, (axis,) = new_figure(3.6)
    rows = results["by_sharers"]
    alone = [row for row in rows if row["medium"] == "alone"]
    others = [row for row in rows if row["medium"] != "alone"]
    media = list(dict.fromkeys(row["medium"] for row in others))
    for place, medium in enumerate(media):
        points = [row for row in others if row["medium"] == medium]
        # A line that starts where nobody helps; a single point is no line.
        line = [*alone, *points] if len(points) > 1 else points
        label, colour, marker = _STYLES[medium]
        # Beside each other, so that intervals can be told apart.
        x = [row["sharers"] + 0.05 * (place - 1) for row in line]
        y = [number(row["accuracy"]) for row in line]
        axis.plot(x, y, color=colour, marker=marker, markersize=6, label=label)
        axis.vlines(x, *_ends(line), color=colour, linewidth=1.4)
    axis.set_xticks([0, 1, 2], ["none", "one", "two"])
    axis.set_xlim(-0.3, 2.3)
    axis.set_xlabel("institutions that help")
    axis.set_ylabel("right, of what somebody knows")
    percent_axis(axis, along="y")
    legend_below(figure, axis, 3)
    return figure


def pairs_plot(results: Results) -> Figure:
    """Draw, for each ordered pair, accuracy on what the sharer holds."""
    rows = results["pairs"]
    figure, (axis,) = new_figure(1.4 + 0.34 * len(rows))
    _dots(axis, [row["ways"] for row in rows])
    rows_on_y(axis, [f"{row['sharer']} → {row['receiver']}" for row in rows])
    percent_axis(axis, along="x")
    axis.set_xlabel("right, of what only the sharer holds")
    legend_below(figure, axis, 3)
    return figure


def kept_plot(results: Results) -> Figure:
    """Draw what receivers keep: facts of their own, and saying that they do not know."""
    rows = results["kept"]
    figure, (axis,) = new_figure(1.5 + 0.36 * len(rows))
    _dots(axis, [row["ways"] for row in rows])
    words = {"own": "own facts", "nobody": "nobody knows"}
    rows_on_y(axis, [f"{row['receiver']}: {words.get(row['task'], row['task'])}" for row in rows])
    percent_axis(axis, along="x")
    axis.set_xlabel("right (where nobody knows: abstained)")
    legend_below(figure, axis, 2)
    return figure


def control_plot(results: Results) -> Figure:
    """Draw what caches of other questions do, against the right ones and chance."""
    rows = results["control"]
    figure, (axis,) = new_figure(1.5 + 0.45 * len(rows))
    _dots(axis, [{n: row[n] for n in ("alone", "cache", "control")} for row in rows])
    if rows:
        chance = number(rows[0]["chance"])
        axis.axvline(chance, color=BLACK, linestyle="--", linewidth=0.8, label="chance")
    words = {"fact": "fact of a sharer", "doc1": "short document", "doc3": "longer document"}
    rows_on_y(axis, [words.get(row["task"], row["task"]) for row in rows])
    percent_axis(axis, along="x")
    axis.set_xlabel("right")
    legend_below(figure, axis, 2)
    return figure


def time_plot(results: Results) -> Figure:
    """Draw the time of a question by way to answer, as multiples of answering alone."""
    rows = _timed(results)
    alone = number(rows[0]["seconds_per_question"]) if rows else 1.0
    figure, (axis,) = new_figure(1.2 + 0.26 * len(rows))
    times = [number(row["seconds_per_question"]) / alone for row in rows]
    axis.hlines(range(len(rows)), 0, times, color=GRID, linewidth=4)
    for y, (row, x) in enumerate(zip(rows, times, strict=True)):
        _, colour, marker = _style_of(row["label"])
        axis.plot([x], [y], marker, color=colour, markersize=6)
        seconds = 1000 * number(row["seconds_per_question"])
        text = f"{x:.1f} x  ({seconds:.0f} ms)"
        axis.annotate(text, (x, y), (8, 0), textcoords="offset points", va="center")
    rows_on_y(axis, [row["title"] for row in rows])
    axis.set_xlim(0, 1.45 * max([*times, 1.0]))
    axis.set_xlabel("time a question, as multiples of answering alone")
    return figure


def bytes_plot(results: Results) -> Figure:
    """Draw accuracy over the bytes of what one sharer sends for a question."""
    rows = [row for row in results["codecs"] if row["body_bytes"]]
    figure, (axis,) = new_figure(3.4)
    for row in rows:
        is_text = row["codec"] == "text"
        colour, marker = (VERMILLION, "s") if is_text else (ORANGE, "D")
        x, y = number(row["body_bytes"]), number(row["accuracy"])
        axis.vlines([x], *_ends([row]), color=colour, linewidth=1.4)
        axis.plot([x], [y], marker, color=colour, markersize=6)
        size = "" if is_text else f", {as_bytes(row['bytes_per_token'])} a token"
        # Encodings are close to each other: upright, their names do not meet.
        axis.annotate(
            f"{row['codec']}{size}",
            (x, number(row["low"])),
            (0, -6),
            textcoords="offset points",
            ha="center",
            va="top",
            rotation=90,
        )
    if rows:
        axis.set_xscale("log")
        sizes = [number(row["body_bytes"]) for row in rows]
        axis.set_xlim(0.6 * min(sizes), 2.4 * max(sizes))
        ticks = sorted({round(size) for size in sizes})
        axis.set_xticks(ticks, [as_bytes(tick) for tick in ticks], rotation=45)
        axis.set_xticks([], minor=True)
    axis.set_xlabel("bytes of one sharer for one question, sealed")
    axis.set_ylabel("right, of what somebody knows")
    percent_axis(axis, along="y")
    return figure


_PLOTS: Final[Mapping[str, tuple[Callable[[Results], Figure], str]]] = {
    "sharers": (sharers_plot, "by_sharers"),
    "pairs": (pairs_plot, "pairs"),
    "kept": (kept_plot, "kept"),
    "control": (control_plot, "control"),
    "time": (time_plot, "steps"),
    "bytes": (bytes_plot, "codecs"),
}


def drawn(results: Results) -> dict[str, Callable[[Results], Figure]]:
    """Return the figures that have data, by name."""
    return {name: plot for name, (plot, key) in _PLOTS.items() if results[key]}


def write_figures(results: Results, folder: Path) -> list[Path]:
    """Write every figure that has data as ``refine-<name>.png`` and ``.svg``.

    Parameters
    ----------
    results : mapping
        What a run wrote.
    folder : Path
        Made when it is not there.

    Returns
    -------
    paths : list of Path

    Raises
    ------
    MissingExtraError
        If matplotlib is not installed.
    """
    matplotlib = import_extra("matplotlib")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, plot in drawn(results).items():
        file = folder / f"refine-{name}.png"
        with matplotlib.rc_context(_SETTINGS):
            plot(results).savefig(file, dpi=_DOTS_PER_INCH, metadata={"Software": None})
        vector = file.with_suffix(".svg")
        vector.write_text(render_svg(plot, results), encoding="utf-8", newline="\n")
        paths += [file, vector]
    return paths


def _timed(results: Results) -> list[Mapping[str, Any]]:
    """Return the steps whose time is drawn: not those that differ in nothing but settings."""
    skipped = ("codec-", "control", "cache-verbatim", "auto")
    return [row for row in results["steps"] if not row["label"].startswith(skipped)]


def _style_of(label: str) -> tuple[str, str, str]:
    return _STYLES.get(label) or _STYLES[label.partition("-")[0]]


def _dots(axis: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw every way of every row, with intervals, a little above each other."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    for place, name in enumerate(names):
        label, colour, marker = _STYLES[name]
        held = [(y, row[name]) for y, row in enumerate(rows) if name in row]
        y = [at + 0.16 * (place - (len(names) - 1) / 2) for at, _ in held]
        axis.hlines(y, *_ends([way for _, way in held]), color=colour, linewidth=1.4)
        x = [number(way["accuracy"]) for _, way in held]
        axis.plot(x, y, marker, color=colour, markersize=5, label=label)


def _ends(rows: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    return [number(row["low"]) for row in rows], [number(row["high"]) for row in rows]
