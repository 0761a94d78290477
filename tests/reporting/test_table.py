import io

import pytest
from rich.console import Console

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.reporting import summary_table


def shown(results, *, width=160):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(summary_table(results))
    return console.file.getvalue()


def test_summary_table_rows_and_columns(results):
    table = summary_table(results)
    assert [column.header for column in table.columns] == [
        "answered by",
        "right",
        "95 % interval",
        "s",
        "B/query",
        "ε query\n/ all",
    ]
    assert table.row_count == 5 + 2 + 3 + 3 + 1


def test_summary_table_shows_baselines_mark_and_epsilons(results):
    text = shown(results)
    for part in (
        "mean site",
        "best site: hospital-e",
        "majority-vote †",
        "0.5 / 50",
        "central bound",
    ):
        assert part in text


def test_summary_table_in_80_columns_cuts_no_figure(results):
    results["sites"][0] |= {"accuracy": 1.0, "low": 0.934, "high": 1.0}
    for entry in results["protections"]:
        entry |= {"seconds": 13.94, "bytes_per_query": 107_374.0}
    results["protections"][-1] |= {"epsilon_per_query": 8.0, "epsilon_total": 17.93}
    text = shown(results, width=80)
    for part in ("93.4 to 100.0 %", "107.4 kB", "8 / 17.9", "13.9", "ε query", "/ all"):
        assert part in text
    assert "…" not in text


def test_summary_table_markup_and_escapes_in_names_are_text(results):
    results["sites"][0]["name"] = "[red]x[/nope]\x1b[31m"
    text = shown(results)
    assert "[red]x[/nope]" in text
    assert "\x1b" not in text


def test_summary_table_empty_lists_keeps_baselines(empty):
    assert summary_table(empty).row_count == 3


def test_summary_table_missing_key_is_refused(results):
    del results["central"]
    with pytest.raises(InvalidValueError, match="central"):
        summary_table(results)
