"""Attacks on answers, one a file: for tests, and for users on their own federation.

An attack that succeeds shows a leak. One that fails proves nothing beyond itself.
"""

from fedinfer_flower.attacks.base import ATTACKS, Attack, AttackResult, Position
from fedinfer_flower.attacks.federation import TargetFederation
from fedinfer_flower.attacks.suite import markdown_table, run_suite

__all__ = [
    "ATTACKS",
    "Attack",
    "AttackResult",
    "Position",
    "TargetFederation",
    "markdown_table",
    "run_suite",
]
