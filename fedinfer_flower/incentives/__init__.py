"""Who earned what: contribution schemes, payment rules, and the ledger."""

from fedinfer_flower.incentives.base import (
    SCHEMES,
    AuditedAnswers,
    CoalitionSums,
    ContributionScheme,
    LinearScheme,
    PublicFacts,
    Sight,
    make_scheme,
)

__all__ = [
    "SCHEMES",
    "AuditedAnswers",
    "CoalitionSums",
    "ContributionScheme",
    "LinearScheme",
    "PublicFacts",
    "Sight",
    "make_scheme",
]
