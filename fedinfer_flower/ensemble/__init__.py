"""Ensemble rules, one file each: pure NumPy, nothing of Flower."""

from fedinfer_flower.ensemble.base import (
    RULES,
    Disclosure,
    EnsembleRule,
    Evidence,
    ScoreKind,
    SiteContext,
    make_rule,
)

__all__ = [
    "RULES",
    "Disclosure",
    "EnsembleRule",
    "Evidence",
    "ScoreKind",
    "SiteContext",
    "make_rule",
]
