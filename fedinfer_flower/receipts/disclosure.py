"""Who can learn what about one site's answer, and about the query: one table for all uses.

The same lines stand in receipts, in reports and in the documentation, so that none of them
says more than another. They hold for parties as described, with the code of this release
at every role; what a site's operator does with its own answer is the operator's affair.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from fedinfer_flower.errors import EnvelopeError, InvalidValueError, UnknownNameError
from fedinfer_flower.receipts.disclosure_texts import (
    ANSWER,
    EVERY,
    EVIDENCE,
    IN_CLEAR,
    QUERY,
    UNLESS_PINNED,
    Party,
)
from fedinfer_flower.wire import fields as read
from fedinfer_flower.wire.envelope import Json

__all__ = [
    "MODES",
    "DisclosureLine",
    "disclosure_table",
    "disclosures",
    "query_table",
    "require_mode",
]

MODES: Final = tuple(name for name in ANSWER if " " not in name)
"""Modes that the table covers."""

_WITH_KEY: Final = frozenset(MODES) - {"plain", "dp", "split"}
_SUBJECTS: Final = ("answer", "query")


@dataclass(frozen=True, kw_only=True)
class DisclosureLine:
    """One cell of the table.

    Parameters
    ----------
    about : str
        ``"answer"``: one site's answer; ``"query"``: the rows that were asked.
    party : str
        Who.
    learns : str
        What, in words.
    """

    about: str
    party: str
    learns: str

    def __post_init__(self) -> None:
        if self.about not in _SUBJECTS:
            raise InvalidValueError(f"a disclosure is about one of {', '.join(_SUBJECTS)}")
        # They end in terminals, and in a receipt they are its author's words.
        if not (self.party.isprintable() and self.learns.isprintable()):
            raise InvalidValueError("a disclosure is of printable characters")

    def to_dict(self) -> dict[str, Json]:
        """Return plain values for JSON."""
        return {"about": self.about, "party": self.party, "learns": self.learns}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Json]) -> DisclosureLine:
        """Read what `to_dict` wrote.

        Raises
        ------
        EnvelopeError
            If it is something else.
        """
        read.exactly(plain, "about", "party", "learns")
        try:
            return cls(
                about=read.text(plain, "about", max_chars=16),
                party=read.text(plain, "party"),
                learns=read.text(plain, "learns", max_chars=1000),
            )
        except InvalidValueError as exc:
            raise EnvelopeError(f"a disclosure is not valid: {exc.message}") from None


def require_mode(mode: str) -> None:
    """Refuse a protection about which nothing is written down.

    Raises
    ------
    UnknownNameError
        Naming those that are.
    """
    if mode not in MODES:
        raise UnknownNameError(
            f"no disclosures are written down for protection {mode[:64]!r}",
            hint=f"known: {', '.join(MODES)}",
        )


def disclosures(
    mode: str, *, sealed: bool = False, options: Mapping[str, object] | None = None
) -> tuple[DisclosureLine, ...]:
    """Return who can learn what under a mode, as lines in a fixed order.

    Parameters
    ----------
    mode : str
        One of `MODES`: the name of a protection, or ``"encrypted-query"``, ``"mpc"``,
        ``"split"``.
    sealed : bool
        Whether the query was sealed to the sites, so that the coordinator relays bytes
        that it cannot read.
    options : mapping, optional
        Options that change the table: ``self_mask`` of `secagg`, ``epsilon`` of the query
        under `split`, ``allow_coordinator_key``, and ``evidence``, the form of second copies
        for a settlement. Others are ignored.

    Raises
    ------
    UnknownNameError
        If nothing is written down for the mode.

    Examples
    --------
    >>> lines = disclosures("secagg", sealed=True)
    >>> lines[2].party, lines[2].learns[:22]
    ('coordinator and querier pooling', 'the sum of the answers')
    >>> [line.party for line in lines if line.about == "query"]
    ['coordinator alone', 'active coordinator', 'sites that are asked']
    """
    require_mode(mode)
    given = dict(options or {})
    answer = dict(ANSWER[mode])
    for variant in _variants(mode, sealed=sealed, options=given):
        answer |= ANSWER.get(f"{mode} {variant}", {})
    query = dict(QUERY[_query_variant(mode, sealed=sealed, options=given)])
    if given.get("allow_coordinator_key") is True and mode in _WITH_KEY:
        # One party is coordinator and querier: alone it is what both are together.
        answer[Party.COORDINATOR] = answer[Party.QUERIER] = answer[Party.POOLED]
        answer[Party.ACTIVE_COORDINATOR] = answer[Party.ACTIVE_POOLED]
        query[Party.COORDINATOR] = query[Party.ACTIVE_COORDINATOR] = IN_CLEAR
    for party, text in EVIDENCE.get(str(given.get("evidence", "")), {}).items():
        if not answer[party].startswith(EVERY):
            answer[party] = f"{answer[party]}; {text}"
    lines = [
        DisclosureLine(about="answer", party=party.value, learns=_by_sealing(answer[party], sealed))
        for party in Party
    ]
    lines += [DisclosureLine(about="query", party=str(p), learns=text) for p, text in query.items()]
    return tuple(lines)


def disclosure_table(*, sealed: bool = False) -> str:
    """Return who learns what about one site's answer, in Markdown: a row a mode.

    Examples
    --------
    >>> disclosure_table().splitlines()[0].split(" | ")[1]
    'coordinator alone'
    """
    return _table({(mode,): mode for mode in MODES}, about="answer", sealed=sealed)


def query_table(*, sealed: bool = False) -> str:
    """Return who learns what about the query, in Markdown: a row for modes that agree.

    Examples
    --------
    >>> query_table().splitlines()[0].split(" | ")[2]
    'active coordinator'
    """
    same: dict[str, list[str]] = {}
    for mode in MODES:
        same.setdefault(_query_variant(mode, sealed=sealed, options={}), []).append(mode)
    rows = {tuple(modes): modes[0] for modes in same.values()}
    return _table(rows, about="query", sealed=sealed)


def _table(rows: Mapping[tuple[str, ...], str], *, about: str, sealed: bool) -> str:
    """Return a table with a row for each group of modes, told by one of them."""
    cells: list[list[str]] = []
    for group, mode in rows.items():
        lines = [line for line in disclosures(mode, sealed=sealed) if line.about == about]
        if not cells:
            cells = [["", *(line.party for line in lines)], ["---"] * (len(lines) + 1)]
        cells.append([", ".join(f"`{m}`" for m in group), *(line.learns for line in lines)])
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _variants(name: str, *, sealed: bool, options: Mapping[str, object]) -> Iterator[str]:
    if options.get("self_mask") is True:
        yield "self-mask"
    if options.get("allow_coordinator_key") is True:
        yield "coordinator key"
    if sealed and name in ("plain", "dp", "mpc"):
        yield "sealed"


def _query_variant(name: str, *, sealed: bool, options: Mapping[str, object]) -> str:
    if name == "encrypted-query":
        return name
    base = name if name in QUERY else ""
    if name == "split" and _has_epsilon(options):
        base = "split noise"
    return f"{base} sealed".strip() if sealed else base


def _has_epsilon(options: Mapping[str, object]) -> bool:
    value = options.get("epsilon", 0.0)
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0.0


def _by_sealing(text: str, sealed: bool) -> str:
    # Who may ask is checked where a query arrives sealed and signed, and not otherwise.
    if sealed:
        return text
    return text.replace(UNLESS_PINNED, "")
