"""What the rewards section says in words and money."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedinfer_flower.reporting.formats import as_percent

__all__ = ["as_credits", "reward_sentences"]

_MICRO = 1_000_000


def as_credits(micro_credits: int) -> str:
    """Write whole micro-credits as credits, to the last digit.

    Examples
    --------
    >>> as_credits(86256), as_credits(-540000), as_credits(0)
    ('0.086256', '-0.540000', '0.000000')
    """
    whole, part = divmod(abs(int(micro_credits)), _MICRO)
    return f"{'-' if micro_credits < 0 else ''}{whole}.{part:06d}"


def reward_sentences(results: Mapping[str, Any]) -> list[str]:
    """Return what the settlement came to, for people.

    Parameters
    ----------
    results : mapping
        Cleaned results with ``rewards``.
    """
    rewards = results["rewards"]
    paid = next(split for split in rewards["splits"] if split["key"] == "paid")
    said = [
        f"{rewards['n_audits']} audits with labels that the querier knew were mixed among"
        f" {rewards['n_queries']} queries, and settled by scheme {rewards['scheme']!r} from one"
        f" weighted sum a site. The fee of {as_credits(rewards['fee'])} credits was split in"
        f" proportion to what is above 0, of which the ledger paid out"
        f" {as_credits(sum(site['paid'] for site in rewards['sites']))}.",
        f"The order of pay agrees with that of labelled Shapley values to a rank correlation of"
        f" {paid['spearman']:.2f}.",
    ]
    riders = [site for site in rewards["sites"] if site["is_free_rider"]]
    if riders:
        others = {
            split["key"]: split["rider_share"]
            for split in rewards["splits"]
            if split["rider_share"] is not None
        }
        said.append(
            f"The free rider, right on {as_percent(riders[0]['accuracy'])} of the rows by chance,"
            f" gets {as_percent(paid['rider_share'])} of the pot, where an equal split would give"
            f" it {as_percent(others.get('equal'))}."
        )
    return said
