"""`FedEnsemble`: ask the sites, add up what they answer, hand the sum to the querier."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Message
from flwr.serverapp import Grid

from fedinfer_flower.ensemble.base import EnsembleRule, make_rule
from fedinfer_flower.errors import (
    ConfigError,
    FedInferError,
    InvalidValueError,
)
from fedinfer_flower.planning.question import with_batch
from fedinfer_flower.privacy.base import Protection, make_protection
from fedinfer_flower.privacy.legality import require_legal
from fedinfer_flower.query import Deadline, QueryReport
from fedinfer_flower.receipts.statement import SignedStatement
from fedinfer_flower.strategies.base import InferenceStrategy, Progress
from fedinfer_flower.strategies.cohort import choose_cohort
from fedinfer_flower.strategies.config import InferConfig
from fedinfer_flower.strategies.onboarding import Onboarding, onboard, wait_for_nodes
from fedinfer_flower.strategies.opening import job_for, open_here, secret_is_here
from fedinfer_flower.strategies.preparing import Prepared, prepare_job
from fedinfer_flower.strategies.pull_loop import Arrival, stream_replies
from fedinfer_flower.strategies.query_round import QueryRound
from fedinfer_flower.strategies.recovery_rounds import ANSWER_SHARE, recover
from fedinfer_flower.strategies.result import InferenceResult
from fedinfer_flower.strategies.sealed import (
    batches_of,
    n_queries_of,
)
from fedinfer_flower.strategies.settling import receipt_of
from fedinfer_flower.wire import messages
from fedinfer_flower.wire.actions import PREDICT, message_type
from fedinfer_flower.wire.directory import Directory, SiteCard
from fedinfer_flower.wire.documents import CombinedAnswer, CombinedBatch, QueryJob
from fedinfer_flower.wire.envelope import DEFAULT_LIMITS, WireLimits
from fedinfer_flower.wire.records import content_digest, pack
from fedinfer_flower.wire.sealed_job import SealedBatch, SealedJob
from fedinfer_flower.wire.sealed_query import sealed_query_envelope

__all__ = ["FedEnsemble"]

log = logging.getLogger("fedinfer_flower.coordinator")


class FedEnsemble(InferenceStrategy):
    """Combine the sites' answers by an ensemble rule, under a protection.

    Parameters
    ----------
    rule : str or EnsembleRule
        ``"auto"`` picks by what the sites agree to share, and says why.
    protection : str or Protection
        What the coordinator is allowed to see.
    deadline : Deadline
        Seconds and quorum of one batch.
    fraction_query : float
        Share of the onboarded sites that are asked.
    min_query_nodes : int
        Fewest sites to ask, whatever the fraction.
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

    def __init__(
        self,
        *,
        rule: str | EnsembleRule = "auto",
        protection: str | Protection = "plain",
        deadline: Deadline | None = None,
        fraction_query: float = 1.0,
        min_query_nodes: int = 1,
        min_available_nodes: int = 0,
        patience_s: float = 60.0,
        batch_size: int = 1024,
        classes: tuple[str, ...] | list[str] | None = None,
        allow_coordinator_key: bool = False,
        limits: WireLimits = DEFAULT_LIMITS,
    ) -> None:
        self.protection = (
            make_protection(protection, {}) if isinstance(protection, str) else protection
        )
        self.rule: EnsembleRule | None
        if isinstance(rule, str):
            self.rule = None if rule == "auto" else make_rule(rule, {})
        else:
            self.rule = rule
        if self.rule is not None:
            require_legal(self.rule, self.protection)
        if not 0.0 < fraction_query <= 1.0:
            raise InvalidValueError(f"fraction_query is in (0, 1], got {fraction_query}")
        if min(min_query_nodes, batch_size) < 1 or min_available_nodes < 0:
            raise InvalidValueError(
                "min_query_nodes and batch_size are at least 1, min_available_nodes at least 0"
            )
        if classes is not None and (not classes or len(set(classes)) != len(classes)):
            raise InvalidValueError("classes are at least one, and none twice")
        self.deadline = deadline or Deadline()
        self.fraction_query = fraction_query
        self.min_query_nodes = min_query_nodes
        self.min_available_nodes = min_available_nodes
        self.patience_s = patience_s
        self.batch_size = batch_size
        self.classes = None if classes is None else tuple(str(c) for c in classes)
        self.allow_coordinator_key = allow_coordinator_key
        self.limits = limits
        self._run_id = 0
        self._cards: dict[int, SiteCard] = {}
        self._failures: dict[int, FedInferError] = {}
        self._onboarded: Onboarding | None = None
        self._prepared: Prepared | None = None
        self._round: QueryRound | None = None
        self._statements: list[SignedStatement] = []
        self._request_bytes = 0
        self._key_here = False

    @classmethod
    def from_run_config(cls, run_config: Mapping[str, Any], **overrides: Any) -> FedEnsemble:
        """Build from the ``fedinfer.*`` keys of ``[tool.flwr.app.config]``.

        Parameters
        ----------
        run_config : mapping
            ``context.run_config``. Keys without the prefix are the app's own.
        **overrides
            Arguments of the constructor that the app fixes itself.

        Raises
        ------
        UnknownConfigKeyError
            For a ``fedinfer.*`` key that nothing reads, with "did you mean".
        """
        return cls(**(InferConfig.from_run_config(run_config).strategy_arguments() | overrides))

    # -- the verbs ---------------------------------------------------------------------

    def configure_onboarding(self, grid: Grid, run_id: int) -> Onboarding:
        """Wait for nodes, collect their profiles, and choose whom to ask."""
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
        self._run_id, self._failures = run_id, onboarding.failures
        self._cards = choose_cohort(
            onboarding.cards,
            onboarding.failures,
            fraction=self.fraction_query,
            at_least=max(self.min_query_nodes, self.protection.min_cohort, self.deadline.quorum),
        )
        self._onboarded = onboarding
        return onboarding

    def directory(self, grid: Grid) -> Directory:
        """Onboard the sites and return their signed cards, for a querier elsewhere.

        `start` then asks these sites, in the same run.
        """
        self.configure_onboarding(grid, _run_id(grid))
        return Directory(run_id=self._run_id, cards=tuple(self._cards.values()))

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

    # -- driving ----------------------------------------------------------------------

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
        self._key_here = secret_is_here(
            job, self.protection, querier, allowed=self.allow_coordinator_key
        )
        log.info("%s", self.summary())
        run_id = _run_id(grid)
        if self._onboarded is None or self._run_id != run_id:
            self.configure_onboarding(grid, run_id)
        onboarding, self._onboarded = self._onboarded, None
        prepared = self._prepared = prepare_job(
            job,
            rule=self.rule,
            protection=self.protection,
            classes=self.classes,
            cards=self._cards,
            all_cards=self._cards if onboarding is None else onboarding.cards,
            failures=self._failures,
            run_id=run_id,
        )
        self._statements = []
        batches: list[CombinedBatch] = []
        reports: list[QueryReport] = []
        for query_id, inputs in batches_of(job):
            batch, report = self._run_batch(grid, query_id, inputs)
            batches.append(batch)
            reports.append(report)
            if progress is not None:
                progress(sum(b.n_queries for b in batches), n_queries_of(job))
        combined = CombinedAnswer(
            job_id=job.job_id,
            rule=prepared.rule.name,
            protection=self.protection.name,
            rule_options=prepared.rule.options(),
            protection_options=self.protection.options(),
            classes=prepared.template.classes,
            n_sites_asked=prepared.template.n_sites,
            key_id=job.key_id,
            batches=tuple(batches),
            roster=prepared.template.roster,
            relayed=prepared.template.relay,
        )
        result = InferenceResult(
            combined=combined,
            reports=tuple(reports),
            profiles={n: card.profile for n, card in prepared.cards.items()},
            prediction=open_here(querier, combined),
            onboarding_s=0.0 if onboarding is None else onboarding.seconds,
            receipt=receipt_of(
                self._statements,
                tuple(reports),
                prepared.cards,
                key_at_coordinator=self._key_here,
                roster=combined.roster,
            ),
        )
        log.info("%s", result.summary())
        return result

    def summary(self) -> str:
        """Return a tree of the strategy's settings."""
        rule = "auto" if self.rule is None else self.rule.name
        online = self.min_available_nodes or "all"
        options = ", ".join(f"{k}={v}" for k, v in self.protection.options().items())
        return "\n".join(
            [
                "FedEnsemble",
                f"├── rule: {rule}",
                f"├── protection: {self.protection.name}{f' ({options})' if options else ''}",
                f"├── deadline: {self.deadline.timeout_s:g} s, quorum {self.deadline.quorum}",
                f"├── sites: fraction {self.fraction_query:g},"
                f" at least {self.min_query_nodes} asked, {online} online",
                f"└── batch: {self.batch_size} queries a message",
            ]
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
        waited = 0.0
        for arrival in stream_replies(
            grid, out, timeout_s=first_s, reply_bytes=current.reply_bytes
        ):
            self.accumulate(arrival)
            waited = arrival.seconds
        if not current.complete:
            waited = first_s
        current.require_answers(seconds=waited, quorum=self.deadline.quorum)
        if recover(grid, current, run_id=self._run_id, start=start, timeout_s=timeout_s):
            waited = time.monotonic() - start
        return self.aggregate_query(waited)

    def _open_round(self) -> QueryRound:
        if self._round is None:
            raise ConfigError("no batch is open: call configure_query first")
        return self._round


def _run_id(grid: Grid) -> int:
    return int(grid.run.run_id)
