"""Aggregator: one site's model reads what the others say, and answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedinfer_flower.errors import ConfigError
from fedinfer_flower.strategies.answer_mixing.base import (
    ANSWER_MIXINGS,
    AnswerMixing,
    Answers,
    Exchange,
    Mixed,
    require_name,
)

__all__ = ["Aggregator"]


@ANSWER_MIXINGS.register("aggregator")
@dataclass(frozen=True, kw_only=True)
class Aggregator(AnswerMixing):
    """Let one site read the others' notes as quoted data, and answer.

    Use where answers are too long to be compared as texts. It is as good as the
    aggregator's model, and a note can mislead it.

    Parameters
    ----------
    site : str
        Name of the site whose model reads and answers.
    rephrase : str
        How it rewrites the question for the others; ``"none"`` sends it as it is.

    References
    ----------
    .. [1] Wang et al., Mixture-of-Agents Enhances Large Language Model Capabilities,
       arXiv 2406.04692 (one layer of proposers and an aggregator).

    Examples
    --------
    >>> Aggregator(site="north").exchanges(None)[0].settings["medium"]
    'text'
    """

    site: str = ""
    rephrase: str = "template"

    def __post_init__(self) -> None:
        require_name(self.site, "an aggregator")

    def exchanges(self, sites: Sequence[str] | None) -> tuple[Exchange, ...]:
        """Return one exchange, with notes to the aggregator from all others."""
        others = None if sites is None else tuple(name for name in sites if name != self.site)
        if others is not None and not others:
            raise ConfigError(
                f"{self.site!r} is the aggregator and the only site", hint="name another site"
            )
        settings = {
            "receiver": self.site,
            "sharers": others,
            "medium": "text",
            "allow": ("text",),
            "rephrase": self.rephrase,
        }
        return (Exchange(settings=settings),)

    def mix(self, answers: Sequence[Answers]) -> Mixed:
        """Return the aggregator's answers."""
        ((given,),) = [list(by_site.values()) for by_site in answers]
        shares = tuple(0.0 if answer is None else 1.0 for answer in given)
        return Mixed(answers=tuple(given), shares=shares)
