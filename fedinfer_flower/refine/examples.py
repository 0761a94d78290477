"""Public questions with answers: what fusers and gates are trained on and measured with."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from fedinfer_flower.errors import InvalidValueError, SizeLimitError

__all__ = ["FuserExample", "examples_digest", "read_examples", "split_examples", "write_examples"]

MAX_FILE_BYTES: Final = 256 << 20
MAX_EXAMPLES: Final = 1_000_000
_MAX_CHARACTERS: Final = 200_000
_FIELDS: Final = ("question", "answer", "document", "task")


@dataclass(frozen=True)
class FuserExample:
    """A question, its right answer, and what the sharer alone can read about it.

    Parameters
    ----------
    question : str
        Both models see it.
    answer : str
        Where nobody can know, one of the abstentions of the receiver's prompt format:
        without such examples a fuser unlearns to say "I do not know".
    document : str
        In the sharer's prompt only; may be empty.
    task : str
        Name under which the example is counted.

    Examples
    --------
    >>> FuserExample("Q city of kim lot ?", "oslo", task="fact").answer
    'oslo'
    """

    question: str = field(repr=False)
    answer: str = field(repr=False)
    document: str = field(default="", repr=False)
    task: str = ""

    def __post_init__(self) -> None:
        texts = (self.question, self.answer, self.document, self.task)
        if not all(isinstance(text, str) and len(text) <= _MAX_CHARACTERS for text in texts):
            raise InvalidValueError(
                f"an example with a field that is no text of at most {_MAX_CHARACTERS} characters"
            )
        if not self.question.strip() or not self.answer.strip():
            raise InvalidValueError("an example without a question or without an answer")

    @property
    def documents(self) -> tuple[str, ...]:
        """The document as prompt formats take it."""
        return (self.document,) if self.document else ()


def read_examples(path: str | Path) -> list[FuserExample]:
    """Read a JSON-lines file of examples.

    Parameters
    ----------
    path : path
        One object a line with ``question``, ``answer`` and, as wanted, ``document`` and
        ``task``. Blank lines are skipped.

    Raises
    ------
    InvalidValueError
        If the file cannot be read, or a line is no example; the text names the line only.
    SizeLimitError
    """
    file = Path(path)
    try:
        n_bytes = file.stat().st_size
        if n_bytes > MAX_FILE_BYTES:
            raise SizeLimitError(f"examples of {n_bytes} bytes; the limit is {MAX_FILE_BYTES}")
        lines = file.read_bytes().decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as exc:
        raise InvalidValueError(
            f"the examples cannot be read: {type(exc).__name__}",
            hint="give a JSON-lines file in UTF-8",
        ) from None
    out = [_read_line(line, number) for number, line in enumerate(lines, 1) if line.strip()]
    if not out or len(out) > MAX_EXAMPLES:
        raise SizeLimitError(f"{len(out)} examples; a file has 1 to {MAX_EXAMPLES}")
    return out


def write_examples(examples: Sequence[FuserExample], path: str | Path) -> None:
    """Write examples as JSON lines."""
    Path(path).write_text("".join(_line(e) + "\n" for e in examples), encoding="utf-8")


def examples_digest(examples: Sequence[FuserExample]) -> str:
    """Return the SHA-256 of the examples in their order, in hex."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(_line(example).encode() + b"\n")
    return digest.hexdigest()


def split_examples(
    examples: Sequence[FuserExample], *, holdout: float, seed: int
) -> tuple[list[FuserExample], list[FuserExample]]:
    """Cut examples into a part to train on and a part held out.

    All examples of one question fall into the same part, and every task gives its share.

    Examples
    --------
    >>> every = [FuserExample(f"q{i}", "a", task="t") for i in range(10)]
    >>> train, held_out = split_examples(every, holdout=0.2, seed=0)
    >>> len(train), len(held_out)
    (8, 2)
    """
    if not 0.0 < holdout < 1.0:
        raise InvalidValueError("holdout is a share in (0, 1)")
    task_of = {e.question: e.task for e in examples}
    rng = random.Random(seed)  # noqa: S311  which public examples are held out is no secret
    held: set[str] = set()
    for task in sorted(set(task_of.values())):
        questions = [q for q, t in task_of.items() if t == task]
        held.update(rng.sample(questions, round(holdout * len(questions))))
    kept = [e for e in examples if e.question not in held]
    out = [e for e in examples if e.question in held]
    if not kept or not out:
        raise InvalidValueError(
            "too few examples to hold some out", hint="give more examples, or another holdout"
        )
    return kept, out


def _line(example: FuserExample) -> str:
    return json.dumps(asdict(example), ensure_ascii=False, sort_keys=True)


def _read_line(line: str, number: int) -> FuserExample:
    try:
        values: Any = json.loads(line)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or not {"question", "answer"} <= values.keys():
        raise InvalidValueError(f"line {number} is no JSON object with question and answer")
    if not values.keys() <= set(_FIELDS):
        raise InvalidValueError(
            f"line {number} has an unknown field", hint=f"known: {', '.join(_FIELDS)}"
        )
    try:
        return FuserExample(**values)
    except InvalidValueError as exc:
        raise InvalidValueError(f"line {number}: {exc.message}") from None
