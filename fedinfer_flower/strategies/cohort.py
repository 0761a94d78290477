"""Who is asked."""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Mapping

from fedinfer_flower.errors import FedInferError, QuorumNotMetError
from fedinfer_flower.wire.directory import SiteCard

__all__ = ["choose_cohort"]


def choose_cohort(
    cards: Mapping[int, SiteCard],
    failures: Mapping[int, FedInferError],
    *,
    fraction: float,
    at_least: int,
    seed: int | None = None,
) -> dict[int, SiteCard]:
    """Return the sites to ask: all, or a random part drawn once a run.

    Once a run and not once a batch: the difference of two overlapping cohorts' answers
    to one query would single out a site.

    Raises
    ------
    QuorumNotMetError
        If fewer than `at_least` sites were onboarded.
    """
    if len(cards) < at_least:
        reasons = "; ".join(f"{n}: {e.code} {e.message}" for n, e in failures.items())
        raise QuorumNotMetError(
            f"{len(cards)} sites can answer, {at_least} are needed ({reasons or 'none failed'})",
            hint="start more sites, or mend those named",
        )
    wanted = max(math.ceil(fraction * len(cards)), at_least)
    if wanted >= len(cards):
        return dict(cards)
    key = secrets.randbits(63) if seed is None else seed

    def lot(node_id: int) -> bytes:
        return hashlib.sha256(f"cohort {key} {node_id}".encode()).digest()

    return {node_id: cards[node_id] for node_id in sorted(sorted(cards, key=lot)[:wanted])}
