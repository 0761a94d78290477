"""What a site or a querier allows to be shared: nothing, unless it says so."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.kv.media import DISCLOSURES, KINDS, Disclosure, Medium

__all__ = ["PARTIES", "SharingPolicy"]

PARTIES: Final = ("sharer", "receiver", "querier")
"""Who must allow a medium."""


@dataclass(frozen=True, kw_only=True)
class SharingPolicy:
    """What one party allows; nothing unless it says so.

    Parameters
    ----------
    media : collection of {"text", "cache", "full-cache"}
        Kinds of media that may be used.
    discloses : {"none", "answer", "context", "text"}
        The most that a medium may disclose to the receiver.
    max_bytes : int, optional
        Most bytes of one question's body, in each direction.

    Privacy
    -------
    Local to the party that states it; the planner can only make it narrower. It is advice
    to a coordinator: each site enforces its own policy again, whatever it is asked.

    Examples
    --------
    >>> SharingPolicy().why_not(Medium.text())
    'does not allow text'
    >>> SharingPolicy(media=("text",), discloses="text").why_not(Medium.text())
    ''
    """

    media: frozenset[str] = frozenset()
    discloses: Disclosure = "answer"
    max_bytes: int | None = None

    def __init__(
        self,
        *,
        media: Iterable[str] = (),
        discloses: Disclosure = "answer",
        max_bytes: int | None = None,
    ) -> None:
        kinds = frozenset([media] if isinstance(media, str) else media)
        unknown = sorted(kinds - set(KINDS[1:]))
        if unknown:
            raise InvalidValueError(
                f"no medium is of kind {str(unknown[0])[:64]!r}", hint=f"kinds: {KINDS[1:]}"
            )
        if discloses not in DISCLOSURES:
            raise InvalidValueError(f"discloses is one of {', '.join(DISCLOSURES)}")
        if max_bytes is not None and (type(max_bytes) is not int or max_bytes < 0):
            raise InvalidValueError("max_bytes is a whole number, or None for no limit")
        object.__setattr__(self, "media", kinds)
        object.__setattr__(self, "discloses", discloses)
        object.__setattr__(self, "max_bytes", max_bytes)

    @classmethod
    def everything(cls) -> SharingPolicy:
        """Return a policy without limits."""
        return cls(media=KINDS[1:], discloses="text")

    def why_not(self, medium: Medium) -> str:
        """Return why this party forbids a medium; empty if it allows it."""
        if medium.kind == "own":
            return ""
        if medium.kind not in self.media:
            return f"does not allow {medium.kind}"
        if DISCLOSURES.index(medium.discloses) > DISCLOSURES.index(self.discloses):
            return f"allows to disclose {self.discloses} at most, this discloses {medium.discloses}"
        if self.max_bytes is not None and max(medium.up_bytes, medium.down_bytes) > self.max_bytes:
            return f"allows {self.max_bytes} bytes at most"
        return ""
