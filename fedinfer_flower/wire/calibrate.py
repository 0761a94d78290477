"""The envelopes of a calibration: a histogram is asked for, and comes back protected.

``query.fi_calibrate`` takes a ``query`` envelope and returns an ``answer``, with fields of
their own: neither can be read as a question or an answer of another action.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from fedinfer_flower.errors import BindingError, EnvelopeError, ShapeError
from fedinfer_flower.query import MAX_CLASSES
from fedinfer_flower.wire import fields
from fedinfer_flower.wire.envelope import Envelope, Kind
from fedinfer_flower.wire.messages import check_bound
from fedinfer_flower.wire.roster import Roster

__all__ = [
    "CALIBRATE",
    "CalibrationCall",
    "calibration",
    "histogram",
    "read_calibration",
    "read_histogram",
]

CALIBRATE: Final = "fi_calibrate"
"""Held-out rows are counted at the site; the reply carries protected counts."""

_NAMES: Final = (
    *("classes", "sites", "bins", "max-rows", "method"),
    *("protection", "protection-options"),
)


@dataclass(frozen=True, kw_only=True)
class CalibrationCall:
    """What the coordinator asks of a site.

    Parameters
    ----------
    query_id : str
    classes : tuple of str
        The label space in which rows are scored.
    n_sites : int
        Sites that are asked.
    n_bins, max_rows : int
    method : str
        See `uncertainty.HistogramSpec`, which bounds all three.
    protection : str
    protection_options : mapping
    roster : Roster
    public_key : bytes
        The querier's; empty for protections without one.
    key_id : str
    """

    query_id: str
    classes: tuple[str, ...]
    n_sites: int
    n_bins: int
    max_rows: int
    method: str
    protection: str
    protection_options: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    roster: Roster = field(repr=False)
    public_key: bytes = field(default=b"", repr=False)
    key_id: str = ""


def calibration(call: CalibrationCall, *, run_id: int) -> Envelope:
    """Build the envelope of a call."""
    return Envelope(
        kind=Kind.QUERY,
        run_id=run_id,
        query_id=call.query_id,
        key_id=call.key_id,
        codec="calibration",
        meta={
            "classes": list(call.classes),
            "sites": call.n_sites,
            "bins": call.n_bins,
            "max-rows": call.max_rows,
            "method": call.method,
            "protection": call.protection,
            "protection-options": dict(call.protection_options),
        },
        sections=(("public-key", call.public_key), ("roster", call.roster.to_bytes())),
    )


def read_calibration(envelope: Envelope) -> CalibrationCall:
    """Read a call.

    Raises
    ------
    EnvelopeError
        If it is malformed.
    """
    if (envelope.kind, envelope.codec, envelope.shape) != (Kind.QUERY, "calibration", ()):
        raise EnvelopeError("expected a call for calibration")
    if not envelope.query_id:
        raise EnvelopeError("a call for calibration without a query id")
    envelope.require_sections("public-key", "roster")
    meta = envelope.meta
    fields.exactly(meta, *_NAMES)
    classes = fields.texts(meta, "classes", max_items=MAX_CLASSES)
    if not classes or len(set(classes)) != len(classes):
        raise EnvelopeError("a call for calibration without classes, or with one twice")
    n_sites = fields.whole(meta, "sites", low=1, high=1_000_000)
    roster = Roster.from_bytes(envelope.section("roster"))
    if len(roster) != n_sites:
        raise EnvelopeError("a call for calibration whose roster lacks a site")
    return CalibrationCall(
        query_id=envelope.query_id,
        classes=classes,
        n_sites=n_sites,
        n_bins=fields.whole(meta, "bins", low=1, high=1_000_000),
        max_rows=fields.whole(meta, "max-rows", low=1, high=1_000_000),
        method=fields.text(meta, "method", max_chars=64),
        protection=fields.text(meta, "protection", max_chars=64),
        protection_options=fields.scalars(meta, "protection-options"),
        roster=roster,
        public_key=bytes(envelope.section("public-key")),
        key_id=envelope.key_id,
    )


def histogram(
    call: CalibrationCall, *, run_id: int, sender: int, payload: bytes, commitment: str
) -> Envelope:
    """Build the envelope of a site's protected histogram."""
    return Envelope(
        kind=Kind.ANSWER,
        run_id=run_id,
        query_id=call.query_id,
        key_id=call.key_id,
        sender=sender,
        shape=(1, call.n_bins + 1),
        codec="calibration",
        meta={"commitment": commitment},
        sections=(("histogram", payload),),
    )


def read_histogram(
    envelope: Envelope, call: CalibrationCall, *, run_id: int, sender: int, commitment: str
) -> bytes | memoryview:
    """Return a site's protected histogram, after checking what it is bound to.

    Raises
    ------
    ProtocolError
        If it is malformed, or belongs to another run, query, key, sender or profile.
    """
    if (envelope.kind, envelope.codec) != (Kind.ANSWER, "calibration"):
        raise EnvelopeError("expected a histogram")
    envelope.require_sections("histogram")
    fields.exactly(envelope.meta, "commitment")
    check_bound(envelope, run_id=run_id, sender=sender, query_id=call.query_id)
    if envelope.key_id != call.key_id:
        raise BindingError("the histogram was made for another querier's key")
    if fields.text(envelope.meta, "commitment", max_chars=64) != commitment:
        raise BindingError("the site's profile is not the one that it declared")
    if envelope.shape != (1, call.n_bins + 1):
        raise ShapeError("the histogram has another number of bins than was asked for")
    return envelope.section("histogram")
