"""Ask every site what it knows about, once, before the first query."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

from fedinfer_flower.errors import (
    BindingError,
    FedInferError,
    NotEnoughNodesError,
    NotRegisteredError,
    SiteFailedError,
)
from fedinfer_flower.query import SiteProfile
from fedinfer_flower.strategies.pull_loop import Arrival, stream_replies
from fedinfer_flower.wire import messages
from fedinfer_flower.wire.actions import HELLO, message_type
from fedinfer_flower.wire.directory import SiteCard, read_site_card
from fedinfer_flower.wire.envelope import DEFAULT_LIMITS, Envelope, Kind, WireLimits
from fedinfer_flower.wire.records import pack, unpack

__all__ = [
    "Onboarding",
    "onboard",
    "read_arrival",
    "wait_for_nodes",
]

log = logging.getLogger("fedinfer_flower.coordinator")

_CODES = {
    1: "the site's app failed to load",
    2: "the site's app raised an error outside the inference handler",
    3: "the message or its reply expired",
    5: "the node is gone",
    6: "a mod at the site refused the message",
    7: "the site did not accept the app's signature",
    8: "the site's app process died",
}
"""Flower's error codes in our words. The reason that comes with them is the text of an
exception at the site, which may quote a query: it is neither shown nor logged."""


@dataclass(frozen=True, kw_only=True)
class Onboarding:
    """What the coordinator knows after onboarding.

    Parameters
    ----------
    cards : dict of node id to SiteCard
    failures : dict of node id to FedInferError
    seconds : float
    """

    cards: dict[int, SiteCard]
    failures: dict[int, FedInferError]
    seconds: float

    @property
    def profiles(self) -> dict[int, SiteProfile]:
        """Profiles of the sites that answered."""
        return {node_id: card.profile for node_id, card in self.cards.items()}


def wait_for_nodes(
    grid: Grid, *, at_least: int, patience_s: float, settle_s: float = 0.5
) -> list[int]:
    """Return the ids of the nodes online, once there are enough and no more are joining.

    In simulation an app starts while nodes are still registering; a list that did not
    change for `settle_s` is taken as complete.

    Raises
    ------
    NotEnoughNodesError
        If fewer than `at_least` are online after `patience_s`.
    """
    start = time.monotonic()
    nodes: list[int] = []
    settled_since = start
    while True:
        now = sorted(grid.get_node_ids())
        if now != nodes:
            nodes, settled_since = now, time.monotonic()
        if len(nodes) >= at_least and time.monotonic() - settled_since >= settle_s:
            return nodes
        if time.monotonic() - start > patience_s and len(nodes) < at_least:
            raise NotEnoughNodesError(
                f"{len(nodes)} nodes online after {patience_s:g} s, {at_least} are needed",
                hint="start more SuperNodes, or lower min_available_nodes",
            )
        time.sleep(0.1)


def onboard(
    grid: Grid,
    node_ids: list[int],
    *,
    run_id: int,
    timeout_s: float,
    limits: WireLimits = DEFAULT_LIMITS,
) -> Onboarding:
    """Collect the profile of every node.

    A node that fails or is late is reported with its typed error and left out.
    """
    start = time.monotonic()
    content = pack(Envelope(kind=Kind.HELLO, run_id=run_id))
    asks = [
        Message(content, node_id, message_type(HELLO), ttl=timeout_s, group_id="onboarding")
        for node_id in node_ids
    ]
    cards: dict[int, SiteCard] = {}
    failures: dict[int, FedInferError] = {}
    for arrival in stream_replies(grid, asks, timeout_s=timeout_s):
        try:
            envelope = read_arrival(arrival, run_id=run_id, limits=limits)
            cards[arrival.node_id] = read_site_card(envelope, run_id=run_id, sender=arrival.node_id)
        except FedInferError as exc:
            failures[arrival.node_id] = exc.at_site(str(arrival.node_id))
    for node_id in node_ids:
        if node_id not in cards and node_id not in failures:
            failures[node_id] = SiteFailedError(
                f"no profile within {timeout_s:g} s", site=str(node_id)
            )
    _refuse_shared_keys(cards, failures)
    for error in failures.values():
        log.warning("%s", error)
    seconds = time.monotonic() - start
    return Onboarding(
        cards={n: cards[n] for n in sorted(cards)}, failures=failures, seconds=seconds
    )


def _refuse_shared_keys(cards: dict[int, SiteCard], failures: dict[int, FedInferError]) -> None:
    """Leave out nodes that show one key: masks between two holders of a key would cancel."""
    holders: dict[bytes, list[int]] = {}
    for node_id, card in cards.items():
        holders.setdefault(card.identity.agreement_key, []).append(node_id)
    for shared in holders.values():
        for node_id in shared if len(shared) > 1 else ():
            del cards[node_id]
            failures[node_id] = BindingError(
                f"{len(shared)} nodes show the same key",
                hint="give every site a home folder of its own",
                site=str(node_id),
            )


def read_arrival(arrival: Arrival, *, run_id: int, limits: WireLimits) -> Envelope:
    """Return the envelope of a reply, or raise the typed error that it stands for.

    Raises
    ------
    FedInferError
        The site's own typed error, or ours about the reply.
    """
    reply = arrival.reply
    if reply is None:
        raise SiteFailedError("the SuperLink did not accept the message for this node")
    if reply.has_error():
        reason = reply.error.reason or ""
        if reply.error.code == 2 and "function registered with name" in reason:
            raise NotRegisteredError(
                "the site's ClientApp has no inference handler",
                hint="add InferenceMod(load_model).attach(app) to the site's client_app.py",
            )
        raise SiteFailedError(
            _CODES.get(reply.error.code, "Flower reported an unknown error"),
            hint="see the site's own log",
        )
    envelope = unpack(reply.content, limits=limits)
    if envelope.kind is Kind.ERROR:
        raise messages.read_error(envelope, run_id=run_id, sender=arrival.node_id)
    return envelope
