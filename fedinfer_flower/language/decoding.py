"""How a model's continuation is chosen: greedy or sampled, how long, where it stops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedinfer_flower.errors import InvalidValueError

__all__ = ["Decoding", "GrowingAnswers"]

_MAX_NEW_TOKENS = 32_768
_COLDEST, _HOTTEST = 1e-3, 100.0


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Settings of one continuation.

    Parameters
    ----------
    max_new_tokens : int
    temperature : float
        0 is greedy.
    top_k : int
        Keep the k most likely tokens; 0 keeps all.
    top_p : float
        Keep the most likely tokens that together have this probability.
    stop : tuple of str
        The text ends before the first of these.
    seed : int
        Of the sampling; greedy decoding has no use for it.

    Examples
    --------
    >>> Decoding(max_new_tokens=4).greedy
    True
    """

    max_new_tokens: int = 32
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.max_new_tokens <= _MAX_NEW_TOKENS:
            raise InvalidValueError(f"max_new_tokens is in [1, {_MAX_NEW_TOKENS}]")
        # A temperature near 0 overflows the logits; 0 itself is greedy.
        if self.temperature != 0.0 and not _COLDEST <= self.temperature <= _HOTTEST:
            raise InvalidValueError(f"temperature is 0, or in [{_COLDEST}, {_HOTTEST}]")
        if not 0.0 < self.top_p <= 1.0 or self.top_k < 0:
            raise InvalidValueError("top_p is in (0, 1], top_k not negative")
        if not isinstance(self.stop, tuple) or not all(self.stop):
            raise InvalidValueError("stop is a tuple of texts that are not empty")
        if not 0 <= self.seed < 1 << 63:
            raise InvalidValueError("seed is in [0, 2^63)")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0

    def sampler(self) -> Sampler:
        """Return what chooses tokens, with a generator of its own."""
        return Sampler(self)

    def ends_in(self, text: str) -> int:
        """Return where the first stop text begins in `text`, or -1."""
        found = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        return min(found, default=-1)


class Sampler:
    """Choose next tokens by the settings; transformers' own warpers do the cutting."""

    def __init__(self, settings: Decoding) -> None:
        from transformers import (
            LogitsProcessorList,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        self._greedy = settings.greedy
        self._generator = torch.Generator().manual_seed(settings.seed)
        warpers: list[Any] = []
        if not settings.greedy:
            warpers.append(TemperatureLogitsWarper(settings.temperature))
            if settings.top_k:
                warpers.append(TopKLogitsWarper(settings.top_k))
            if settings.top_p < 1.0:
                warpers.append(TopPLogitsWarper(settings.top_p))
        self._warp = LogitsProcessorList(warpers)

    def choose(self, logits: Tensor) -> Tensor:
        """Return one token id a row, int64 (B, 1), from logits (B, V)."""
        if self._greedy:
            return logits.argmax(-1, keepdim=True)
        # No warper that is used here looks at the ids.
        no_ids = torch.empty(len(logits), 0, dtype=torch.long)
        warped: Tensor = self._warp(no_ids, logits.float())  # type: ignore[arg-type]
        return torch.multinomial(warped.softmax(-1).cpu(), 1, generator=self._generator)


class GrowingAnswers:
    """Texts as they grow, row by row, until each has ended."""

    def __init__(self, tokenizer: Any, settings: Decoding, rows: int, ends: frozenset[int]) -> None:
        self._tokenizer, self._settings, self._ends = tokenizer, settings, ends
        self._ids: list[list[int]] = [[] for _ in range(rows)]
        self._done = [False] * rows

    def take(self, token: Tensor) -> bool:
        """Add one token a row; return whether all rows have ended."""
        for row, value in enumerate(token[:, 0].tolist()):
            if self._done[row]:
                continue
            if value in self._ends:
                self._done[row] = True
                continue
            self._ids[row].append(value)
            if self._settings.stop:
                self._done[row] = self._settings.ends_in(self._text(row)) >= 0
        return all(self._done)

    def texts(self) -> list[str]:
        """Return the texts, each up to where it ended."""
        out = []
        for row in range(len(self._ids)):
            text = self._text(row)
            end = self._settings.ends_in(text)
            out.append((text if end < 0 else text[:end]).strip())
        return out

    def _text(self, row: int) -> str:
        text: str = self._tokenizer.decode(self._ids[row], skip_special_tokens=True)
        return text
