"""What is checked before a job is accepted, and before a gateway starts."""

from __future__ import annotations

import dataclasses
import math
import secrets
import threading
from collections import OrderedDict
from typing import Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.ensemble.base import Disclosure, make_rule
from fedinfer_flower.errors import (
    BindingError,
    ConfigError,
    ExpiredError,
    InvalidValueError,
    KeyAtCoordinatorError,
    ShapeError,
    SizeLimitError,
)
from fedinfer_flower.privacy.base import make_protection
from fedinfer_flower.privacy.legality import require_legal
from fedinfer_flower.privacy.row_digest import KEY_BYTES, row_digests
from fedinfer_flower.serving.config import GatewayConfig, ModelConfig
from fedinfer_flower.serving.jobs import JobKind, JobRequest
from fedinfer_flower.serving.text_job import TextJob
from fedinfer_flower.serving.text_options import require_askable, require_text_options
from fedinfer_flower.wire.arrays import array_from_bytes
from fedinfer_flower.wire.sealed_job import SealedJob

__all__ = ["SeenRows", "check_models", "checked_request", "has_exact_sums"]

_MAX_KEY: Final = 255
_MAX_DIMENSIONS: Final = 8


def check_models(config: GatewayConfig) -> None:
    """Refuse models that could never be asked.

    Raises
    ------
    KeyAtCoordinatorError
        If the gateway would hold the key that opens answers encrypted against it.
    ConfigError
        If a rule cannot work under its protection, or a name or option is none.
    """
    for name, model in config.models.items():
        protection = make_protection(model.protection, dict(model.protection_options))
        if model.kind == "language":
            require_text_options(model)
            continue
        if model.rule != "auto":
            require_legal(make_rule(model.rule), protection)
        if not (model.clear or model.sealed):
            raise ConfigError(f"model {name!r} takes queries neither in clear nor sealed")
        if model.clear and protection.needs_key:
            raise KeyAtCoordinatorError(
                f"model {name!r} takes queries in clear under {model.protection!r}: the gateway"
                " would hold the key against which the answers are encrypted",
                hint=f"clear = false in [models.{name}], or protection 'secagg'",
            )


def has_exact_sums(model: ModelConfig) -> bool:
    """Whether sites remember rows, to refuse sums of them that could be compared."""
    protection = make_protection(model.protection, dict(model.protection_options))
    return protection.reveals is Disclosure.SUM and protection.min_cohort > 1


def checked_request(
    request: JobRequest, config: GatewayConfig, *, run_id: int, now: float
) -> JobRequest:
    """Return a request as it is carried out: with a deadline that the model allows.

    Raises
    ------
    InvalidValueError
        If there is no such model, or it does not take this kind of job.
    ProtocolError
        If the body is not what it claims to be.
    """
    model = config.models.get(request.model)
    if model is None:
        raise InvalidValueError(
            "no model of this name", hint="GET /v1/models has the list, and what each takes"
        )
    if len(request.body) > config.limits.body_bytes:
        raise SizeLimitError(
            f"the body has {len(request.body)} bytes; the limit is {config.limits.body_bytes}"
        )
    if len(request.idempotency_key) > _MAX_KEY or not request.idempotency_key.isprintable():
        raise InvalidValueError(f"an idempotency key has at most {_MAX_KEY} printable characters")
    takes = {
        JobKind.ROWS: model.kind == "classifier" and model.clear,
        JobKind.SEALED: model.kind == "classifier" and model.sealed,
        JobKind.TEXT: model.kind == "language" and model.clear,
    }
    if not takes[request.kind]:
        raise InvalidValueError(
            f"this model does not take {request.kind.value}",
            hint="GET /v1/models says what each model takes",
        )
    if request.kind is JobKind.ROWS:
        _check_rows(request)
    elif request.kind is JobKind.SEALED:
        _check_sealed(request, model, run_id=run_id, now=now)
    else:
        _check_text(request, model)
    return dataclasses.replace(request, timeout_s=min(request.timeout_s, model.timeout_s))


def _check_rows(request: JobRequest) -> None:
    shape, dtype = request.facts.get("shape"), request.facts.get("dtype")
    if (
        not isinstance(shape, list | tuple)
        or not 2 <= len(shape) <= _MAX_DIMENSIONS
        or not all(type(size) is int and size > 0 for size in shape)
        or not isinstance(dtype, str)
    ):
        raise ShapeError("rows have a shape (n_rows, ...) of positive numbers, and a dtype")
    if shape[0] != request.n_rows or math.prod(shape) > 8 * max(len(request.body), 1):
        raise ShapeError("the rows are not as many as was said")
    array_from_bytes(request.body, dtype=dtype, shape=tuple(shape))


def _check_text(request: JobRequest, model: ModelConfig) -> None:
    job = TextJob.from_bytes(request.body)
    require_askable(model, job)
    if len(job.questions) != request.n_rows:
        raise ShapeError("the questions are not as many as was said")


def _check_sealed(request: JobRequest, model: ModelConfig, *, run_id: int, now: float) -> None:
    job = SealedJob.from_bytes(request.body)
    if job.run_id != run_id:
        raise BindingError(
            "the job is sealed for another run",
            hint="fetch the directory again and seal the queries anew",
        )
    if job.expires_at and job.expires_at <= now:
        raise ExpiredError("the sealed job has expired", hint="seal anew, with a longer ttl_s")
    if job.n_queries != request.n_rows:
        raise ShapeError("the sealed job has another number of rows than was said")
    protection = make_protection(model.protection, dict(model.protection_options))
    if (job.protection, dict(job.protection_options)) != (
        protection.name,
        dict(protection.options()),
    ):
        raise BindingError(
            "the job is sealed for another protection than the model's, or other options of it",
            hint="GET /v1/models/NAME has the model's protection and options",
        )
    if model.rule != "auto" and job.rule != model.rule:
        raise BindingError(
            "the job is sealed for another rule than the model's",
            hint="GET /v1/models/NAME has the model's rule",
        )


class SeenRows:
    """Recognises rows that this process has asked before; forgets the oldest.

    Under exact sums sites treat rows that come again otherwise than new ones: no dropout is
    made good for any more in a batch with one of them, and they are refused to another
    cohort. So such rows travel in a batch without other jobs' rows.

    Parameters
    ----------
    capacity : int
        Rows to remember.

    Privacy
    -------
    Keeps 16 bytes a row, made under a random key that lives as long as the process.

    Examples
    --------
    >>> seen, rows = SeenRows(), np.array([[1.0], [2.0]])
    >>> seen.note(rows), seen.note(rows[1:])
    (False, True)
    """

    def __init__(self, *, capacity: int = 500_000) -> None:
        self._key, self._capacity = secrets.token_bytes(KEY_BYTES), capacity
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self._lock = threading.Lock()

    def note(self, rows: npt.NDArray[np.generic]) -> bool:
        """Remember rows; return whether one of them was known."""
        digests = [d[:16] for d in row_digests(rows, context=b"gateway", key=self._key)]
        with self._lock:
            known = any(digest in self._seen for digest in digests)
            for digest in digests:
                self._seen[digest] = None
                self._seen.move_to_end(digest)
            while len(self._seen) > self._capacity:
                self._seen.popitem(last=False)
        return known
