"""Which medium to use for one sharer: the best of quality minus price times seconds.

A medium is legal if it is in time and if sharer, receiver and querier all allow it. The
receiver's own answer is always legal. Every decision carries the table that it compared
and a sentence that says why.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.kv.latency import JITTER, UNKNOWN_SPEED, Speed, Workload, predicted_s
from fedinfer_flower.kv.link import UNKNOWN_LINK, Link, LinkEstimate
from fedinfer_flower.kv.media import Medium
from fedinfer_flower.kv.media_history import MediaHistory
from fedinfer_flower.kv.sharing_policy import PARTIES, SharingPolicy

__all__ = [
    "PARTIES",
    "Link",
    "LinkEstimate",
    "MediaHistory",
    "Medium",
    "Plan",
    "PlanRow",
    "Planner",
    "PlannerOptions",
    "SharingPolicy",
    "Speed",
    "Workload",
    "plan",
]


@dataclass(frozen=True, kw_only=True)
class PlannerOptions:
    """What time is worth, and how much better another medium must be.

    Parameters
    ----------
    price_per_s : float
        Quality that one second is worth; above 0. The default gives up one point of
        accuracy for a second. Without a price the planner waits any time for any gain.
    hysteresis : float
        A change of medium must gain more than this, so that noise in the measurements
        does not change the medium from question to question.
    jitter : float
        Factor on all remote time; at least 1.
    """

    price_per_s: float = 0.01
    hysteresis: float = 0.02
    jitter: float = JITTER

    def __post_init__(self) -> None:
        if not (math.isfinite(self.price_per_s) and self.price_per_s > 0.0):
            raise InvalidValueError(
                "price_per_s of a planner is positive",
                hint="at price 0 it spends the whole deadline on the smallest gain",
            )
        if not (math.isfinite(self.hysteresis) and self.hysteresis >= 0.0):
            raise InvalidValueError("hysteresis of a planner is not negative")
        if not (math.isfinite(self.jitter) and self.jitter >= 1.0):
            raise InvalidValueError("jitter of a planner is at least 1")


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One medium as the planner saw it; `why_not` is empty where it is legal."""

    medium: Medium
    predicted_s: float
    quality: float
    utility: float
    why_not: str = ""

    @property
    def legal(self) -> bool:
        """Whether time and all three policies allow the medium."""
        return not self.why_not


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A choice of medium, with what it was chosen from.

    Parameters
    ----------
    medium : Medium
    predicted_s, quality : float
    table : tuple of PlanRow
        All media compared, the own answer first.
    reason : str
        Why this one, and why not each other one.
    notes : tuple of str
        What had to be assumed.
    """

    medium: Medium
    predicted_s: float
    quality: float
    table: tuple[PlanRow, ...] = field(repr=False)
    reason: str = field(repr=False)
    notes: tuple[str, ...] = ()


def plan(
    media: Sequence[Medium],
    *,
    workload: Workload,
    quality: Mapping[str, float],
    policies: Mapping[str, SharingPolicy],
    deadline_s: float,
    sharer: Speed | None = None,
    receiver: Speed | None = None,
    link: Link | None = None,
    previous: str = "",
    options: PlannerOptions | None = None,
) -> Plan:
    """Choose a medium for one sharer.

    Parameters
    ----------
    media : sequence of Medium
        The own answer is added if it is not among them.
    workload : Workload
    quality : mapping of medium name to float
        Expected share of right answers, from `MediaHistory` or from a gate's evidence.
    policies : mapping of party to SharingPolicy
        Of all `PARTIES`; a party that is missing allows nothing.
    deadline_s : float
        Seconds left for this question.
    sharer, receiver, link : optional
        Measured; where None, a slow default is assumed and noted.
    previous : str
        Name of the medium used last with this sharer.
    options : PlannerOptions, optional

    Returns
    -------
    plan : Plan
        Always: the own answer is legal also after the deadline.

    Raises
    ------
    InvalidValueError
        If a medium has no quality, a name comes twice, or a party does not exist.

    Examples
    --------
    >>> work = Workload(sharer_prompt_tokens=64, receiver_prompt_tokens=64, answer_tokens=8)
    >>> chosen = plan([Medium.text()], workload=work, quality={"own": 0.4, "text": 0.9},
    ...               policies={}, deadline_s=60.0)
    >>> chosen.medium.name
    'own'
    >>> "the sharer does not allow text" in chosen.reason
    True
    """
    options = options or PlannerOptions()
    rows_of = _with_own(media)
    _check(rows_of, quality, policies, deadline_s)
    notes = _assumptions(sharer, receiver, link)
    rows = []
    for medium in rows_of:
        seconds = predicted_s(
            medium,
            workload=workload,
            sharer=sharer or UNKNOWN_SPEED,
            receiver=receiver or UNKNOWN_SPEED,
            link=link or UNKNOWN_LINK,
            jitter=options.jitter,
        )
        expected = quality[medium.name]
        rows.append(
            PlanRow(
                medium=medium,
                predicted_s=seconds,
                quality=expected,
                utility=expected - options.price_per_s * seconds,
                why_not=_why_not(medium, policies, seconds, deadline_s),
            )
        )
    best, stays = _best(rows, previous, options.hysteresis)
    return Plan(
        medium=best.medium,
        predicted_s=best.predicted_s,
        quality=best.quality,
        table=tuple(rows),
        reason=_reason(rows, best, stays=stays, options=options, notes=notes),
        notes=notes,
    )


class Planner:
    """Plans for many sharers over time: keeps history, links and the media used last.

    Not thread-safe: one coordinator's round at a time.

    Parameters
    ----------
    options : PlannerOptions, optional
    history : MediaHistory, optional
        May be shared with other receivers of the same model.

    Privacy
    -------
    Lives at the coordinator. Sizes, seconds and shares of right answers are kept per
    sharer; no question and no answer.

    Examples
    --------
    >>> planner = Planner()
    >>> planner.observe_transfer("north", size_bytes=100_000, seconds=0.1)
    >>> work = Workload(sharer_prompt_tokens=64, receiver_prompt_tokens=64, answer_tokens=8)
    >>> speed = Speed(prefill_s=0.1, prefill_s_per_token=0.001, decode_s_per_token=0.01)
    >>> everybody = dict.fromkeys(PARTIES, SharingPolicy.everything())
    >>> planner.choose("north", [Medium.text()], workload=work, policies=everybody,
    ...                deadline_s=60.0, sharer=speed, receiver=speed).medium.name
    'text'
    """

    def __init__(
        self, *, options: PlannerOptions | None = None, history: MediaHistory | None = None
    ) -> None:
        self.options = options or PlannerOptions()
        self.history = history or MediaHistory()
        self._links: dict[str, LinkEstimate] = {}
        self._previous: dict[str, str] = {}

    def observe_transfer(self, sharer: str, *, size_bytes: int, seconds: float) -> None:
        """Add a measured transfer from a sharer."""
        self._links.setdefault(sharer, LinkEstimate()).observe(
            size_bytes=size_bytes, seconds=seconds
        )

    def link(self, sharer: str) -> Link | None:
        """Return the measured link of a sharer; None if nothing was measured."""
        estimate = self._links.get(sharer)
        if estimate is None:
            return None
        speed = estimate.bytes_per_s
        return Link(up_bytes_per_s=speed, down_bytes_per_s=speed, rtt_s=estimate.rtt_s)

    def choose(
        self,
        sharer_name: str,
        media: Sequence[Medium],
        *,
        workload: Workload,
        policies: Mapping[str, SharingPolicy],
        deadline_s: float,
        sharer: Speed | None = None,
        receiver: Speed | None = None,
        quality: Mapping[str, float] | None = None,
    ) -> Plan:
        """Choose a medium for a sharer and remember the choice; see `plan`.

        `quality` replaces the measured quality of the media that it names.
        """
        rows = _with_own(media)
        expected = {m.name: self.history.quality(sharer_name, m) for m in rows}
        chosen = plan(
            rows,
            workload=workload,
            quality=expected | dict(quality or {}),
            policies=policies,
            deadline_s=deadline_s,
            sharer=sharer,
            receiver=receiver,
            link=self.link(sharer_name),
            previous=self._previous.get(sharer_name, ""),
            options=self.options,
        )
        self._previous[sharer_name] = chosen.medium.name
        return chosen


def _with_own(media: Sequence[Medium]) -> tuple[Medium, ...]:
    own = [m for m in media if m.kind == "own"] or [Medium.own()]
    return (*own, *(m for m in media if m.kind != "own"))


def _check(
    media: Sequence[Medium],
    quality: Mapping[str, float],
    policies: Mapping[str, SharingPolicy],
    deadline_s: float,
) -> None:
    names = [m.name for m in media]
    if len(set(names)) != len(names) or sum(m.kind == "own" for m in media) > 1:
        raise InvalidValueError("two media with the same name, or two own answers")
    for name in names:
        if not 0.0 <= quality.get(name, -1.0) <= 1.0:
            raise InvalidValueError(f"medium {name!r} has no expected quality in [0, 1]")
    if set(policies) - set(PARTIES):
        raise InvalidValueError(f"policies are of {', '.join(PARTIES)}")
    if math.isnan(deadline_s):
        raise InvalidValueError("deadline_s is a number of seconds")


def _assumptions(
    sharer: Speed | None, receiver: Speed | None, link: Link | None
) -> tuple[str, ...]:
    """Return what is not known, and what is assumed in its place."""
    notes = [
        f"the {who}'s speed is unknown: assumed {UNKNOWN_SPEED.decode_s_per_token:g} s a token"
        for who, speed in (("sharer", sharer), ("receiver", receiver))
        if speed is None
    ]
    if link is None:
        notes.append(
            f"the link is unknown: assumed {UNKNOWN_LINK.up_bytes_per_s:,.0f} bytes/s"
            f" and {UNKNOWN_LINK.rtt_s:g} s a request"
        )
    return tuple(notes)


def _why_not(
    medium: Medium, policies: Mapping[str, SharingPolicy], seconds: float, deadline_s: float
) -> str:
    if medium.kind == "own":
        return ""
    nothing = SharingPolicy()
    reasons = [
        f"the {who} {why}" for who in PARTIES if (why := policies.get(who, nothing).why_not(medium))
    ]
    if seconds > deadline_s:
        reasons.append(f"{seconds:.2f} s is later than the deadline of {deadline_s:.2f} s")
    return "; ".join(reasons)


def _best(rows: Sequence[PlanRow], previous: str, hysteresis: float) -> tuple[PlanRow, bool]:
    """Return the row chosen, and whether it only stays because the gain is too small."""
    legal = [row for row in rows if row.legal]
    best = max(legal, key=lambda row: (row.utility, -row.predicted_s))
    for row in legal:
        if row.medium.name == previous and row is not best:
            stays = best.utility - row.utility <= hysteresis
            return (row, True) if stays else (best, False)
    return best, False


def _reason(
    rows: Sequence[PlanRow],
    best: PlanRow,
    *,
    stays: bool,
    options: PlannerOptions,
    notes: tuple[str, ...],
) -> str:
    because = (
        f"kept from the last question, no other gains more than {options.hysteresis:g}"
        if stays
        else f"the best of quality less {options.price_per_s:g} a second"
    )
    parts = [f"{best.medium.name} ({best.quality:.2f} in {best.predicted_s:.2f} s) is {because}."]
    others = [
        f"{row.medium.name} ({row.quality:.2f} in {row.predicted_s:.2f} s): "
        + (row.why_not or f"worth {row.utility:.3f} against {best.utility:.3f}")
        for row in rows
        if row is not best
    ]
    if others:
        parts.append("Not chosen: " + "; ".join(others) + ".")
    if notes:
        parts.append("Assumed: " + "; ".join(notes) + ".")
    return " ".join(parts)
