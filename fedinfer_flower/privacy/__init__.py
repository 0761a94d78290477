"""Protections of answers, one file each."""

from fedinfer_flower.privacy.base import PROTECTIONS, KeyPair, Protection, ScorePlan

__all__ = ["PROTECTIONS", "KeyPair", "Protection", "ScorePlan"]
