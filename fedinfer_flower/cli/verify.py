"""`fedinfer verify`: check a receipt or an audit log, offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedinfer_flower.errors import ConfigError, SizeLimitError

__all__ = ["verify"]


def verify(
    file: Annotated[Path, typer.Argument(help="receipt, or audit log (*.jsonl)")],
    pins: Annotated[Path | None, typer.Option(help="TOML with [sites] and [queriers]")] = None,
    coordinator: Annotated[str, typer.Option(help="key id that must have signed it all")] = "",
    head: Annotated[str, typer.Option(help="hash that an earlier check of the log printed")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="print the checks as JSON")] = False,
) -> None:
    """Check a receipt, and say who could have learnt what; or check an audit log.

    A file may hold several receipts, as a gateway gives for a large query in clear: each is
    checked. Exit status 1 if a check fails, 2 if the file is neither.

    Example: fedinfer verify receipt.json --pins pins.toml

    Example: fedinfer verify audit.jsonl --head 3f9a...
    """
    if _is_audit_log(file):
        _require_unused("a receipt", {"--pins": pins, "--coordinator": coordinator})
        _verify_audit_log(file, head=head, as_json=as_json)
        return
    _require_unused("an audit log", {"--head": head})
    _verify_receipt(file, pins=pins, coordinator=coordinator, as_json=as_json)


def _is_audit_log(file: Path) -> bool:
    """Tell an audit log, which is lines, from a receipt, which is one JSON object."""
    if file.suffix == ".jsonl":
        return True
    try:
        with file.open("rb") as stream:
            return stream.read(4096).startswith(b'{"at":')
    except OSError:
        return False


def _require_unused(what: str, options: dict[str, object]) -> None:
    for name, value in options.items():
        if value:
            raise ConfigError(f"{name} is for {what}; this file is another kind")


def _verify_audit_log(file: Path, *, head: str, as_json: bool) -> None:
    from rich.console import Console
    from rich.text import Text

    from fedinfer_flower.observability.audit_log import verify_audit_log

    found = verify_audit_log(file, head=head or None)
    if as_json:
        typer.echo(json.dumps(vars(found)))
    else:
        console = Console()
        style = "green" if found.ok else "red"
        console.print(Text(found.words, style=style))
        console.print(Text(f"entries that fit: {found.n_entries}"))
        console.print(Text(f"head: {found.head}"), soft_wrap=True)
        verdict = "the audit log verifies" if found.ok else "the audit log does NOT verify"
        console.print(Text(verdict))
    if not found.ok:
        raise typer.Exit(1)


def _verify_receipt(file: Path, *, pins: Path | None, coordinator: str, as_json: bool) -> None:
    from fedinfer_flower.receipts.bundle import receipts_of
    from fedinfer_flower.receipts.receipt import MAX_RECEIPT_BYTES
    from fedinfer_flower.receipts.verification import verify as verify_bytes
    from fedinfer_flower.wire.pins import read_pins

    pinned = None if pins is None else read_pins(pins)
    try:
        n_bytes = file.stat().st_size
        if n_bytes > MAX_RECEIPT_BYTES:
            raise SizeLimitError(f"a receipt of {n_bytes} bytes; the limit is {MAX_RECEIPT_BYTES}")
        data = file.read_bytes()
    except OSError as exc:
        raise ConfigError(
            f"the receipt {file.name!r} cannot be read: {type(exc).__name__}",
            hint="give the path of a file",
        ) from None
    found = [
        verify_bytes(
            part,
            pins=None if pinned is None else pinned.sites,
            # A pin file without queriers says nothing about them.
            queriers=pinned.queriers if pinned is not None and pinned.queriers else None,
            coordinator_key_id=coordinator or None,
        )
        for part in receipts_of(data)
    ]
    for one in found:
        if as_json:
            typer.echo(json.dumps(one.to_dict()))
        else:
            _show(one.to_dict())
    if not all(one.ok for one in found):
        raise typer.Exit(1)


def _show(found: dict[str, object]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    plain = json.loads(json.dumps(found))
    console = Console()
    style = {"ok": "green", "failed": "red", "not checked": "yellow"}
    checks = Table("", "check", "found", box=None)
    for check in plain["checks"]:
        outcome = check["outcome"]
        # Names in a receipt are its author's: shown as text, never as markup.
        words = Text(f"{check['words']} {check['code']}".strip())
        checks.add_row(Text(outcome, style=style[outcome]), Text(check["name"]), words)
    console.print(checks)
    totals = Table("site", "batches", "rows", "charged", "epsilon", "delta", title="Totals")
    for total in plain["totals"]:
        numbers = (total["n_batches"], total["n_rows"], total["n_fresh_rows"])
        privacy = (total["epsilon"], total["delta"])
        cells = [str(n) for n in numbers] + ["none" if n is None else f"{n:.6g}" for n in privacy]
        totals.add_row(Text(total["site"]), *cells)
    console.print(totals)
    # Of a receipt that failed this may be anybody's words.
    warning = "" if plain["ok"] else " (the receipt failed: do not rely on this)"
    learns = Table("about", "who", "learns", title=f"Who could learn what{warning}")
    for line in plain["who_can_learn_what"]:
        learns.add_row(*(Text(line[name]) for name in ("about", "party", "learns")))
    console.print(learns)
    verdict = "the receipt verifies" if plain["ok"] else "the receipt does NOT verify"
    n_open = sum(check["outcome"] == "not checked" for check in plain["checks"])
    console.print(Text(f"{verdict}; {n_open} checks could not be made"))
