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

__all__ = [
    "SELECTORS",
    "AuditTally",
    "Candidate",
    "Selection",
    "SelectionNeed",
    "Selector",
    "SiteEvidence",
    "SiteRecord",
    "make_selector",
]
