"""What a gateway says of models, jobs and answers, read as what a stranger sent."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from fedinfer_flower.errors import (
    EnvelopeError,
    FedInferError,
    InvalidScoresError,
    ReceiptError,
    ShapeError,
)
from fedinfer_flower.querier.gateway_wire import error_of, json_object
from fedinfer_flower.query import MAX_CLASSES, Prediction
from fedinfer_flower.receipts.bundle import receipts_of
from fedinfer_flower.receipts.verification import Verification, verify
from fedinfer_flower.wire import fields
from fedinfer_flower.wire.pins import Pins
from fedinfer_flower.wire.sealed_job import SealedJob

__all__ = [
    "Answer",
    "GatewayJob",
    "GatewayModel",
    "ModelMemory",
    "OnProgress",
    "check_receipt",
    "read_job",
    "read_models",
    "read_prediction",
]

_ENDS: Final = ("done", "failed", "cancelled")
_STATES: Final = ("accepted", "asking", *_ENDS)
_JOB_ID: Final = re.compile(r"[0-9a-f]{32}")
_MODEL_ID: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_MAX_MODELS: Final = 1000
_MAX_COUNT: Final = 2**53
_FRESH_S: Final = 60.0
# Probabilities are rounded to a few digits on their way.
_SUM_TOLERANCE: Final = 1e-3


@dataclass(frozen=True, kw_only=True)
class GatewayModel:
    """A model that a gateway offers.

    Parameters
    ----------
    name, kind : str
    protection, rule : str
        What the gateway's operator set; empty if the gateway does not say.
    protection_options : mapping
    timeout_s : float
        Most that a query may take; 0.0 if the gateway does not say.
    facts : mapping
        Everything that the gateway shows of it, as it came: for people.
    """

    name: str
    kind: str
    protection: str = ""
    rule: str = ""
    protection_options: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    timeout_s: float = 0.0
    facts: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, kw_only=True)
class GatewayJob:
    """A job, as the gateway tells its owner.

    Parameters
    ----------
    job_id, model, state : str
    n_rows : int
    rows_done, sites_asked, sites_answered : int
        How far it is, of the batch that is being asked.
    answer : mapping or None
        Before it was checked; see `read_prediction`.
    provenance : mapping
        In the gateway's words: nobody signed it.
    error : FedInferError or None
        Why it failed.
    """

    job_id: str
    model: str
    state: str
    n_rows: int
    rows_done: int = 0
    sites_asked: int = 0
    sites_answered: int = 0
    answer: Mapping[str, Any] | None = field(default=None, repr=False)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    error: FedInferError | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing more happens to it."""
        return self.state in _ENDS


class ModelMemory:
    """What the gateway said of its models, for a minute: one call less a query.

    Parameters
    ----------
    clock : callable
        Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[str, tuple[float, GatewayModel]] = {}

    def get(self, name: str) -> GatewayModel | None:
        """Return a model that was listed less than a minute ago."""
        at, model = self._known.get(name, (-math.inf, None))
        return model if self._clock() - at < _FRESH_S else None

    def note(self, models: Iterable[GatewayModel]) -> None:
        """Take a list in, in place of the last."""
        self._known = {model.name: (self._clock(), model) for model in models}


OnProgress = Callable[[GatewayJob], None]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The joint answer to one `ask`.

    Parameters
    ----------
    prediction : Prediction
    provenance : mapping
        How the gateway says that it came about: ``sites_asked``, ``sites_answered``,
        ``degraded``, ``rule``, ``protection``, ``epsilon_per_query``, ``seconds``, ...
        Only what `checks` lists has been verified.
    receipt : bytes
        What the sites signed, to keep: `fedinfer verify` reads it. Empty if there is none.
    checks : Verification or None
        What was checked in the receipt, and what could not be; None without a receipt.
    job_id : str
        The gateway's id of the job.
    asked_times : int
        2 if the job had to be sealed anew, because the federation started another run.
    """

    prediction: Prediction
    provenance: Mapping[str, Any] = field(default_factory=dict)
    receipt: bytes = field(default=b"", repr=False)
    checks: Verification | None = field(default=None, repr=False)
    job_id: str
    asked_times: int = 1


def read_models(body: bytes) -> tuple[GatewayModel, ...]:
    """Read ``GET /v1/models``.

    Raises
    ------
    ProtocolError
        If it is no list of models.
    """
    data = json_object(body).get("data")
    if not isinstance(data, list) or len(data) > _MAX_MODELS:
        raise EnvelopeError("the gateway's list of models is not one")
    found = []
    for entry in data:
        if not isinstance(entry, dict) or not _MODEL_ID.fullmatch(fields.text(entry, "id")):
            raise EnvelopeError("the gateway lists a model without a name")
        found.append(
            GatewayModel(
                name=entry["id"],
                kind=_short(entry, "kind"),
                protection=_short(entry, "protection"),
                rule=_short(entry, "rule"),
                protection_options=fields.scalars(
                    {"protection_options": entry.get("protection_options") or {}},
                    "protection_options",
                ),
                timeout_s=max(0.0, fields.number({"timeout_s": 0.0} | entry, "timeout_s")),
                facts=entry,
            )
        )
    return tuple(found)


def _short(entry: Mapping[str, Any], name: str) -> str:
    return fields.text(entry, name, max_chars=64) if entry.get(name) is not None else ""


def read_job(body: bytes) -> GatewayJob:
    """Read a job.

    Raises
    ------
    ProtocolError
        If it is none.
    """
    plain = json_object(body)
    job_id, state = fields.text(plain, "id"), fields.text(plain, "state")
    if not _JOB_ID.fullmatch(job_id) or state not in _STATES:
        raise EnvelopeError("the gateway's reply is no job")
    progress = _table(plain, "progress")
    error = _table(plain, "error")
    return GatewayJob(
        job_id=job_id,
        model=fields.text(plain, "model", max_chars=64),
        state=state,
        n_rows=_count(plain, "n_rows"),
        rows_done=_count(progress, "rows_done"),
        sites_asked=_count(progress, "sites_asked"),
        sites_answered=_count(progress, "sites_answered"),
        answer=_table(plain, "answer") or None,
        provenance=_table(plain, "provenance"),
        error=error_of(error) if error else None,
    )


def _table(plain: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = plain.get(name)
    if value is not None and not isinstance(value, dict):
        raise EnvelopeError(f"field {name!r} is not an object")
    return value or {}


def _count(plain: Mapping[str, Any], name: str) -> int:
    return fields.whole(plain, name, low=0, high=_MAX_COUNT) if name in plain else 0


def read_prediction(answer: Mapping[str, Any], *, n_rows: int) -> Prediction:
    """Read the answer to rows in clear.

    Raises
    ------
    ProtocolError
        If it is not one row of finite probabilities for each row asked, or contradicts
        itself.

    Examples
    --------
    >>> answer = {"classes": ["a", "b"], "labels": ["b"], "indices": [1],
    ...           "probabilities": [[0.25, 0.75]], "margin": [0.5], "abstained": [False]}
    >>> read_prediction(answer, n_rows=1).names
    ['b']
    """
    classes = fields.texts(answer, "classes", max_items=MAX_CLASSES)
    if not classes or len(set(classes)) != len(classes):
        raise ShapeError("the answer has no classes, or one twice")
    for name in ("labels", "indices", "probabilities", "margin", "abstained"):
        value = answer.get(name)
        if not isinstance(value, list) or len(value) != n_rows:
            raise ShapeError(f"the answer's {name!r} is not a list of {n_rows}, one a row")
    probabilities = _probabilities(answer["probabilities"], len(classes))
    indices = answer["indices"]
    if any(type(i) is not int or not 0 <= i < len(classes) for i in indices):
        raise ShapeError("the answer has an index that is no class")
    if [classes[i] for i in indices] != answer["labels"]:
        raise ShapeError("the answer's labels are not those of its indices")
    if any(type(flag) is not bool for flag in answer["abstained"]):
        raise EnvelopeError("the answer's 'abstained' is not true or false")
    return Prediction(
        classes=classes,
        labels=np.array(indices, dtype=np.int64),
        probabilities=probabilities,
        margin=np.array(fields.numbers(answer, "margin", max_items=n_rows)),
        abstained=np.array(answer["abstained"], dtype=np.bool_),
    )


def _probabilities(rows: list[Any], n_classes: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    for row in rows:
        if not isinstance(row, list) or len(row) != n_classes:
            raise ShapeError(f"a row of the answer does not have {n_classes} probabilities")
    values = np.array(
        [
            fields.numbers({"probabilities": row}, "probabilities", max_items=n_classes)
            for row in rows
        ]
    )
    if (values < 0.0).any() or (np.abs(values.sum(axis=1) - 1.0) > _SUM_TOLERANCE).any():
        raise InvalidScoresError("the answer's probabilities are negative, or do not add up to 1")
    return values


def check_receipt(
    receipt: bytes, *, pins: Pins | None, sealed: SealedJob | None = None, querier: str = ""
) -> Verification:
    """Verify a receipt, and of a sealed job that it is one of this job.

    Parameters
    ----------
    receipt : bytes
        Of a query in clear perhaps several: the checks of all are returned, and the first.
    pins : Pins, optional
        Without them nothing says whose the signing keys are.
    sealed : SealedJob, optional
        What was asked; without it the gateway asked, and the job cannot be compared.
    querier : str
        Key id that asked `sealed`.

    Raises
    ------
    ReceiptError
        If a check fails, or it is the receipt of another job.
    ProtocolError
        If it is no receipt.
    """
    # In clear the gateway may have asked in several batches, each with a receipt.
    parts = receipts_of(receipt) if sealed is None else (receipt,)
    verified = [verify(part, pins=pins.sites if pins is not None else None) for part in parts]
    for one in verified:
        one.require_ok()
    found = verified[0].receipt
    checks = Verification(receipt=found, checks=tuple(c for one in verified for c in one.checks))
    if sealed is not None:
        asked = {
            "job": (sealed.job_id, found.job_id),
            "run": (sealed.run_id, found.run_id),
            "querier": (querier, found.querier_key_id),
            "protection": (sealed.protection, found.protection),
            "rule": (sealed.rule, found.rule),
            "seal": (True, found.query_sealed),
            "session key": (sealed.key_id, found.session_key_id),
            "rows": (sealed.n_queries, sum(batch.n_rows for batch in found.batches)),
        }
        for name, (mine, theirs) in asked.items():
            if mine != theirs:
                raise ReceiptError(f"the receipt is of another {name} than was asked")
        if not set(sealed.roster.key_ids) >= {member.key_id for member in found.cohort}:
            raise ReceiptError("the receipt names a site that was not asked")
    return checks
