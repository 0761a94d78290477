"""What a report is made of: the keys of a result, and rows that table and plot share."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.reporting.formats import number

__all__ = [
    "FEDSEI_MARK",
    "KEYS",
    "MeterReading",
    "Row",
    "chosen_protection",
    "chosen_row",
    "clean",
    "epsilons_of",
    "learning_groups",
    "meter_reading",
    "points_by_protection",
    "summary_rows",
]

FEDSEI_MARK = "†"

KEYS = frozenset(
    {
        *("title", "dataset", "seed", "alpha", "n_sites", "classes", "n_queries", "command"),
        *("versions", "seconds_total", "rule", "rule_reason", "protection", "sites"),
        *("best_site", "mean_site", "central", "rules", "protections", "by_alpha"),
        *("reliability", "examples", "warnings"),
        *("by_epsilon", "epsilon_reference", "epsilon_meter", "who_learns", "sealed"),
    }
)

# They reverse the reading order of whatever follows them, in a page and in a terminal.
_BIDI_CONTROLS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

_ABOUT = {"answer": "one site's answer", "query": "the query"}

Group = Literal["site", "baseline", "rule", "joint", "bound"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured way to answer the queries.

    Parameters
    ----------
    group : str
        Kind of row: "site", "baseline", "rule", "joint" or "bound".
    label : str
        Name for people.
    accuracy, low, high : float, optional
        Share of right answers and its 95 % interval.
    seconds, bytes_per_query : float, optional
        Cost; None where nothing is sent.
    epsilon_per_query, epsilon_total : float, optional
        Differential privacy spent; None where no noise is added.
    short : str
        Name where room is scarce; empty where it is the label.
    chosen : bool
        Whether this is the rule, or the rule and protection, of the run.
    """

    group: Group
    label: str
    accuracy: float | None
    low: float | None
    high: float | None
    seconds: float | None = None
    bytes_per_query: float | None = None
    epsilon_per_query: float | None = None
    epsilon_total: float | None = None
    short: str = ""
    chosen: bool = False


def _clean_text(text: str) -> str:
    return "".join(
        "\N{REPLACEMENT CHARACTER}"
        if char in _BIDI_CONTROLS
        or (unicodedata.category(char) in {"Cc", "Cs"} and char not in "\n\t")
        else char
        for char in text
    )


def _clean_value(value: Any) -> Any:
    if isinstance(value, str):
        return _clean_text(value)
    if isinstance(value, Mapping):
        return {_clean_value(key): _clean_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean_value(item) for item in value]
    return value


def clean(results: Mapping[str, Any]) -> dict[str, Any]:
    """Check the keys of a result and copy it without control characters.

    Parameters
    ----------
    results : mapping
        What a run wrote.

    Returns
    -------
    results : dict
        A copy; characters that no terminal, XML or UTF-8 file takes are replaced.

    Raises
    ------
    InvalidValueError
        If a key is missing.
    """
    missing = sorted(KEYS - results.keys())
    if missing:
        raise InvalidValueError(
            f"the results lack {', '.join(missing)}",
            hint="write the report with the release that made the results",
        )
    cleaned: dict[str, Any] = _clean_value(results)
    return cleaned


def _interval(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: entry[key] for key in ("accuracy", "low", "high")}


def _cost(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: entry[key] for key in ("seconds", "bytes_per_query")}


def _protection_row(entry: Mapping[str, Any], chosen: bool) -> Row:
    return Row(
        group="joint",
        label=f"{entry['label']}: {entry['rule']}",
        short=entry["label"],
        **_interval(entry),
        **_cost(entry),
        epsilon_per_query=entry["epsilon_per_query"],
        epsilon_total=entry["epsilon_total"],
        chosen=chosen,
    )


def summary_rows(results: Mapping[str, Any]) -> list[Row]:
    """Return every site, the baselines, the rules, the protections and the bound, in order.

    Parameters
    ----------
    results : mapping
        Cleaned results.

    Returns
    -------
    rows : list of Row
        Sites first, the central bound last.
    """
    best, central = results["best_site"], results["central"]
    rows = [Row(group="site", label=site["name"], **_interval(site)) for site in results["sites"]]
    rows.append(Row(group="baseline", label="mean site", **_interval(results["mean_site"])))
    rows.append(Row(group="baseline", label=f"best site: {best['name']}", **_interval(best)))
    rows += [
        Row(
            group="rule",
            label=f"{rule['name']} {FEDSEI_MARK}" if rule["fedsei"] else rule["name"],
            **_interval(rule),
            **_cost(rule),
            chosen=rule["name"] == results["rule"],
        )
        for rule in results["rules"]
    ]
    in_use = chosen_protection(results)
    rows += [_protection_row(entry, entry is in_use) for entry in results["protections"]]
    label = f"central bound: {central['kind']}"
    rows.append(Row(group="bound", label=label, **_interval(central)))
    return rows


def chosen_protection(results: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the entry of the protection that the run used, None if it was not measured."""
    named = [entry for entry in results["protections"] if entry["name"] == results["protection"]]
    same_rule = [entry for entry in named if entry["rule"] == results["rule"]]
    found: list[Mapping[str, Any]] = same_rule or named
    return found[0] if found else None


def chosen_row(results: Mapping[str, Any]) -> Row | None:
    """Return the row of the joint answer: protected, else in clear, else None."""
    chosen = [row for row in summary_rows(results) if row.chosen]
    joint = [row for row in chosen if row.group == "joint"]
    return next(iter(joint or chosen), None)


def points_by_protection(results: Mapping[str, Any]) -> dict[str, dict[float, Mapping[str, Any]]]:
    """Return the accuracies of `by_epsilon`: protection to epsilon to point, in order."""
    lines: dict[str, dict[float, Mapping[str, Any]]] = {}
    for point in results["by_epsilon"]:
        lines.setdefault(point["protection"], {})[number(point["epsilon"])] = point
    return lines


def epsilons_of(results: Mapping[str, Any]) -> list[float]:
    """Return every epsilon of `by_epsilon` once, the smallest first."""
    return sorted({number(point["epsilon"]) for point in results["by_epsilon"]})


def learning_groups(results: Mapping[str, Any]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Return the lines of `who_learns` by what they are about, named for people."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for line in results["who_learns"]:
        groups.setdefault(_ABOUT.get(line["about"], line["about"]), []).append(line)
    return list(groups.items())


@dataclass(frozen=True, kw_only=True)
class MeterReading:
    """What one site has spent of a cap after so many distinct queries.

    Parameters
    ----------
    queries : int
        Distinct rows answered.
    epsilon : float
        Spent on them.
    cap : float, optional
        None where there is none.
    covered, not_covered : int, optional
        Most queries of the results that fit under the cap, fewest that do not; None where
        there is no such point.

    Examples
    --------
    >>> over = MeterReading(queries=9, epsilon=8.0, cap=2.0, covered=1, not_covered=9)
    >>> over.is_over, over.filled, over.cap_at
    (True, 1.0, 0.25)
    """

    queries: int
    epsilon: float
    cap: float | None
    covered: int | None
    not_covered: int | None

    @property
    def is_over(self) -> bool:
        """Whether more than the cap is spent."""
        return self.cap is not None and self.epsilon > self.cap

    @property
    def filled(self) -> float:
        """Part of the bar, in [0, 1], that is spent. The bar ends at the larger of the two."""
        return self._part(self.epsilon)

    @property
    def cap_at(self) -> float:
        """Place of the cap on the bar, in [0, 1]."""
        return self._part(number(self.cap))

    def _part(self, value: float) -> float:
        whole = max(self.epsilon, number(self.cap))
        if value >= whole:
            return 1.0 if whole > 0 else 0.0
        return value / whole


def meter_reading(results: Mapping[str, Any]) -> MeterReading | None:
    """Read the epsilon meter at the queries of the run.

    Parameters
    ----------
    results : mapping
        Cleaned results.

    Returns
    -------
    reading : MeterReading, optional
        At the last point that has no more queries than the run, else at the first. None
        where nothing was measured.
    """
    meter = results["epsilon_meter"]
    points = sorted(
        (
            (int(point["queries"]), number(point["epsilon"]))
            for point in (meter["points"] if meter else ())
        ),
    )
    points = [point for point in points if not math.isnan(point[1])]
    if not points:
        return None
    asked = [point for point in points if point[0] <= results["n_queries"]]
    queries, epsilon = asked[-1] if asked else points[0]
    cap = None if meter["cap"] is None else float(meter["cap"])
    fits = [] if cap is None else [n for n, spent in points if spent <= cap]
    over = [] if cap is None else [n for n, spent in points if spent > cap]
    return MeterReading(
        queries=queries,
        epsilon=epsilon,
        cap=cap,
        covered=max(fits, default=None),
        not_covered=min(over, default=None),
    )
