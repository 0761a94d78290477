"""How often each medium of each sharer led to a right answer, as counts that fade."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.kv.media import Medium

__all__ = ["MediaHistory"]

_MAX_PAIRS: Final = 100_000
"""A coordinator that runs for months meets many sharers; the oldest pairs go."""


@dataclass
class _Counts:
    good: float = 0.0
    seen: float = 0.0


class MediaHistory:
    """Expected quality of a medium, from what was measured.

    Quality is the mean of a beta posterior: prior and counts in one fraction. Labelled
    answers count fully. Without labels, agreement with the answer that the querier took
    counts a quarter: it shows a useless medium, not a right one.

    Parameters
    ----------
    prior_own, prior_help : float
        Expected quality before anything is measured. Help is expected to be better than
        the own answer: a medium that is never tried is never measured.
    prior_weight : float
        Answers that the prior is worth.
    agreement_weight : float
        What an agreement counts against a label, in [0, 1].
    decay : float
        What older counts of a pair weigh after each new one; 0.99 remembers about 100.

    Examples
    --------
    >>> history = MediaHistory()
    >>> text = Medium.text()
    >>> before = history.quality("north", text)
    >>> history.record("north", text, right=True)
    >>> history.quality("north", text) > before
    True
    """

    def __init__(
        self,
        *,
        prior_own: float = 0.5,
        prior_help: float = 0.7,
        prior_weight: float = 8.0,
        agreement_weight: float = 0.25,
        decay: float = 0.99,
    ) -> None:
        for name, value in (
            ("prior_own", prior_own),
            ("prior_help", prior_help),
            ("agreement_weight", agreement_weight),
        ):
            if not 0.0 <= value <= 1.0:
                raise InvalidValueError(f"{name} of a history is in [0, 1]")
        if not (math.isfinite(prior_weight) and prior_weight > 0.0 and 0.0 < decay <= 1.0):
            raise InvalidValueError("prior_weight is positive, decay in (0, 1]")
        self._prior_own, self._prior_help = prior_own, prior_help
        self._prior_weight, self._agreement_weight = prior_weight, agreement_weight
        self._decay = decay
        self._counts: dict[tuple[str, str], _Counts] = {}

    def record(
        self, sharer: str, medium: Medium, *, right: bool | None = None, agree: bool | None = None
    ) -> None:
        """Add one answer; `right` where a label is known, else `agree`.

        Raises
        ------
        InvalidValueError
            If neither or both are given: one answer counts once.
        """
        if (right is None) == (agree is None):
            raise InvalidValueError("an answer is recorded with either right or agree")
        weight = 1.0 if right is not None else self._agreement_weight
        key = self._key(sharer, medium)
        counts = self._counts.pop(key, None) or _Counts()
        if len(self._counts) >= _MAX_PAIRS:
            del self._counts[next(iter(self._counts))]
        counts.good = self._decay * counts.good + weight * bool(right or agree)
        counts.seen = self._decay * counts.seen + weight
        self._counts[key] = counts

    def quality(self, sharer: str, medium: Medium) -> float:
        """Return the expected share of right answers, in [0, 1]."""
        prior = self._prior_own if medium.kind == "own" else self._prior_help * medium.kept
        counts = self._counts.get(self._key(sharer, medium)) or _Counts()
        good = self._prior_weight * prior + counts.good
        return good / (self._prior_weight + counts.seen)

    def weight(self, sharer: str, medium: Medium) -> float:
        """Return how many answers, faded, the quality rests on."""
        return (self._counts.get(self._key(sharer, medium)) or _Counts()).seen

    @staticmethod
    def _key(sharer: str, medium: Medium) -> tuple[str, str]:
        # The own answer is the same whoever else could have been asked.
        return ("" if medium.kind == "own" else sharer, medium.name)
