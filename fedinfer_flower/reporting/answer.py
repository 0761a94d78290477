"""The first paragraph of the report: what came out, in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedinfer_flower.reporting.contents import (
    Row,
    chosen_protection,
    chosen_row,
    meter_reading,
)
from fedinfer_flower.reporting.formats import as_epsilon, as_interval, as_percent, number

__all__ = [
    "LIMITS",
    "answer_sentences",
    "limit_sentences",
    "meter_sentences",
    "visibility_sentences",
]

_IN_CLEAR = "The queries themselves travel in clear: sites and coordinator can read them."
_SEALED = (
    "The queries travelled sealed to the sites: a coordinator that follows the protocol relays "
    "bytes that it cannot read; the sites that are asked read the queries."
)
_ENCRYPTED = (
    "The queries travelled encrypted: without the querier's secret key, neither sites nor "
    "coordinator can read them."
)
_SHARES = (
    "The queries travelled as shares in clear: one site alone cannot read them, the coordinator "
    "that relays all shares can."
)
_SEALED_SHARES = (
    "The queries travelled as sealed shares: neither the coordinator nor one site alone can read "
    "them; two of the three sites that pool their shares can."
)
_POOLING = (
    "Under he, a querier and a coordinator who pool what they have can open every site's answer."
)
_MORE_POOLING = {
    "he+dp": "Under he+dp they open every site's answer with that site's share of the noise only.",
    "encrypted-query": "Under encrypted-query they can do so too.",
}
LIMITS = f"{_IN_CLEAR} {_POOLING}"
"""Said where queries travel in clear. Its second sentence is said in every report."""

_MASKED = ("masked", "Every site's vector is masked; their sum can be opened by the querier only.")
_MECHANISMS = {
    "secagg": _MASKED,
    "secagg+dp": _MASKED,
    "encrypted-query": (
        "encrypted quer",
        "The sites compute on encrypted queries, which they cannot read.",
    ),
    "mpc": (
        "compute",
        "Three sites compute together on shares; one share alone tells a site nothing.",
    ),
}
"""Name to a word and a sentence. What the coordinator sees may say it already: by the word."""


def _share(entry: Mapping[str, Any]) -> str:
    return f"{as_percent(entry['accuracy'])} ({as_interval(entry['low'], entry['high'])})"


def _joint_sentence(results: Mapping[str, Any], row: Row) -> str:
    sites = "1 site" if results["n_sites"] == 1 else f"{results['n_sites']} sites"
    protected = chosen_protection(results)
    how = f"protection: {protected['label']}" if protected else "no protection"
    rule = protected["rule"] if protected else results["rule"]
    return (
        f"Together, {sites} answered {as_percent(row.accuracy)} of {results['n_queries']} queries "
        f"on {results['dataset']} correctly (95 % interval "
        f"{as_interval(row.low, row.high)}; rule: {rule}; {how})."
    )


def _comparison(row: Row, best: Mapping[str, Any]) -> str:
    points = 100 * (number(row.accuracy) - number(best["accuracy"]))
    if number(row.low) > number(best["high"]):
        return f"The joint answer is {points:.1f} points above the best single site."
    if number(row.high) < number(best["low"]):
        return (
            f"The joint answer is {-points:.1f} points below the best single site: "
            "on these queries, asking that site alone would have been better."
        )
    return (
        "The intervals of the joint answer and of the best single site overlap: "
        "this run alone does not settle which of the two is better."
    )


def answer_sentences(results: Mapping[str, Any]) -> list[str]:
    """Say how good the joint answer is next to local-only, best site and central bound.

    Parameters
    ----------
    results : mapping
        Cleaned results.

    Returns
    -------
    sentences : list of str
        Plain text, not escaped.
    """
    row = chosen_row(results)
    best, central = results["best_site"], results["central"]
    joint = _joint_sentence(results, row) if row else "No joint answer was measured."
    sentences = [
        joint,
        f"Alone, the best site ({best['name']}) reaches {_share(best)} "
        f"and the mean site {_share(results['mean_site'])}.",
        f"The central bound, a model ({central['kind']}) trained on the data of all sites in one "
        f"place, reaches {_share(central)}.",
    ]
    if row:
        sentences.append(_comparison(row, best))
    if results["n_sites"] == 1:
        sentences.append("With a single site, the joint answer is that site's own.")
    return sentences


def _spending(entry: Mapping[str, Any], n_queries: int) -> str:
    return (
        f"One site spends epsilon {as_epsilon(entry['epsilon_per_query'])} a query and "
        f"{as_epsilon(entry['epsilon_total'])} over the {n_queries} queries of this run "
        f"(delta {as_epsilon(entry['delta'])})."
    )


def visibility_sentences(results: Mapping[str, Any]) -> list[str]:
    """Say what the coordinator sees under the protection of the run.

    `limit_sentences` goes with it.

    Parameters
    ----------
    results : mapping
        Cleaned results.

    Returns
    -------
    sentences : list of str
        Plain text, not escaped.
    """
    entry = chosen_protection(results)
    if entry is None:
        return [f"The protection {results['protection']} was not measured in this run."]
    seen = entry["coordinator_sees"].rstrip(".")
    sentences = [f"Under this protection the coordinator sees: {seen}."]
    if not entry["key_at_coordinator"]:
        word, sentence = _MECHANISMS.get(entry["name"], ("", ""))
        sentences += [sentence] if word not in seen else []
    if entry["epsilon_per_query"] is not None:
        sentences.append(_spending(entry, results["n_queries"]))
    if entry["key_at_coordinator"]:
        sentences.append(
            "In this run the coordinator held the secret key, so it could open every answer."
        )
    return sentences


def _query_limit(results: Mapping[str, Any]) -> str:
    entry = chosen_protection(results)
    if entry is not None and entry["key_at_coordinator"]:
        # Who holds the querier's key is the querier, and knows the queries.
        return _IN_CLEAR
    if results["protection"] == "encrypted-query":
        return _ENCRYPTED
    if results["protection"] == "mpc":
        return _SEALED_SHARES if results["sealed"] else _SHARES
    return _SEALED if results["sealed"] else _IN_CLEAR


def limit_sentences(results: Mapping[str, Any]) -> list[str]:
    """Say who can read the queries, and what pooling opens.

    Parameters
    ----------
    results : mapping
        Cleaned results.

    Returns
    -------
    sentences : list of str
        Fixed sentences of this module: no text of the results is in them.
    """
    more = _MORE_POOLING.get(results["protection"])
    return [_query_limit(results), _POOLING, *([more] if more else [])]


def meter_sentences(results: Mapping[str, Any]) -> list[str]:
    """Say what one site has spent of a cap, in numbers.

    Parameters
    ----------
    results : mapping
        Cleaned results.

    Returns
    -------
    sentences : list of str
        Plain text, not escaped; empty where no meter was read.
    """
    meter, reading = results["epsilon_meter"], meter_reading(results)
    if reading is None:
        return []
    queries = (
        "1 query costs" if reading.queries == 1 else f"{reading.queries} distinct queries cost"
    )
    spent = as_epsilon(reading.epsilon)
    sentences = [
        f"Under {meter['protection']} at epsilon {as_epsilon(meter['epsilon_per_query'])} a query, "
        f"{queries} one site epsilon {spent} in total, at delta {as_epsilon(meter['delta'])}."
    ]
    if reading.cap is None:
        return [*sentences, "There is no cap: every new query adds, without end."]
    cap = as_epsilon(reading.cap)
    if reading.is_over:
        sentences.append(
            f"That is over the cap of {cap}: a site whose budget has this cap refuses the query "
            "that would pass it."
        )
    else:
        share = f" ({as_percent(reading.epsilon / reading.cap)})" if reading.cap > 0 else ""
        sentences.append(f"That is {spent} of a cap of {cap}{share}.")
    if reading.covered is not None and reading.not_covered is not None:
        sentences.append(
            f"Of the points drawn, {reading.covered} queries fit under the cap, "
            f"{reading.not_covered} do not."
        )
    return sentences
