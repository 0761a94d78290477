"""Whom to ask: one file per selector, eligibility gates in front of them."""

from fedinfer_flower.selection.base import (
    SELECTORS,
    Selection,
    SelectionNeed,
    Selector,
    SiteEvidence,
    make_selector,
)
from fedinfer_flower.selection.candidate import AuditTally, Candidate, SiteRecord
from fedinfer_flower.selection.history import SiteHistory
from fedinfer_flower.selection.plan import QueryPlan, plan_query

__all__ = [
    "SELECTORS",
    "AuditTally",
    "Candidate",
    "QueryPlan",
    "Selection",
    "SelectionNeed",
    "Selector",
    "SiteEvidence",
    "SiteHistory",
    "SiteRecord",
    "make_selector",
    "plan_query",
]
