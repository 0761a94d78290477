"""Quote what other parties wrote: bounded, cleaned, numbered, between marks of our own.

The marks carry a code that the author of a text cannot know: a keyed hash of the texts
themselves. A text that repeats a code it has seen before changes the code. The same texts get
the same marks while a process lives, so an answer stays reproducible.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.language.foreign_text import ForeignText

__all__ = ["DOCUMENTS", "NOTES", "QuoteLimits", "Quoter", "abstains"]

_KEY_BYTES: Final = 32
_CODE_DIGITS: Final = 16
_CUT: Final = " \u2026"
_LONG_WORDS: Final = 12
_DENIALS: Final = re.compile(
    r"\b(i|we) (do not|don't|cannot|can't|could not|couldn't|am unable to|am not able to)"
    r" (know|answer|say|tell|find|determine|help)\b"
    r"|\b(not (known|sure|certain|specified|mentioned|provided|enough information))\b"
    r"|\b(unknown|no idea|no information|unsure|insufficient information)\b"
    r"|^(n/?a|none|null|idk|i have no .*)$"
)


@dataclass(frozen=True, kw_only=True)
class QuoteLimits:
    """How much is quoted; the rest is cut off.

    Parameters
    ----------
    texts : int
    chars, lines : int
        Of each text, after cleaning.
    """

    texts: int
    chars: int
    lines: int

    def __post_init__(self) -> None:
        if min(self.texts, self.chars, self.lines) < 1:
            raise InvalidValueError("limits of quoting are at least 1")


NOTES: Final = QuoteLimits(texts=8, chars=1000, lines=12)
"""For what other sites wrote."""

DOCUMENTS: Final = QuoteLimits(texts=64, chars=200_000, lines=20_000)
"""For a site's own documents; the model's window is the tighter bound."""


class Quoter:
    """Quote texts for the prompts of one tokenizer.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerFast, optional
        Whose control tokens must not appear in a quoted text.
    key : bytes, optional
        Secret of this process; default fresh from the operating system.

    Privacy
    -------
    Quoting keeps a foreign text from becoming a message of its own. It does not keep a model
    from believing or obeying what is quoted: that is up to the model.

    Examples
    --------
    >>> lines = Quoter(key=b"0" * 32).quote(["the city is oslo"], kind="note").splitlines()
    >>> len(lines), lines[1]
    (3, '> the city is oslo')
    """

    def __init__(self, tokenizer: Any = None, *, key: bytes | None = None) -> None:
        if key is not None and len(key) < _KEY_BYTES:
            raise InvalidValueError(f"the key of a quoter has at least {_KEY_BYTES} bytes")
        self._key = secrets.token_bytes(_KEY_BYTES) if key is None else key
        self._foreign = ForeignText(tokenizer)

    def clean(self, text: str) -> str:
        """Return a text that stands outside marks, such as the question."""
        return self._foreign.clean(text).strip()

    def quote(self, texts: Sequence[str], *, kind: str, limits: QuoteLimits = NOTES) -> str:
        """Return the texts between marks, one behind the other.

        Parameters
        ----------
        texts : sequence of str
        kind : str
            One lower-case word that stands in the marks: ``"note"``, ``"document"``.
        limits : QuoteLimits
            Texts beyond the bound are left out, longer ones are cut.

        Returns
        -------
        quoted : str
            Empty without texts. Every quoted line begins with ``> ``.
        """
        if not kind.isalpha() or not kind.islower():
            raise InvalidValueError("the kind of a quotation is one lower-case word")
        bodies = [self._bounded(text, limits) for text in texts[: limits.texts]]
        bodies = [body for body in bodies if body]
        code = self._code(bodies)
        blocks = []
        for number, body in enumerate(bodies, 1):
            lines = "\n".join(f"> {line}" for line in body.split("\n"))
            blocks.append(f"[[{kind} {number} {code}]]\n{lines}\n[[end {kind} {number} {code}]]")
        return "\n".join(blocks)

    def _bounded(self, text: str, limits: QuoteLimits) -> str:
        # Bounded before cleaning too: the work must not grow with what a stranger sends.
        lines = self._foreign.clean(text[: 4 * limits.chars]).split("\n")
        lines = [line.strip() for line in lines if line.strip()]
        body = "\n".join(lines[: limits.lines])
        cut = len(lines) > limits.lines or len(body) > limits.chars or len(text) > 4 * limits.chars
        return body[: limits.chars].rstrip() + (_CUT if cut else "")

    def _code(self, bodies: Sequence[str]) -> str:
        whole = "\n".join(bodies)
        for attempt in range(1 << 16):
            data = json.dumps([attempt, *bodies]).encode()
            digest = hmac.new(self._key, data, hashlib.sha256).hexdigest()
            if digest[:_CODE_DIGITS] not in whole:
                return digest[:_CODE_DIGITS]
        raise AssertionError("65,536 codes of 64 bits all stand in one text")


def abstains(text: str, abstentions: Collection[str] = ()) -> bool:
    """Whether a text says only that its author does not know.

    Parameters
    ----------
    text : str
    abstentions : collection of str
        What the model says then; short refusals in English are known.

    Examples
    --------
    >>> abstains("I don't know."), abstains("The city is Oslo."), abstains("unk .", ("unk",))
    (True, False, True)
    """
    plain = " ".join(text.replace("\u2019", "'").casefold().split()).strip(" .!?,;:\"'")
    if not re.search(r"\w", plain):
        return True
    if plain in {" ".join(a.casefold().split()).strip(" .!?") for a in abstentions}:
        return True
    # A long text may begin with what it does not know and go on with what it does.
    return len(plain.split()) <= _LONG_WORDS and _DENIALS.search(plain) is not None
