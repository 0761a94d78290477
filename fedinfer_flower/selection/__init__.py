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
from fedinfer_flower.selection.cascade_learning import learn_cascade
from fedinfer_flower.selection.cascade_policy import CascadePolicy
from fedinfer_flower.selection.diversity_overlap import error_overlap, overlap_to_json
from fedinfer_flower.selection.history import SiteHistory
from fedinfer_flower.selection.plan import QueryPlan, plan_query
from fedinfer_flower.selection.sequential import SequentialAnswer
from fedinfer_flower.selection.sequential_selector import SequentialSelector

__all__ = [
    "SELECTORS",
    "AuditTally",
    "Candidate",
    "CascadePolicy",
    "QueryPlan",
    "Selection",
    "SelectionNeed",
    "Selector",
    "SequentialAnswer",
    "SequentialSelector",
    "SiteEvidence",
    "SiteHistory",
    "SiteRecord",
    "error_overlap",
    "learn_cascade",
    "make_selector",
    "overlap_to_json",
    "plan_query",
]
