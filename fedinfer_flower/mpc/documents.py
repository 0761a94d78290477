"""What goes between querier and coordinator: a job of sealed shares, and sealed results."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedinfer_flower.errors import EnvelopeError
from fedinfer_flower.mpc.session import MpcSession
from fedinfer_flower.mpc.shares import N_PARTIES
from fedinfer_flower.wire import fields
from fedinfer_flower.wire.envelope import Envelope, Kind, decode, encode

__all__ = ["MpcAnswer", "MpcJob", "triples"]

Triple = tuple[bytes, ...]


@dataclass(frozen=True, kw_only=True)
class MpcJob:
    """A session with the queries' shares, each sealed to one party.

    Parameters
    ----------
    session : bytes
        Signed by the querier; see `MpcSession.to_bytes`.
    queries : tuple of three bytes each
        For every batch, what goes to party 0, 1 and 2.

    Privacy
    -------
    The coordinator reads the session, which is public, and the length of everything else.
    """

    session: bytes = field(repr=False)
    queries: tuple[Triple, ...] = field(repr=False)

    def to_bytes(self) -> bytes:
        """Return the job as one envelope."""
        return encode(
            Envelope(
                kind=Kind.JOB,
                meta={"batches": len(self.queries)},
                sections=(("session", self.session), *titled("query", self.queries)),
            )
        )

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> MpcJob:
        """Read a job.

        Raises
        ------
        ProtocolError
            If the bytes are not one job with a session that verifies.
        """
        envelope = decode(data)
        fields.exactly(envelope.meta, "batches")
        session = bytes(envelope.section("session"))
        n_batches = MpcSession.from_bytes(session).n_batches
        if envelope.kind is not Kind.JOB or envelope.meta["batches"] != n_batches:
            raise EnvelopeError("the job does not hold as many batches as its session says")
        return cls(session=session, queries=triples(envelope, "query", n_batches))


@dataclass(frozen=True, kw_only=True)
class MpcAnswer:
    """The parties' shares of the results, sealed to the querier.

    Parameters
    ----------
    session_id : str
    results : tuple of three bytes each
        For every batch, what party 0, 1 and 2 sent.
    seconds : float
        From the first message to the last result.
    """

    session_id: str
    results: tuple[Triple, ...] = field(repr=False)
    seconds: float = 0.0

    def to_bytes(self) -> bytes:
        """Return the answer as one envelope."""
        return encode(
            Envelope(
                kind=Kind.COMBINED,
                query_id=self.session_id,
                meta={"batches": len(self.results), "seconds": self.seconds},
                sections=titled("result", self.results),
            )
        )

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> MpcAnswer:
        """Read an answer.

        Raises
        ------
        ProtocolError
            If the bytes are not one answer.
        """
        envelope = decode(data)
        fields.exactly(envelope.meta, "batches", "seconds")
        if envelope.kind is not Kind.COMBINED or not envelope.query_id:
            raise EnvelopeError("the bytes are not a joint answer")
        n_batches = fields.whole(envelope.meta, "batches", low=1, high=256)
        return cls(
            session_id=envelope.query_id,
            results=triples(envelope, "result", n_batches),
            seconds=fields.number(envelope.meta, "seconds"),
        )


def titled(name: str, batches: tuple[Triple, ...]) -> tuple[tuple[str, bytes], ...]:
    """Return sections ``<name>-<batch>-<rank>``."""
    return tuple(
        (f"{name}-{batch}-{rank}", data)
        for batch, triple in enumerate(batches)
        for rank, data in enumerate(triple)
    )


def triples(envelope: Envelope, name: str, n_batches: int) -> tuple[Triple, ...]:
    """Read the sections that `titled` made."""
    return tuple(
        tuple(bytes(envelope.section(f"{name}-{b}-{rank}")) for rank in range(N_PARTIES))
        for b in range(n_batches)
    )
