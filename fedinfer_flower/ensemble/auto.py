"""Pick a rule from what the sites agree to say about themselves; no rule of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fedinfer_flower.ensemble.base import EnsembleRule
from fedinfer_flower.ensemble.class_share import ClassShare
from fedinfer_flower.ensemble.entropy_weighted import EntropyWeighted
from fedinfer_flower.ensemble.majority_vote import MajorityVote
from fedinfer_flower.ensemble.mean_probability import MeanProbability
from fedinfer_flower.ensemble.open_set import OpenSet
from fedinfer_flower.ensemble.open_set_class_share import OpenSetClassShare
from fedinfer_flower.query import CountsKind, SiteProfile

__all__ = ["AUTO_CAP", "pick_rule"]

AUTO_CAP = 0.5
"""Cap of the entropy weight: beyond a toss-up between two classes, being surer adds no
weight. The weight is self-declared, and overconfidence is how models err most."""


def pick_rule(
    profiles: Sequence[SiteProfile], protection: str, dp_mechanism: str | None
) -> tuple[EnsembleRule, str]:
    """Return the rule that suits these sites and this protection, and why in one sentence.

    Never picks a rule that needs what a site withholds or cannot measure, and never one
    that needs each site's own scores.

    Parameters
    ----------
    profiles : sequence of SiteProfile
        Of the sites that will be asked.
    protection : str
        Registered name; one of whose parts ``dp`` is adds noise.
    dp_mechanism : str, optional
        The mechanism that adds the noise; None without noise.

    Examples
    --------
    >>> profiles = [SiteProfile(name="a", classes=("x", "y"), calibrated=True)]
    >>> rule, reason = pick_rule(profiles, "secagg", None)
    >>> rule
    EntropyWeighted(cap=0.5)
    >>> reason
    'Not all sites say which classes they know, but all are calibrated: surer ones count more.'
    """
    familiar = bool(profiles) and all(profile.familiarity for profile in profiles)
    if dp_mechanism is not None or "dp" in re.split("[+-]", protection):
        if familiar and dp_mechanism != "randomised-response" and _uneven(profiles):
            return OpenSet(), (
                "The protection adds noise, the sites know different classes, and all can tell"
                " unfamiliar queries: those who cannot know stay silent."
            )
        return MajorityVote(), "The protection adds noise, and votes lose the least by noise."
    if profiles and all(p.counts_kind is not CountsKind.WITHHELD for p in profiles):
        counted = all(profile.counts_kind is CountsKind.COUNTS for profile in profiles)
        shared = "share class counts" if counted else "say which classes they know"
        if familiar:
            return OpenSetClassShare(), (
                f"All sites {shared} and can tell unfamiliar queries,"
                " so each counts for what it has seen."
            )
        return ClassShare(), f"All sites {shared}, so each counts for the classes it has seen."
    if familiar:
        return OpenSet(), (
            "Not all sites say which classes they know, but all can tell unfamiliar queries:"
            " each counts for queries like its own data."
        )
    if profiles and all(profile.calibrated for profile in profiles):
        return EntropyWeighted(cap=AUTO_CAP), (
            "Not all sites say which classes they know, but all are calibrated:"
            " surer ones count more."
        )
    return MeanProbability(), (
        "Not all sites say which classes they know, and not all are calibrated: all count alike."
    )


def _uneven(profiles: Sequence[SiteProfile]) -> bool:
    """Return whether some site lacks a class that another one knows, as far as they say."""
    known = [
        {name for name, count in zip(p.classes, p.class_counts or (), strict=False) if count > 0}
        if p.class_counts is not None
        else set(p.classes)
        for p in profiles
    ]
    return any(classes != known[0] for classes in known)
