"""One HTML file that says what a run showed and what its protection hides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedinfer_flower.reporting import (
    formats,
    plots,
    privacy_plots,
    rewards_plots,
    rewards_section,
    selection_plots,
)
from fedinfer_flower.reporting.answer import (
    answer_sentences,
    limit_sentences,
    meter_sentences,
    visibility_sentences,
)
from fedinfer_flower.reporting.contents import (
    FEDSEI_MARK,
    clean,
    epsilons_of,
    learning_groups,
    meter_reading,
    points_by_protection,
    summary_rows,
)
from fedinfer_flower.reporting.extra import import_extra
from fedinfer_flower.reporting.svg import render_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["write_report"]

_TEMPLATE = "report.html.jinja"
_MACROS = """
{% macro plot(name, alt, caption) %}
{% if name in figures %}
<figure>
<div class="plot scroll" role="img" aria-label="{{ alt }}">{{ figures[name] }}</div>
<figcaption>{{ caption }}</figcaption>
</figure>
{% endif %}
{% endmacro %}
"""
"""The template's own macro, for sections that are rendered apart from it."""


def _environment() -> Any:
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
        "epsilon": formats.as_epsilon,
        "percent": formats.as_percent,
        "seconds": formats.as_seconds,
    }
    environment.globals["interval"] = formats.as_interval
    return environment


def _figures(results: Mapping[str, Any]) -> dict[str, str]:
    """Draw the figures that have data, by the name that the template asks for."""
    wanted: dict[str, tuple[Callable[[Mapping[str, Any]], Figure], bool]] = {
        "accuracy": (plots.accuracy_plot, True),
        "classes": (plots.class_plot, bool(results["sites"] and results["classes"])),
        "alpha": (plots.alpha_plot, bool(results["by_alpha"])),
        "cost": (plots.cost_plot, bool(results["protections"])),
        "epsilon": (privacy_plots.epsilon_plot, bool(privacy_plots.epsilon_lines(results))),
        "meter": (privacy_plots.meter_plot, bool(privacy_plots.meter_line(results))),
        "reliability": (plots.reliability_plot, bool(results["reliability"]["bins"])),
        "rewards": (rewards_plots.rewards_plot, bool(results.get("rewards"))),
        "frontier": (selection_plots.frontier_plot, bool(results.get("selection"))),
    }
    return {name: render_svg(plot, results) for name, (plot, drawn) in wanted.items() if drawn}


def _further_sections(
    environment: Any, results: Mapping[str, Any], figures: Mapping[str, str]
) -> list[str]:
    """Render the sections of what not every run has: selection and rewards."""
    sections = []
    if results.get("selection"):
        sections.append(
            _section(environment, "selection").render(
                r=results, figures=figures, lines=selection_plots.frontier_lines(results)
            )
        )
    if results.get("rewards"):
        sections.append(
            _section(environment, "rewards").render(
                r=results,
                figures=figures,
                words=rewards_section.reward_sentences(results),
                credits=rewards_section.as_credits,
                riders=any(site["is_free_rider"] for site in results["rewards"]["sites"]),
                max_paid_sites=rewards_plots.MAX_PAID_SITES,
            )
        )
    return sections


def _section(environment: Any, name: str) -> Any:
    source = resources.files("fedinfer_flower.reporting").joinpath(f"{name}.html.jinja")
    return environment.from_string(_MACROS + source.read_text(encoding="utf-8"))


def _alpha_rules(results: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(name for point in results["by_alpha"] for name in point["rules"]))


def write_report(results: Mapping[str, Any], path: Path) -> Path:
    """Write the report of a run as one HTML file that works offline.

    Use for people; keep the JSON of the results for programs. `summary_table` gives the
    same numbers in a terminal.

    Parameters
    ----------
    results : mapping
        What a run wrote. All keys must be there; lists may be short or empty.
    path : Path
        The file to write. Missing folders above it are made, an old file is replaced.

    Returns
    -------
    path : Path
        The file written.

    Raises
    ------
    InvalidValueError
        If a key of the results is missing.
    MissingExtraError
        If matplotlib or jinja2 is not installed.

    Privacy
    -------
    The file repeats what the results hold, example queries and each site's opinion on them
    included: it is for whoever may see all of these. It loads nothing from anywhere.
    """
    results = clean(results)
    environment = _environment()
    markup = import_extra("markupsafe").Markup
    source = resources.files("fedinfer_flower.reporting").joinpath(_TEMPLATE)
    figures = {name: markup(svg) for name, svg in _figures(results).items()}
    page = environment.from_string(source.read_text(encoding="utf-8")).render(
        r=results,
        rows=summary_rows(results),
        answer=answer_sentences(results),
        visibility=visibility_sentences(results),
        limits=markup(" ".join(limit_sentences(results))),
        learning=learning_groups(results),
        epsilons=epsilons_of(results),
        epsilon_points=points_by_protection(results),
        epsilon_lines=privacy_plots.epsilon_lines(results),
        meter=meter_reading(results),
        meter_words=meter_sentences(results),
        figures=figures,
        further=[markup(part) for part in _further_sections(environment, results, figures)],
        alpha_rules=_alpha_rules(results),
        plotted_rules=plots.plotted_rules(results),
        max_sites=plots.MAX_SITES,
        mark=FEDSEI_MARK,
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8", newline="\n")
    return path
