import io

import pytest
from rich.console import Console

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.reporting import summary_table


def shown(results):
    console = Console(file=io.StringIO(), width=160, color_system=None)
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
        "ε query / all",
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
