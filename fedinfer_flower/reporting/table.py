"""The summary of a run as a terminal table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from fedinfer_flower.reporting.contents import FEDSEI_MARK, Row, clean, summary_rows
from fedinfer_flower.reporting.formats import (
    MISSING,
    as_bytes,
    as_epsilon,
    as_interval,
    as_percent,
    as_seconds,
)

__all__ = ["summary_table"]

_COLUMNS = ("right", "95 % interval", "s", "B/query", "ε query\n/ all")


def _epsilons(row: Row) -> str:
    if row.epsilon_per_query is None and row.epsilon_total is None:
        return MISSING
    return f"{as_epsilon(row.epsilon_per_query)} / {as_epsilon(row.epsilon_total)}"


def summary_table(results: Mapping[str, Any]) -> Table:
    """Build the table of every way to answer: alone, together, protected, central.

    Parameters
    ----------
    results : mapping
        What a run wrote; see `write_report`.

    Returns
    -------
    table : rich.table.Table
        Sites, mean site, best site, rules in clear, protections, central bound. Names of
        sites are plain text: markup in them is shown, not obeyed.

    Raises
    ------
    InvalidValueError
        If a key of the results is missing.
    """
    results = clean(results)
    caption = (
        f"{FEDSEI_MARK} rule of FedSEI. A dash: no noise and hence no epsilon, or not measured."
    )
    # 80 columns are enough: no vertical lines.
    table = Table(title=Text(results["title"]), caption=caption, box=SIMPLE, padding=(0, 1, 0, 0))
    # A narrow terminal must cut the figures' headings before the names.
    table.add_column("answered by", overflow="fold", min_width=24)
    for name in _COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    rows = summary_rows(results)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        style = "bold" if row.chosen else ""
        table.add_row(
            Text(row.label, style=style),
            as_percent(row.accuracy),
            as_interval(row.low, row.high),
            as_seconds(row.seconds),
            as_bytes(row.bytes_per_query),
            _epsilons(row),
            end_section=following is not None and following.group != row.group,
        )
    return table
