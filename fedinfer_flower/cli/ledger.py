"""`fedinfer ledger`: who was paid how much, whether the book is whole, and paying a job out."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fedinfer_flower.errors import ConfigError, InvalidValueError, LedgerError

if TYPE_CHECKING:
    from rich.table import Table

    from fedinfer_flower.incentives.ledger import Ledger, Verification

__all__ = ["ledger_app"]

URL_VARIABLE: Final = "FEDINFER_LEDGER_URL"

_NAME_SHOWN: Final = 24
_MAX_JSON_BYTES: Final = 16 << 20
_DEADLINE_S: Final = 86_400

ledger_app = typer.Typer(help="The ledger of fees and pay.", no_args_is_help=True)

LedgerFile = Annotated[
    Path | None,
    typer.Option("--file", help=f"SQLite file; default: the URL in ${URL_VARIABLE}"),
]
AsJson = Annotated[bool, typer.Option("--json", help="print as JSON")]


@ledger_app.command()
def show(file: LedgerFile = None, as_json: AsJson = False) -> None:
    """Show every account's balance and every job's fee; check the book; change nothing.

    Exit status 1 if a row does not fit, 2 if there is no ledger.

    Example: fedinfer ledger show --file ledger.db
    """
    from rich.console import Console

    found = _ledger(file).verify()
    if as_json:
        typer.echo(json.dumps(_plain(found)))
    else:
        console = Console()
        console.print(_accounts(found))
        console.print(_jobs(found))
        console.print(_verdict(found), markup=False, highlight=False, soft_wrap=True)
    if not found.ok:
        raise typer.Exit(1)


@ledger_app.command()
def verify(
    file: LedgerFile = None,
    head: Annotated[
        str, typer.Option(help="number:hash that was published: the book must contain it")
    ] = "",
    export: Annotated[
        Path | None, typer.Option(help="check a JSON export instead of a database")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check every row, and name the first that does not fit.

    Without --head nobody can tell that the last rows were deleted, or that the whole book was
    written anew. Exit status 1 if a row does not fit, 2 if there is no ledger.

    Example: fedinfer ledger verify --file ledger.db --head 12:9f86...
    """
    from fedinfer_flower.incentives.ledger import Head

    published = Head.from_text(head) if head else None
    if export is not None:
        found = _verified_export(export, published)
    else:
        found = _ledger(file).verify(published)
    if as_json:
        typer.echo(json.dumps(_plain(found)))
    else:
        typer.echo(_verdict(found))
    if not found.ok:
        raise typer.Exit(1)


@ledger_app.command()
def export(
    out: Annotated[Path, typer.Argument(help="file to write; not one that exists")],
    form: Annotated[str, typer.Option(help="csv, or json, which `verify --export` checks")] = "csv",
    file: LedgerFile = None,
) -> None:
    """Write all entries to a file, for its owner alone.

    Exit status 2 if there is no ledger, or the file exists.

    Example: fedinfer ledger export ledger.csv --file ledger.db
    """
    lines = _ledger(file).export(form)
    try:
        handle = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(handle, "w", encoding="utf-8", newline="") as stream:
            stream.writelines(lines)
    except OSError as exc:
        raise _unreadable("export", out, exc) from None


@ledger_app.command()
def settle(
    receipt: Annotated[Path, typer.Argument(help="receipt, as the coordinator wrote it")],
    scores: Annotated[Path, typer.Option(help="JSON: contribution score by site key id")],
    fee: Annotated[int, typer.Option(help="micro-credits (a millionth of a credit)")],
    coordinator: Annotated[str, typer.Option(help="key id that must have signed the receipt")],
    payment: Annotated[str, typer.Option(help="payment rule")] = "proportional",
    accounts: Annotated[
        Path | None, typer.Option(help="JSON: account by key id; default: the key id itself")
    ] = None,
    pins: Annotated[Path | None, typer.Option(help="TOML with \\[sites]")] = None,
    file: LedgerFile = None,
    as_json: AsJson = False,
) -> None:
    """Pay a job's fee out to the sites that signed, by their scores.

    Takes the fee from the querier's account first, if it is not in escrow yet. Doing it again
    changes nothing. Exit status 2 if anything is refused; then nobody is paid.

    Example: fedinfer ledger settle receipt.json --scores scores.json --fee 5000000
    --coordinator 9f86... --file ledger.db
    """
    import numpy as np

    from fedinfer_flower.incentives.ledger import Escrow, Payee
    from fedinfer_flower.incentives.payments.base import make_payment
    from fedinfer_flower.receipts.receipt import MAX_RECEIPT_BYTES, Receipt
    from fedinfer_flower.wire.pins import read_pins

    job = Receipt.from_bytes(_bytes(receipt, "receipt", max_bytes=MAX_RECEIPT_BYTES))
    by_key = {key_id: _number(value) for key_id, value in sorted(_object(scores, "scores").items())}
    names = {} if accounts is None else _object(accounts, "accounts")

    def account_of(key_id: str) -> str:
        return str(names.get(key_id, key_id))

    if not by_key:
        raise InvalidValueError("there is no site to pay", hint="write one score for each site")
    if not job.querier_key_id:
        raise LedgerError("the receipt does not say who asked, and so not who pays")
    payees = [Payee(key_id=key_id, account=account_of(key_id)) for key_id in by_key]
    payout = make_payment(payment).pay(np.array(list(by_key.values())), fee=fee)
    ledger = _ledger(file)
    escrow = Escrow(
        ledger,
        coordinator_key_id=coordinator,
        site_pins=None if pins is None else read_pins(pins).sites,
    )
    # A receipt that does not verify is refused before the querier's money moves.
    escrow.require_receipt(job)
    if escrow.state(job.job_id) is None:
        escrow.open(
            job.job_id,
            account_of(job.querier_key_id),
            fee=fee,
            deadline=int(time.time()) + _DEADLINE_S,
            query_ids=[batch.query_id for batch in job.batches],
            querier_key_id=job.querier_key_id,
        )
    entry = escrow.release(job.job_id, payout, job, payees=payees)
    if as_json:
        typer.echo(json.dumps(entry.to_dict()))
        return
    for posting in entry.postings:
        typer.echo(f"{posting.amount:>+20,}  {posting.account}")
    typer.echo(f"entry {entry.head}")


def _ledger(file: Path | None) -> Ledger:
    from fedinfer_flower.incentives.ledger import Ledger

    if file is not None:
        if not file.exists():
            raise ConfigError(
                f"there is no ledger {file.name!r}", hint="make one with Ledger(...).migrate()"
            )
        return Ledger(f"sqlite:///{file}")
    # Not an option: a URL with a password would be seen in the list of processes.
    url = os.environ.get(URL_VARIABLE, "")
    if not url:
        raise ConfigError(
            "no ledger was named", hint=f"give --file PATH, or set {URL_VARIABLE} to its URL"
        )
    return Ledger(url)


def _verified_export(path: Path, head: object) -> Verification:
    from fedinfer_flower.incentives.ledger import Head, read_export, verify_entries

    published = head if isinstance(head, Head) else None
    try:
        with path.open("rb") as lines:
            return verify_entries(read_export(lines), head=published)
    except OSError as exc:
        raise _unreadable("export", path, exc) from None


def _bytes(path: Path, what: str, *, max_bytes: int) -> bytes:
    try:
        with path.open("rb") as stream:
            # One byte more than may be: the reader of the content refuses it.
            return stream.read(max_bytes + 1)
    except OSError as exc:
        raise _unreadable(what, path, exc) from None


def _object(path: Path, what: str) -> dict[str, object]:
    from fedinfer_flower.receipts.canonical import parse_object

    data = _bytes(path, what, max_bytes=_MAX_JSON_BYTES)
    return dict(parse_object(data, max_bytes=_MAX_JSON_BYTES, what=f"file of {what}"))


def _number(value: object) -> float:
    from fedinfer_flower.wire import fields as read

    plain: Mapping[str, Any] = {"score": value}
    return read.number(plain, "score")


def _unreadable(what: str, path: Path, exc: OSError) -> ConfigError:
    return ConfigError(
        f"the {what} {path.name!r} cannot be read or written: {type(exc).__name__}",
        hint="check the path",
    )


def _plain(found: Verification) -> dict[str, object]:
    bad = found.first_bad
    return {
        "ok": found.ok,
        "n_entries": found.n_entries,
        "head": str(found.head) if found.head else None,
        "first_bad": None if bad is None else {"seq": bad.seq, "what": bad.what},
        "balances": found.balances,
        "jobs": [
            {"job_id": j.job_id, "status": j.status.value, "fee": j.fee, "deadline": j.deadline}
            for j in found.jobs
        ],
    }


def _verdict(found: Verification) -> str:
    if found.first_bad is not None:
        return f"the ledger does NOT verify: row {found.first_bad.seq}: {found.first_bad.what}"
    return f"the ledger verifies: {found.n_entries} entries, head {found.head}"


def _accounts(found: Verification) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table("account", "credits", box=None)
    for account, balance in found.balances.items():
        # An account's name is its owner's: shown as text, never as markup.
        table.add_row(Text(_cut(account)), f"{balance / 1e6:,.6f}")
    return table


def _jobs(found: Verification) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table("job", "fee in credits", "is", box=None)
    for job in found.jobs:
        table.add_row(Text(_cut(job.job_id)), f"{job.fee / 1e6:,.6f}", job.status.value)
    return table


def _cut(name: str) -> str:
    return name if len(name) <= _NAME_SHOWN else f"{name[: _NAME_SHOWN - 1]}…"
