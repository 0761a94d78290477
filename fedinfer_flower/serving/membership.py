"""`Membership`: which sites are here, kept up to date beside the queries."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Final

from flwr.app import Message

from fedinfer_flower.errors import (
    BindingError,
    FedInferError,
    SiteFailedError,
    UnavailableError,
)
from fedinfer_flower.query import SiteOutcome, SiteStatus
from fedinfer_flower.serving.hub import GridHub
from fedinfer_flower.strategies.onboarding import read_arrival
from fedinfer_flower.strategies.pull_loop import Arrival
from fedinfer_flower.wire.actions import HELLO, message_type
from fedinfer_flower.wire.directory import Directory, SiteCard, read_site_card
from fedinfer_flower.wire.envelope import DEFAULT_LIMITS, Envelope, Kind, WireLimits
from fedinfer_flower.wire.pins import Pins
from fedinfer_flower.wire.records import pack

__all__ = ["Member", "Membership"]

log = logging.getLogger("fedinfer_flower.gateway")

_TICK_S: Final = 0.5
_LIST_S: Final = 2.0
"""Between two looks at who is online, once somebody is: it changes seldom."""

_ASKING_TICK_S: Final = 0.02
_AGAIN_S: Final = 180.0
_PING_S: Final = 15.0
_RETRY_S: Final = (1.0, 2.0, 5.0, 15.0, 60.0)
_SMOOTHING: Final = 0.2
_GONE_KEPT: Final = 256
_STALE: Final = "FI303"


@dataclass(kw_only=True)
class Member:
    """What is known of one node.

    Parameters
    ----------
    node_id : int
    online : bool
        Whether the SuperLink hears from it.
    card : SiteCard, optional
        What it said of itself last.
    error : FedInferError, optional
        Why it has no card, or none that counts.
    last_seen_at : float
        When a reply of it came, in seconds since 1970; 0.0 for never.
    latency_s : float
        Moving average of its answers to queries.
    answers, failures : int
    """

    node_id: int
    online: bool = True
    card: SiteCard | None = None
    error: FedInferError | None = None
    last_seen_at: float = 0.0
    latency_s: float = 0.0
    answers: int = 0
    failures: int = 0
    ask_at: float = 0.0  # by the monotonic clock: when to say hello again
    asked_at: float = 0.0
    message_id: str = ""
    misses: int = 0
    key_id: str = ""  # of its last good card,
    since: float = 0.0  # and when it first showed that, by the monotonic clock


class Membership:
    """Says hello to nodes in the background and keeps their signed cards.

    A node is asked when it is new or was offline, when a site says that its card is stale,
    when it was late with an answer, when its last hello failed (after 1, 2, 5, 15 and then
    every 60 s), and every three minutes. One that does not answer is left out until it does.
    Queries never wait for any of it.

    Parameters
    ----------
    hub : GridHub
    run_id : int
    hello_s : float
        Seconds that a node has to answer. Its first answer loads the model.
    again_s : float
        Seconds after which a good card is asked for again.
    changed : callable
        Called, from the thread, when the sites to ask are others than before.
    clock : callable
        Seconds since 1970.
    limits : WireLimits

    Privacy
    -------
    Holds what the sites show every coordinator: names, classes, counts as far as consented,
    prices, keys.
    """

    def __init__(
        self,
        hub: GridHub,
        *,
        run_id: int,
        hello_s: float = 60.0,
        again_s: float = _AGAIN_S,
        changed: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.time,
        limits: WireLimits = DEFAULT_LIMITS,
        pins: Pins | None = None,
    ) -> None:
        self._pins = pins
        self._hub, self._grid, self._run_id = hub, hub.grid(), run_id
        self._hello_s, self._again_s, self._limits = hello_s, again_s, limits
        self._changed, self._clock = changed, clock
        self._members: dict[int, Member] = {}
        self._lock = threading.Condition()
        self._closed = False
        self._nudged = False
        self._listed_at = 0.0
        self._shared: frozenset[int] = frozenset()
        self._directory: tuple[tuple[str, ...], Directory] | None = None
        self._thread = threading.Thread(target=self._run, name="fedinfer-members", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout=5.0)
        self._grid.close()

    # -- asked by others ---------------------------------------------------------------

    def cards(self) -> dict[int, SiteCard]:
        """Return the cards of the sites that can be asked now, by node id."""
        with self._lock:
            return {
                n: member.card
                for n, member in sorted(self._members.items())
                if member.online and member.card is not None and n not in self._shared
            }

    def directory(self, cards: Mapping[int, SiteCard] | None = None) -> Directory:
        """Return the cards, default those of now, as a directory.

        Raises
        ------
        UnavailableError
            If no site can be asked.
        """
        shown = tuple((self.cards() if cards is None else cards).values())
        if not shown:
            raise UnavailableError("no site can be asked now", hint="start the sites' SuperNodes")
        # Checking signatures takes a while for each card: once for one set of sites.
        key = tuple(card.signature.hex() for card in shown)
        known = self._directory
        if known is None or known[0] != key:
            known = self._directory = (key, Directory(run_id=self._run_id, cards=shown))
        return known[1]

    def members(self) -> tuple[Member, ...]:
        """Return all nodes of this run that were ever seen, online or not."""
        with self._lock:
            return tuple(self._members[n] for n in sorted(self._members))

    def refresh(self, node_ids: Collection[int] | None = None) -> None:
        """Have nodes, default all, asked for their cards now; does not wait."""
        with self._lock:
            for member in self._members.values():
                if node_ids is None or member.node_id in node_ids:
                    member.ask_at = 0.0
            self._nudged = True
            self._lock.notify_all()

    def renew(self, node_ids: Collection[int], *, timeout_s: float) -> bool:
        """Ask nodes for their cards now, and wait; return whether all came."""
        begun = time.monotonic()
        self.refresh(node_ids)
        with self._lock:
            return self._lock.wait_for(
                lambda: all(self._is_renewed(n, begun) for n in node_ids), timeout=timeout_s
            )

    def _is_renewed(self, node_id: int, begun: float) -> bool:
        member = self._members.get(node_id)
        return member is None or (
            member.asked_at >= begun and not member.message_id and member.error is None
        )

    def note(self, outcomes: Collection[SiteOutcome]) -> frozenset[int]:
        """Note how sites fared in a query; return those whose cards are stale."""
        stale = set()
        now = self._clock()
        with self._lock:
            for outcome in outcomes:
                member = self._members.get(int(outcome.site_id))
                if member is None:
                    continue
                if outcome.status is SiteStatus.ANSWERED:
                    member.answers += 1
                    member.last_seen_at = now
                    share = _SMOOTHING if member.latency_s else 1.0
                    member.latency_s += share * (outcome.seconds - member.latency_s)
                    continue
                member.failures += 1
                if outcome.error_code == _STALE:
                    stale.add(member.node_id)
                if outcome.error_code == _STALE or outcome.status is SiteStatus.LATE:
                    # Of a late one: is it still there? Its hello says, or its silence does.
                    member.ask_at = 0.0
        return frozenset(stale)

    # -- the thread --------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._lock:
                if self._closed:
                    return
            try:
                self._tick(list_nodes=self._is_time())
            except FedInferError as exc:
                log.warning("membership: %s", exc.code)
            except Exception as exc:  # of Flower's transport; the hub counts how long
                log.warning("membership: %s", type(exc).__name__)
            with self._lock:
                asking = any(m.message_id for m in self._members.values())
                self._lock.wait_for(
                    lambda: self._closed or self._nudged,
                    timeout=_ASKING_TICK_S if asking else _TICK_S,
                )
                self._nudged = False

    def _is_time(self) -> bool:
        return time.monotonic() - self._listed_at >= (_LIST_S if self.cards() else _TICK_S)

    def _tick(self, *, list_nodes: bool) -> None:
        before = self._shown()
        if list_nodes:
            self._listed_at = time.monotonic()
            self._see(self._hub.node_ids())
        self._ask()
        self._take_in()
        with self._lock:
            self._shared = self._shared_keys()
            self._lock.notify_all()
        if self._shown() != before:
            self._changed()

    def _shown(self) -> tuple[tuple[int, str], ...]:
        return tuple((n, card.signature.hex()) for n, card in self.cards().items())

    def _see(self, online: Collection[int]) -> None:
        here = set(online)
        with self._lock:
            for node_id in here:
                member = self._members.get(node_id)
                if member is None:
                    self._members[node_id] = Member(node_id=node_id)
                elif not member.online:
                    # It may come back with another model, or another key.
                    member.online, member.ask_at = True, 0.0
            gone = [m for m in self._members.values() if m.node_id not in here]
            for member in gone:
                member.online = False
            for member in gone[: max(len(gone) - _GONE_KEPT, 0)]:
                del self._members[member.node_id]

    def _ask(self) -> None:
        now = time.monotonic()
        with self._lock:
            due = [
                m
                for m in self._members.values()
                if m.online and not m.message_id and now >= m.ask_at
            ]
        if not due:
            return
        content = pack(Envelope(kind=Kind.HELLO, run_id=self._run_id))
        asks = [
            Message(
                content,
                m.node_id,
                message_type(HELLO),
                ttl=self._hello_s,
                group_id="onboarding",
            )
            for m in due
        ]
        accepted = {i for i in self._grid.push_messages(asks) if i}
        with self._lock:
            for member, ask in zip(due, asks, strict=True):
                member.asked_at = now
                member.message_id = ask.metadata.message_id
                if member.message_id not in accepted:
                    self._fail(member, SiteFailedError("the SuperLink did not accept the message"))

    def _take_in(self) -> None:
        now = time.monotonic()
        with self._lock:
            asked = {m.message_id: m for m in self._members.values() if m.message_id}
        for reply in self._grid.pull_messages(list(asked)):
            member = asked.pop(reply.metadata.reply_to_message_id)
            arrival = Arrival(node_id=member.node_id, reply=reply, seconds=now - member.asked_at)
            try:
                envelope = read_arrival(arrival, run_id=self._run_id, limits=self._limits)
                card = read_site_card(envelope, run_id=self._run_id, sender=member.node_id)
                if self._pins is not None:
                    self._pins.require_site(card.profile.name, card.key_id)
            except FedInferError as exc:
                self._fail(member, exc)
            else:
                self._keep(member, card)
        for member in asked.values():
            wait_s = self._patience_s(member)
            if now - member.asked_at > wait_s:
                self._miss(member, SiteFailedError(f"no profile within {wait_s:g} s"))

    def _patience_s(self, member: Member) -> float:
        # The first hello has the site load its model.
        return self._hello_s if member.card is None else min(self._hello_s, _PING_S)

    def _miss(self, member: Member, error: FedInferError) -> None:
        busy_s = time.monotonic() - member.asked_at
        if member.card is not None and self._clock() - member.last_seen_at < busy_s:
            # It answered queries meanwhile: the hello waits behind others.
            with self._lock:
                member.message_id, member.ask_at = "", time.monotonic() + _RETRY_S[-1]
        else:
            self._fail(member, error)

    def _keep(self, member: Member, card: SiteCard) -> None:
        with self._lock:
            if member.key_id != card.key_id:
                member.key_id, member.since = card.key_id, time.monotonic()
            member.card, member.error, member.message_id = card, None, ""
            self._shared = self._shared_keys()  # before anybody is shown the card
            member.misses = 0
            member.last_seen_at = self._clock()
            # `refresh` may have come while it was asked.
            if member.ask_at <= member.asked_at:
                member.ask_at = time.monotonic() + self._again_s

    def _fail(self, member: Member, error: FedInferError) -> None:
        log.warning("%s", error.at_site(str(member.node_id)))
        with self._lock:
            member.error, member.message_id = error.at_site(str(member.node_id)), ""
            # A card from before would have it asked, and be missing in every sum.
            member.card = None
            wait_s = _RETRY_S[min(member.misses, len(_RETRY_S) - 1)]
            member.misses += 1
            member.ask_at = time.monotonic() + wait_s

    def _shared_keys(self) -> frozenset[int]:
        """Return nodes that show one key: masks between two holders of it would cancel.

        The first to have shown it stays. Keys and cards are public: if all were left out, a
        site could shut another out by showing its card.
        """
        holders: dict[bytes, list[Member]] = {}
        for member in self._members.values():
            if member.online and member.card is not None:
                holders.setdefault(member.card.identity.agreement_key, []).append(member)
        shared = [sorted(members, key=lambda m: m.since)[1:] for members in holders.values()]
        for member in (m for members in shared for m in members):
            member.error = BindingError(
                "several nodes show the same key",
                hint="give every site a home folder of its own",
                site=str(member.node_id),
            )
        found = frozenset(m.node_id for members in shared for m in members)
        for node_id in self._shared - found:
            if node_id in self._members and self._members[node_id].card is not None:
                self._members[node_id].error = None
        return found
