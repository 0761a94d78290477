"""What travels before and after the training of a stack: builders and strict readers.

================  =====================  =================================================
action            from → to              carries (`PREFIX` of the package before the name)
================  =====================  =================================================
``stack_offer``   coordinator → site     the job; back: held-out rows, sealed to the peers
``stack_peers``   coordinator → site     all peers' sealed rows; back: answers, each sealed
                                         to the owner of the rows
``stack_take``    coordinator → site     all peers' sealed answers to this site's rows
``stack_install`` coordinator → site     a fitted aggregator
================  =====================  =================================================

Training itself travels as Flower's own records under `TRAIN`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import BindingError, EnvelopeError, ShapeError, SizeLimitError
from fedinfer_flower.query import MAX_CLASSES
from fedinfer_flower.wire import fields
from fedinfer_flower.wire.arrays import array_from_bytes, array_to_bytes
from fedinfer_flower.wire.directory import Directory
from fedinfer_flower.wire.envelope import (
    DEFAULT_LIMITS,
    Envelope,
    Kind,
    WireLimits,
    decode,
    encode,
)
from fedinfer_flower.wire.identity import Identity, PublicIdentity
from fedinfer_flower.wire.sealing import SealedBody, open_body, open_sealed, seal_for, seal_to

__all__ = [
    "INSTALL",
    "OFFER",
    "PEERS",
    "STACK_ACTIONS",
    "TAKE",
    "TRAIN",
    "TRAIN_ACTION",
    "StackJob",
    "open_answers",
    "open_rows",
    "read_step",
    "reply",
    "seal_answers",
    "seal_rows",
    "step",
]

OFFER = "fi_stack_offer"
PEERS = "fi_stack_peers"
TAKE = "fi_stack_take"
INSTALL = "fi_stack_install"
STACK_ACTIONS = (OFFER, PEERS, TAKE, INSTALL)

TRAIN_ACTION = "fi_stack"
TRAIN = f"train.{TRAIN_ACTION}"
"""Message type of a training round: an app's own ``@app.train()`` is another."""

_ROWS: Final = "stack rows"
_ANSWERS: Final = "stack answers"
_SIGNATURE_BYTES: Final = 64

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class StackJob:
    """One training of a stack, as all sites must mean it.

    Parameters
    ----------
    job_id : str
    classes : tuple of str
        Label space, in its order.
    directory : Directory
        The sites, with the keys that rows and answers are sealed to.
    """

    job_id: str
    classes: tuple[str, ...]
    directory: Directory = field(repr=False)

    @property
    def key_ids(self) -> tuple[str, ...]:
        """Key ids of the sites: the order of the axis K."""
        return self.directory.roster.key_ids

    def identity(self, place: int) -> PublicIdentity:
        """Return the public keys of a site by its place."""
        return self.directory.roster.seats[place].identity

    @property
    def binding(self) -> bytes:
        """Digest of the whole job: what is sealed for it opens in no other."""
        digest = hashlib.sha256(b"fedinfer/v1/stack|" + self.job_id.encode())
        for part in (*self.classes, ""):
            digest.update(len(part.encode()).to_bytes(4, "big") + part.encode())
        digest.update(self.directory.to_bytes())
        return digest.digest()


def step(job: StackJob, sections: Mapping[str, bytes | memoryview]) -> Envelope:
    """Build a message to a site; its action says which step it is."""
    return Envelope(
        kind=Kind.QUERY,
        run_id=job.directory.run_id,
        query_id=job.job_id,
        meta={"classes": list(job.classes)},
        sections=(("directory", job.directory.to_bytes()), *sections.items()),
    )


def read_step(
    envelope: Envelope, *, limits: WireLimits = DEFAULT_LIMITS
) -> tuple[StackJob, dict[str, bytes | memoryview]]:
    """Read a message to a site: the job, with all signatures checked, and the rest.

    Raises
    ------
    ProtocolError
        If it is malformed, or its directory is of another run.
    """
    if envelope.kind is not Kind.QUERY or not envelope.query_id:
        raise EnvelopeError("not a message of a stack's training")
    fields.exactly(envelope.meta, "classes")
    classes = fields.texts(envelope.meta, "classes", max_items=MAX_CLASSES)
    if len(classes) < 2 or len(set(classes)) != len(classes):
        raise EnvelopeError("a stack is trained on two classes or more, none twice")
    sections = dict(envelope.sections)
    directory = Directory.from_bytes(bytes(envelope.section("directory")), limits=limits)
    del sections["directory"]
    if directory.run_id != envelope.run_id:
        raise BindingError("the directory belongs to another run")
    return StackJob(job_id=envelope.query_id, classes=classes, directory=directory), sections


def reply(
    job_id: str, sections: Mapping[str, bytes | memoryview], *, run_id: int, sender: int, rows: int
) -> Envelope:
    """Build a site's answer to a step; `rows` is how many it answers with."""
    return Envelope(
        kind=Kind.ANSWER,
        run_id=run_id,
        query_id=job_id,
        sender=sender,
        meta={"rows": rows},
        sections=tuple(sections.items()),
    )


def seal_rows(
    inputs: npt.NDArray[np.generic], job: StackJob, *, identity: Identity, to: Sequence[int]
) -> SealedBody:
    """Sign held-out rows and seal them to the sites at these places.

    Privacy
    -------
    Whoever carries them sees how many bytes they are. Every peer reads the rows; labels are
    not among them.
    """
    dtype, data = array_to_bytes(inputs)
    plain = encode(
        Envelope(
            kind=Kind.QUERY,
            run_id=job.directory.run_id,
            query_id=job.job_id,
            shape=tuple(inputs.shape),
            codec=dtype,
            sections=(("inputs", data),),
        )
    )
    info = _info(_ROWS, job, identity.key_id)
    signed = identity.sign(_ROWS, info + plain) + plain
    return seal_for([job.identity(place) for place in to], signed, info=info)


def open_rows(
    sealed: SealedBody, job: StackJob, *, identity: Identity, owner: PublicIdentity, max_rows: int
) -> npt.NDArray[np.generic]:
    """Open a peer's held-out rows, and require its signature.

    Raises
    ------
    ProtocolError
        If they are of another job, site or form, or too many.
    """
    info = _info(_ROWS, job, owner.key_id)
    opened = open_body(identity, sealed, info=info)
    plain = opened[_SIGNATURE_BYTES:]
    owner.verify(_ROWS, info + plain, opened[:_SIGNATURE_BYTES])
    envelope = decode(plain)
    envelope.require_sections("inputs")
    if len(envelope.shape) < 2 or envelope.shape[0] > max_rows:
        raise SizeLimitError(f"a peer's held-out rows are more than {max_rows}, or no rows")
    return array_from_bytes(envelope.section("inputs"), dtype=envelope.codec, shape=envelope.shape)


def seal_answers(
    answers_bc: FloatArray, job: StackJob, *, identity: Identity, owner: PublicIdentity
) -> bytes:
    """Sign the answers to a peer's rows and seal them to that peer alone."""
    info = _info(_ANSWERS, job, owner.key_id, identity.key_id)
    plain = np.ascontiguousarray(answers_bc, "<f8").tobytes()
    return seal_to(owner, identity.sign(_ANSWERS, info + plain) + plain, info=info)


def open_answers(
    sealed: bytes | memoryview,
    job: StackJob,
    *,
    identity: Identity,
    site: PublicIdentity,
    n_rows: int,
) -> FloatArray:
    """Open a peer's answers to this site's rows: probabilities, shape (n_rows, n_classes).

    Raises
    ------
    ProtocolError
        If they are of another job or site, or are no probabilities.
    """
    info = _info(_ANSWERS, job, identity.key_id, site.key_id)
    opened = open_sealed(identity, sealed, info=info)
    plain = opened[_SIGNATURE_BYTES:]
    site.verify(_ANSWERS, info + plain, opened[:_SIGNATURE_BYTES])
    shape = (n_rows, len(job.classes))
    answers = array_from_bytes(plain, dtype="float64", shape=shape).astype(np.float64)
    # Sums of at most thousands of float64; a peer could only gain by much more than this.
    if answers.min() < 0.0 or np.abs(answers.sum(axis=1) - 1.0).max() > 1e-6:
        raise ShapeError("a peer's answers are no probabilities")
    return answers


def _info(domain: str, job: StackJob, *key_ids: str) -> bytes:
    return b"|".join([domain.encode(), job.binding, *(k.encode() for k in key_ids)])
