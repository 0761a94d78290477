"""`FedMPC`: carries set-up, shares and results of a joint computation, and reads none."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Final

from flwr.app import Message
from flwr.serverapp import Grid

from fedinfer_flower.errors import FedInferError, PartyFailedError, SiteFailedError
from fedinfer_flower.mpc.documents import MpcAnswer, MpcJob
from fedinfer_flower.mpc.session import MpcSession
from fedinfer_flower.mpc.shares import N_PARTIES
from fedinfer_flower.mpc.statement import SiteStatement
from fedinfer_flower.query import Deadline
from fedinfer_flower.strategies.onboarding import read_arrival, wait_for_nodes
from fedinfer_flower.strategies.pull_loop import stream_replies
from fedinfer_flower.wire.actions import message_type
from fedinfer_flower.wire.envelope import DEFAULT_LIMITS, Envelope, Kind, WireLimits
from fedinfer_flower.wire.records import pack

__all__ = ["FedMPC"]

log = logging.getLogger("fedinfer_flower.coordinator")

_MPC: Final = "fi_mpc"
_MARGIN_S: Final = 2.0
"""Parties end this much before the coordinator's deadline, so that their errors arrive."""


class FedMPC:
    """Run a joint computation of three sites over the networks of any number of owners.

    Flower carries sealed shares, star-shaped as always. The protocol itself runs between
    the three parties, over links of their own: they must be able to reach each other.

    Parameters
    ----------
    deadline : Deadline
        Seconds for each of the two steps, collecting weights and computing. The quorum is
        not used: every owner and every party of a session must stay to its end.
    min_available_nodes : int
        Nodes to wait for.
    patience_s : float
        How long to wait for them.
    limits : WireLimits

    Privacy
    -------
    The coordinator sees who takes part, architectures, and sizes. It holds all shares, each
    sealed to one party: together with one party it has what that party has.

    Examples
    --------
    >>> print(FedMPC(deadline=Deadline(timeout_s=30)).summary())
    FedMPC
    ├── protocol: ABY3, three parties, honest majority, semi-honest
    └── deadline: 30 s a step
    """

    def __init__(
        self,
        *,
        deadline: Deadline | None = None,
        min_available_nodes: int = N_PARTIES,
        patience_s: float = 60.0,
        limits: WireLimits = DEFAULT_LIMITS,
    ) -> None:
        self.deadline = deadline or Deadline()
        self.min_available_nodes = min_available_nodes
        self.patience_s = patience_s
        self.limits = limits
        self._nodes: dict[str, int] = {}

    def collect(self, grid: Grid) -> list[bytes]:
        """Return the signed statements of all sites that answer; for the querier.

        A site that fails is left out and logged.
        """
        node_ids = wait_for_nodes(
            grid, at_least=self.min_available_nodes, patience_s=self.patience_s
        )
        replies, failures = self._ask(
            grid, {node_id: self._envelope(grid, "statement") for node_id in node_ids}
        )
        for failure in failures.values():
            log.warning("%s", failure)
        statements = []
        for node_id, reply in replies.items():
            try:
                data = bytes(reply.section("statement"))
                key_id = SiteStatement.from_bytes(data).identity.key_id
            except FedInferError as exc:
                log.warning("%s", exc.at_site(str(node_id)))
                continue
            # A second node with a site's key is the site itself, or somebody's replay.
            if key_id in self._nodes and self._nodes[key_id] != node_id:
                log.warning("two nodes state the key %s: the first is kept", key_id[:16])
                continue
            self._nodes[key_id] = node_id
            statements.append(data)
        return statements

    def start(self, grid: Grid, job: MpcJob) -> MpcAnswer:
        """Carry a job through and return the sealed results.

        Parameters
        ----------
        grid : Grid
            The one whose sites' statements the job was made from.
        job : MpcJob

        Raises
        ------
        PartyFailedError
            If a party or an owner failed, or was not there by the deadline. Nothing about
            the queries is disclosed then.
        """
        started = time.monotonic()
        session = MpcSession.from_bytes(job.session)
        log.info("%s", self.summary())
        owners = [self._node(place) for place in session.owner_places]
        parties = [self._node(place) for place in session.party_places]
        shared = self._all(
            grid,
            "owner",
            {node: self._envelope(grid, "weights", session=job.session) for node in owners},
        )
        jobs = {}
        for rank, node in enumerate(parties):
            sections = {
                f"weights-{i}": bytes(shared[owner].section(f"share-{rank}"))
                for i, owner in enumerate(owners)
            }
            sections |= {f"query-{b}": triple[rank] for b, triple in enumerate(job.queries)}
            jobs[node] = self._envelope(
                grid, "compute", session=job.session, sections=sections, with_time=True
            )
        done = self._all(grid, "party", jobs)
        return MpcAnswer(
            session_id=session.session_id,
            results=tuple(
                tuple(bytes(done[node].section(f"result-{b}")) for node in parties)
                for b in range(session.n_batches)
            ),
            seconds=time.monotonic() - started,
        )

    def summary(self) -> str:
        """Return a tree of the strategy's settings."""
        return "\n".join(
            [
                "FedMPC",
                "├── protocol: ABY3, three parties, honest majority, semi-honest",
                f"└── deadline: {self.deadline.timeout_s:g} s a step",
            ]
        )

    # -- parts -------------------------------------------------------------------------

    def _node(self, place: SiteStatement) -> int:
        node = self._nodes.get(place.identity.key_id)
        if node is None:
            raise PartyFailedError(
                "a site of the job has no node here",
                hint="collect statements on this grid first, and make the job from them",
                site=place.name,
            )
        return node

    def _envelope(
        self,
        grid: Grid,
        verb: str,
        *,
        session: bytes = b"",
        sections: Mapping[str, bytes] | None = None,
        with_time: bool = False,
    ) -> Envelope:
        meta: dict[str, str | float] = {"verb": verb}
        if with_time:
            timeout_s = self.deadline.timeout_s
            meta["seconds-left"] = max(timeout_s - _MARGIN_S, 0.5 * timeout_s)
        first = (("session", session),) if session else ()
        return Envelope(
            kind=Kind.JOB,
            run_id=int(grid.run.run_id),
            meta=meta,
            sections=(*first, *(sections or {}).items()),
        )

    def _all(self, grid: Grid, role: str, asks: dict[int, Envelope]) -> dict[int, Envelope]:
        replies, failures = self._ask(grid, asks, until_failure=True)
        for node_id, failure in failures.items():
            log.warning("%s", failure.at_site(str(node_id)))
            if not isinstance(failure, PartyFailedError | SiteFailedError):
                raise failure.at_site(str(node_id))
            raise PartyFailedError(
                f"the joint computation ended when this {role} failed: {failure.message}",
                hint="all of a session must stay to its end: ask again, without the failed site",
                site=str(node_id),
            )
        return replies

    def _ask(
        self, grid: Grid, asks: dict[int, Envelope], *, until_failure: bool = False
    ) -> tuple[dict[int, Envelope], dict[int, FedInferError]]:
        timeout_s, run_id = self.deadline.timeout_s, int(grid.run.run_id)
        out = [
            Message(pack(envelope), node_id, message_type(_MPC), ttl=timeout_s, group_id="mpc")
            for node_id, envelope in asks.items()
        ]
        replies: dict[int, Envelope] = {}
        failures: dict[int, FedInferError] = {}
        for arrival in stream_replies(grid, out, timeout_s=timeout_s):
            try:
                reply = read_arrival(arrival, run_id=run_id, limits=self.limits)
                replies[arrival.node_id] = self._checked(reply, asks[arrival.node_id], run_id)
            except FedInferError as exc:
                failures[arrival.node_id] = exc
                # The first failure is the cause; the others only wait for the one that is gone.
                if until_failure:
                    return replies, failures
        for node_id in asks.keys() - replies.keys() - failures.keys():
            failures[node_id] = PartyFailedError(f"no answer within {timeout_s:g} s")
        return replies, failures

    @staticmethod
    def _checked(reply: Envelope, asked: Envelope, run_id: int) -> Envelope:
        fits = reply.kind is Kind.ANSWER and reply.run_id == run_id
        if not fits or reply.meta.get("verb") != asked.meta["verb"]:
            raise PartyFailedError("a node answered something else than was asked")
        return reply
