"""What asking rows and passing on sealed jobs have in common."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from fedinfer_flower.errors import (
    FedInferError,
    NotEnoughNodesError,
    PolicyRefusedError,
    QuorumNotMetError,
)
from fedinfer_flower.privacy.base import make_protection
from fedinfer_flower.query import QueryReport, SiteOutcome, SiteStatus
from fedinfer_flower.serving.config import ModelConfig
from fedinfer_flower.strategies.result import InferenceResult
from fedinfer_flower.wire.directory import SiteCard
from fedinfer_flower.wire.identity import Identity

__all__ = ["cause_of", "check_least", "least_sites", "price_a_row", "signed_receipt"]


def least_sites(model: ModelConfig) -> int:
    """Return how many sites have to be there before a model can be asked."""
    least = max(model.min_sites, model.quorum)
    if model.kind != "classifier":
        return least
    return max(least, make_protection(model.protection, dict(model.protection_options)).min_cohort)


def check_least(model: ModelConfig, n_sites: int) -> None:
    """Refuse to ask too few sites.

    Raises
    ------
    NotEnoughNodesError
    """
    needed = least_sites(model)
    if n_sites < needed:
        raise NotEnoughNodesError(
            f"{n_sites} sites can be asked, {needed} are needed",
            hint="start the sites' SuperNodes; /v1/status says what they last answered",
        )


def cause_of(error: FedInferError, outcomes: Collection[SiteOutcome]) -> FedInferError:
    """Return why a query failed: the sites' policies, where it is they that kept the quorum away.

    The sites' own words stay with the operator: they say what is left of their limits.
    """
    missing = [o for o in outcomes if o.status is not SiteStatus.ANSWERED]
    refused = [o.name for o in missing if o.error_code == PolicyRefusedError.code]
    if not isinstance(error, QuorumNotMetError) or not refused or len(refused) < len(missing):
        return error
    return PolicyRefusedError(
        f"{len(refused)} of {len(outcomes)} sites refused the query by their policies"
        f" ({', '.join(sorted(refused)[:5])})",
        hint="another rule or protection, fewer rows, or later; /v1/status has the sites' words",
    )


def price_a_row(report: QueryReport, cards: Mapping[int, SiteCard]) -> dict[str, float]:
    """Return what each site in an answer asks for a row, by key id."""
    return {
        cards[int(site.site_id)].key_id: cards[int(site.site_id)].profile.price_per_query
        for site in report.answered
        if int(site.site_id) in cards
    }


def signed_receipt(result: InferenceResult, identity: Identity) -> bytes:
    """Return the receipt of a result with the gateway's signature; empty if there is none."""
    return b"" if result.receipt is None else result.receipt.signed_by(identity).to_bytes()
