"""Introductions of language sites, kept between the jobs of a run."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from flwr.serverapp import Grid

from fedinfer_flower.errors import NotEnoughNodesError, UntrustedKeyError
from fedinfer_flower.strategies.refine_onboarding import LanguageSites, introduce
from fedinfer_flower.wire.envelope import WireLimits
from fedinfer_flower.wire.pins import Pins

__all__ = ["LIMITS", "KnownSites"]

LIMITS: Final = WireLimits(max_payload_bytes=64 << 20)
_FRESH_S: Final = 300.0

log = logging.getLogger("fedinfer_flower.gateway")


class KnownSites:
    """The signed language cards of a run's sites; collected anew when they may be stale.

    They are where the run is another one, nodes came or went, some time passed, or somebody
    called `forget` because an exchange failed.

    Parameters
    ----------
    fresh_s : float
        Seconds after which sites introduce themselves again: cards say what a site shares,
        and its operator may have changed that.
    clock : callable
        Monotonic seconds.

    Attributes
    ----------
    times_collected : int

    Privacy
    -------
    What is kept is what the sites show anybody who may ask them. A stale card costs a
    refused exchange and no secret: sites check every request by their policy of the moment.
    """

    def __init__(
        self, *, fresh_s: float = _FRESH_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._fresh_s, self._clock = fresh_s, clock
        self._lock = threading.Lock()
        self._found: LanguageSites | None = None
        self._of: tuple[int, frozenset[int]] = (0, frozenset())
        self._found_at = 0.0
        self.times_collected = 0

    def get(
        self,
        grid: Grid,
        run_id: int,
        *,
        timeout_s: float,
        at_least: int = 1,
        pins: Pins | None = None,
    ) -> LanguageSites:
        """Return the sites that are pinned, or all; they introduce themselves if need be.

        Raises
        ------
        NotEnoughNodesError
            If fewer than `at_least` have a language model to show.
        """
        with self._lock:
            nodes = frozenset(grid.get_node_ids())
            found = self._found
            stale = self._clock() - self._found_at > self._fresh_s
            if found is None or stale or self._of != (run_id, nodes):
                found = introduce(
                    grid, sorted(nodes), run_id=run_id, timeout_s=timeout_s, limits=LIMITS
                )
                found = _known(found, pins)
                self._found, self._of, self._found_at = found, (run_id, nodes), self._clock()
                self.times_collected += 1
            if len(found.sites) < max(1, at_least):
                self._found = None
                raise NotEnoughNodesError(
                    f"{len(found.sites)} of {len(nodes)} sites show a language model,"
                    f" {max(1, at_least)} are needed",
                    hint="sites answer with LanguageMod: [language] in their policy",
                )
            return found

    def forget(self) -> None:
        """Let the next job collect the cards anew."""
        with self._lock:
            self._found = None


def _known(found: LanguageSites, pins: Pins | None) -> LanguageSites:
    """Leave out sites that the gateway's operator does not know."""
    if pins is None:
        return found
    kept = []
    for site in found.sites:
        try:
            pins.require_site(site.card.name, site.card.key_id)
        except UntrustedKeyError as exc:
            log.warning("%s", exc)
        else:
            kept.append(site)
    return dataclasses.replace(found, sites=tuple(kept))
