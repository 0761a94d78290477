"""What a querier says to a gateway to hand a job in: models, directory, seal, job."""

from __future__ import annotations

import dataclasses
import io
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.ensemble.base import EnsembleRule
from fedinfer_flower.errors import (
    BindingError,
    InvalidValueError,
)
from fedinfer_flower.privacy.base import Protection, make_protection
from fedinfer_flower.querier.gateway_job import (
    GatewayJob,
    GatewayModel,
    ModelMemory,
    OnProgress,
    read_job,
    read_models,
)
from fedinfer_flower.querier.gateway_wire import MAX_ANSWER_BYTES, Call, Talk, Terms, exchange
from fedinfer_flower.querier.querier import Querier
from fedinfer_flower.wire.arrays import array_to_bytes
from fedinfer_flower.wire.directory import Directory
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.pins import Pins
from fedinfer_flower.wire.sealed_job import SealedJob

__all__ = [
    "Asking",
    "Submitted",
    "directory_of_another_run",
    "directory_talk",
    "models_talk",
    "submit_talk",
]

LONGEST_WAIT_S: Final = 30.0
TELLING_WAIT_S: Final = 0.5
"""Between two looks at a job whose progress somebody wants to hear of."""
SPARE_S: Final = 15.0
"""For the way, beyond what the gateway was told to wait."""
_GRACE: Final = 0.1
"""Share of the time given that is kept for fetching what the gateway ended in time."""
_MODEL: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_KEY: Final = re.compile(r"[!-~]{1,128}")
_RECEIPT_MODES: Final = ("verify", "require", "skip")


@dataclass(frozen=True, kw_only=True)
class Asking:
    """What one `Gateway.ask` is to do; the parameters are described there."""

    inputs: npt.ArrayLike = field(repr=False)
    model: str
    seal: bool = True
    protection: str | Protection | None = None
    rule: str | EnsembleRule | None = None
    pins: Pins | None = field(default=None, repr=False)
    identity: Identity | None = field(default=None, repr=False)
    idempotency_key: str | None = field(default=None, repr=False)
    receipt: str = "verify"
    reseals: int = 1
    batch_size: int = 1024
    timeout_s: float | None = None
    on_progress: OnProgress | None = field(default=None, repr=False)
    known: ModelMemory = field(default_factory=ModelMemory, repr=False)

    def __post_init__(self) -> None:
        if self.receipt not in _RECEIPT_MODES:
            raise InvalidValueError(f"receipt is one of {', '.join(_RECEIPT_MODES)}")
        if not 0 <= self.reseals <= 2:
            raise InvalidValueError("reseals is 0, 1 or 2: sites charge rows again for each")
        if not self.seal and (self.protection is not None or self.rule is not None):
            raise InvalidValueError(
                "in clear the gateway picks protection and rule, not the querier",
                hint="seal=True, or leave protection and rule to gateway.toml",
            )
        key = self.idempotency_key
        if key is not None and not _KEY.fullmatch(key):
            raise InvalidValueError("an idempotency key has 1 to 128 visible ASCII characters")


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """A job that the gateway has accepted.

    Parameters
    ----------
    asking : Asking
    job : GatewayJob
        As it stood last.
    n_rows : int
    times : int
        How often it was sealed.
    querier, sealed : Querier, SealedJob, optional
        What opens the answer, and what was sent; None in clear.
    """

    asking: Asking
    job: GatewayJob
    n_rows: int
    times: int = 1
    querier: Querier | None = field(default=None, repr=False)
    sealed: SealedJob | None = field(default=None, repr=False)


def models_talk(terms: Terms) -> Talk[tuple[GatewayModel, ...]]:
    """Ask what the gateway serves."""
    reply = yield from exchange(Call(method="GET", path="/v1/models"), terms)
    return read_models(reply.body)


def directory_talk(model: str, pins: Pins | None, terms: Terms) -> Talk[Directory]:
    """Fetch the sites' signed cards; verify them, and compare them with the pins.

    Raises
    ------
    ProtocolError
        If a card is not signed by the key that it shows.
    UntrustedKeyError
        If a site is not pinned, or pinned to another key.
    """
    path = f"/v1/models/{_named(model)}/directory"
    call = Call(method="GET", path=path, max_bytes=MAX_ANSWER_BYTES)
    directory = Directory.from_bytes((yield from exchange(call, terms)).body)
    if pins is not None:
        directory.require_pinned(pins)
    return directory


def _named(model: str) -> str:
    # It becomes part of a path.
    if not _MODEL.fullmatch(model):
        raise InvalidValueError(
            "a model's name has lower-case letters, digits, dots, dashes: at most 64",
            hint="the names are in Gateway.models()",
        )
    return model


def submit_talk(
    asking: Asking,
    terms: Terms,
    *,
    wait_s: float = 0.0,
    times: int = 1,
    fresh: Directory | None = None,
) -> Talk[Submitted]:
    """Hand a job in.

    A sealed job that the gateway refuses because the federation has started another run is
    sealed to the new run, if the caller allows it: see `Asking.reseals`.
    """
    rows = np.asarray(asking.inputs)
    key = asking.idempotency_key if times == 1 else None
    served = yield from _served(asking, terms)
    if not asking.seal:
        call = _clear_call(rows, _query(asking, served, terms, wait_s))
        job = yield from _post(call, key, terms)
        return Submitted(asking=asking, job=job, n_rows=len(rows))
    protection, rule = _protection(asking, served), asking.rule or served.rule or "auto"
    directory = fresh
    while True:
        if directory is None:
            directory = yield from directory_talk(asking.model, asking.pins, terms)
        querier = Querier(protection=protection, identity=asking.identity, pins=asking.pins)
        sealed = querier.ask(
            rows,
            directory=directory,
            rule=rule,
            batch_size=asking.batch_size,
            ttl_s=max(terms.left_s, 1.0) + SPARE_S,
        )
        call = _sealed_call(sealed, _query(asking, served, terms, wait_s))
        try:
            job = yield from _post(call, key, terms)
        except BindingError:
            directory = yield from directory_of_another_run(asking, directory.run_id, times, terms)
            if directory is None:
                raise
            times, key = times + 1, None
            continue
        return Submitted(
            asking=asking, job=job, n_rows=len(rows), times=times, querier=querier, sealed=sealed
        )


def _served(asking: Asking, terms: Terms) -> Talk[GatewayModel]:
    found = asking.known.get(asking.model)
    if found is None:
        models = yield from models_talk(terms)
        asking.known.note(models)
        found = next((m for m in models if m.name == asking.model), None)
        if found is None:
            raise InvalidValueError(
                f"the gateway serves no model {asking.model[:64]!r} to this key",
                hint=f"it serves: {', '.join(m.name for m in models[:10]) or 'none'}",
            )
    return found


def _protection(asking: Asking, served: GatewayModel) -> Protection:
    chosen = asking.protection
    if isinstance(chosen, Protection):
        return chosen
    if chosen is not None:
        return make_protection(chosen, {})
    return make_protection(served.protection or "secagg", served.protection_options)


def _query(asking: Asking, served: GatewayModel, terms: Terms, wait_s: float) -> dict[str, str]:
    # The gateway ends the job a little before we stop waiting, so that its reason arrives.
    timeout_s = max(terms.left_s - _GRACE * terms.timeout_s, 0.1)
    timeout_s = min(timeout_s, served.timeout_s or timeout_s)
    wait_s = TELLING_WAIT_S if asking.on_progress and wait_s else wait_s
    query = {
        "model": _named(asking.model),
        "wait_s": f"{min(wait_s, LONGEST_WAIT_S, timeout_s):.3f}",
    }
    # More than the model takes is refused: a default of ours must not be.
    if served.timeout_s or asking.timeout_s is not None:
        query["timeout_s"] = f"{timeout_s:.3f}"
    return query


def _clear_call(rows: npt.NDArray[Any], query: Mapping[str, str]) -> Call:
    if rows.ndim < 2 or len(rows) == 0:
        raise InvalidValueError(
            f"queries have shape {rows.shape}, expected (n_queries, ...)",
            hint="reshape a single query to (1, n_features)",
        )
    array_to_bytes(rows)  # refuses dtypes and values that do not travel
    body = io.BytesIO()
    np.save(body, np.ascontiguousarray(rows), allow_pickle=False)
    return Call(
        method="POST",
        path="/v1/query",
        params=query,
        headers={"content-type": "application/octet-stream"},
        body=body.getvalue(),
    )


def _sealed_call(sealed: SealedJob, query: Mapping[str, str]) -> Call:
    return Call(
        method="POST",
        path="/v1/query",
        params=query,
        headers={"content-type": "application/vnd.fedinfer.sealed-job"},
        body=sealed.to_bytes(),
    )


def _post(call: Call, key: str | None, terms: Terms) -> Talk[GatewayJob]:
    keyed = dataclasses.replace(
        call,
        # One key for all repetitions: a request that arrived without our hearing is not a second.
        headers={**call.headers, "idempotency-key": key or secrets.token_urlsafe(24)},
        timeout_s=float(call.params["wait_s"]) + SPARE_S,
        max_bytes=MAX_ANSWER_BYTES,
    )
    return read_job((yield from exchange(keyed, terms)).body)


def directory_of_another_run(
    asking: Asking, run_id: int, times: int, terms: Terms
) -> Talk[Directory | None]:
    """Return the directory if it is now another run's, and sealing again is allowed."""
    if times > asking.reseals:
        return None
    directory = yield from directory_talk(asking.model, asking.pins, terms)
    return None if directory.run_id == run_id else directory
