"""The document between coordinator and querier: the sum of the histograms, still protected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from fedinfer_flower.errors import BindingError, EnvelopeError, InvalidValueError
from fedinfer_flower.privacy.base import KeyPair, make_protection
from fedinfer_flower.privacy.cohort import Cohort
from fedinfer_flower.uncertainty.federated_quantile import (
    FederatedThreshold,
    HistogramSpec,
    open_quantile,
)
from fedinfer_flower.wire import fields
from fedinfer_flower.wire.envelope import DEFAULT_LIMITS, Envelope, Kind, decode, encode
from fedinfer_flower.wire.roster import Roster

__all__ = ["CombinedHistogram"]

_CODEC: Final = "calibration"


@dataclass(frozen=True, kw_only=True)
class CombinedHistogram:
    """What the coordinator hands to the querier.

    Parameters
    ----------
    query_id : str
    spec : HistogramSpec
    classes : tuple of str
        The label space in which rows were scored: sets are of these classes.
    n_sites : int
        Sites in the sum.
    protection : str
    protection_options : mapping
    roster : Roster
        Of all sites that were asked.
    total : bytes
    content : bytes
        Digest of the message that asked; see `Cohort`.
    key_id : str
        Of the querier's public key.

    Privacy
    -------
    As the combined payload of the protection: public under `secagg` and `he`, the pooled
    histogram in clear under `plain`.
    """

    query_id: str
    spec: HistogramSpec
    classes: tuple[str, ...]
    n_sites: int
    protection: str
    protection_options: Mapping[str, str | int | float | bool]
    roster: Roster = field(repr=False)
    total: bytes = field(repr=False)
    content: bytes = field(default=b"", repr=False)
    key_id: str = ""

    def open(
        self, keys: KeyPair, *, alpha: float = 0.1, failure: float | None = None
    ) -> FederatedThreshold:
        """Open the sum with the querier's keys; see `open_quantile`.

        Raises
        ------
        BindingError
            If the keys are not those that were asked with.
        ProtocolError
            If the total does not open to counts.
        """
        if keys.key_id != self.key_id:
            raise BindingError("the histograms were made for another querier's key")
        protection = make_protection(self.protection, dict(self.protection_options))
        cohort = None
        if protection.needs_roster:
            cohort = Cohort(
                query_id=self.query_id,
                roster=self.roster,
                public_key=keys.public_key,
                content=self.content,
            )
        return open_quantile(
            self.total,
            self.spec,
            protection,
            n_sites=self.n_sites,
            n_sites_max=len(self.roster),
            keys=keys,
            cohort=cohort,
            alpha=alpha,
            failure=failure,
        )

    def to_bytes(self) -> bytes:
        """Return the document as one envelope."""
        return encode(
            Envelope(
                kind=Kind.COMBINED,
                query_id=self.query_id,
                key_id=self.key_id,
                shape=(1, self.spec.n_bins + 1),
                codec=_CODEC,
                meta={
                    "classes": list(self.classes),
                    "sites": self.n_sites,
                    "max-rows": self.spec.max_rows,
                    "method": self.spec.method,
                    "scope": self.spec.scope,
                    "protection": self.protection,
                    "protection-options": dict(self.protection_options),
                },
                sections=(
                    ("total", self.total),
                    ("roster", self.roster.to_bytes()),
                    ("content", self.content),
                ),
            )
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> CombinedHistogram:
        """Read the document.

        Raises
        ------
        ProtocolError
            If the bytes are not exactly one.
        """
        envelope = decode(data, limits=DEFAULT_LIMITS)
        if (envelope.kind, envelope.codec) != (Kind.COMBINED, _CODEC) or len(envelope.shape) != 2:
            raise EnvelopeError("the bytes are no combined histogram")
        envelope.require_sections("total", "roster", "content")
        meta = envelope.meta
        fields.exactly(
            meta,
            *("classes", "sites", "max-rows", "method", "scope"),
            *("protection", "protection-options"),
        )
        roster = Roster.from_bytes(envelope.section("roster"))
        try:
            spec = HistogramSpec(
                n_bins=envelope.shape[1] - 1,
                max_rows=fields.whole(meta, "max-rows", low=1, high=1_000_000),
                method=fields.text(meta, "method", max_chars=64),
                scope=fields.text(meta, "scope", max_chars=64),
            )
        except InvalidValueError as exc:
            raise EnvelopeError(f"a combined histogram out of range: {exc.message}") from None
        if not envelope.query_id or envelope.shape[0] != 1 or not len(roster):
            raise EnvelopeError("a combined histogram without an id, a row or sites")
        return cls(
            query_id=envelope.query_id,
            spec=spec,
            classes=fields.texts(meta, "classes", max_items=65_536),
            n_sites=fields.whole(meta, "sites", low=1, high=len(roster)),
            protection=fields.text(meta, "protection", max_chars=64),
            protection_options=fields.scalars(meta, "protection-options"),
            roster=roster,
            total=bytes(envelope.section("total")),
            content=bytes(envelope.section("content")),
            key_id=envelope.key_id,
        )
