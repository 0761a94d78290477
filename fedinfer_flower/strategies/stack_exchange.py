"""The coordinator's part before and after the training of a stack: it carries sealed bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

from fedinfer_flower.errors import BindingError, FedInferError, SiteFailedError
from fedinfer_flower.strategies.onboarding import read_arrival
from fedinfer_flower.strategies.pull_loop import stream_replies
from fedinfer_flower.wire import fields, stack_messages
from fedinfer_flower.wire.actions import message_type
from fedinfer_flower.wire.directory import SiteCard
from fedinfer_flower.wire.envelope import DEFAULT_LIMITS, Envelope, Kind, WireLimits
from fedinfer_flower.wire.records import pack
from fedinfer_flower.wire.stack_messages import INSTALL, OFFER, PEERS, TAKE, StackJob

__all__ = ["StackExchange"]

Sections = Mapping[str, bytes | memoryview]

_MAX_ROWS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class StackExchange:
    """Carry held-out rows and answers between sites.

    Parameters
    ----------
    grid : Grid
    job : StackJob
    cards : mapping of node id to SiteCard
        Of the job's sites.
    timeout_s : float
        Of one step.
    limits : WireLimits

    Privacy
    -------
    The coordinator sees the number of held-out rows of each site, and of everything else
    its length. It could leave out a site or a message; it cannot read, alter or make up
    rows or answers of sites whose keys are pinned.
    """

    grid: Grid
    job: StackJob
    cards: Mapping[int, SiteCard]
    timeout_s: float
    limits: WireLimits = DEFAULT_LIMITS

    def exchange(self) -> dict[int, int]:
        """Give every site all sites' answers to its held-out rows.

        Returns
        -------
        rows : dict of node id to int
            Held-out rows of the sites that have any.

        Raises
        ------
        FedInferError
            The typed error of the first site that does not take part.
        """
        place = {n: self.job.key_ids.index(card.key_id) for n, card in self.cards.items()}
        offers = self._ask(OFFER, {node_id: {} for node_id in self.cards})
        rows = {n: fields.whole(e.meta, "rows", low=0, high=_MAX_ROWS) for n, e in offers.items()}
        owners = [node_id for node_id in rows if rows[node_id]]
        for node_id in owners:
            offers[node_id].require_sections("body", "wraps")
        to_peers: dict[int, dict[str, bytes | memoryview]] = {}
        for node_id in self.cards:
            theirs = to_peers.setdefault(node_id, {})
            for owner in owners:
                if owner != node_id:
                    theirs[f"body-{place[owner]}"] = offers[owner].section("body")
                    theirs[f"wraps-{place[owner]}"] = offers[owner].section("wraps")
        answers = self._ask(PEERS, to_peers)
        to_owners = {
            owner: {
                f"answer-{place[peer]}": answers[peer].section(f"answer-{place[owner]}")
                for peer in self.cards
                if peer != owner
            }
            for owner in owners
        }
        self._ask(TAKE, to_owners)
        return {owner: rows[owner] for owner in owners}

    def install(self, aggregator: bytes) -> dict[int, FedInferError]:
        """Offer a fitted aggregator to all sites; return who refused it, and why."""
        refused: dict[int, FedInferError] = {}
        self._ask(INSTALL, {n: {"aggregator": aggregator} for n in self.cards}, refused=refused)
        return refused

    def _ask(
        self,
        action: str,
        sections: Mapping[int, Sections],
        *,
        refused: dict[int, FedInferError] | None = None,
    ) -> dict[int, Envelope]:
        asks = [
            Message(
                pack(stack_messages.step(self.job, parts)),
                node_id,
                message_type(action),
                ttl=self.timeout_s,
                group_id="stack",
            )
            for node_id, parts in sections.items()
        ]
        found: dict[int, Envelope] = {}
        failed: dict[int, FedInferError] = {}
        for arrival in stream_replies(self.grid, asks, timeout_s=self.timeout_s):
            try:
                found[arrival.node_id] = self._read(
                    read_arrival(arrival, run_id=self.job.directory.run_id, limits=self.limits),
                    arrival.node_id,
                )
            except FedInferError as exc:
                failed[arrival.node_id] = exc.at_site(self.cards[arrival.node_id].profile.name)
        for node_id in sections:
            if node_id not in found and node_id not in failed:
                failed[node_id] = SiteFailedError(
                    f"no reply within {self.timeout_s:g} s",
                    site=self.cards[node_id].profile.name,
                )
        if failed and refused is None:
            raise failed[min(failed)]
        if refused is not None:
            refused.update(failed)
        return found

    def _read(self, envelope: Envelope, sender: int) -> Envelope:
        job = self.job
        meant = (job.directory.run_id, job.job_id, sender)
        if envelope.kind is not Kind.ANSWER or meant != (
            envelope.run_id,
            envelope.query_id,
            envelope.sender,
        ):
            raise BindingError("a reply of another kind, run, training or sender")
        fields.exactly(envelope.meta, "rows")
        return envelope
