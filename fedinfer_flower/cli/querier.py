"""`fedinfer querier`: ask and open from outside the federation, by files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from fedinfer_flower.errors import InvalidValueError

__all__ = ["querier_app"]

querier_app = typer.Typer(help="Ask and open from outside the federation.", no_args_is_help=True)


@querier_app.command()
def ask(
    inputs: Annotated[Path, typer.Option(help="queries: .npy of shape (n_queries, ...)")],
    job: Annotated[Path, typer.Option(help="job file to write; public")],
    secret: Annotated[Path, typer.Option(help="key file to write; stays with you")],
    protect: Annotated[str, typer.Option(help="protection of the answers")] = "he",
    batch_size: Annotated[int, typer.Option(min=1, help="queries a message")] = 1024,
    reuse: Annotated[Path | None, typer.Option(help="key file whose key sites pin")] = None,
) -> None:
    """Make a key and a job file for the coordinator.

    The job file holds the queries in clear and the public key. The key file opens the
    answer: keep it away from the coordinator. A fresh key is made unless --reuse names
    an earlier key file: sites that pin a key id answer only under that key.

    Example: fedinfer querier ask --inputs x.npy --job job.fi --secret me.key
    """
    from fedinfer_flower.querier import Querier

    querier = Querier(protection=protect) if reuse is None else Querier.load_secret(reuse)
    rows = np.load(inputs, allow_pickle=False)
    data = querier.ask(rows, batch_size=batch_size).to_bytes()
    # The key first: a job whose key could not be written must not replace another.
    querier.save_secret(secret)
    job.write_bytes(data)
    typer.echo(f"{len(rows)} queries in {job}; key id {querier.key_id or '(none needed)'}")


@querier_app.command("open")
def open_answer(
    answer: Annotated[Path, typer.Option(help="answer file from the coordinator")],
    secret: Annotated[Path, typer.Option(help="key file of 'ask'")],
    out: Annotated[Path | None, typer.Option(help="also write .npz with probabilities")] = None,
) -> None:
    """Open a combined answer; prints one JSON line a query.

    Example: fedinfer querier open --answer answer.fi --secret me.key
    """
    from fedinfer_flower.querier import Querier
    from fedinfer_flower.wire.documents import CombinedAnswer

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
