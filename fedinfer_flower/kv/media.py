"""The ways in which one model helps another, and what each costs and discloses."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Final, Literal

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.kv.share import ShareSpec

__all__ = ["CODEC_BITS", "DISCLOSURES", "KINDS", "Disclosure", "Kind", "Medium", "require_numbers"]

Kind = Literal["own", "text", "cache", "full-cache"]
Disclosure = Literal["none", "answer", "context", "text"]

KINDS: Final = ("own", "text", "cache", "full-cache")
DISCLOSURES: Final = ("none", "answer", "context", "text")
"""What a medium is meant to tell the receiver, least first: nothing, what the sharer is about
to answer, what its prompt was about, whole sentences. An order of classes for policies, no
bound: the last tokens' cache also carries part of what else was in the prompt."""

CODEC_BITS: Final = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "int4": 4, "static4": 4}
_MOST_LAST_TOKENS: Final = 4
_HEADER_BYTES: Final = 1024
"""Descriptor, mask and envelope of a cache; an upper estimate."""


def require_numbers(owner: object, *, positive: tuple[str, ...] = ()) -> None:
    """Require that a dataclass's numbers are finite, and not negative or else positive.

    Raises
    ------
    InvalidValueError
    """
    for item in fields(owner):  # type: ignore[arg-type]
        value: Any = getattr(owner, item.name)
        if isinstance(value, str):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidValueError(f"{item.name} of {type(owner).__name__} is a number")
        low = 0.0 if item.name not in positive else math.ulp(0.0)
        if not (math.isfinite(value) and value >= low):
            raise InvalidValueError(
                f"{item.name} of {type(owner).__name__} is finite and"
                f" {'positive' if item.name in positive else 'not negative'}"
            )


@dataclass(frozen=True, kw_only=True)
class Medium:
    """One way to help the receiver, with what it costs.

    Parameters
    ----------
    name : str
    kind : {"own", "text", "cache", "full-cache"}
    discloses : {"none", "answer", "context", "text"}
    up_bytes, down_bytes : int
        Sharer to coordinator, coordinator to receiver; equal unless the coordinator fuses.
    sharer_tokens : int
        Tokens that the sharer decodes.
    read_tokens : int
        Tokens that the receiver has to read on top of its prompt.
    codec_s, fuse_s : float
        Seconds to encode and decode, and to fuse.
    round_trips : int
        2 where a large body is fetched with a handle.
    kept : float
        Share of the sharer's right answers that survive this medium, in [0, 1]; measured
        for the fuser. Only a prior: `MediaHistory` replaces it.

    Examples
    --------
    >>> Medium.text(tokens=16).up_bytes
    64
    >>> from fedinfer_flower.kv.share import ShareSpec
    >>> Medium.cache(ShareSpec(last=1, decode=1), floats=1024, codec="bf16").up_bytes
    3072
    """

    name: str
    kind: Kind
    discloses: Disclosure
    up_bytes: int = 0
    down_bytes: int = 0
    sharer_tokens: int = 0
    read_tokens: int = 0
    codec_s: float = 0.0
    fuse_s: float = 0.0
    round_trips: int = 1
    kept: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.discloses not in DISCLOSURES or not self.name:
            raise InvalidValueError(
                f"a medium has a name, one of the kinds {', '.join(KINDS)}"
                f" and one of the disclosures {', '.join(DISCLOSURES)}"
            )
        if (self.kind == "own") != (self.discloses == "none"):
            raise InvalidValueError("the own answer discloses nothing, and nothing else does so")
        require_numbers(self)
        if self.kept > 1.0:
            raise InvalidValueError("kept is a share, in [0, 1]")

    @classmethod
    def own(cls) -> Medium:
        """Return the receiver's own answer, which needs nobody."""
        return cls(name="own", kind="own", discloses="none", round_trips=0)

    @classmethod
    def text(cls, *, tokens: int = 64, bytes_per_token: int = 4, name: str = "text") -> Medium:
        """Return help in words: the sharer writes, the receiver reads."""
        size = tokens * bytes_per_token
        return cls(
            name=name,
            kind="text",
            discloses="text",
            up_bytes=size,
            down_bytes=size,
            sharer_tokens=tokens,
            read_tokens=tokens,
        )

    @classmethod
    def cache(
        cls,
        share: ShareSpec,
        *,
        floats: int,
        codec: str = "int8",
        relayed_floats: int = 0,
        codec_s: float = 0.0,
        fuse_s: float = 0.0,
        kept: float = 1.0,
        one_phase_bytes: int = 64_000,
    ) -> Medium:
        """Return the cache that a `ShareSpec` describes.

        Parameters
        ----------
        share : ShareSpec
        floats : int
            Numbers of one question's payload: ``share.floats(layout, prompt_tokens)``.
        codec : str
            One of `CODEC_BITS`.
        relayed_floats : int
            Numbers that go down where the coordinator fuses, in the receiver's layout; 0
            where the receiver fuses and the payload itself goes down.
        codec_s, fuse_s, kept : float
        one_phase_bytes : int
            Larger bodies are fetched with a handle, in a second round trip.
        """
        if codec not in CODEC_BITS:
            raise InvalidValueError(f"codec is one of {', '.join(CODEC_BITS)}")

        def size(numbers: int) -> int:
            return _HEADER_BYTES + math.ceil(numbers * CODEC_BITS[codec] / 8)

        up = size(floats)
        # Many last tokens are the prompt in all but name.
        full = share.full or share.last > _MOST_LAST_TOKENS
        parts = ["full cache" if share.full else f"cache of the last {share.last}"]
        parts += [f"{share.decode} decoded"] if share.decode else []
        parts += ["hidden"] if share.hidden else []
        return cls(
            name=f"{' + '.join(parts)}, {codec}",
            kind="full-cache" if full else "cache",
            discloses="context" if full else "answer",
            up_bytes=up,
            down_bytes=size(relayed_floats) if relayed_floats else up,
            sharer_tokens=share.decode,
            codec_s=codec_s,
            fuse_s=fuse_s,
            round_trips=1 if up <= one_phase_bytes else 2,
            kept=kept,
        )
