"""`FedRefine`: language models of several sites help each other to answer."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from flwr.serverapp import Grid

from fedinfer_flower.errors import ConfigError, InvalidValueError, QuorumNotMetError
from fedinfer_flower.kv.planner import PlannerOptions
from fedinfer_flower.query import Deadline
from fedinfer_flower.strategies.base import Progress
from fedinfer_flower.strategies.onboarding import wait_for_nodes
from fedinfer_flower.strategies.refine_asking import clear_batches, sealed_batches
from fedinfer_flower.strategies.refine_exchange import BatchOutcome, run_batch
from fedinfer_flower.strategies.refine_hosting import host_of
from fedinfer_flower.strategies.refine_messages import RoundMessages, RoundTerms
from fedinfer_flower.strategies.refine_onboarding import LanguageSites, introduce
from fedinfer_flower.strategies.refine_options import (
    RefineOptions,
    consents,
    names_of,
    plain_decoding,
)
from fedinfer_flower.strategies.refine_parts import Collected, Schedule
from fedinfer_flower.strategies.refine_planning import MediaPlanner, Terms, share_of
from fedinfer_flower.strategies.refine_result import PlannedMedium, RefineResult
from fedinfer_flower.strategies.refine_round import ReceiverRound
from fedinfer_flower.strategies.refine_settling import settle
from fedinfer_flower.strategies.refine_who import Who, who_of
from fedinfer_flower.wire.envelope import WireLimits
from fedinfer_flower.wire.refine_job import AskedBatch, RefineJob
from fedinfer_flower.wire.refine_seats import SharerSeat

if TYPE_CHECKING:
    from fedinfer_flower.kv.fuser_bank import FuserBank
    from fedinfer_flower.kv.gate import Gate

__all__ = ["FedRefine"]

log = logging.getLogger("fedinfer_flower.coordinator")

_LIMITS = WireLimits(max_payload_bytes=64 << 20)


class FedRefine:
    """Let language models answer with each other's help: by KV cache, by text, or alone.

    A *receiver* answers. It rewrites each question, so that *sharers* see other words than
    the querier's; they send notes, or a part of their KV cache that a trained *fuser* brings
    into the receiver's space; the receiver answers on top of it (FedRefine, equations 1-4).
    One receiver, a pair in both directions and all to all (Co-C2C) are the same exchange.

    Parameters
    ----------
    receiver : str or sequence of str
        Names of the sites that answer; ``"all"`` for every site that takes part as one.
    sharers : str or sequence of str, optional
        Names of the sites that may help; default all others.
    medium : {"auto", "cache", "text", "own"}
        ``"auto"`` plans for each pair: the best of expected quality less a price for
        seconds, among what sharer, receiver and querier allow and the deadline leaves time
        for. Where a medium cannot be, the next of cache, text, own is taken.
    allow : sequence of {"text", "cache", "full-cache"}
        The querier's consent. A cache can be inverted: whoever gets one recovers the
        rewritten question and much of the sharer's prompt. It must be named here.
    fusers : "receiver" or FuserBank
        Where caches are fused: at each receiver with fusers of its own, or here. Here the
        coordinator reads every cache; sites must have agreed to it.
    gate : str or Gate, optional
        With fusers here: chooses sharers for each question from the evidence that sites
        share. Receivers that fuse bring their own.
    rephrase : str
        Name of the receivers' rephraser; ``"none"`` sends the question as it is.
    rounds : int
        Most rounds. In a later one, sharers that are receivers too share what they fused in
        the one before. A receiver whose answers stayed the same stops.
    deadline : Deadline
        Seconds of a whole exchange over one batch, all rounds included; the quorum counts
        receivers that answer.
    decoding : Decoding or mapping, optional
        Greedy by default. Stop texts are the prompt format's, at the site.
    planning : PlannerOptions, optional
        What a second is worth, for ``medium="auto"``.
    batch_size : int
        Questions in one exchange.
    min_available_nodes : int
        Nodes to wait for; default as many as are named. If fewer are enough, named sharers
        that are not there are reported, and the others help.
    patience_s : float
        How long to wait for them.
    limits : WireLimits
        Largest reply that is read.

    Raises
    ------
    ConfigError
        For a combination that cannot work.

    Privacy
    -------
    With a `RefineJob` of a `LanguageQuerier` the coordinator relays sealed bytes: it sees
    who asks whom in which medium, sizes and times. Asked in clear it reads questions and
    answers; what goes between receiver and sharers is sealed to them all the same, unless
    fusers run here. Sites without pins cannot tell a receiver that it made
    up. Receivers read the questions. Sharers read the rewritten questions,
    which keep names and numbers: another wording hides style and not what is asked about.
    A receiver that gets a cache can recover much of what the sharer's model had read.

    Examples
    --------
    >>> strategy = FedRefine(receiver="north", sharers=["south"], medium="text")
    >>> print(strategy.summary().splitlines()[1])
    ├── receivers: north; sharers: south
    """

    def __init__(
        self,
        *,
        receiver: str | Sequence[str] = "all",
        sharers: str | Sequence[str] | None = None,
        medium: str = "auto",
        allow: str | Iterable[str] = ("text",),
        fusers: str | FuserBank = "receiver",
        gate: str | Gate | None = None,
        rephrase: str = "template",
        rounds: int = 1,
        deadline: Deadline | None = None,
        decoding: Any = None,
        planning: PlannerOptions | None = None,
        batch_size: int = 32,
        min_available_nodes: int = 0,
        patience_s: float = 60.0,
        limits: WireLimits = _LIMITS,
    ) -> None:
        if type(min_available_nodes) is not int or min_available_nodes < 0:
            raise InvalidValueError("min_available_nodes is a whole number, at least 0")
        if deadline is not None and not isinstance(deadline, Deadline):
            raise InvalidValueError(
                "deadline is a Deadline", hint="Deadline(timeout_s=30.0), of fedinfer_flower.query"
            )
        self.options = RefineOptions(
            receivers=names_of(receiver, "receiver"),
            sharers=names_of(sharers, "sharers"),
            medium=medium,
            allow=consents(allow),
            hosted=not isinstance(fusers, str),
            rephrase=rephrase,
            rounds=rounds,
            decoding=plain_decoding(decoding),
            batch_size=batch_size,
        )
        self.deadline = deadline or Deadline()
        named = self.options.receivers
        if named is not None and self.deadline.quorum > len(named):
            raise InvalidValueError(
                f"a quorum of {self.deadline.quorum}, and {len(named)} receivers"
            )
        self.min_available_nodes, self.patience_s = min_available_nodes, patience_s
        self.limits = limits
        self._host = host_of(fusers, gate)
        self._planner = MediaPlanner(self.options, planning)
        self._refine_s = 0.0
        self._run_id = 0

    # -- the verbs ---------------------------------------------------------------------

    def configure_onboarding(self, grid: Grid, run_id: int) -> LanguageSites:
        """Wait for nodes and let them introduce themselves."""
        named = {*(self.options.receivers or ()), *(self.options.sharers or ())}
        node_ids = wait_for_nodes(
            grid,
            at_least=self.min_available_nodes or max(1, len(named)),
            patience_s=self.patience_s,
            settle_s=0.0 if self.min_available_nodes else 0.5,
        )
        self._run_id = run_id
        return introduce(
            grid,
            node_ids,
            run_id=run_id,
            timeout_s=self.deadline.timeout_s,
            limits=self.limits,
        )

    def configure_query(
        self,
        who: Who,
        number: int,
        batches: Sequence[AskedBatch],
        start_s: float,
        end_s: float,
    ) -> list[ReceiverRound]:
        """Plan a round: for each receiver who is asked for what, and until when.

        Parameters
        ----------
        who : Who
        number : int
            Of the round, from 1.
        batches : sequence of AskedBatch
            One for each receiver.
        start_s, end_s : float
            Of a monotonic clock.
        """
        terms = RoundTerms(
            run_id=self._run_id,
            number=number,
            keep=number < who.rounds,
            sealed=who.sealed,
            rephrase=who.rephrase,
            schedule=Schedule.until(end_s, start_s=start_s, refine_s=self._refine_s),
            max_body_bytes=self.limits.max_payload_bytes,
            observe=self._observe,
        )
        return [self._receiver_round(who, batch, terms, end_s - start_s) for batch in batches]

    def aggregate_query(self, who: Who, outcome: BatchOutcome) -> BatchOutcome:
        """Close a batch.

        Raises
        ------
        QuorumNotMetError
            If fewer receivers answered than the quorum.
        """
        answered = [r for r in outcome.receivers.values() if r.body]
        if len(answered) < self.deadline.quorum:
            reasons = "; ".join(
                f"{who.name_of(key)}: {r.error.code} {r.error.message}"
                for key, r in outcome.receivers.items()
                if r.error is not None
            )
            raise QuorumNotMetError(
                f"{len(answered)} of {len(outcome.receivers)} receivers answered,"
                f" {self.deadline.quorum} are needed ({reasons})",
                hint="see the receivers' own logs, or raise the deadline",
            )
        self._refine_s = max(outcome.refine_s, 0.5 * self._refine_s)
        return outcome

    # -- driving -----------------------------------------------------------------------

    def collect(self, grid: Grid) -> list[bytes]:
        """Return the signed cards of all sites that introduce themselves; for a querier."""
        sites = self.configure_onboarding(grid, int(grid.run.run_id))
        return [site.card.to_bytes() for site in sites.sites]

    def start(
        self,
        grid: Grid,
        questions: Sequence[str] | RefineJob | bytes,
        *,
        progress: Progress | None = None,
    ) -> RefineResult:
        """Ask all questions and return the answers of every receiver.

        Parameters
        ----------
        grid : Grid
        questions : sequence of str, RefineJob or bytes
            In clear, or the job of a `LanguageQuerier`, also as bytes.
        progress : callable, optional
            Called with (questions answered, questions asked) after every batch.

        Raises
        ------
        ConfigError
            For names that no site has, or a job that these settings cannot run.
        NotEnoughNodesError, QuorumNotMetError
            If too few sites are there, or too few receivers answer.
        """
        job = RefineJob.from_bytes(questions) if isinstance(questions, bytes) else None
        if isinstance(questions, RefineJob):
            job = questions
        texts = _texts(questions) if job is None else []
        if job is not None and self._host is not None:
            raise ConfigError(
                "a sealed job, and fusers at the coordinator: it would read every cache",
                hint="fusers='receiver', or ask in clear",
            )
        log.info("%s", self.summary())
        run_id = int(grid.run.run_id)
        sites = self.configure_onboarding(grid, run_id)
        who = who_of(
            self.options, sites, job=job, run_id=run_id, strict=not self.min_available_nodes
        )
        who.characters = max(map(len, texts), default=0)
        if job is None:
            asked = clear_batches(texts, who, self.options, run_id=run_id)
        else:
            asked = sealed_batches(job, who)
        total = sum(batches[0].n_questions for batches in asked)
        outcomes: list[BatchOutcome] = []
        done = 0
        for batches in asked:
            outcome = run_batch(
                grid,
                batches,
                lambda *step: self.configure_query(who, *step),
                run_id=run_id,
                rounds=who.rounds,
                timeout_s=self.deadline.timeout_s,
                limits=self.limits,
            )
            outcomes.append(self.aggregate_query(who, outcome))
            done += batches[0].n_questions
            if progress is not None:
                progress(done, total)
        result = settle(who, outcomes, introduction_s=sites.seconds, run_id=run_id)
        log.info("%s", result.summary())
        return result

    def summary(self) -> str:
        """Return a tree of the strategy's settings."""
        o = self.options
        receivers = "all" if o.receivers is None else ", ".join(o.receivers)
        sharers = "all others" if o.sharers is None else ", ".join(o.sharers)
        held = "coordinator, which reads every cache" if o.hosted else "receiver"
        return "\n".join(
            [
                "FedRefine",
                f"├── receivers: {receivers}; sharers: {sharers}",
                f"├── medium: {o.medium}; the querier allows: {', '.join(sorted(o.allow)) or '-'}",
                f"├── fusers: at the {held}",
                f"├── rephrase: {o.rephrase}; rounds: {o.rounds}",
                f"└── deadline: {self.deadline.timeout_s:g} s an exchange of at most"
                f" {o.batch_size} questions, quorum {self.deadline.quorum}",
            ]
        )

    # -- parts -------------------------------------------------------------------------

    def _observe(
        self, receiver: Any, sharer: Any, medium: str, size_bytes: int, seconds: float
    ) -> None:
        self._planner.observe(receiver, sharer, medium, size_bytes=size_bytes, seconds=seconds)

    def _receiver_round(
        self, who: Who, batch: AskedBatch, terms: RoundTerms, timeout_s: float
    ) -> ReceiverRound:
        receiver = who.site(batch.receiver)
        sharers = {s.key_id: s for s in who.sharers_of(receiver)}
        plans: dict[str, PlannedMedium] = {}
        seats: dict[str, SharerSeat] = {}
        for key_id, sharer in sharers.items():
            shared = self._host.share_of if self._host is not None else share_of
            plan = self._planner.choose(
                receiver,
                sharer,
                terms=Terms(
                    rows=batch.n_questions,
                    characters=who.characters,
                    deadline_s=timeout_s,
                ),
                share=shared(receiver, sharer),
                allow=who.allow,
            )
            plans[key_id] = plan
            if plan.medium == "cache" and self._host is not None:
                seats[key_id] = self._host.seat(receiver, sharer)
            elif plan.medium != "own":
                seats[key_id] = SharerSeat(card=sharer.card, medium=plan.medium)
        messages = RoundMessages(
            batch=batch,
            site=receiver,
            sharers=sharers,
            seats=seats,
            terms=terms,
            hosted=self._host is not None,
        )
        collected = Collected(
            host=self._host,
            receiver=receiver,
            sharers=sharers,
            run_id=terms.run_id,
            query_id=batch.query_id,
            round_number=terms.number,
            rows=batch.n_questions,
        )
        return ReceiverRound(messages, plans=plans, collected=collected)


def _texts(questions: object) -> list[str]:
    if isinstance(questions, Sequence) and not isinstance(questions, str | bytes) and questions:
        texts = list(questions)
        if all(isinstance(text, str) for text in texts):
            return texts
    raise InvalidValueError("questions are a list of texts that is not empty, or a RefineJob")
