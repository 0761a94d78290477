"""Protections of answers, one file each."""

from fedinfer_flower.privacy.base import (
    PROTECTIONS,
    KeyPair,
    Protection,
    ScorePlan,
    make_protection,
)
from fedinfer_flower.privacy.legality import legality_matrix, refusal, require_legal

__all__ = [
    "PROTECTIONS",
    "KeyPair",
    "Protection",
    "ScorePlan",
    "legality_matrix",
    "make_protection",
    "refusal",
    "require_legal",
]
