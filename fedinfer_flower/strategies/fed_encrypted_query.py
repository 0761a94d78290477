"""`FedEncryptedQuery`: relay encrypted queries, add up encrypted logits."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from flwr.app import Message
from flwr.serverapp import Grid

from fedinfer_flower.encrypted_query.ckks_batch import reply_bytes
from fedinfer_flower.encrypted_query.documents import (
    ACTION,
    NAME,
    EncryptedBatch,
    EncryptedJob,
    EncryptedQuestion,
)
from fedinfer_flower.errors import (
    BindingError,
    ConfigError,
    FedInferError,
    InvalidValueError,
    KeyAtCoordinatorError,
)
from fedinfer_flower.planning.label_space import shared_classes
from fedinfer_flower.privacy.base import key_id_of
from fedinfer_flower.privacy.key_presence import secret_in_process
from fedinfer_flower.query import (
    Deadline,
    QueryReport,
    SiteProfile,
)
from fedinfer_flower.strategies.base import Progress
from fedinfer_flower.strategies.cohort import choose_cohort
from fedinfer_flower.strategies.encrypted_round import EncryptedRound
from fedinfer_flower.strategies.onboarding import (
    Onboarding,
    onboard,
    wait_for_nodes,
)
from fedinfer_flower.strategies.pull_loop import Arrival, stream_replies
from fedinfer_flower.strategies.result import InferenceResult
from fedinfer_flower.wire.actions import message_type
from fedinfer_flower.wire.documents import CombinedAnswer, CombinedBatch
from fedinfer_flower.wire.envelope import DEFAULT_LIMITS, WireLimits
from fedinfer_flower.wire.records import pack

__all__ = ["EncryptedResult", "FedEncryptedQuery"]

log = logging.getLogger("fedinfer_flower.coordinator")


@dataclass(frozen=True, kw_only=True)
class EncryptedResult(InferenceResult):
    """Combined answers, and what sites chose to say about their polynomial forms.

    Parameters
    ----------
    agreements : dict of node id to float
        Share of a site's own calibration rows on which polynomial form and model agree;
        the site's word. Only sites that share it are in it.
    """

    agreements: dict[int, float] = field(default_factory=dict)

    def epsilon_delta_total(self) -> None:
        """Return None: flooding hides errors of the evaluation, it is no `dp`."""


class FedEncryptedQuery:
    """Ask sites encrypted queries and add their encrypted logits.

    Parameters
    ----------
    deadline : Deadline
        Seconds and quorum of one batch.
    min_sites : int
        Fewest sites whose sum is released. With 1 the querier sees one site's logits, and
        every site must have agreed to that.
    n_sites : int, optional
        Ask exactly so many of the onboarded sites; default all. With ``n_sites=1`` and
        ``min_sites=1`` the coordinator relays.
    min_available_nodes : int
        Nodes to wait for before onboarding; default `min_sites`.
    patience_s : float
        How long to wait for them.
    allow_coordinator_key : bool
        Permit the querier's secret key in this process, for simulations. The coordinator
        can then read every query and answer, and every report says so.
    limits : WireLimits

    Privacy
    -------
    The coordinator sees ciphertexts, the number of rows, features and classes, the sites'
    profiles and, where a site shares it, one agreement figure. It promises the sites to
    release sums of at least `min_sites` only; pooled with the querier it can have every
    site's logits opened.

    Examples
    --------
    >>> print(FedEncryptedQuery().summary().splitlines()[1])
    ├── sums: at least 3 sites
    """

    def __init__(
        self,
        *,
        deadline: Deadline | None = None,
        min_sites: int = 3,
        n_sites: int | None = None,
        min_available_nodes: int = 0,
        patience_s: float = 60.0,
        allow_coordinator_key: bool = False,
        limits: WireLimits = DEFAULT_LIMITS,
    ) -> None:
        if min_sites < 1 or min_available_nodes < 0:
            raise InvalidValueError("min_sites is at least 1, min_available_nodes at least 0")
        if n_sites is not None and n_sites < min_sites:
            raise InvalidValueError(
                f"n_sites={n_sites} is fewer than min_sites={min_sites}",
                hint="a relay of one site's logits is n_sites=1, min_sites=1",
            )
        self.deadline = deadline or Deadline()
        self.min_sites, self.n_sites = min_sites, n_sites
        self.min_available_nodes, self.patience_s = min_available_nodes, patience_s
        self.allow_coordinator_key, self.limits = allow_coordinator_key, limits
        self._run_id = 0
        self._profiles: dict[int, SiteProfile] = {}
        self._failures: dict[int, FedInferError] = {}
        self._round: EncryptedRound | None = None
        self._agreements: dict[int, float] = {}
        self._key_here = False

    # -- the verbs ---------------------------------------------------------------------

    def configure_onboarding(self, grid: Grid, run_id: int) -> Onboarding:
        """Wait for nodes, collect their profiles, and choose whom to ask."""
        node_ids = wait_for_nodes(
            grid,
            at_least=self.min_available_nodes or self.min_sites,
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
        at_least = max(self.min_sites, self.deadline.quorum)
        share = 1.0 if self.n_sites is None else 1e-9
        cards = choose_cohort(
            onboarding.cards,
            onboarding.failures,
            fraction=share,
            at_least=max(at_least, self.n_sites or 0),
        )
        self._profiles = {node_id: card.profile for node_id, card in cards.items()}
        return onboarding

    def configure_query(
        self, job: EncryptedJob, batch: EncryptedBatch, classes: tuple[str, ...]
    ) -> list[Message]:
        """Open a batch and return one message for each site that is asked."""
        asked = EncryptedQuestion(
            query_id=batch.query_id,
            n_queries=batch.n_queries,
            n_features=job.n_features,
            classes=classes,
            plan=job.plan,
            input_bound=job.input_bound,
            n_sites=len(self._profiles),
            min_sites=self.min_sites,
            public_key=job.public_key,
            inputs=batch.inputs,
            key_id=job.key_id,
        )
        self._round = EncryptedRound(
            asked, self._run_id, self._profiles, self._failures, self.limits
        )
        content, ttl = pack(asked.to_envelope(run_id=self._run_id)), self.deadline.timeout_s
        return [
            Message(content, node_id, message_type(ACTION), ttl=ttl, group_id=batch.query_id)
            for node_id in self._profiles
        ]

    def accumulate(self, arrival: Arrival) -> None:
        """Fold one reply in; a bad one is reported and leaves no trace in the sum."""
        self._open_round().accumulate(arrival)

    def aggregate_query(self, seconds: float) -> tuple[CombinedBatch, QueryReport]:
        """Close the batch.

        Raises
        ------
        QuorumNotMetError
            If fewer than `min_sites` or the quorum answered.
        """
        current, self._round = self._open_round(), None
        needed = max(self.min_sites, self.deadline.quorum)
        self._agreements |= current.agreements
        return current.close(seconds=seconds, needed=needed, key_here=self._key_here)

    # -- driving -----------------------------------------------------------------------

    def start(
        self, grid: Grid, job: EncryptedJob, *, progress: Progress | None = None
    ) -> EncryptedResult:
        """Ask all batches of a job and return the encrypted sums.

        Parameters
        ----------
        grid : Grid
        job : EncryptedJob
            Of an `EncryptedQuerier` in another process.
        progress : callable, optional
            Called with (queries answered, queries asked) after every batch.

        Raises
        ------
        KeyAtCoordinatorError
            If the job's secret key is in this process.
        NotEnoughNodesError, QuorumNotMetError
            If too few sites are there or answer.
        """
        self._key_here = self._secret_is_here(job)
        self._agreements = {}
        log.info("%s", self.summary())
        onboarding = self.configure_onboarding(grid, int(grid.run.run_id))
        classes = job.classes or shared_classes(self._profiles)
        batches: list[CombinedBatch] = []
        reports: list[QueryReport] = []
        for encrypted in job.batches:
            batch, report = self._run_batch(grid, job, encrypted, classes)
            batches.append(batch)
            reports.append(report)
            if progress is not None:
                progress(sum(b.n_queries for b in batches), job.n_queries)
        combined = CombinedAnswer(
            job_id=job.job_id,
            rule="mean-logit",
            protection=NAME,
            rule_options={},
            protection_options={"plan": job.plan.name},
            classes=classes,
            n_sites_asked=len(self._profiles),
            key_id=job.key_id,
            batches=tuple(batches),
        )
        result = EncryptedResult(
            combined=combined,
            reports=tuple(reports),
            profiles=self._profiles,
            onboarding_s=onboarding.seconds,
            agreements=dict(sorted(self._agreements.items())),
        )
        log.info("%s", result.summary())
        return result

    def summary(self) -> str:
        """Return a tree of the strategy's settings."""
        asked = "all" if self.n_sites is None else f"{self.n_sites}"
        return "\n".join(
            [
                "FedEncryptedQuery",
                f"├── sums: at least {self.min_sites} site{'s' * (self.min_sites > 1)}",
                f"├── deadline: {self.deadline.timeout_s:g} s, quorum {self.deadline.quorum}",
                f"└── sites: {asked} asked, {self.min_available_nodes or 'all'} online",
            ]
        )

    # -- parts -------------------------------------------------------------------------

    def _run_batch(
        self, grid: Grid, job: EncryptedJob, batch: EncryptedBatch, classes: tuple[str, ...]
    ) -> tuple[CombinedBatch, QueryReport]:
        out = self.configure_query(job, batch, classes)
        current = self._open_round()
        seconds = 0.0
        for arrival in stream_replies(
            grid,
            out,
            timeout_s=self.deadline.timeout_s,
            reply_bytes=reply_bytes(job.plan, len(classes)),
        ):
            self.accumulate(arrival)
            seconds = arrival.seconds
        return self.aggregate_query(seconds if current.complete else self.deadline.timeout_s)

    def _secret_is_here(self, job: EncryptedJob) -> bool:
        if not isinstance(job, EncryptedJob):
            raise KeyAtCoordinatorError(
                f"start() was given a {type(job).__name__}: it would see the query",
                hint="pass what EncryptedQuerier.ask(...) returns, made in another process",
            )
        if key_id_of(bytes(job.public_key)) != job.key_id:
            raise BindingError("the job's public key is not the one that its key id names")
        here = secret_in_process(job.key_id)
        if here and not self.allow_coordinator_key:
            raise KeyAtCoordinatorError(
                "the querier's secret key is in the coordinator's process: it could read every"
                " query and answer",
                hint="make the job with an EncryptedQuerier in another process, or accept it in"
                " a simulation: allow_coordinator_key=True",
            )
        return here

    def _open_round(self) -> EncryptedRound:
        if self._round is None:
            raise ConfigError("no batch is open: call configure_query first")
        return self._round
