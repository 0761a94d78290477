"""Gates on disk: ``gate.json`` (kind, options, card) beside ``gate.safetensors`` (weights).

Nothing in the files is run. The digest of the weights guards against mixed-up and damaged
files. It is no signature: whoever can write the folder can write both.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

from torch import Tensor

from fedinfer_flower.errors import FuserError, InvalidValueError, MissingExtraError
from fedinfer_flower.kv.gate import GATES, Gate

__all__ = ["load_gate", "read_gate_card", "save_gate"]

FILE_VERSION: Final = 1
_JSON: Final = "gate.json"
_WEIGHTS: Final = "gate.safetensors"
_FIELDS: Final = {"version", "kind", "options", "receiver", "card", "weights_sha256"}
_MAX_JSON_BYTES: Final = 1 << 20
_MAX_WEIGHTS_BYTES: Final = 16 << 20


def save_gate(
    gate: Gate, folder: str | Path, card: Mapping[str, Any] | None = None, *, receiver: str = ""
) -> Path:
    """Write a gate into a folder.

    Parameters
    ----------
    gate : Gate
    folder : path
        Made when it is not there; a gate in it is replaced.
    card : mapping, optional
        What is to be known of the gate, fit for JSON: how it was trained, what it reached.
    receiver : str
        Model digest of the receiver that it was trained for.

    Returns
    -------
    folder : pathlib.Path

    Raises
    ------
    InvalidValueError
        If the gate has no registered name, or the card is not fit for JSON.

    Examples
    --------
    >>> import tempfile
    >>> from fedinfer_flower.kv.gate import make_gate
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     load_gate(save_gate(make_gate("top-k", k=2), folder)).options()
    {'k': 2}
    """
    folder = Path(folder)
    if gate.name not in GATES.names():
        raise InvalidValueError("a gate without a registered name cannot be read back")
    tensors = gate.tensors()
    weights = _pack(tensors) if tensors else b""
    head = {
        "version": FILE_VERSION,
        "kind": gate.name,
        "options": gate.options(),
        "receiver": receiver,
        "card": dict(card or {}),
        "weights_sha256": hashlib.sha256(weights).hexdigest() if tensors else "",
    }
    try:
        text = json.dumps(head, sort_keys=True, indent=1, allow_nan=False)
    except (TypeError, ValueError):
        raise InvalidValueError("the card of a gate is not fit for JSON") from None
    folder.mkdir(parents=True, exist_ok=True)
    if tensors:
        _replace(folder / _WEIGHTS, weights)
    else:
        (folder / _WEIGHTS).unlink(missing_ok=True)
    _replace(folder / _JSON, text.encode())
    return folder


def load_gate(folder: str | Path, *, receiver: str = "") -> Gate:
    """Read a gate.

    Parameters
    ----------
    folder : path
    receiver : str
        Model digest of the receiver; empty to accept a gate of any.

    Raises
    ------
    FuserError
        If a file is missing, damaged, too large, of another release or kind, or of another
        receiver than asked for.
    """
    folder = Path(folder)
    head = _head(folder)
    if head["kind"] not in GATES.names():
        raise FuserError(
            "a gate of a kind that this installation has not",
            hint=f"known: {', '.join(GATES.names())}",
        )
    if receiver and head["receiver"] != receiver:
        raise FuserError(
            f"a gate of receiver {head['receiver'][:12] or 'unknown'}, expected {receiver[:12]}",
            hint="a gate belongs to one revision of its receiver: train it again",
        )
    tensors: dict[str, Tensor] = {}
    if head["weights_sha256"]:
        data = _read(folder / _WEIGHTS, _MAX_WEIGHTS_BYTES)
        if hashlib.sha256(data).hexdigest() != head["weights_sha256"]:
            raise FuserError("the weights of a gate are not those that its gate.json names")
        tensors = _unpack(data)
    try:
        return GATES.get(head["kind"]).restore(head["options"], tensors)
    except InvalidValueError as exc:
        raise FuserError(exc.message) from None


def read_gate_card(folder: str | Path) -> dict[str, Any]:
    """Read a gate's card, without its weights.

    Raises
    ------
    FuserError
    """
    card: dict[str, Any] = _head(Path(folder))["card"]
    return card


def _head(folder: Path) -> dict[str, Any]:
    data = _read(folder / _JSON, _MAX_JSON_BYTES)
    try:
        head: Any = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise FuserError("the gate.json of a gate is not JSON") from None
    if not isinstance(head, dict) or "version" not in head:
        raise FuserError("the gate.json of a gate has no version")
    if head["version"] != FILE_VERSION or type(head["version"]) is not int:
        raise FuserError(
            "a gate of another version of the file",
            hint="train the gate again with this release of fedinfer-flower",
        )
    texts = ("kind", "receiver", "weights_sha256")
    good = (
        set(head) == _FIELDS
        and all(isinstance(head[name], str) for name in texts)
        and all(isinstance(head[name], dict) for name in ("options", "card"))
    )
    if not good:
        raise FuserError("the gate.json of a gate lacks a field or has a wrong one")
    return head


def _read(path: Path, max_bytes: int) -> bytes:
    try:
        with path.open("rb") as stream:
            data = stream.read(max_bytes + 1)
    except OSError:
        raise FuserError(
            f"the folder of a gate has no readable {path.name}",
            hint="give the folder that save_gate wrote",
        ) from None
    if len(data) > max_bytes:
        raise FuserError(f"the {path.name} of a gate is larger than {max_bytes} bytes")
    return data


def _replace(path: Path, data: bytes) -> None:
    # A reader finds the old file or the new one, never half of one.
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    os.replace(part, path)


def _no_constant(_: str) -> NoReturn:
    raise ValueError


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as exc:
        raise MissingExtraError(
            "gates with weights need safetensors", hint="pip install 'fedinfer-flower[llm]'"
        ) from exc
    return safetensors.torch


def _pack(tensors: Mapping[str, Tensor]) -> bytes:
    data: bytes = _safetensors().save({k: v.contiguous() for k, v in tensors.items()})
    return data


def _unpack(data: bytes) -> dict[str, Tensor]:
    library = _safetensors()
    try:
        tensors: dict[str, Tensor] = library.load(data)
    except Exception:
        # Its parser raises a class of its own, and whatever a strange header provokes.
        raise FuserError("the weights of a gate are no safetensors") from None
    return tensors
