"""Ask every site what it knows about, once, before the first query."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from flwr.app import Message
from flwr.serverapp import Grid

from fedinfer_flower.errors import (
    FedInferError,
    NotEnoughNodesError,
    NotRegisteredError,
    SiteFailedError,
)
from fedinfer_flower.query import CountsKind, SiteProfile
from fedinfer_flower.strategies.pull_loop import Arrival, stream_replies
from fedinfer_flower.wire import messages
from fedinfer_flower.wire.actions import HELLO, message_type
from fedinfer_flower.wire.envelope import DEFAULT_LIMITS, Envelope, Kind, WireLimits
from fedinfer_flower.wire.records import pack, unpack

__all__ = [
    "Onboarding",
    "class_totals",
    "onboard",
    "read_arrival",
    "shared_classes",
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
    profiles : dict of node id to SiteProfile
    failures : dict of node id to FedInferError
    seconds : float
    """

    profiles: dict[int, SiteProfile]
    failures: dict[int, FedInferError]
    seconds: float


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
    profiles: dict[int, SiteProfile] = {}
    failures: dict[int, FedInferError] = {}
    for arrival in stream_replies(grid, asks, timeout_s=timeout_s):
        try:
            envelope = read_arrival(arrival, run_id=run_id, limits=limits)
            profile = messages.read_profile(envelope, run_id=run_id, sender=arrival.node_id)
            profiles[arrival.node_id] = profile
        except FedInferError as exc:
            failures[arrival.node_id] = exc.at_site(str(arrival.node_id))
    for node_id in node_ids:
        if node_id not in profiles and node_id not in failures:
            failures[node_id] = SiteFailedError(
                f"no profile within {timeout_s:g} s", site=str(node_id)
            )
    for error in failures.values():
        log.warning("%s", error)
    seconds = time.monotonic() - start
    return Onboarding(
        profiles={n: profiles[n] for n in sorted(profiles)}, failures=failures, seconds=seconds
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


def shared_classes(profiles: dict[int, SiteProfile]) -> tuple[str, ...]:
    """Return the union of all class names, numbers in numerical order before words.

    Examples
    --------
    >>> a = SiteProfile(name="a", classes=("10", "9"))
    >>> b = SiteProfile(name="b", classes=("cat", "9"))
    >>> shared_classes({1: a, 2: b})
    ('9', '10', 'cat')
    """
    names = {name for profile in profiles.values() for name in profile.classes}
    return tuple(sorted(names, key=lambda n: (0, int(n), n) if n.isdecimal() else (1, 0, n)))


def class_totals(
    profiles: dict[int, SiteProfile], classes: tuple[str, ...]
) -> tuple[npt.NDArray[np.float64] | None, CountsKind]:
    """Return (sum of the committed class counts, their kind).

    Counts and presence bits do not add up: where only some sites share counts, all are
    read as presence bits. Where any site withholds both there are no totals.
    """
    kinds = {profile.counts_kind for profile in profiles.values()}
    if not kinds or CountsKind.WITHHELD in kinds:
        return None, CountsKind.WITHHELD
    kind = CountsKind.COUNTS if kinds == {CountsKind.COUNTS} else CountsKind.PRESENCE
    totals = np.zeros(len(classes))
    for profile in profiles.values():
        totals += profile.aligned_counts(classes, kind)
    return totals, kind
