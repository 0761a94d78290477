"""What sharers gave, opened and checked one by one: a bad part costs its sharer its place.

Axes: B questions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.clients.containment import contained
from fedinfer_flower.clients.language_state import Desk
from fedinfer_flower.clients.refine_rephrasing import Expected, Kept
from fedinfer_flower.errors import (
    BindingError,
    CacheError,
    FedInferError,
    ShapeError,
    SizeLimitError,
)
from fedinfer_flower.wire.refine_ask import ShareBody, open_body
from fedinfer_flower.wire.refine_fields import Evidence, Span
from fedinfer_flower.wire.refine_request import Part

if TYPE_CHECKING:
    from fedinfer_flower.kv.fuser import Fuser
    from fedinfer_flower.kv.layout import CacheEntries, CacheLayout

__all__ = ["CachePart", "Parts", "TextPart", "open_parts"]

_SEE_LOG: Final = "see the site's own log"
_MAX_MAGNITUDE: Final = 1e6
"""Entries of known models stay below a few thousand. Much larger ones are finite, but their
products are not, and one such row turns an answer into nonsense."""


@dataclass(frozen=True, eq=False, kw_only=True)
class CachePart:
    """Entries that may be fused.

    Parameters
    ----------
    sharer : str
        Key id.
    entries : CacheEntries
        Of the sharer's model; in the receiver's space where a coordinator projected them.
    fuser : Fuser, optional
        None for projected entries.
    evidence : float32 array (B, 4), optional
    gate : uint8 array (B,), optional
        The coordinator's choice, for projected entries.
    spans, sections : tuples
        Of the sharer's prompts, for fusers that align tokens.
    """

    sharer: str
    entries: CacheEntries = field(repr=False)
    fuser: Fuser | None = field(default=None, repr=False)
    evidence: Evidence | None = field(default=None, repr=False)
    gate: npt.NDArray[np.uint8] | None = field(default=None, repr=False)
    spans: tuple[tuple[Span, ...], ...] = field(default=(), repr=False)
    sections: tuple[Span, ...] = field(default=(), repr=False)


@dataclass(frozen=True, eq=False, kw_only=True)
class TextPart:
    """Notes that may be quoted; one a question."""

    sharer: str
    notes: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True, eq=False, kw_only=True)
class Parts:
    """All parts that can be used, and why the others cannot."""

    caches: list[CachePart] = field(default_factory=list)
    texts: list[TextPart] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)


def open_parts(parts: tuple[Part, ...], kept: Kept, desk: Desk) -> Parts:
    """Open and check every part on its own.

    Parameters
    ----------
    parts : tuple of Part
    kept : Kept
        Who was asked for what.
    desk : Desk

    Returns
    -------
    parts : Parts
        `dropped` has the error code of every sharer whose part cannot be used.
    """
    found = Parts()
    for part in parts:
        try:
            with contained(CacheError, "a part failed", hint=_SEE_LOG, pass_typed=True):
                opened = _opened(part, kept, desk)
        except FedInferError as exc:
            found.dropped[part.sharer] = exc.code
            continue
        if isinstance(opened, CachePart):
            found.caches.append(opened)
        else:
            found.texts.append(opened)
    return found


def _opened(part: Part, kept: Kept, desk: Desk) -> CachePart | TextPart:
    expected = kept.expected.get(part.sharer)
    if expected is None:
        raise BindingError("a part of a sharer that was not asked")
    if part.medium == "projected":
        return _projected(part, kept, desk)
    if part.medium != expected.medium:
        raise BindingError("a part in another medium than was asked for")
    if kept.host == "coordinator" and part.medium == "cache":
        raise BindingError("a cache as it is, where the coordinator has the fusers")
    sealed = kept.host == "receiver"
    body = open_body(
        part.body,
        identity=desk.identity,
        sharer=expected.seat.card.identity,
        run_id=desk.run_id,
        query_id=kept.asked.consent.query_id,
        round_number=kept.round_number,
        sealed=sealed,
        limits=desk.limits,
    )
    rows = len(kept.asked.questions)
    if part.medium == "text":
        return TextPart(sharer=part.sharer, notes=_notes(body, desk, rows=rows))
    return _cache(part, body, expected, kept, desk)


def _notes(body: ShareBody, desk: Desk, *, rows: int) -> tuple[str, ...]:
    if body.payload or len(body.notes) != rows:
        raise ShapeError("not one note a question")
    if any(len(note) > desk.policy.max_note_chars for note in body.notes):
        raise SizeLimitError("a note that is longer than this site reads")
    return body.notes


def _cache(part: Part, body: ShareBody, expected: Expected, kept: Kept, desk: Desk) -> CachePart:
    fuser, rows = expected.fuser, len(kept.asked.questions)
    if fuser is None:
        raise BindingError("a cache for which this site has no fuser")
    entries = _entries(
        body.payload,
        desk,
        rows=rows,
        layout=fuser.spec.sharer,
        most_tokens=fuser.spec.share.tokens(fuser.spec.sharer.window),
        scales=fuser.scales,
    )
    fuser.require_sharer(entries)
    if body.notes or (body.evidence is not None and len(body.evidence) != rows):
        raise ShapeError("evidence of another number of questions, or notes beside a cache")
    if body.spans and (len(body.spans), len(body.sections)) != (rows, rows):
        raise ShapeError("spans of tokens of another number of questions")
    return CachePart(
        sharer=part.sharer,
        entries=entries,
        fuser=fuser,
        evidence=body.evidence,
        spans=body.spans,
        sections=body.sections,
    )


def _projected(part: Part, kept: Kept, desk: Desk) -> CachePart:
    if kept.host != "coordinator":
        raise BindingError("entries of a coordinator's fuser, where fusers run here")
    rows = len(kept.asked.questions)
    layout = desk.state.model.layout
    entries = _entries(
        part.body, desk, rows=rows, layout=layout, most_tokens=layout.window, scales=None
    )
    if entries.layout != layout:
        raise CacheError("projected entries that are not in this model's space")
    if part.gate is not None and len(part.gate) != rows:
        raise ShapeError("a gate of another number of questions")
    return CachePart(sharer=part.sharer, entries=entries, gate=part.gate)


def _entries(
    data: bytes,
    desk: Desk,
    *,
    rows: int,
    layout: CacheLayout,
    most_tokens: int,
    scales: Any,
) -> CacheEntries:
    """Decode a payload of a sender who is not trusted.

    Padding does not travel, so a hundred bytes may ask for a cache of gigabytes: what counts
    is how large a cache was asked for.
    """
    from fedinfer_flower.kv.payload import PayloadLimits, decode_entries

    tokens = min(most_tokens, desk.policy.max_cache_tokens)
    asked_for = 4 * rows * tokens * layout.floats_per_token(hidden=True)
    limits = PayloadLimits(
        max_bytes=desk.policy.max_payload_bytes,
        max_rows=rows,
        max_tokens=tokens,
        # Four bits a number at least; the rest is padding.
        max_entries_bytes=min(asked_for, 16 * desk.policy.max_payload_bytes),
    )
    entries = decode_entries(data, limits=limits, scales=scales)
    if entries.rows != rows:
        raise ShapeError("a cache of another number of questions")
    entries.require_finite()
    hidden = () if entries.hidden is None else (entries.hidden,)
    every = (*entries.keys, *entries.values, *hidden)
    if any(float(x.abs().amax()) > _MAX_MAGNITUDE for x in every):
        raise CacheError("a cache with numbers larger than those of any model")
    return entries
