"""Sites with language models introduce themselves: who there is, and what each will share."""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass, replace

from flwr.serverapp import Grid

from fedinfer_flower.errors import BindingError, FedInferError, SiteFailedError
from fedinfer_flower.strategies.refine_mailbox import Ask, Letter, Mailbox
from fedinfer_flower.wire.actions import INTRODUCE
from fedinfer_flower.wire.envelope import DEFAULT_LIMITS, Envelope, Kind, WireLimits
from fedinfer_flower.wire.language_card import LanguageCard, read_language_card

__all__ = ["LanguageSite", "LanguageSites", "introduce"]

log = logging.getLogger("fedinfer_flower.coordinator")

_POLL_S = 0.005


@dataclass(frozen=True, kw_only=True)
class LanguageSite:
    """A site that introduced itself.

    Parameters
    ----------
    node_id : int
    name : str
        As in its card; with the start of its key id where two sites have one name.
    card : LanguageCard
    seconds : float
        That the introduction took, there and back: the first sign of how far away it is.
    """

    node_id: int
    name: str
    card: LanguageCard
    seconds: float

    @property
    def key_id(self) -> str:
        """Fingerprint of the site's keys."""
        return self.card.key_id


@dataclass(frozen=True, kw_only=True)
class LanguageSites:
    """All sites that introduced themselves, and those that failed to.

    Parameters
    ----------
    sites : tuple of LanguageSite
        In the order of their node ids.
    failures : dict of node id to FedInferError
    seconds : float
    """

    sites: tuple[LanguageSite, ...]
    failures: dict[int, FedInferError]
    seconds: float

    @property
    def names(self) -> tuple[str, ...]:
        """Names, in the order of the sites."""
        return tuple(site.name for site in self.sites)

    def named(self, name: str) -> LanguageSite:
        """Return a site by its name."""
        return next(site for site in self.sites if site.name == name)

    def by_key(self, key_id: str) -> LanguageSite | None:
        """Return a site by its key id."""
        return next((site for site in self.sites if site.key_id == key_id), None)


def introduce(
    grid: Grid,
    node_ids: list[int],
    *,
    run_id: int,
    timeout_s: float,
    limits: WireLimits = DEFAULT_LIMITS,
) -> LanguageSites:
    """Collect the language card of every node.

    A node that fails or is late is reported with its typed error and left out: so is one
    without a language model, which may take part in other queries of the run.
    """
    start = time.monotonic()
    mailbox: Mailbox[int] = Mailbox(grid, run_id=run_id, limits=limits, group_id="introduce")
    hello = Envelope(kind=Kind.HELLO, run_id=run_id)
    mailbox.push(
        [Ask(key=n, node_id=n, action=INTRODUCE, envelope=hello, ttl_s=timeout_s) for n in node_ids]
    )
    found: dict[int, LanguageSite] = {}
    failures: dict[int, FedInferError] = {}
    while time.monotonic() - start < timeout_s and len(found) + len(failures) < len(node_ids):
        came = 0
        for letter in mailbox.collect():
            came += 1
            try:
                found[letter.node_id] = _site(letter, run_id)
            except FedInferError as exc:
                failures[letter.node_id] = exc.at_site(str(letter.node_id))
        if not came:
            time.sleep(_POLL_S)
    for node_id in set(node_ids) - found.keys() - failures.keys():
        failures[node_id] = SiteFailedError(
            f"no language card within {timeout_s:g} s", site=str(node_id)
        )
    _refuse_shared_keys(found, failures)
    for error in failures.values():
        log.warning("%s", error)
    return LanguageSites(
        sites=_with_clear_names([found[n] for n in sorted(found)]),
        failures=failures,
        seconds=time.monotonic() - start,
    )


def _site(letter: Letter[int], run_id: int) -> LanguageSite:
    if letter.envelope is None:
        raise letter.error or SiteFailedError("a node answered nothing")
    card = read_language_card(letter.envelope, run_id=run_id, sender=letter.node_id)
    return LanguageSite(node_id=letter.node_id, name=card.name, card=card, seconds=letter.seconds)


def _refuse_shared_keys(found: dict[int, LanguageSite], failures: dict[int, FedInferError]) -> None:
    # Two sites with one home, or a stolen key: nobody can tell which of them is meant. A
    # card that is merely replayed names its own node, and got no further than its reader.
    keys = Counter(site.key_id for site in found.values())
    for node_id, site in list(found.items()):
        if keys[site.key_id] > 1:
            del found[node_id]
            failures[node_id] = BindingError(
                f"{keys[site.key_id]} nodes show the same key",
                hint="give every site a home folder of its own",
                site=str(node_id),
            )


def _with_clear_names(sites: list[LanguageSite]) -> tuple[LanguageSite, ...]:
    names = Counter(site.name for site in sites)
    return tuple(
        replace(site, name=f"{site.name}#{site.key_id[:8]}") if names[site.name] > 1 else site
        for site in sites
    )
