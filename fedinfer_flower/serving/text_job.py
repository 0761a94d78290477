"""Bodies of `TEXT` jobs: questions with options, and the answers to them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Final

from fedinfer_flower.errors import EnvelopeError, InvalidValueError, SizeLimitError

__all__ = ["MAX_QUESTIONS", "MAX_QUESTION_BYTES", "TextAnswer", "TextJob", "read_json"]

MAX_QUESTIONS: Final = 256
MAX_QUESTION_BYTES: Final = 48 << 10
"""Of one question in UTF-8: a row of text holds 64 KiB, and the answer so far is part of it."""

_MAX_BODY_BYTES: Final = 8 << 20
_MAX_STOPS: Final = 4
_MAX_STOP_CHARS: Final = 64
_OPTIONS: Final[Mapping[str, tuple[type | UnionType, float, float]]] = {
    "max_new_tokens": (int, 1, 32_768),
    "temperature": (int | float, 0.0, 2.0),
    "top_p": (int | float, 0.001, 1.0),
    "seed": (int, 0, (1 << 63) - 1),
}
_COLDEST: Final = 1e-3


@dataclass(frozen=True, kw_only=True)
class TextJob:
    """Questions to language models.

    Parameters
    ----------
    questions : sequence of str
    options : mapping
        ``max_new_tokens``, ``temperature``, ``top_p``, ``seed``: as for a `Decoding`, where
        the model's strategy takes them. ``stop``: texts before the first of which an answer
        is cut.

    Raises
    ------
    InvalidValueError
        For an option or a question that cannot be asked.
    SizeLimitError
        For too many, or too long, questions.

    Examples
    --------
    >>> job = TextJob(questions=["why ?"], options={"max_new_tokens": 4})
    >>> TextJob.from_bytes(job.to_bytes()) == job
    True
    """

    questions: Sequence[str] = field(repr=False)
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "questions", _questions(self.questions))
        object.__setattr__(self, "options", _options(self.options))

    @property
    def decoding(self) -> dict[str, Any]:
        """The options that go to a site; stop texts are cut off at the gateway."""
        return {name: value for name, value in self.options.items() if name != "stop"}

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts before which an answer ends."""
        return tuple(self.options.get("stop", ()))

    def to_bytes(self) -> bytes:
        """Return the body: UTF-8 JSON, the same for the same job."""
        return _packed({"questions": list(self.questions), "options": dict(self.options)})

    @classmethod
    def from_bytes(cls, data: bytes) -> TextJob:
        """Read a body; what nothing reads is refused.

        Raises
        ------
        EnvelopeError, InvalidValueError, SizeLimitError
        """
        values = read_json(data)
        if unknown := sorted(set(values) - {"questions", "options"}):
            raise EnvelopeError(f"a text job has no field {unknown[0][:64]!r}")
        options = values.get("options", {})
        if not isinstance(options, dict):
            raise EnvelopeError("options of a text job are an object")
        return cls(questions=values.get("questions", ()), options=options)


@dataclass(frozen=True, kw_only=True)
class TextAnswer:
    """Answers in the order of the questions.

    Parameters
    ----------
    texts : tuple of str or None
        None where nobody answered.
    used : tuple of tuple of str
        Names of the sites whose help an answer rests on.
    finish : tuple of {"stop", "length"}
        ``"length"`` where an answer was cut for its length, as far as that is known.

    Examples
    --------
    >>> TextAnswer(texts=("yes",), used=(("south",),), finish=("stop",)).to_bytes()
    b'{"texts":["yes"],"used":[["south"]],"finish":["stop"]}'
    """

    texts: tuple[str | None, ...] = field(repr=False)
    used: tuple[tuple[str, ...], ...]
    finish: tuple[str, ...]

    def __post_init__(self) -> None:
        if not len(self.texts) == len(self.used) == len(self.finish) or not self.texts:
            raise InvalidValueError("an answer has as many texts, sites and endings")
        if not set(self.finish) <= {"stop", "length"}:
            raise InvalidValueError("an answer ends by 'stop' or 'length'")

    def rows(self, start: int, stop: int) -> TextAnswer:
        """Return some of the answers."""
        return TextAnswer(
            texts=self.texts[start:stop],
            used=self.used[start:stop],
            finish=self.finish[start:stop],
        )

    def to_bytes(self) -> bytes:
        """Return UTF-8 JSON."""
        return _packed(
            {
                "texts": list(self.texts),
                "used": [list(names) for names in self.used],
                "finish": list(self.finish),
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> TextAnswer:
        """Read an answer.

        Raises
        ------
        EnvelopeError
            If it is none.
        """
        values = read_json(data)
        try:
            return cls(
                texts=tuple(values["texts"]),
                used=tuple(tuple(names) for names in values["used"]),
                finish=tuple(values["finish"]),
            )
        except (KeyError, TypeError, InvalidValueError):
            raise EnvelopeError("bytes that are no answer in text") from None


def read_json(data: bytes, *, max_bytes: int = _MAX_BODY_BYTES) -> dict[str, Any]:
    """Read a JSON object strictly: no key twice, no NaN, bounded.

    Raises
    ------
    EnvelopeError, SizeLimitError
        Without a word of what the bytes say.
    """
    if len(data) > max_bytes:
        raise SizeLimitError(f"a body of {len(data)} bytes; {max_bytes} are read")
    try:
        values = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise EnvelopeError("the body is not a JSON object in UTF-8") from None
    if not isinstance(values, dict):
        raise EnvelopeError("the body is not a JSON object in UTF-8")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError  # two readers would understand two things
    return values


def _no_constant(_: str) -> float:
    raise ValueError


def _packed(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()


def _questions(given: object) -> tuple[str, ...]:
    if not isinstance(given, list | tuple) or not given:
        raise InvalidValueError("questions are a list of texts that is not empty")
    if len(given) > MAX_QUESTIONS:
        raise SizeLimitError(f"{len(given)} questions; a job has at most {MAX_QUESTIONS}")
    for text in given:
        if not isinstance(text, str) or not text.strip() or "\0" in text:
            raise InvalidValueError("a question is a text that is not empty, without a zero")
        try:
            n_bytes = len(text.encode())
        except UnicodeEncodeError:
            raise InvalidValueError("a question that is not valid Unicode") from None
        if n_bytes > MAX_QUESTION_BYTES:
            raise SizeLimitError(
                f"a question of {n_bytes} bytes; {MAX_QUESTION_BYTES} are taken",
                hint="shorten it, or drop older messages",
            )
    return tuple(given)


def _options(given: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in given.items():
        if name == "stop":
            kept[name] = list(_stops(value))
            continue
        if name not in _OPTIONS:
            raise InvalidValueError(
                f"a text job has no option {str(name)[:64]!r}",
                hint=f"known: {', '.join([*_OPTIONS, 'stop'])}",
            )
        kind, low, high = _OPTIONS[name]
        number = isinstance(value, kind) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not low <= value <= high:
            raise InvalidValueError(f"{name} is a number in [{low:g}, {high:g}]")
        if name == "temperature" and 0.0 < value < _COLDEST:
            raise InvalidValueError(f"temperature is 0, or at least {_COLDEST:g}")
        kept[name] = value
    return kept


def _stops(given: object) -> tuple[str, ...]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or len(texts) > _MAX_STOPS:
        raise InvalidValueError(f"stop is at most {_MAX_STOPS} texts")
    for text in texts:
        if not isinstance(text, str) or not 0 < len(text) <= _MAX_STOP_CHARS:
            raise InvalidValueError(f"a stop text has 1 to {_MAX_STOP_CHARS} characters")
    return tuple(texts)
