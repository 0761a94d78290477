"""Texts that grow by one candidate a step: what is asked next, and what an answer adds.

Runs wherever answers are opened: in the coordinator's process for an array in clear, else at
the querier.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import ConfigError, InvalidValueError, LabelSpaceError, ShapeError
from fedinfer_flower.query import Prediction, SiteProfile
from fedinfer_flower.wire.text_rows import text_rows

__all__ = ["Candidates", "DecodeSteps", "DecodeTerms", "Ended", "agreed_candidates"]

Candidates = Sequence[str] | Callable[[int, Sequence[str]], Sequence[str]]
"""Candidates of every step, or a function from (step, the open texts so far) to them."""

_MAX_STEPS: Final = 4096


class Ended(StrEnum):
    """Why a text grows no further."""

    STOP = "stop"
    STEPS = "steps"
    ABSTAINED = "abstained"
    BUDGET = "budget"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class DecodeTerms:
    """How texts grow.

    Parameters
    ----------
    candidates : sequence of str, or callable, optional
        What may come next. Default: all that every site offers. A function gets the step,
        from 0, and the texts that still grow, and narrows them down.
    max_steps : int
        Most candidates in one text.
    stop : sequence of str
        A text ends before the first of these.
    joiner : str
        Stands between two candidates.
    abstain_below : float
        In [0, 1): a text ends, as abstained, where the best candidate's joint probability is
        smaller. Where one of J sites knows, that is about 1/J under rules that average.
    abstentions : sequence of str
        Candidates that say nothing. They take their part of the probability, and are never
        picked: the best of the others is, or the text ends by `abstain_below`. So one site
        that knows is not outvoted by those that do not. A rule of votes needs this, because
        a vote cannot be spread.

    Raises
    ------
    InvalidValueError
        For a value out of its range.
    """

    candidates: Candidates | None = None
    max_steps: int = 1
    stop: Sequence[str] = ()
    joiner: str = " "
    abstain_below: float = 0.0
    abstentions: Sequence[str] = ()

    def __post_init__(self) -> None:
        if type(self.max_steps) is not int or not 1 <= self.max_steps <= _MAX_STEPS:
            raise InvalidValueError(f"max_steps is in [1, {_MAX_STEPS}], got {self.max_steps!r}")
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise InvalidValueError("stop is a list of texts that are not empty")
        if not (math.isfinite(self.abstain_below) and 0.0 <= self.abstain_below < 1.0):
            raise InvalidValueError("abstain_below is in [0, 1)")
        if isinstance(self.abstentions, str):
            raise InvalidValueError("abstentions are a list of candidates")
        if self.abstentions and self.abstain_below == 0.0:
            raise ConfigError(
                "abstentions, and no probability below which a text ends: none ever would",
                hint="abstain_below=0.2, say: below one over the number of sites",
            )
        object.__setattr__(self, "abstentions", tuple(self.abstentions))
        if self.candidates is not None and not callable(self.candidates):
            _checked(self.candidates)
            object.__setattr__(self, "candidates", tuple(self.candidates))
        object.__setattr__(self, "stop", tuple(self.stop))

    def candidates_at(
        self, step: int, texts: Sequence[str], profiles: Iterable[SiteProfile]
    ) -> tuple[str, ...]:
        """Return the candidates of a step, all of which every site can write.

        Raises
        ------
        LabelSpaceError
            If a site lacks one, or the sites have none in common.
        """
        given = self.candidates
        if given is None:
            return agreed_candidates(profiles)
        wanted = _checked(given(step, tuple(texts)) if callable(given) else given)
        for profile in profiles:
            lacking = len(set(wanted) - set(profile.classes))
            if lacking:
                raise LabelSpaceError(
                    f"{lacking} of {len(wanted)} candidates are not among what a site can write",
                    site=profile.name,
                    hint="candidates=None takes what all sites have in common",
                )
        return wanted


def agreed_candidates(profiles: Iterable[SiteProfile]) -> tuple[str, ...]:
    """Return the candidates that all sites offer, in the order of the first.

    Raises
    ------
    LabelSpaceError
        If there is none.

    Examples
    --------
    >>> agreed_candidates([SiteProfile(name="a", classes=("yes", "no", "oui")),
    ...                    SiteProfile(name="b", classes=("no", "yes"))])
    ('yes', 'no')
    """
    first, *others = (profile.classes for profile in profiles)
    shared = set(first).intersection(*others)
    if not shared:
        raise LabelSpaceError(
            "the sites have no candidate in common",
            hint="compare the texts that the sites' CandidateModel were given",
        )
    return tuple(name for name in first if name in shared)


class DecodeSteps:
    """The texts of a batch of questions while they grow.

    Parameters
    ----------
    questions : sequence of str
    terms : DecodeTerms

    Examples
    --------
    >>> steps = DecodeSteps(["sky ?"], DecodeTerms(max_steps=2, stop=(".",)))
    >>> answer = lambda label: Prediction(
    ...     classes=("blue", "."), labels=np.array([label]), margin=np.ones(1),
    ...     probabilities=np.array([[0.8, 0.2], [0.4, 0.6]])[[label]],
    ...     abstained=np.array([False]))
    >>> steps.take(answer(0)); steps.take(answer(1))
    >>> steps.texts, steps.ended[0].value, round(steps.probabilities[0], 2)
    (('blue',), 'stop', 0.48)
    """

    def __init__(self, questions: Sequence[str], terms: DecodeTerms) -> None:
        if isinstance(questions, str) or not len(questions):
            raise InvalidValueError("questions are a list of texts that is not empty")
        self.questions = tuple(questions)
        self.terms = terms
        self.n_steps = 0
        n = len(self.questions)
        self._texts = [""] * n
        self._lengths = [0] * n
        self._log_probabilities = [0.0] * n
        self._ended: list[Ended | None] = [None] * n
        text_rows(self.questions, self._texts)  # what cannot travel is refused here

    @property
    def open(self) -> tuple[int, ...]:
        """Places of the texts that still grow."""
        return tuple(i for i, ended in enumerate(self._ended) if ended is None)

    @property
    def open_texts(self) -> tuple[str, ...]:
        """Texts that still grow, so far."""
        return tuple(self._texts[i] for i in self.open)

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts, in the order of the questions."""
        return tuple(self._texts)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Steps that each text took, the one that ended it included."""
        return tuple(self._lengths)

    @property
    def probabilities(self) -> tuple[float, ...]:
        """Product of the joint probabilities of what was picked, for each text."""
        return tuple(math.exp(p) for p in self._log_probabilities)

    @property
    def ended(self) -> tuple[Ended, ...]:
        """Why each text ended.

        Raises
        ------
        ConfigError
            While one still grows.
        """
        found = tuple(ended for ended in self._ended if ended is not None)
        if len(found) < len(self._ended):
            raise ConfigError("texts still grow: take further answers, or end them")
        return found

    def rows(self) -> npt.NDArray[np.uint8]:
        """Return what to ask next: a row for each open text."""
        return text_rows([self.questions[i] for i in self.open], self.open_texts)

    def take(self, prediction: Prediction) -> None:
        """Add the candidate that was picked to each open text.

        Raises
        ------
        ShapeError
            If the prediction does not answer the open rows.
        """
        places = self.open
        if len(prediction) != len(places):
            raise ShapeError(f"{len(prediction)} answers to {len(places)} open texts")
        self.n_steps += 1
        for row, place in enumerate(places):
            label = self._picked(prediction, row, lot=f"{self.n_steps}|{place}")
            probability = float(prediction.probabilities[row, label])
            self._lengths[place] += 1
            silent = prediction.classes[label] in self.terms.abstentions
            if silent or prediction.abstained[row] or probability < self.terms.abstain_below:
                self._ended[place] = Ended.ABSTAINED
                continue
            self._log_probabilities[place] += math.log(max(probability, 1e-300))
            self._append(place, prediction.classes[label])

    def end(self, reason: Ended) -> None:
        """End all open texts."""
        for place in self.open:
            self._ended[place] = reason

    def _picked(self, prediction: Prediction, row: int, *, lot: str) -> int:
        """Return the best column that says something; ties by lot."""
        label = int(prediction.labels[row])
        silent = set(self.terms.abstentions)
        if prediction.classes[label] not in silent:
            return label
        heard = [i for i, name in enumerate(prediction.classes) if name not in silent]
        if not heard:
            return label
        told = prediction.probabilities[row, heard]
        tied = [i for i, p in zip(heard, told, strict=True) if p >= told.max() - 1e-9]
        return random.Random(lot).choice(tied)  # noqa: S311  a lot that can be drawn again

    def _append(self, place: int, picked: str) -> None:
        before = self._texts[place]
        text = before + self.terms.joiner + picked if before else picked
        # A stop may have begun in an earlier candidate, and not before that.
        cuts = [at for stop in self.terms.stop if (at := text.find(stop)) >= 0]
        self._texts[place] = text[: min(cuts)].strip() if cuts else text
        if cuts:
            self._ended[place] = Ended.STOP
        elif self._lengths[place] >= self.terms.max_steps:
            self._ended[place] = Ended.STEPS


def _checked(candidates: Sequence[str]) -> tuple[str, ...]:
    given = tuple(candidates)
    if isinstance(candidates, str) or not given or len(set(given)) != len(given):
        raise InvalidValueError("candidates are a list of texts, at least one and none twice")
    if not all(isinstance(text, str) and text for text in given):
        raise InvalidValueError("a candidate is a text that is not empty")
    return given
