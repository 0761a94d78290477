"""People who cheat for pay, one kind a file: for tests, and for users on their own prices."""

from fedinfer_flower.attacks.cheating.base import (
    CHEATS,
    Cheat,
    Cheated,
    Knowledge,
    make_cheat,
)
from fedinfer_flower.attacks.cheating.settling import Settling, Stage

__all__ = ["CHEATS", "Cheat", "Cheated", "Knowledge", "Settling", "Stage", "make_cheat"]
