"""`fedinfer querier`: ask and open from outside the federation, by files."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from fedinfer_flower.errors import ConfigError, InvalidValueError

if TYPE_CHECKING:
    from fedinfer_flower.wire.directory import Directory

__all__ = ["querier_app"]

querier_app = typer.Typer(help="Ask and open from outside the federation.", no_args_is_help=True)


@querier_app.command()
def ask(
    inputs: Annotated[Path, typer.Option(help="queries: .npy of shape (n_queries, ...)")],
    job: Annotated[Path, typer.Option(help="job file to write; public")],
    secret: Annotated[Path, typer.Option(help="key file to write; stays with you")],
    directory: Annotated[
        Path | None, typer.Option(help="directory of the sites; seals the queries to them")
    ] = None,
    wait_s: Annotated[float, typer.Option(help="wait so long for the directory")] = 0.0,
    pins: Annotated[Path | None, typer.Option(help="pin file: the sites' key ids")] = None,
    identity: Annotated[
        Path | None, typer.Option(help="your identity, made at first use; sites may pin it")
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="let the coordinator read them")] = False,
    protect: Annotated[str, typer.Option(help="protection of the answers")] = "he",
    epsilon: Annotated[float | None, typer.Option(help="of one row, where noise is added")] = None,
    rule: Annotated[str, typer.Option(help="ensemble rule of sealed queries")] = "auto",
    allow_skew: Annotated[
        bool, typer.Option("--allow-skew", help="take a median of sites whose classes differ")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="queries a message")] = 1024,
    reuse: Annotated[Path | None, typer.Option(help="key file whose key sites pin")] = None,
) -> None:
    """Make a key and a job file for the coordinator.

    With --directory only the sites can read the queries; with --clear the coordinator can
    as well. The key file opens the answer: keep it away from the coordinator. Fresh keys
    are made unless --reuse names an earlier key file.

    Example: fedinfer querier ask --inputs x.npy --directory directory.fi --pins pins.toml
    --identity me.id --protect secagg --job job.fi --secret me.key
    """
    from fedinfer_flower.ensemble.skew_check import regardless
    from fedinfer_flower.privacy.base import make_protection
    from fedinfer_flower.querier import Querier
    from fedinfer_flower.strategies.handover import write_whole
    from fedinfer_flower.wire.identity import Identity
    from fedinfer_flower.wire.pins import read_pins

    options = {} if epsilon is None else {"epsilon": epsilon}
    known = None if pins is None else read_pins(pins)
    if reuse is not None:
        querier = Querier.load_secret(reuse, pins=known)
    else:
        querier = Querier(
            protection=make_protection(protect, options),
            identity=None if identity is None else Identity.load_or_create(identity),
            pins=known,
        )
    rows = np.load(inputs, allow_pickle=False)
    if directory is not None and not clear:
        found = _directory(directory, wait_s)
        picked = regardless(rule) if allow_skew and rule != "auto" else rule
        data = querier.ask(rows, directory=found, batch_size=batch_size, rule=picked).to_bytes()
        names = ", ".join(f"{c.profile.name} {c.key_id[:16]}" for c in found.cards)
        typer.echo(f"sealed to {len(found.cards)} sites: {names}")
    elif clear and directory is None:
        data = querier.ask(rows, clear=True, batch_size=batch_size).to_bytes()
    else:
        raise ConfigError(
            "queries are sealed to the sites of a directory, or asked in clear: one of both",
            hint="--directory FILE, from the coordinator; or --clear",
        )
    # The key first: a job whose key could not be written must not replace another.
    querier.save_secret(secret)
    write_whole(job, data)
    typer.echo(f"{len(rows)} queries in {job}; key id {querier.key_id or '(none needed)'}")


def _directory(path: Path, wait_s: float) -> Directory:
    from fedinfer_flower.wire.directory import Directory

    end = time.monotonic() + wait_s
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.1)
    if not path.exists():
        raise ConfigError(
            f"there is no directory {path.name!r}",
            hint="the coordinator writes it once the sites are there: Handover.publish",
        )
    return Directory.from_bytes(path.read_bytes())


@querier_app.command("open")
def open_answer(
    answer: Annotated[Path, typer.Option(help="answer file from the coordinator")],
    secret: Annotated[Path, typer.Option(help="key file of 'ask'")],
    wait_s: Annotated[float, typer.Option(help="wait so long for the answer")] = 0.0,
    out: Annotated[Path | None, typer.Option(help="also write .npz with probabilities")] = None,
) -> None:
    """Open a combined answer; prints one JSON line a query.

    Example: fedinfer querier open --answer answer.fi --secret me.key
    """
    from fedinfer_flower.querier import Querier
    from fedinfer_flower.wire.documents import CombinedAnswer

    end = time.monotonic() + wait_s
    while not answer.exists() and time.monotonic() < end:
        time.sleep(0.1)
    if not answer.exists():
        raise ConfigError(f"there is no answer {answer.name!r} yet", hint="--wait-s 60")
    combined = CombinedAnswer.from_bytes(answer.read_bytes())
    prediction = Querier.load_secret(secret).open(combined)
    for i, name in enumerate(prediction.names):
        line = {
            "label": name,
            "probability": round(float(prediction.probabilities[i, prediction.labels[i]]), 6),
            "margin": round(float(prediction.margin[i]), 6),
            "abstained": bool(prediction.abstained[i]),
        }
        typer.echo(json.dumps(line))
    if out is not None:
        if out.suffix != ".npz":
            raise InvalidValueError(f"{out} does not end in .npz")
        np.savez(
            out,
            classes=np.array(prediction.classes),
            labels=prediction.labels,
            probabilities=prediction.probabilities,
            margin=prediction.margin,
            abstained=prediction.abstained,
        )
