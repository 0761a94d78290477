"""What a site with a language model agrees to. Sharing is off until the site turns it on."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

from fedinfer_flower.errors import (
    InvalidValueError,
    MediumRefusedError,
    SizeLimitError,
    UnknownConfigKeyError,
)
from fedinfer_flower.wire.refine_fields import MAX_CHARS, MAX_QUESTIONS, MAX_ROUNDS, MEDIA

__all__ = ["LanguagePolicy"]

_CODECS: Final = ("static4", "int8", "int4", "static8", "fp16", "bf16", "fp32")
_WHY: Final = {
    "cache": "whoever holds a cache can invert it, and read what was asked and much of the"
    " site's document",
    "full-cache": "every token of the prompt can be read from a full cache, the site's document"
    " included",
    "text": "a note is written from the site's documents, and says what the model chose to say",
}
_RANGES: Final = {
    "max_questions": (1, MAX_QUESTIONS),
    "max_question_chars": (1, MAX_CHARS),
    "max_note_chars": (1, MAX_CHARS),
    "max_new_tokens": (1, 32_768),
    "max_decode": (0, 256),
    "max_rounds": (1, MAX_ROUNDS),
    "one_phase_bytes": (0, 1 << 30),
    "max_handle_bytes": (1, 1 << 40),
    "max_payload_bytes": (1, 1 << 30),
    "max_cache_tokens": (1, 1 << 20),
}


@dataclass(frozen=True, kw_only=True)
class LanguagePolicy:
    """What a site shares, answers and accepts. A coordinator cannot widen it.

    Parameters
    ----------
    cache : bool
        Share KV entries of the last tokens of a prompt.
    full_cache : bool
        Share KV entries of whole prompts.
    text : bool
        Share notes in text.
    answers : bool
        Answer as receiver.
    answers_from_documents : bool
        Read the site's own documents before answering as receiver. The querier then gets
        what the model makes of them.
    candidates : bool
        Score answers that the querier gives.
    coordinator_fusers : bool
        Let the coordinator read rewritten questions and caches, so that fusers can run
        there.
    share_evidence : bool
        Tell the coordinator how certain the model is; only where fusers run there.
    share_speeds : bool
        Tell everybody how fast the model is.
    max_questions, max_question_chars : int
        Of one batch.
    max_new_tokens : int
        Longest answer or note; a querier that asks for more gets these.
    max_decode : int
        Most tokens that the site decodes on top of a cache.
    max_note_chars : int
        Longest note of another site that is read.
    max_rounds : int
        Most rounds that a batch may have in which the site takes part. In a later round a
        receiver shares what it fused: what this site gave is in it, and reaches sites that
        it did not give it to. 1 keeps it with the receiver.
    codecs : tuple of str
        How caches may be encoded, the preferred first.
    one_phase_bytes : int
        Larger bodies are offered by handle.
    handle_ttl_s : float
        How long offers, questions and refined states are kept, in seconds.
    max_handle_bytes : int
        Most bytes kept for each of them.
    max_payload_bytes, max_cache_tokens : int
        Largest cache of another site that is read.

    Raises
    ------
    InvalidValueError
        For a value out of its range.

    Privacy
    -------
    What is shared goes to a site that can read it: a receiver, whose key the querier named if
    it signed its consent, and in later rounds those with whom the receiver shares
    (`max_rounds`). A site that pins neither peers nor queriers has the coordinator's word for
    who the receiver is: it can be the coordinator.
    Last-token entries give away the answer and, often, more of the document; text says what
    it says; full caches give away everything. Nothing here adds noise.

    Examples
    --------
    >>> LanguagePolicy().media, LanguagePolicy(cache=True, text=True).media
    ((), ('cache', 'text'))
    """

    cache: bool = False
    full_cache: bool = False
    text: bool = False
    answers: bool = True
    answers_from_documents: bool = False
    candidates: bool = False
    coordinator_fusers: bool = False
    share_evidence: bool = False
    share_speeds: bool = True
    max_questions: int = 64
    max_question_chars: int = 4000
    max_new_tokens: int = 256
    max_decode: int = 8
    max_note_chars: int = 4000
    max_rounds: int = 1
    codecs: tuple[str, ...] = _CODECS
    one_phase_bytes: int = 65_536
    handle_ttl_s: float = 120.0
    max_handle_bytes: int = 256 << 20
    max_payload_bytes: int = 64 << 20
    max_cache_tokens: int = 8192

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.type == "bool" and type(value) is not bool:
                raise InvalidValueError(f"{item.name} of a language policy is true or false")
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise InvalidValueError(f"{name} of a language policy is in [{low}, {high}]")
        if not (math.isfinite(self.handle_ttl_s) and self.handle_ttl_s > 0.0):
            raise InvalidValueError("handle_ttl_s of a language policy is positive seconds")
        if not self.codecs or not set(self.codecs) <= set(_CODECS):
            raise InvalidValueError(
                "codecs of a language policy is a tuple of known names",
                hint=f"of {', '.join(_CODECS)}",
            )
        object.__setattr__(self, "codecs", tuple(self.codecs))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> LanguagePolicy:
        """Read a policy, as from a table of a configuration file.

        Raises
        ------
        UnknownConfigKeyError
            For a key that nothing reads: a misspelt limit would not be one.

        Examples
        --------
        >>> LanguagePolicy.from_mapping({"text": True, "codecs": ["int8"]}).codecs
        ('int8',)
        """
        known = [item.name for item in fields(cls)]
        given = {str(key).replace("-", "_"): value for key, value in values.items()}
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                raise UnknownConfigKeyError(
                    f"a language policy has no {name[:64]!r}",
                    hint=f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}",
                )
        if isinstance(given.get("codecs"), list):
            given["codecs"] = tuple(given["codecs"])
        return cls(**given)

    @property
    def media(self) -> tuple[str, ...]:
        """Media in which the site shares."""
        on = {"cache": self.cache, "full-cache": self.full_cache, "text": self.text}
        return tuple(medium for medium in MEDIA if on[medium])

    def require_medium(self, medium: str) -> None:
        """Require that the site shares in this way.

        Raises
        ------
        MediumRefusedError
            Which says what sharing in this way gives away.
        """
        if medium not in self.media:
            raise MediumRefusedError(
                f"this site does not share {medium!r}: {_WHY.get(medium, 'unknown medium')}",
                hint=f"its operator turns it on: LanguagePolicy({medium.replace('-', '_')}=True),"
                f" or [language] {medium} in its policy",
            )

    def require_on(self, name: str, what: str) -> None:
        """Require that a switch is on.

        Raises
        ------
        MediumRefusedError
        """
        if not getattr(self, name):
            raise MediumRefusedError(
                f"this site does not {what}",
                hint=f"its operator turns it on: LanguagePolicy({name}=True),"
                f" or [language] {name.replace('_', '-')} in its policy",
            )

    def require_questions(self, questions: Sequence[str]) -> None:
        """Require a batch within the limits.

        Raises
        ------
        SizeLimitError
        """
        if len(questions) > self.max_questions:
            raise SizeLimitError(
                f"{len(questions)} questions; this site takes {self.max_questions} at a time",
                hint="ask in smaller batches",
            )
        if any(len(question) > self.max_question_chars for question in questions):
            raise SizeLimitError(
                f"a question of more than {self.max_question_chars} characters",
                hint="shorten it",
            )
