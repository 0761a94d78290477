"""Which of a sharer's tokens travel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from fedinfer_flower.errors import EnvelopeError, InvalidValueError

if TYPE_CHECKING:
    from fedinfer_flower.kv.layout import CacheLayout

__all__ = ["ShareSpec"]

_MAX_LAST: Final = 4096
_MAX_DECODE: Final = 256


@dataclass(frozen=True, kw_only=True)
class ShareSpec:
    """Which entries a sharer computes and sends for each prompt.

    Parameters
    ----------
    last : int
        Last tokens of the prompt that travel, in [0, 4096]; 0 for all of them.
    decode : int
        Tokens that the sharer decodes on top, in [0, 256]; they travel too. The entries of
        a layer are made from its *input*, so a cache never contains what the last layer
        computed: the entries of one decoded token do.
    hidden : bool
        Send the final hidden state as one more layer. It holds what the last layer
        computed, at no decoding step.

    Raises
    ------
    InvalidValueError

    Privacy
    -------
    Whoever opens the payload can invert it. The first layer of a full cache is
    a lookup table of the prompt's tokens. The last tokens alone still carry the answer and
    part of what else was in the prompt.

    Examples
    --------
    >>> spec = ShareSpec(last=1, decode=1)
    >>> spec.full, spec.tokens(30), ShareSpec(last=0, decode=0).tokens(30)
    (False, 2, 30)
    >>> ShareSpec.from_dict(spec.to_dict()) == spec
    True
    """

    last: int = 1
    decode: int = 1
    hidden: bool = False

    def __post_init__(self) -> None:
        for name, most in (("last", _MAX_LAST), ("decode", _MAX_DECODE)):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value <= most:
                raise InvalidValueError(f"{name} of a share is a whole number in [0, {most}]")
        if type(self.hidden) is not bool:
            raise InvalidValueError("hidden of a share is true or false")

    @property
    def full(self) -> bool:
        """Whether the whole prompt travels."""
        return self.last == 0

    def tokens(self, prompt_tokens: int) -> int:
        """Return how many tokens travel for a prompt of this many."""
        kept = prompt_tokens if self.full else min(self.last, prompt_tokens)
        return kept + self.decode

    def floats(self, layout: CacheLayout, prompt_tokens: int) -> int:
        """Return how many numbers travel for a prompt of this many tokens."""
        return self.tokens(prompt_tokens) * layout.floats_per_token(hidden=self.hidden)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ShareSpec:
        """Read the fields.

        Raises
        ------
        EnvelopeError
            If one is missing, unknown, or out of its range.
        """
        if not isinstance(values, Mapping) or set(values) != set(cls.__dataclass_fields__):
            raise EnvelopeError("a share that lacks a field or has an unknown one")
        try:
            return cls(**values)
        except InvalidValueError as exc:
            raise EnvelopeError(exc.message) from None
