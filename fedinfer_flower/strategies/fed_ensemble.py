"""`FedEnsemble`: ask the sites, add up what they answer, hand the sum to the querier."""

from __future__ import annotations

import dataclasses
import logging
import secrets
import time
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from flwr.app import Message
from flwr.serverapp import Grid

from fedinfer_flower.errors import ConfigError, FedInferError
from fedinfer_flower.observability.tracing import span
from fedinfer_flower.planning.question import with_batch
from fedinfer_flower.query import QueryReport, SiteOutcome
from fedinfer_flower.receipts.statement import SignedStatement
from fedinfer_flower.selection.plan import QueryPlan
from fedinfer_flower.settlement.book import EvidenceBook
from fedinfer_flower.strategies.base import Progress
from fedinfer_flower.strategies.choosing import Chosen
from fedinfer_flower.strategies.ensemble_settings import EnsembleSettings
from fedinfer_flower.strategies.job_result import new_book, result_of, seconds_of
from fedinfer_flower.strategies.onboarding import Onboarding, onboard, wait_for_nodes
from fedinfer_flower.strategies.opening import LocalQuerier, job_for, secret_is_here
from fedinfer_flower.strategies.preparing import Prepared, prepare_job
from fedinfer_flower.strategies.pull_loop import Arrival, stream_replies
from fedinfer_flower.strategies.query_round import QueryRound
from fedinfer_flower.strategies.recovery_rounds import ANSWER_SHARE, recover
from fedinfer_flower.strategies.result import InferenceResult
from fedinfer_flower.strategies.sealed import batches_of, n_queries_of, request_bytes_of
from fedinfer_flower.strategies.stragglers import Stragglers
from fedinfer_flower.wire import messages
from fedinfer_flower.wire.actions import PREDICT, message_type
from fedinfer_flower.wire.directory import Directory, SiteCard
from fedinfer_flower.wire.documents import CombinedBatch, QueryJob
from fedinfer_flower.wire.records import content_digest, pack
from fedinfer_flower.wire.sealed_job import SealedBatch, SealedJob
from fedinfer_flower.wire.sealed_query import sealed_query_envelope

__all__ = ["FedEnsemble"]

log = logging.getLogger("fedinfer_flower.coordinator")


class FedEnsemble(EnsembleSettings):
    """Combine the sites' answers by an ensemble rule, under a protection.

    Parameters
    ----------
    rule : str or EnsembleRule
        ``"auto"`` picks by what the sites agree to share, and says why.
    protection : str or Protection
        What the coordinator is allowed to see.
    deadline : Deadline
        Seconds and quorum of one batch, and how long stragglers are waited for.
    fraction_query : float
        Share of the onboarded sites that are asked.
    min_query_nodes, max_query_nodes : int
        Fewest and most sites to ask.
    selector, gates : optional
        Pick among the onboarded sites, by name or object; see `fedinfer_flower.selection`.
    history : SiteHistory, optional
        What is remembered of the sites; their latencies are added to it.
    budget : float, optional
        Most credits for all queries of a job, at the sites' prices.
    evidence : bool or str
        Collect a second copy of each answer for settlement: `InferenceResult.evidence`. In
        the strongest form that the protection allows, or the one named.
    min_available_nodes : int
        Nodes to wait for before onboarding. With 0, wait until no more are joining, and
        for at least two.
    patience_s : float
        How long to wait for them.
    batch_size : int
        Queries in one message.
    classes : sequence of str, optional
        Label space of the answer; default the union of the sites' classes.
    allow_coordinator_key : bool
        Permit the querier's secret key in this process. Under `he` the coordinator can
        then read every answer, and every report says so.
    limits : WireLimits

    Raises
    ------
    IncompatibleProtection
        When built, if the rule cannot work under the protection.

    Privacy
    -------
    The coordinator reads the sites' profiles, and the queries unless they come as a
    `SealedJob`. Of the answers it sees what the protection reveals: every score under
    `plain`, noisy scores under `dp` (both only where the job is not sealed), ciphertexts
    under `he`, masked vectors under `secagg`. An array that is asked here under `secagg` is
    also opened here: the sum, and no single answer. With `he`, coordinator and querier
    together can open every site's answer.

    Examples
    --------
    >>> FedEnsemble(rule="median", protection="plain").summary().splitlines()[1]
    '├── rule: median'
    """

    def _reset(self) -> None:
        self._run_id = 0
        self._lots = 0
        self._cards: dict[int, SiteCard] = {}
        self._failures: dict[int, FedInferError] = {}
        self._onboarded: Onboarding | None = None
        self._prepared: Prepared | None = None
        self._round: QueryRound | None = None
        self._statements: list[SignedStatement] = []
        self._request_bytes = 0
        self._key_here = False
        self._chosen: Chosen | None = None
        self._book: EvidenceBook | None = None

    def configure_onboarding(
        self, grid: Grid, run_id: int, *, n_queries: int = 1, request_bytes: int = 0
    ) -> Onboarding:
        """Wait for nodes, collect their profiles, and choose whom to ask.

        `n_queries` is what a budget has to cover; the bytes are for the plan alone.
        """
        node_ids = wait_for_nodes(
            grid,
            at_least=self.min_available_nodes or max(2, self.protection.min_cohort),
            patience_s=self.patience_s,
            settle_s=0.0 if self.min_available_nodes else 0.5,
        )
        onboarding = onboard(
            grid,
            node_ids,
            run_id=run_id,
            timeout_s=self.deadline.timeout_s,
            limits=self.limits,
        )
        if run_id != self._run_id:
            # Once a run: the same rows, asked again, go to the same cohort.
            self._lots = secrets.randbits(63)
        self._run_id, self._failures = run_id, onboarding.failures
        self._cards, self._chosen = self.choosing.choose(
            onboarding.cards,
            onboarding.failures,
            seed=self._lots,
            **self.needs_of(n_queries, request_bytes),
        )
        self._onboarded = onboarding
        return onboarding

    def directory(self, grid: Grid, *, n_queries: int = 1) -> Directory:
        """Onboard the sites and return their signed cards, for a querier elsewhere.

        `start` then asks these sites, in the same run. `n_queries` is what a budget has to
        cover.
        """
        self.configure_onboarding(grid, int(grid.run.run_id), n_queries=n_queries)
        return Directory(run_id=self._run_id, cards=tuple(self._cards.values()))

    @property
    def chosen(self) -> Chosen | None:
        """What the selector chose at onboarding, and from what; None without one."""
        return self._chosen

    @property
    def cohort(self) -> dict[int, SiteCard]:
        """The sites that were chosen at onboarding, by node id."""
        return dict(self._cards)

    @property
    def outcomes(self) -> tuple[SiteOutcome, ...]:
        """How the sites have fared so far in the batch that is open, or failed."""
        return () if self._round is None else tuple(self._round.outcomes.values())

    def plan(self, grid: Grid, *, n_queries: int, request_bytes: int = 0) -> QueryPlan:
        """Return whom `start` would ask, why, and at what cost; only profiles are fetched.

        `start` asks these sites, if it follows in the same run.
        """
        self.configure_onboarding(
            grid, int(grid.run.run_id), n_queries=n_queries, request_bytes=request_bytes
        )
        needs = self.needs_of(n_queries, request_bytes)
        return (self._chosen or self.choosing.plan(self._cards, **needs)).plan

    def configure_query(
        self, query_id: str, inputs: npt.NDArray[np.generic] | SealedBatch
    ) -> list[Message]:
        """Open a batch and return one message for each site that is asked.

        All share one content, which Flower uploads once.
        """
        if self._prepared is None:
            raise ConfigError("configure_query before start: the sites are not onboarded")
        prepared = self._prepared
        if isinstance(inputs, SealedBatch):
            asked = dataclasses.replace(prepared.template, query_id=query_id)
            n_queries = inputs.n_queries
            envelope = sealed_query_envelope(inputs.sealed, query_id=query_id, run_id=self._run_id)
        else:
            asked = with_batch(prepared.template, query_id, inputs)
            n_queries = asked.n_queries
            envelope = messages.question(asked, run_id=self._run_id)
        content, ttl = pack(envelope), self.deadline.timeout_s
        self._round = QueryRound(
            asked=asked,
            n_queries=n_queries,
            content=content_digest(content),
            run_id=self._run_id,
            rule=prepared.rule,
            rule_reason=prepared.reason,
            protection=self.protection,
            cards=prepared.cards,
            failures=prepared.failures,
            limits=self.limits,
            book=self._book,
        )
        self._request_bytes = sum(len(data) for _, data in envelope.sections)
        return [
            Message(content, node_id, message_type(PREDICT), ttl=ttl, group_id=query_id)
            for node_id in prepared.cards
        ]

    def accumulate(self, arrival: Arrival) -> None:
        """Fold one reply in; a bad one is reported and leaves no trace in the sum."""
        self._open_round().accumulate(arrival)

    def aggregate_query(self, seconds: float) -> tuple[CombinedBatch, QueryReport]:
        """Close the batch; see `QueryRound.close`."""
        current, self._round = self._open_round(), None
        self._statements += current.statements
        return current.close(
            seconds=seconds,
            quorum=self.deadline.quorum,
            request_bytes=self._request_bytes,
            key_at_coordinator=self._key_here,
        )

    def start(
        self,
        grid: Grid,
        queries: npt.NDArray[np.generic] | QueryJob | SealedJob,
        *,
        progress: Progress | None = None,
    ) -> InferenceResult:
        """Ask all queries and return the combined answers.

        Parameters
        ----------
        grid : Grid
            Flower's, of a simulation or of a SuperLink.
        queries : array of shape (n_queries, ...), SealedJob or QueryJob
            A job comes from a querier elsewhere, who keeps the keys: sealed, or in clear.
            An array is for protections without a secret key.
        progress : callable, optional
            Called with (queries answered, queries asked) after every batch.

        Returns
        -------
        InferenceResult
            With a `prediction` only where the coordinator can open the answer.

        Raises
        ------
        KeyAtCoordinatorError
            If the secret key would be, or is, in this process.
        NotEnoughNodesError, QuorumNotMetError
            If too few sites are there or answer.
        """
        job, querier = job_for(queries, self)
        secret_is_here(job, self.protection, querier, allowed=self.allow_coordinator_key)
        log.info("%s", self.summary())
        run_id = int(grid.run.run_id)
        if self._onboarded is None or self._run_id != run_id:
            self.configure_onboarding(
                grid, run_id, n_queries=n_queries_of(job), request_bytes=request_bytes_of(job)
            )
        onboarding, self._onboarded = self._onboarded, None
        result = self.ask_cohort(
            grid,
            job,
            querier,
            cards=self._cards,
            all_cards=self._cards if onboarding is None else onboarding.cards,
            onboarding_s=0.0 if onboarding is None else onboarding.seconds,
            progress=progress,
        )
        log.info("%s", result.summary())
        return result

    def ask_cohort(
        self,
        grid: Grid,
        job: QueryJob | SealedJob,
        querier: LocalQuerier | None,
        *,
        cards: Mapping[int, SiteCard],
        all_cards: Mapping[int, SiteCard],
        weighed: Mapping[int, SiteCard] | None = None,
        onboarding_s: float = 0.0,
        progress: Progress | None = None,
        run_id: int | None = None,
    ) -> InferenceResult:
        """Ask a job of given sites; `start` after onboarding.

        Parameters
        ----------
        querier : Querier, optional
            Whoever opens the answer here.
        cards, all_cards : mapping of node id to SiteCard
            Those to ask, and all that a sealed job may name.
        weighed : mapping of node id to SiteCard, optional
            Sites over which class weights are normalised; default those that are asked.
        run_id : int, optional
            Of the cards, where this strategy has onboarded nobody.
        """
        self._run_id = self._run_id if run_id is None else run_id
        self._key_here = secret_is_here(
            job, self.protection, querier, allowed=self.allow_coordinator_key
        )
        prepared = self._prepared = prepare_job(
            job,
            rule=self.rule,
            protection=self.protection,
            classes=self.classes,
            cards=cards,
            all_cards=all_cards,
            failures=self._failures,
            run_id=self._run_id,
            weighed=weighed,
            evidence=self.evidence,
        )
        self.choosing.require_together(prepared.cards, self._chosen)
        self.choosing.require_affordable(prepared.cards, n_queries_of(job))
        self._statements = []
        self._book = new_book(
            job, self.protection, self.evidence, classes=prepared.template.classes
        )
        batches: list[CombinedBatch] = []
        reports: list[QueryReport] = []
        for query_id, inputs in batches_of(job):
            with span("coordinator.round", query_id=query_id, protection=self.protection.name):
                batch, report = self._run_batch(grid, query_id, inputs)
            batches.append(batch)
            reports.append(report)
            if progress is not None:
                progress(sum(b.n_queries for b in batches), n_queries_of(job))
        self.choosing.remember(
            prepared.cards, seconds_of(reports, timeout_s=self.deadline.timeout_s)
        )
        return result_of(
            job,
            prepared,
            batches,
            reports,
            protection=self.protection,
            querier=querier,
            statements=self._statements,
            key_here=self._key_here,
            onboarding_s=onboarding_s,
            plan=None if self._chosen is None else self._chosen.plan,
            book=self._book,
        )

    def _run_batch(
        self, grid: Grid, query_id: str, inputs: npt.NDArray[np.generic] | SealedBatch
    ) -> tuple[CombinedBatch, QueryReport]:
        out = self.configure_query(query_id, inputs)
        current = self._open_round()
        start = time.monotonic()
        timeout_s = self.deadline.timeout_s
        # Masks of sites that drop out take further rounds, which end by the same deadline.
        first_s = ANSWER_SHARE * timeout_s if self.protection.needs_roster else timeout_s
        least = self.protection.least_sites(current.plan.n_sites_max)
        rest = Stragglers(self.deadline, least=least, timeout_s=first_s)
        waited, size = 0.0, current.reply_bytes
        for arrival in stream_replies(
            grid, out, timeout_s=first_s, reply_bytes=size, enough_s=rest.ends_s
        ):
            self.accumulate(arrival)
            waited = arrival.seconds
            rest.note(len(current.answered), waited)
        if not current.complete:
            waited = rest.ends_s() or first_s
        current.require_answers(seconds=waited, quorum=self.deadline.quorum)
        # Before masks of dropouts are asked for: until then nobody can open the sum.
        self.choosing.require_together(current.answered, self._chosen)
        if recover(grid, current, run_id=self._run_id, start=start, timeout_s=timeout_s):
            waited = time.monotonic() - start
        return self.aggregate_query(waited)

    def _open_round(self) -> QueryRound:
        if self._round is None:
            raise ConfigError("no batch is open: call configure_query first")
        return self._round
