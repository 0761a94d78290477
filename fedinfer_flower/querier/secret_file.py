"""The querier's state between asking and opening: one file, readable by its owner alone."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fedinfer_flower.errors import EnvelopeError, FedInferError, InvalidValueError
from fedinfer_flower.privacy.base import KeyPair, Protection, make_protection
from fedinfer_flower.querier.asked import AskedJob
from fedinfer_flower.wire.identity import Identity

__all__ = ["QuerierState", "read_secret", "write_secret"]

_VERSION: Final = 2


@dataclass(frozen=True, kw_only=True)
class QuerierState:
    """What a file holds.

    Parameters
    ----------
    protection : Protection
    keys : KeyPair
    identity : Identity
    asked : mapping of job id to AskedJob
    tie_seed : int
    """

    protection: Protection
    keys: KeyPair
    identity: Identity
    asked: Mapping[str, AskedJob]
    tie_seed: int


def write_secret(
    path: Path,
    *,
    protection: Protection,
    keys: KeyPair,
    identity: Identity,
    asked: Mapping[str, AskedJob],
    tie_seed: int,
) -> None:
    """Write state with mode 0600; an existing file is not overwritten.

    Raises
    ------
    InvalidValueError
        If the file exists: it may hold the only key to an answer.
    """
    state = {
        "version": _VERSION,
        "protection": protection.name,
        "options": dict(protection.options()),
        "public": base64.b64encode(keys.public_key).decode(),
        "secret": base64.b64encode(keys.secret_key).decode(),
        "identity": identity.to_secret(),
        "asked": {job_id: job.to_dict() for job_id, job in asked.items()},
        "tie-seed": tie_seed,
    }
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as exc:
        raise InvalidValueError(
            f"{path} exists and may hold the only key to an answer",
            hint="choose another file, or delete it yourself",
        ) from exc
    with os.fdopen(descriptor, "w") as file:
        json.dump(state, file)


def read_secret(path: Path) -> QuerierState:
    """Read what `write_secret` wrote.

    Raises
    ------
    InvalidValueError
        If others than the owner may read the file.
    EnvelopeError
        If it is not such a file.
    """
    if os.name == "posix" and path.stat().st_mode & 0o077:
        raise InvalidValueError(
            f"{path} can be read by others than its owner", hint=f"chmod 600 {path}"
        )
    try:
        state: dict[str, Any] = json.loads(path.read_text())
        if state["version"] != _VERSION:
            raise ValueError
        keys = KeyPair(
            public_key=base64.b64decode(state["public"], validate=True),
            secret_key=base64.b64decode(state["secret"], validate=True),
        )
        return QuerierState(
            protection=make_protection(state["protection"], state["options"]),
            keys=keys,
            identity=Identity.from_secret(state["identity"]),
            asked={str(job): AskedJob.from_dict(plain) for job, plain in state["asked"].items()},
            tie_seed=int(state["tie-seed"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, FedInferError):
        # The cause would quote the file, which holds a key.
        raise EnvelopeError(f"{path} is not a querier's file") from None
