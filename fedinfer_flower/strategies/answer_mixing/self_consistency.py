"""Self-consistency: one site answers several times, and its most frequent answer counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedinfer_flower.errors import ConfigError, InvalidValueError
from fedinfer_flower.strategies.answer_mixing.base import (
    ABSTENTIONS,
    ANSWER_MIXINGS,
    AnswerMixing,
    Answers,
    Exchange,
    Mixed,
    require_name,
    vote,
)

__all__ = ["SelfConsistency"]

_MAX_SAMPLES = 64


@ANSWER_MIXINGS.register("self-consistency")
@dataclass(frozen=True, kw_only=True)
class SelfConsistency(AnswerMixing):
    """Sample one site's model several times and vote among its own answers.

    What a mixture of several sites has to beat: the same number of answers, from one model.

    Parameters
    ----------
    site : str
        Name of the site.
    samples : int
        In [2, 64].
    temperature : float
    seed : int
        Of the first sample; each has a seed of its own.
    abstentions : tuple of str
        Answers that are none.

    References
    ----------
    .. [1] Wang et al., Self-Consistency Improves Chain of Thought Reasoning in Language
       Models, ICLR 2023.

    Examples
    --------
    >>> len(SelfConsistency(site="north", samples=3).exchanges(None))
    3
    """

    site: str = ""
    samples: int = 5
    temperature: float = 0.7
    seed: int = 0
    abstentions: tuple[str, ...] = ABSTENTIONS

    def __post_init__(self) -> None:
        require_name(self.site, "the site of self-consistency")
        if type(self.samples) is not int or not 2 <= self.samples <= _MAX_SAMPLES:
            raise InvalidValueError(f"samples is in [2, {_MAX_SAMPLES}], got {self.samples!r}")
        if not 0.0 < self.temperature <= 100.0:
            raise InvalidValueError("temperature is in (0, 100]: greedy samples are all the same")

    def exchanges(self, sites: Sequence[str] | None) -> tuple[Exchange, ...]:
        """Return one exchange a sample."""
        if sites is not None and self.site not in sites:
            raise ConfigError(f"{self.site!r} is not among the sites")
        return tuple(
            Exchange(
                settings={
                    "receiver": self.site,
                    "medium": "own",
                    "decoding": {"temperature": self.temperature, "seed": self.seed + i},
                }
            )
            for i in range(self.samples)
        )

    def mix(self, answers: Sequence[Answers]) -> Mixed:
        """Return the most frequent samples."""
        columns = [column for by_site in answers for column in by_site.values()]
        return vote(columns, abstentions=self.abstentions, tie_seed=self.seed)
