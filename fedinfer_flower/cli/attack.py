"""`fedinfer attack`: run attacks against protections, on a federation in this process."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fedinfer_flower.errors import InvalidValueError

if TYPE_CHECKING:
    from fedinfer_flower.attacks import TargetFederation

__all__ = ["attack"]


def attack(
    names: Annotated[list[str] | None, typer.Argument(help="attacks; none lists them all")] = None,
    suite: Annotated[bool, typer.Option("--suite", help="run all attacks")] = False,
    protect: Annotated[
        list[str] | None, typer.Option(help="protection to attack, repeatable; default all")
    ] = None,
    federation: Annotated[
        str, typer.Option(help="your own: MODULE:NAME of a TargetFederation, or a function to it")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="print results as JSON")] = False,
    seed: Annotated[int, typer.Option(min=0, help="of data, models and attackers")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="also write results, as .json or else Markdown")
    ] = None,
) -> None:
    """Attack five simulated sites with digits, or your own federation, under each protection.

    Exit status 1 if an attack does what a protection promises to prevent. An attack that is
    stopped proves nothing about other attacks.

    Example: fedinfer attack --suite --protect plain --protect dp
    """
    from fedinfer_flower.attacks import ATTACKS, markdown_table, run_suite
    from fedinfer_flower.privacy.base import make_protection

    if suite and names:
        raise InvalidValueError("--suite runs all attacks", hint="leave the names out")
    if not suite and not names:
        _list_attacks(as_json=as_json)
        return
    chosen = [ATTACKS.get(name)() for name in (names or ATTACKS.names())]
    console = Console(stderr=as_json)
    with console.status("attacking") as status:
        results = run_suite(
            federation=_own(federation) if federation else None,
            attacks=chosen,
            protections=[make_protection(name) for name in protect] if protect else None,
            seed=seed,
            progress=lambda name, mode: status.update(f"{name} against {mode}"),
        )
    plain = json.dumps([result.to_dict() for result in results], indent=2)
    if out is not None:
        out.write_text(plain if out.suffix == ".json" else markdown_table(results) + "\n")
    if as_json:
        typer.echo(plain)
    else:
        console.print(_table(results))
    if any(result.claim == "broken" for result in results):
        raise typer.Exit(1)


def _own(name: str) -> TargetFederation:
    """Return the federation that a ``module:name`` of the user's stands for."""
    from fedinfer_flower.attacks import TargetFederation

    module, _, attribute = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError):
        raise InvalidValueError(
            f"--federation names {module[:64]!r}, {attribute[:64]!r}, which cannot be imported",
            hint="--federation my_sites:federation, with my_sites.py in this folder",
        ) from None
    finally:
        sys.path.pop(0)
    federation = found() if callable(found) else found
    if not isinstance(federation, TargetFederation):
        raise InvalidValueError(
            f"{name[:64]!r} is a {type(federation).__name__}, not a TargetFederation",
            hint="see fedinfer_flower.attacks.TargetFederation",
        )
    return federation


def _list_attacks(*, as_json: bool) -> None:
    from fedinfer_flower.attacks import ATTACKS

    known = [ATTACKS.get(name)() for name in ATTACKS.names()]
    if as_json:
        typer.echo(json.dumps({a.name: a.threat for a in known}))
        return
    table = Table("attack", "sees as", "what goes wrong", box=None)
    for a in known:
        table.add_row(a.name, ", ".join(sorted(a.sees)), a.threat)
    Console().print(table)


def _table(results: list[Any]) -> Table:
    table = Table("attack", "against", "statistic", "value", "chance", "verdict", "promise")
    style = {"kept": "green", "broken": "bold red", "none": "dim"}
    for r in results:
        verdict = f"[{'red' if r.succeeded else 'green'}]{r.verdict}[/]"
        promise = f"[{style[r.claim]}]{r.claim}[/]"
        figures = (f"{r.value:.3g}", f"{r.baseline:.3g}")
        table.add_row(r.attack, r.mode, r.statistic, *figures, verdict, promise)
    return table
