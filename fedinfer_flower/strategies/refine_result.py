"""What `FedRefine.start` returns: answers, who helped with what, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from fedinfer_flower.query import SiteStatus
from fedinfer_flower.wire.refine_job import RefineAnswer

__all__ = ["Pairing", "PlannedMedium", "ReceiverAnswers", "RefineResult", "SharerOutcome"]

_SHOWN = 12


class Pairing(StrEnum):
    """The four kinds of collaboration of the FedRefine paper (appendix A).

    Homogeneous means one model at both sites, by digest: entries of the one can be read by
    the other as they are. Everything else is heterogeneous.
    """

    HOMOGENEOUS_TEXT = "homogeneous-token"
    HOMOGENEOUS_CACHE = "homogeneous-cache"
    HETEROGENEOUS_TEXT = "heterogeneous-token"
    HETEROGENEOUS_CACHE = "heterogeneous-cache"

    @classmethod
    def of(cls, *, same_model: bool, medium: str) -> Pairing:
        """Return the kind of a pair that communicated by ``"cache"`` or ``"text"``.

        Examples
        --------
        >>> Pairing.of(same_model=False, medium="cache").value
        'heterogeneous-cache'
        """
        first = "homogeneous" if same_model else "heterogeneous"
        return cls(f"{first}-{'token' if medium == 'text' else 'cache'}")


@dataclass(frozen=True, kw_only=True)
class PlannedMedium:
    """Why a sharer was asked in the way it was.

    Parameters
    ----------
    receiver, sharer : str
        Names.
    medium : str
        ``"cache"``, ``"text"`` or ``"own"``, which asks the sharer nothing.
    reason : str
    predicted_s : float
        Seconds until the answer, as predicted; 0.0 where nothing could be predicted.
    table : tuple of str
        The options that were compared, one line each.
    """

    receiver: str
    sharer: str
    medium: str
    reason: str
    predicted_s: float = 0.0
    table: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SharerOutcome:
    """How one sharer fared towards one receiver in one round of one batch.

    Parameters
    ----------
    query_id : str
    round : int
    receiver, sharer : str
        Names; `sharer` is the receiver itself for its own steps.
    medium : str
    status : SiteStatus
    payload_bytes : int
        Of what it shared; 0 if nothing came.
    seconds : float
        From asking to having it, all phases.
    error_code : str
        Of the typed error; empty if it shared. The text of an error is the site's own word:
        it is logged, and decides nothing.
    """

    query_id: str
    round: int
    receiver: str
    sharer: str
    medium: str
    status: SiteStatus
    payload_bytes: int = 0
    seconds: float = 0.0
    error_code: str = ""


@dataclass(frozen=True, kw_only=True)
class ReceiverAnswers:
    """The answers of one receiver, in the order of the questions.

    Parameters
    ----------
    name : str
    answers : tuple of str or None
        None where the receiver did not answer, and where answers are sealed to the querier.
    used : tuple of mapping of str to str
        For each question the sharers whose help the receiver used, with the medium. Empty:
        the receiver's own answer.
    answered : tuple of bool
        Whether there is an answer, be it sealed.
    error_codes : tuple of str
        For each question the code of what kept the receiver from answering; empty if nothing.
    """

    name: str
    answers: tuple[str | None, ...] = field(repr=False)
    used: tuple[Mapping[str, str], ...]
    answered: tuple[bool, ...]
    error_codes: tuple[str, ...]

    @property
    def refined(self) -> tuple[bool, ...]:
        """Whether anybody helped, for each question."""
        return tuple(bool(helpers) for helpers in self.used)


@dataclass(frozen=True, kw_only=True)
class RefineResult:
    """Answers of every receiver, and how they came about.

    Parameters
    ----------
    receivers : tuple of ReceiverAnswers
    outcomes : tuple of SharerOutcome
        One for each receiver, sharer and round of a batch.
    plans : tuple of PlannedMedium
    pairings : mapping of (receiver, sharer) to tuple of Pairing
        The pairs that communicated, and how.
    rounds : tuple of int
        Rounds run, for each batch.
    seconds : float
        Of all batches, without introductions.
    introduction_s : float
    request_bytes, reply_bytes : int
        Of all envelopes' sections: what the exchange carried, without headers.
    sealed : bool
        Whether the coordinator relayed answers that it cannot read.
    answer : RefineAnswer
        For the querier: `LanguageQuerier.open` reads it.

    Examples
    --------
    >>> alone = ReceiverAnswers(name="north", answers=("yes",), used=({},), answered=(True,),
    ...                         error_codes=("",))
    >>> result = RefineResult(receivers=(alone,), rounds=(1,), seconds=0.5)
    >>> result.answers["north"], result.degraded
    (('yes',), False)
    """

    receivers: tuple[ReceiverAnswers, ...]
    outcomes: tuple[SharerOutcome, ...] = ()
    plans: tuple[PlannedMedium, ...] = ()
    pairings: Mapping[tuple[str, str], tuple[Pairing, ...]] = field(default_factory=dict)
    rounds: tuple[int, ...] = ()
    seconds: float = 0.0
    introduction_s: float = 0.0
    request_bytes: int = 0
    reply_bytes: int = 0
    sealed: bool = False
    answer: RefineAnswer | None = field(default=None, repr=False)

    @property
    def answers(self) -> dict[str, tuple[str | None, ...]]:
        """Answers by receiver; None where there is none, or it is sealed."""
        return {each.name: each.answers for each in self.receivers}

    @property
    def n_questions(self) -> int:
        """Questions asked."""
        return len(self.receivers[0].answered) if self.receivers else 0

    @property
    def degraded(self) -> bool:
        """Whether a receiver did not answer, or a sharer that was asked did not help."""
        missing = any(not all(each.answered) for each in self.receivers)
        return missing or any(o.status is not SiteStatus.ANSWERED for o in self.outcomes)

    @property
    def failures(self) -> tuple[SharerOutcome, ...]:
        """What went wrong, by code."""
        return tuple(o for o in self.outcomes if o.status is not SiteStatus.ANSWERED)

    def summary(self) -> str:
        """Return a tree of what happened, for a log or a terminal: no question, no answer."""
        refined = sum(sum(each.refined) for each in self.receivers)
        total = self.n_questions * len(self.receivers)
        given = sum(sum(each.answered) for each in self.receivers)
        lines = [
            f"RefineResult: {self.n_questions} questions to {len(self.receivers)} receivers,"
            f" {self.seconds:.2f} s",
            f"├── answers: {given} of {total}, {refined} with help,"
            f" degraded: {'yes' if self.degraded else 'no'}",
            f"├── rounds: {', '.join(map(str, self.rounds))}",
            f"├── bytes: {self.request_bytes} of requests, {self.reply_bytes} of replies",
        ]
        for (receiver, sharer), kinds in sorted(self.pairings.items())[:_SHOWN]:
            lines.append(f"├── {sharer} → {receiver}: {', '.join(kinds)}")
        lines += [f"├── plan {p.sharer} → {p.receiver}: {p.reason}" for p in self.plans[:_SHOWN]]
        lines += [
            f"├── {o.status.value}: {o.sharer} → {o.receiver}: {o.error_code}"
            for o in self.failures[:_SHOWN]
        ]
        held = "sealed for the querier" if self.sealed else "read by the coordinator"
        lines.append(f"└── answers: {held}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON: no question, no answer."""
        return {
            "questions": self.n_questions,
            "seconds": self.seconds,
            "introduction_s": self.introduction_s,
            "degraded": self.degraded,
            "sealed": self.sealed,
            "rounds": list(self.rounds),
            "request_bytes": self.request_bytes,
            "reply_bytes": self.reply_bytes,
            "receivers": [
                {
                    "name": each.name,
                    "answered": list(each.answered),
                    "used": [dict(helpers) for helpers in each.used],
                    "error_codes": list(each.error_codes),
                }
                for each in self.receivers
            ],
            "pairings": [
                {"receiver": receiver, "sharer": sharer, "kinds": [k.value for k in kinds]}
                for (receiver, sharer), kinds in sorted(self.pairings.items())
            ],
            "plans": [asdict(plan) for plan in self.plans],
            "outcomes": [
                asdict(outcome) | {"status": outcome.status.value} for outcome in self.outcomes
            ],
        }
