"""Majority: every site answers alone, and the answer of most of them counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedinfer_flower.errors import ConfigError
from fedinfer_flower.strategies.answer_mixing.base import (
    ABSTENTIONS,
    ANSWER_MIXINGS,
    AnswerMixing,
    Answers,
    Exchange,
    Mixed,
    vote,
)

__all__ = ["Majority"]


@ANSWER_MIXINGS.register("majority")
@dataclass(frozen=True, kw_only=True)
class Majority(AnswerMixing):
    """Take the answer that most sites gave; abstentions do not vote.

    Use for short answers that can be compared as texts. Two sites that share an error
    outvote the one that knows.

    Parameters
    ----------
    abstentions : tuple of str
        Answers that are none.
    tie_seed : int

    Examples
    --------
    >>> mixed = Majority().mix([{"a": ["Paris"], "b": ["paris."], "c": ["Rome"]}])
    >>> mixed.answers
    ('Paris',)
    """

    abstentions: tuple[str, ...] = ABSTENTIONS
    tie_seed: int = 0

    def exchanges(self, sites: Sequence[str] | None) -> tuple[Exchange, ...]:
        """Return one exchange, in which all answer alone."""
        if sites is not None and len(sites) < 2:
            raise ConfigError("a majority of one site", hint="name more sites, or none for all")
        receiver = "all" if sites is None else tuple(sites)
        return (Exchange(settings={"receiver": receiver, "medium": "own"}),)

    def mix(self, answers: Sequence[Answers]) -> Mixed:
        """Return the votes' winners."""
        (by_site,) = answers
        return vote(list(by_site.values()), abstentions=self.abstentions, tie_seed=self.tie_seed)
