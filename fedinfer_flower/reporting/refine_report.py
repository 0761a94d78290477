"""One HTML file, and a terminal table, that say what helping each other did for models."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Final

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.reporting import formats
from fedinfer_flower.reporting.extra import import_extra
from fedinfer_flower.reporting.refine_plots import drawn
from fedinfer_flower.reporting.svg import render_svg

__all__ = ["KEYS", "refine_sentences", "refine_table", "write_refine_report"]

KEYS: Final = frozenset(
    {
        *("title", "command", "seed", "quick", "questions_each", "n_questions", "receivers"),
        *("media", "in_process", "seconds_preparing", "seconds_total", "trained", "versions"),
        *("models", "fusers", "gates", "steps", "by_sharers", "pairs", "kept", "control"),
        *("codecs", "plans", "who_learns", "measured", "warnings"),
    }
)
_TEMPLATE: Final = "refine.html.jinja"
_TASKS: Final = ("own", "fact", "doc1", "doc3", "nobody")


def refine_sentences(results: Mapping[str, Any]) -> list[str]:
    """Return what a run showed, in words, with its figures.

    Parameters
    ----------
    results : mapping
        What a run wrote.
    """
    steps = {step["label"]: step for step in results["steps"]}
    said = [f"Alone, receivers answer {_percent(steps['alone'])} of what somebody knows."]
    for label, words in (
        ("text-both", "With text from both others"),
        ("cache-both", "With caches from both others"),
        ("cache-gated", "With caches, and a gate that picks for each question"),
    ):
        if label in steps:
            said.append(f"{words}: {_percent(steps[label])}.")
    if "control" in steps:
        control = steps["control"]["tasks"]["fact"]["accuracy"]
        said.append(
            "Caches that belong to other questions give"
            f" {formats.as_percent(control)} of the others' facts: chance is"
            f" {formats.as_percent(results['control'][0]['chance'])}."
        )
    kept = {
        words: formats.as_percent(steps[label]["tasks"]["own"]["accuracy"])
        for label, words in (
            ("text-both", "with text"),
            ("cache-both", "with caches"),
            ("cache-gated", "with gated caches"),
            ("control-gated", "with gated caches that all belong to other questions"),
        )
        if label in steps
    }
    said += [
        f"Of their own facts receivers have {share} right {how}." for how, share in kept.items()
    ]
    return said


def refine_table(results: Mapping[str, Any]) -> Table:
    """Build the table of every way to answer.

    Parameters
    ----------
    results : mapping
        What a run wrote.

    Returns
    -------
    table : rich.table.Table

    Raises
    ------
    InvalidValueError
        If a key of the results is missing.
    """
    require_keys(results)
    table = Table(title=Text(results["title"]), box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("right answers, %", overflow="fold", min_width=20)
    for name in ("all", "own", "fact", "doc1", "doc3", "nobody", "ms", "B"):
        table.add_column(name, justify="right", no_wrap=True)
    for step in results["steps"]:
        shares = [step["answerable"], *(step["tasks"][task] for task in _TASKS)]
        table.add_row(
            Text(step["title"]),
            *(_whole_percent(share["accuracy"]) for share in shares),
            f"{1000 * step['seconds_per_question']:.0f}",
            formats.as_bytes(step["body_bytes"]).removesuffix(" B"),
        )
    table.caption = (
        "all: own, fact, doc1, doc3 together. own: what the receiver knows by heart. fact: what"
        " another knows by heart. doc: a document at another, of 1 or 3 statements. nobody:"
        " abstained where nobody knows. ms: a question. B: from one sharer, a question."
    )
    return table


def write_refine_report(results: Mapping[str, Any], path: Path) -> Path:
    """Write the report of a refinement as one HTML file that works offline.

    Parameters
    ----------
    results : mapping
        What a run wrote. All keys must be there; lists may be empty.
    path : Path
        The file to write. Missing folders above it are made, an old file is replaced.

    Returns
    -------
    path : Path

    Raises
    ------
    InvalidValueError
        If a key of the results is missing.
    MissingExtraError
        If matplotlib or jinja2 is not installed.

    Privacy
    -------
    The file holds shares, seconds and bytes, and how often who helped: no question, no
    answer, no document. It loads nothing from anywhere.
    """
    require_keys(results)
    jinja2 = import_extra("jinja2")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "bytes": formats.as_bytes,
        "percent": formats.as_percent,
        "seconds": formats.as_seconds,
    }
    environment.globals["interval"] = formats.as_interval
    markup = import_extra("markupsafe").Markup
    source = resources.files("fedinfer_flower.reporting").joinpath(_TEMPLATE)
    page = environment.from_string(source.read_text(encoding="utf-8")).render(
        r=results,
        tasks=_TASKS,
        answer=refine_sentences(results),
        figures={name: markup(render_svg(plot, results)) for name, plot in drawn(results).items()},
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8", newline="\n")
    return path


def require_keys(results: Mapping[str, Any]) -> None:
    """Require results of a refinement.

    Raises
    ------
    InvalidValueError
    """
    missing = sorted(KEYS - results.keys())
    if missing:
        raise InvalidValueError(
            f"the results lack {', '.join(missing)}",
            hint="write the report with the release that made the results",
        )


def _percent(step: Mapping[str, Any]) -> str:
    share = step["answerable"]
    ends = formats.as_interval(share["low"], share["high"])
    return f"{formats.as_percent(share['accuracy'])} ({ends})"


def _whole_percent(share: float | None) -> str:
    value = formats.as_percent(share)
    return value if value == formats.MISSING else f"{100 * (share or 0.0):.0f}"
