"""The envelopes of a recovery round: see `privacy.mask_recovery` for what they achieve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedinfer_flower.errors import EnvelopeError
from fedinfer_flower.wire import fields
from fedinfer_flower.wire.envelope import Envelope, Kind
from fedinfer_flower.wire.messages import check_bound
from fedinfer_flower.wire.roster import Roster

__all__ = ["RecoveryCall", "read_recovered", "read_recovery", "recovered", "recovery"]


@dataclass(frozen=True, kw_only=True)
class RecoveryCall:
    """What the coordinator asks of a site after a batch.

    Parameters
    ----------
    query_id : str
    protection : str
    protection_options : mapping
    public_key : bytes
    roster : Roster
    request : bytes
    content : bytes
        Digest of the message that asked the batch; see `Cohort`.
    """

    query_id: str
    protection: str
    protection_options: Mapping[str, str | int | float | bool]
    public_key: bytes = field(repr=False)
    roster: Roster = field(repr=False)
    request: bytes = field(repr=False)
    content: bytes = field(default=b"", repr=False)


def recovery(call: RecoveryCall, *, run_id: int) -> Envelope:
    """Build the envelope of a call."""
    return Envelope(
        kind=Kind.RECOVER,
        run_id=run_id,
        query_id=call.query_id,
        codec="",
        meta={
            "protection": call.protection,
            "protection-options": dict(call.protection_options),
        },
        sections=(
            ("request", call.request),
            ("roster", call.roster.to_bytes()),
            ("public-key", call.public_key),
            ("content", call.content),
        ),
    )


def read_recovery(envelope: Envelope) -> RecoveryCall:
    """Read a call.

    Raises
    ------
    EnvelopeError
        If it is malformed.
    """
    if envelope.kind is not Kind.RECOVER or not envelope.query_id:
        raise EnvelopeError("expected a recover envelope with a query id")
    envelope.require_sections("request", "roster", "public-key", "content")
    fields.exactly(envelope.meta, "protection", "protection-options")
    return RecoveryCall(
        query_id=envelope.query_id,
        protection=fields.text(envelope.meta, "protection", max_chars=64),
        protection_options=fields.scalars(envelope.meta, "protection-options"),
        public_key=bytes(envelope.section("public-key")),
        roster=Roster.from_bytes(envelope.section("roster")),
        request=bytes(envelope.section("request")),
        content=bytes(envelope.section("content")),
    )


def recovered(reply: bytes, *, query_id: str, run_id: int, sender: int) -> Envelope:
    """Build the envelope of a site's reply."""
    return Envelope(
        kind=Kind.RECOVERED,
        run_id=run_id,
        query_id=query_id,
        sender=sender,
        sections=(("reply", reply),),
    )


def read_recovered(
    envelope: Envelope, *, query_id: str, run_id: int, sender: int
) -> bytes | memoryview:
    """Read a site's reply, after checking what it is bound to."""
    if envelope.kind is not Kind.RECOVERED:
        raise EnvelopeError(f"expected a recovered envelope, got {envelope.kind.value}")
    envelope.require_sections("reply")
    check_bound(envelope, run_id=run_id, sender=sender, query_id=query_id)
    return envelope.section("reply")
