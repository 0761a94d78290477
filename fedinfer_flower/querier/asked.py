"""What a querier remembers of a job until its answer comes."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedinfer_flower.errors import BindingError
from fedinfer_flower.wire.documents import CombinedAnswer, Options
from fedinfer_flower.wire.roster import Roster

__all__ = ["AskedJob", "SealedTerms"]


@dataclass(frozen=True, kw_only=True)
class SealedTerms:
    """What the querier fixed inside the seal, and the answer must agree with.

    Parameters
    ----------
    run_id : int
    rule : str
    rule_options : mapping
    classes : tuple of str
    roster : Roster
    relay : bool
    contents : tuple of bytes
        Digest of the message of each batch.
    """

    run_id: int
    rule: str
    rule_options: Options
    classes: tuple[str, ...]
    roster: Roster = field(repr=False)
    relay: bool
    contents: tuple[bytes, ...] = field(repr=False)

    def require(self, combined: CombinedAnswer) -> None:
        """Require that a combined answer was made on these terms.

        Raises
        ------
        BindingError
            Naming the first term that differs.
        """
        terms = {
            "rule": (self.rule, combined.rule),
            "rule options": (dict(self.rule_options), dict(combined.rule_options)),
            "classes": (self.classes, combined.classes),
            "number of sites": (len(self.roster), combined.n_sites_asked),
            "roster": (self.roster, combined.roster),
            "way of relaying": (self.relay, combined.relayed),
            "message": (self.contents, tuple(bytes(b.content) for b in combined.batches)),
        }
        for name, (asked, answered) in terms.items():
            if asked != answered:
                raise BindingError(f"the combined answer has another {name} than was sealed")


@dataclass(frozen=True, kw_only=True)
class AskedJob:
    """One job.

    Parameters
    ----------
    batches : tuple of (query id, number of rows)
    sealed : SealedTerms, optional
        None for a job in clear.
    """

    batches: tuple[tuple[str, int], ...]
    sealed: SealedTerms | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return values for JSON."""
        terms = self.sealed
        return {
            "batches": [list(batch) for batch in self.batches],
            "sealed": None
            if terms is None
            else {
                "run": terms.run_id,
                "rule": terms.rule,
                "rule-options": dict(terms.rule_options),
                "classes": list(terms.classes),
                "roster": base64.b64encode(terms.roster.to_bytes()).decode(),
                "relay": terms.relay,
                "contents": [content.hex() for content in terms.contents],
            },
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> AskedJob:
        """Read what `to_dict` wrote; raises KeyError, TypeError or ValueError otherwise."""
        terms = plain["sealed"]
        return cls(
            batches=tuple((str(q), int(n)) for q, n in plain["batches"]),
            sealed=None
            if terms is None
            else SealedTerms(
                run_id=int(terms["run"]),
                rule=str(terms["rule"]),
                rule_options=dict(terms["rule-options"]),
                classes=tuple(str(c) for c in terms["classes"]),
                roster=Roster.from_bytes(base64.b64decode(terms["roster"], validate=True)),
                relay=bool(terms["relay"]),
                contents=tuple(bytes.fromhex(c) for c in terms["contents"]),
            ),
        )
