"""The first paragraph of the report: what came out, in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedinfer_flower.reporting.contents import Row, chosen_protection, chosen_row
from fedinfer_flower.reporting.formats import as_interval, as_percent, number

__all__ = ["LIMITS", "answer_sentences", "visibility_sentences"]

LIMITS = (
    "The queries themselves travel in clear: sites and coordinator can read them. "
    "Under he, a querier and a coordinator who pool what they have can open every site's answer."
)
"""Said in every report, whatever the protection."""


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


def visibility_sentences(results: Mapping[str, Any]) -> list[str]:
    """Say what the coordinator sees under the protection of the run; `LIMITS` goes with it.

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
    if entry["key_at_coordinator"]:
        sentences.append(
            "In this run the coordinator held the secret key, so it could open every answer."
        )
    return sentences
