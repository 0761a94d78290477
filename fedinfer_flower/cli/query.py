"""`fedinfer query`: ask a gateway about the rows of a file."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import numpy as np
import typer

from fedinfer_flower.errors import ConfigError, InvalidValueError, SizeLimitError

if TYPE_CHECKING:
    from fedinfer_flower.querier.gateway_job import Answer
    from fedinfer_flower.query import Prediction

__all__ = ["query", "read_rows"]

_MAX_FILE_BYTES: Final = 1 << 30


def query(
    file: Annotated[Path, typer.Argument(help="rows: .npy, .csv of numbers, or .json lists")],
    gateway: Annotated[str, typer.Option(help="https://HOST:PORT", envvar="FEDINFER_GATEWAY")],
    model: Annotated[str, typer.Option(help="a model that the gateway serves")],
    seal: Annotated[
        bool, typer.Option("--seal/--clear", help="to the sites, or readable to the gateway")
    ] = True,
    pins: Annotated[Path | None, typer.Option(help="pin file: the sites' key ids")] = None,
    identity: Annotated[
        Path | None, typer.Option(help="your identity, made at first use; sites may pin it")
    ] = None,
    protect: Annotated[
        str, typer.Option(help="protection of sealed answers; default the model's")
    ] = "",
    api_key_file: Annotated[
        Path | None, typer.Option(help="file with the API key; default FEDINFER_API_KEY")
    ] = None,
    ca: Annotated[Path | None, typer.Option(help="PEM file of a private authority")] = None,
    timeout_s: Annotated[
        float | None, typer.Option(help="seconds for everything; default 60, or the model's")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="also write .npz or .json")] = None,
    receipt: Annotated[
        Path | None, typer.Option(help="write the receipt; it is an error if there is none")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="no words on the error stream")] = False,
) -> None:
    """Ask a federation through its gateway; prints one JSON line a row.

    Exit status 0: answered, and what the receipt says agrees. 1: answered, but every row
    was abstained from. 2: no answer, or one that is not believed; the reason is on the
    error stream.

    Example: fedinfer query rows.npy --gateway https://gw:8443 --model triage --pins pins.toml
    """
    from fedinfer_flower.querier.gateway_client import Gateway
    from fedinfer_flower.wire.identity import Identity
    from fedinfer_flower.wire.pins import read_pins

    if out is not None and out.suffix not in (".npz", ".json"):
        raise InvalidValueError(f"{out.name} ends neither in .npz nor in .json")
    rows = read_rows(file)
    known = None if pins is None else read_pins(pins)
    me = None if identity is None else Identity.load_or_create(identity)
    if seal and pins is None and not quiet:
        typer.echo("no --pins: who the sites are is taken from the gateway", err=True)
    with Gateway(gateway, api_key_file=api_key_file, ca=ca) as client:
        answer = client.ask(
            rows,
            model=model,
            seal=seal,
            protection=protect or None,
            pins=known,
            identity=me,
            timeout_s=timeout_s,
            receipt="verify" if receipt is None else "require",
        )
    # The receipt first: what was charged was charged, whatever becomes of the answer.
    if receipt is not None:
        receipt.write_bytes(answer.receipt)
    for line in _lines(answer.prediction):
        typer.echo(json.dumps(line))
    if out is not None:
        _write(out, answer)
    if not quiet:
        typer.echo(_words(answer), err=True)
    if answer.prediction.abstained.all():
        raise typer.Exit(1)


def read_rows(path: Path) -> np.ndarray[Any, Any]:
    """Read the rows of a ``.npy``, ``.csv`` or ``.json`` file.

    A CSV has numbers only; a first line that is not of numbers is a header. Values out of
    a file never stand in an error text.

    Raises
    ------
    ConfigError
        If it cannot be read, or is of another kind.
    InvalidValueError
        If it holds anything but a rectangle of numbers.
    """
    readers = {".npy": _read_npy, ".csv": _read_csv, ".json": _read_json}
    if path.suffix not in readers:
        raise ConfigError(
            f"{path.name} is of a kind that cannot be read", hint=".npy, .csv or .json"
        )
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise SizeLimitError(f"{path.name} has more than {_MAX_FILE_BYTES} bytes")
        rows = readers[path.suffix](path)
    except OSError as exc:
        raise ConfigError(f"{path.name} cannot be read: {type(exc).__name__}") from None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise InvalidValueError(f"{path.name} holds no rectangle of numbers") from None
    if rows.ndim < 2 or len(rows) == 0 or rows.dtype.kind not in "biuf":
        raise InvalidValueError(
            f"{path.name} holds an array of shape {rows.shape}, expected numbers of shape"
            " (n_queries, ...)"
        )
    return rows


def _read_npy(path: Path) -> np.ndarray[Any, Any]:
    return np.asarray(np.load(path, allow_pickle=False))


def _read_csv(path: Path) -> np.ndarray[Any, Any]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = [line for line in csv.reader(file) if line]
    if lines and not _are_numbers(lines[0]):
        lines = lines[1:]
    return np.array([[float(cell) for cell in line] for line in lines], dtype=np.float64)


def _are_numbers(cells: list[str]) -> bool:
    try:
        return bool([float(cell) for cell in cells])
    except ValueError:
        return False


def _read_json(path: Path) -> np.ndarray[Any, Any]:
    found = json.loads(path.read_bytes())
    return np.array(found["inputs"] if isinstance(found, dict) else found)


def _lines(prediction: Prediction) -> list[dict[str, Any]]:
    return [
        {
            "label": name,
            "probability": round(float(prediction.probabilities[i, prediction.labels[i]]), 6),
            "margin": round(float(prediction.margin[i]), 6),
            "abstained": bool(prediction.abstained[i]),
        }
        for i, name in enumerate(prediction.names)
    ]


def _write(out: Path, answer: Answer) -> None:
    prediction = answer.prediction
    if out.suffix == ".npz":
        np.savez(
            out,
            classes=np.array(prediction.classes),
            labels=prediction.labels,
            probabilities=prediction.probabilities,
            margin=prediction.margin,
            abstained=prediction.abstained,
        )
        return
    plain = {
        "job_id": answer.job_id,
        "classes": list(prediction.classes),
        "labels": prediction.names,
        "probabilities": prediction.probabilities.tolist(),
        "margin": prediction.margin.tolist(),
        "abstained": prediction.abstained.tolist(),
        "provenance": dict(answer.provenance),
    }
    out.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")


def _words(answer: Answer) -> str:
    said = f"{len(answer.prediction)} rows, job {answer.job_id}"
    if answer.asked_times > 1:
        said += f", sealed {answer.asked_times} times: the federation started another run"
    if answer.checks is None:
        return f"{said}; no receipt"
    left = ", ".join(check.name for check in answer.checks.not_checked)
    return f"{said}; receipt verified" + (f", except: {left}" if left else "")
