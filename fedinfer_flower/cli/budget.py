"""`fedinfer budget`: what a site has given away, and what is left."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from fedinfer_flower.privacy.site_budget import BudgetLine, BudgetPolicy

__all__ = ["budget_app"]

_NAME_SHOWN = 16

budget_app = typer.Typer(help="A site's privacy budget.", no_args_is_help=True)


@budget_app.callback()
def _budget() -> None:
    """Keep `show` a command of its own while there is only one."""


@budget_app.command()
def show(
    path: Annotated[Path, typer.Argument(help="the site's budget file")],
    policy_epsilon_per_querier: Annotated[
        float | None, typer.Option(help="cap of one querier; default: as last used")
    ] = None,
    policy_epsilon_global: Annotated[
        float | None, typer.Option(help="cap of all together; default: as last used")
    ] = None,
    policy_delta: Annotated[
        float | None, typer.Option(help="delta of both; default: as last used")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the lines as JSON")] = False,
) -> None:
    """Show what each querier and all together have spent; check the file; change nothing.

    Another policy shows what would be left under it.  Exit status 2 if the file is missing,
    damaged, or no budget.

    Example: fedinfer budget show budget.db
    """
    from rich.console import Console

    from fedinfer_flower.privacy.site_budget import SiteBudget

    given = {
        "epsilon_per_querier": policy_epsilon_per_querier,
        "epsilon_global": policy_epsilon_global,
        "delta": policy_delta,
    }
    budget = SiteBudget.inspect(path)
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if changes:
        budget = SiteBudget.inspect(path, dataclasses.replace(budget.policy, **changes))
    budget.verify()
    lines = budget.status()
    if as_json:
        found = {
            "policy": dataclasses.asdict(budget.policy),
            "lines": [dataclasses.asdict(line) for line in lines],
        }
        typer.echo(json.dumps(found))
    else:
        Console().print(_table(budget.policy, lines))


def _table(policy: BudgetPolicy, lines: tuple[BudgetLine, ...]) -> Table:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    table = Table(
        *("querier", "epsilon spent / cap", "", "queries", "rows", "open"),
        box=None,
        caption=f"at delta {policy.delta:g}; open: in work, or lost in a crash (counts as spent)",
        caption_justify="left",
    )
    for line in lines:
        name = "all together" if line.querier is None else line.querier[:_NAME_SHOWN]
        table.add_row(
            Text(name),
            f"{line.spent:.3f} / {line.cap:g}",
            ProgressBar(total=line.cap, completed=min(line.spent, line.cap), width=20),
            *(str(count) for count in (line.n_queries, line.n_rows, line.n_open)),
        )
    return table
