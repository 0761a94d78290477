"""What comes out of an epoch: one number a site."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from fedinfer_flower.errors import EnvelopeError, SettlementError
from fedinfer_flower.settlement.reading import DIGEST, EPOCH_ID, read_document
from fedinfer_flower.wire import fields
from fedinfer_flower.wire.envelope import DEFAULT_LIMITS, Envelope, Kind, WireLimits, encode

__all__ = ["Settlement"]

_MAX_SITES: Final = 100_000


@dataclass(frozen=True, kw_only=True)
class Settlement:
    """Contribution scores of an epoch, released once.

    Parameters
    ----------
    epoch_id : str
        32 hex digits.
    scheme : str
    values : mapping of str to float
        By the site's key id; see `LinearScheme.contributions`.
    n_audits : int
    noise_scale : float
        Standard deviation of all noise in each value; 0 for none.

    Raises
    ------
    SettlementError
        If a number is not finite, or an id is malformed.

    Privacy
    -------
    Each value is one weighted sum of a site's answers. It names no audit and no label.

    Examples
    --------
    >>> done = Settlement(epoch_id="0" * 32, scheme="brier-shapley",
    ...                   values={"a" * 64: 0.25}, n_audits=200, noise_scale=0.0)
    >>> Settlement.from_bytes(done.to_bytes()) == done
    True
    """

    epoch_id: str
    scheme: str
    values: Mapping[str, float]
    n_audits: int
    noise_scale: float

    def __post_init__(self) -> None:
        if not EPOCH_ID.fullmatch(self.epoch_id):
            raise SettlementError("an epoch id is 32 hex digits")
        if not self.values or not all(DIGEST.fullmatch(site) for site in self.values):
            raise SettlementError("a settlement has at least one site, named by its key id")
        if not all(math.isfinite(x) for x in (*self.values.values(), self.noise_scale)):
            raise SettlementError("a settlement's values are finite")
        if self.n_audits < 1 or self.noise_scale < 0.0:
            raise SettlementError("a settlement has audits, and noise that is not negative")

    @property
    def digest(self) -> str:
        """SHA-256 of the byte form, in hex."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """Return the settlement as one envelope; the same for the same values."""
        sites = sorted(self.values)
        return encode(
            Envelope(
                kind=Kind.SETTLEMENT,
                query_id=self.epoch_id,
                meta={
                    "scheme": self.scheme,
                    "sites": sites,
                    "values": [self.values[site] for site in sites],
                    "audits": self.n_audits,
                    "noise": self.noise_scale,
                },
            )
        )

    @classmethod
    def from_bytes(cls, data: bytes, *, limits: WireLimits = DEFAULT_LIMITS) -> Settlement:
        """Read a settlement.

        Raises
        ------
        ProtocolError
            If the bytes are not exactly one valid settlement.
        """
        envelope = read_document(data, Kind.SETTLEMENT, limits)
        meta = envelope.meta
        fields.exactly(meta, "scheme", "sites", "values", "audits", "noise")
        sites = fields.texts(meta, "sites", max_items=_MAX_SITES)
        values = fields.numbers(meta, "values", max_items=_MAX_SITES)
        if len(sites) != len(values) or sorted(set(sites)) != list(sites):
            raise EnvelopeError("a settlement's sites and values do not match, or are unsorted")
        return cls(
            epoch_id=envelope.query_id,
            scheme=fields.text(meta, "scheme", max_chars=64),
            values=dict(zip(sites, values, strict=True)),
            n_audits=fields.whole(meta, "audits", low=1, high=limits.max_rows),
            noise_scale=fields.number(meta, "noise"),
        )
