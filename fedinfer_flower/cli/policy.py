"""`fedinfer policy`: what a site's policy lets out, before the site is started."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fedinfer_flower.clients.policy_words import PolicyReport

__all__ = ["policy_app"]

_TITLES = {
    "leaves": "What can leave the site",
    "to_whom": "To whom",
    "protection": "How it is protected",
    "cost": "At what cost, and how much",
    "code": "Whose code answers",
}

policy_app = typer.Typer(help="A site's policy.", no_args_is_help=True)


@policy_app.callback()
def _policy() -> None:
    """Keep `check` a command of its own while there is only one."""


@policy_app.command()
def check(
    path: Annotated[Path, typer.Argument(help="the site's policy, as site.toml")],
    as_json: Annotated[bool, typer.Option("--json", help="print all as JSON")] = False,
) -> None:
    """Read a policy, and say in plain words what it lets out; start and change nothing.

    Exit status 1 if the policy cannot be used. Warnings do not change it. The model is not
    loaded.

    Example: fedinfer policy check site.toml
    """
    from fedinfer_flower.clients.policy import SitePolicy
    from fedinfer_flower.clients.policy_words import explain
    from fedinfer_flower.errors import FedInferError

    try:
        policy = SitePolicy.read(path)
        report = explain(policy)
    except FedInferError as exc:
        if as_json:
            error = {"code": exc.code, "message": exc.message, "hint": exc.hint}
            typer.echo(json.dumps({"ok": False, "error": error}))
        else:
            typer.echo(str(exc), err=True)
        raise typer.Exit(1) from None
    if as_json:
        found = {"ok": True, "site": policy.site.name, "digest": policy.digest}
        typer.echo(json.dumps({**found, **dataclasses.asdict(report)}))
        return
    typer.echo(f"Site {policy.site.name}, policy {policy.digest[:16]}")
    _show(report)


def _show(report: PolicyReport) -> None:
    for name, title in _TITLES.items():
        typer.echo(f"\n{title}")
        for words in getattr(report, name):
            typer.echo(f"  - {words}")
    typer.echo("\nWarnings" if report.warnings else "\nNo warnings")
    for words in report.warnings:
        typer.echo(f"  ! {words}")
