"""Who was asked and who answered, in the coordinator's words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from fedinfer_flower.errors import EnvelopeError
from fedinfer_flower.receipts.checks import (
    HEX,
    MAX_ROWS,
    MAX_SITES,
    QUERY_ID,
    is_site_name,
    objects,
)
from fedinfer_flower.wire import fields as read
from fedinfer_flower.wire.envelope import Json

__all__ = ["BatchRecord", "CohortMember", "Dropout"]


@dataclass(frozen=True, kw_only=True)
class CohortMember:
    """One site that was asked: its name and the fingerprint of its key."""

    name: str
    key_id: str

    def to_dict(self) -> dict[str, Json]:
        """Return plain values for JSON."""
        return {"name": self.name, "key_id": self.key_id}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Json]) -> CohortMember:
        """Read what `to_dict` wrote; raise `EnvelopeError` for anything else."""
        read.exactly(plain, "name", "key_id")
        member = cls(name=read.text(plain, "name"), key_id=read.text(plain, "key_id"))
        if not is_site_name(member.name) or not HEX.fullmatch(member.key_id):
            raise EnvelopeError("a member of the cohort without a name or a key id")
        return member


@dataclass(frozen=True, kw_only=True)
class Dropout:
    """One site whose answer is not in a batch's result, and why, in the coordinator's words.

    Parameters
    ----------
    site : str
    status : str
        ``"late"`` or ``"failed"``.
    error_code : str
        Of the typed error; empty if there was none.
    """

    site: str
    status: str
    error_code: str = ""

    def to_dict(self) -> dict[str, Json]:
        """Return plain values for JSON."""
        return {"site": self.site, "status": self.status, "error_code": self.error_code}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Json]) -> Dropout:
        """Read what `to_dict` wrote; raise `EnvelopeError` for anything else."""
        read.exactly(plain, "site", "status", "error_code")
        dropout = cls(
            site=read.text(plain, "site", max_chars=128),
            status=read.text(plain, "status", max_chars=16),
            error_code=read.text(plain, "error_code", max_chars=8),
        )
        if dropout.status not in {"late", "failed"} or not is_site_name(dropout.site):
            raise EnvelopeError("a dropout that is neither late nor failed, or of no site")
        if not re.fullmatch(r"(FI[0-9]{3})?", dropout.error_code):
            raise EnvelopeError("a dropout with an unknown form of error code")
        return dropout


@dataclass(frozen=True, kw_only=True)
class BatchRecord:
    """Who answered one batch, and who did not, in the coordinator's words.

    Parameters
    ----------
    query_id : str
    n_rows : int
    answered : tuple of str
        Names of the sites whose answers are in the result.
    dropped : tuple of Dropout
    """

    query_id: str
    n_rows: int
    answered: tuple[str, ...]
    dropped: tuple[Dropout, ...] = ()

    def to_dict(self) -> dict[str, Json]:
        """Return plain values for JSON."""
        return {
            "query_id": self.query_id,
            "n_rows": self.n_rows,
            "answered": list(self.answered),
            "dropped": [d.to_dict() for d in self.dropped],
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Json]) -> BatchRecord:
        """Read what `to_dict` wrote; raise `EnvelopeError` for anything else."""
        read.exactly(plain, "query_id", "n_rows", "answered", "dropped")
        batch = cls(
            query_id=read.text(plain, "query_id"),
            n_rows=read.whole(plain, "n_rows", low=1, high=MAX_ROWS),
            answered=read.texts(plain, "answered", max_items=MAX_SITES),
            dropped=tuple(Dropout.from_dict(d) for d in objects(plain, "dropped")),
        )
        if not QUERY_ID.fullmatch(batch.query_id) or not all(map(is_site_name, batch.answered)):
            raise EnvelopeError("a batch without a query id, or with an answer of no site")
        return batch
