"""`FedEnsemble`: ask the sites, add up what they answer, hand the sum to the querier."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Message
from flwr.serverapp import Grid

from fedinfer_flower.ensemble.auto import pick_rule
from fedinfer_flower.ensemble.base import EnsembleRule, Evidence, make_rule
from fedinfer_flower.errors import (
    BindingError,
    ConfigError,
    FedInferError,
    IncompatibleProtection,
    InvalidValueError,
    KeyAtCoordinatorError,
    QuorumNotMetError,
    ShapeError,
)
from fedinfer_flower.privacy.base import (
    CoordinatorSide,
    Protection,
    ScorePlan,
    key_id_of,
    make_protection,
)
from fedinfer_flower.privacy.key_presence import secret_in_process
from fedinfer_flower.privacy.legality import require_legal
from fedinfer_flower.query import (
    Deadline,
    QueryId,
    QueryReport,
    SiteId,
    SiteOutcome,
    SiteProfile,
    SiteStatus,
)
from fedinfer_flower.strategies.base import InferenceStrategy, Progress
from fedinfer_flower.strategies.config import InferConfig
from fedinfer_flower.strategies.onboarding import (
    Onboarding,
    class_totals,
    onboard,
    read_arrival,
    shared_classes,
    wait_for_nodes,
)
from fedinfer_flower.strategies.pull_loop import Arrival, stream_replies
from fedinfer_flower.strategies.result import InferenceResult
from fedinfer_flower.wire import messages
from fedinfer_flower.wire.actions import PREDICT, message_type
from fedinfer_flower.wire.documents import CombinedAnswer, CombinedBatch, QueryJob
from fedinfer_flower.wire.envelope import DEFAULT_LIMITS, WireLimits
from fedinfer_flower.wire.messages import Question
from fedinfer_flower.wire.records import pack

__all__ = ["FedEnsemble"]

log = logging.getLogger("fedinfer_flower.coordinator")


@dataclass(kw_only=True)
class _Round:
    """State of one batch; thrown away with it."""

    asked: Question
    side: CoordinatorSide
    messages_out: list[Message]
    request_bytes: int
    outcomes: dict[int, SiteOutcome] = field(default_factory=dict)


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
        Nodes to wait for before onboarding.
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
    The coordinator reads the queries and the sites' profiles. Of the answers it sees
    what the protection reveals: everything under `plain`, noisy scores under `dp`,
    ciphertexts under `he`. With `he`, coordinator and querier together can open every
    site's answer.

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
        min_available_nodes: int = 2,
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
        if min(min_query_nodes, min_available_nodes, batch_size) < 1:
            raise InvalidValueError(
                "min_query_nodes, min_available_nodes and batch_size are at least 1"
            )
        self.deadline = deadline or Deadline()
        self.fraction_query = fraction_query
        self.min_query_nodes = min_query_nodes
        self.min_available_nodes = max(min_available_nodes, self.protection.min_cohort)
        self.patience_s = patience_s
        self.batch_size = batch_size
        self.classes = None if classes is None else tuple(str(c) for c in classes)
        self.allow_coordinator_key = allow_coordinator_key
        self.limits = limits
        self._run_id = 0
        self._picked: tuple[EnsembleRule, str] | None = None
        self._profiles: dict[int, SiteProfile] = {}
        self._failures: dict[int, FedInferError] = {}
        self._template: Question | None = None
        self._round: _Round | None = None

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

    # -- the four verbs ---------------------------------------------------------------

    def configure_onboarding(self, grid: Grid, run_id: int) -> Onboarding:
        """Wait for nodes and collect their profiles."""
        node_ids = wait_for_nodes(
            grid, at_least=self.min_available_nodes, patience_s=self.patience_s
        )
        self._run_id = run_id
        onboarding = onboard(
            grid,
            node_ids,
            run_id=run_id,
            timeout_s=self.deadline.timeout_s,
            limits=self.limits,
        )
        self._failures = onboarding.failures
        self._profiles = self._choose(onboarding.profiles)
        return onboarding

    def configure_query(
        self, query_id: str, inputs: npt.NDArray[np.generic], grid: Grid
    ) -> list[Message]:
        """Return one message for each site that is asked.

        All share one content, which Flower uploads once.
        """
        template, (rule, _) = self._template, self._require_picked()
        if template is None:
            raise ConfigError("configure_query before start: the sites are not onboarded")
        asked = _with_batch(template, query_id, inputs)
        plan = self._plan(rule, asked)
        envelope = messages.question(asked, run_id=self._run_id)
        content = pack(envelope)
        out = [
            grid.create_message(
                content, message_type(PREDICT), node_id, query_id, ttl=self.deadline.timeout_s
            )
            for node_id in self._profiles
        ]
        side = self.protection.coordinator_side(
            plan, n_queries=asked.n_queries, rule=rule, public_key=asked.public_key
        )
        request_bytes = sum(len(data) for _, data in envelope.sections)
        self._round = _Round(asked=asked, side=side, messages_out=out, request_bytes=request_bytes)
        for node_id, error in self._failures.items():
            self._record(node_id, SiteStatus.FAILED, error=error)
        return out

    def accumulate(self, arrival: Arrival) -> None:
        """Fold one reply in; a bad one is reported and leaves no trace in the sum."""
        current = self._require_round()
        node_id = arrival.node_id
        if node_id in current.outcomes:  # a second reply is never counted
            return
        rule, _ = self._require_picked()
        payload: bytes | memoryview = b""
        try:
            envelope = read_arrival(arrival, run_id=self._run_id, limits=self.limits)
            payload = messages.read_answer(
                envelope,
                current.asked,
                run_id=self._run_id,
                sender=node_id,
                width=rule.score_width(len(current.asked.classes)),
                commitment=self._profiles[node_id].commitment(),
            )
            current.side.add(payload)
        except FedInferError as exc:
            self._record(
                node_id,
                SiteStatus.FAILED,
                error=exc,
                payload_bytes=len(payload),
                seconds=arrival.seconds,
            )
            return
        self._record(
            node_id, SiteStatus.ANSWERED, payload_bytes=len(payload), seconds=arrival.seconds
        )

    def aggregate_query(self, seconds: float) -> tuple[CombinedBatch, QueryReport]:
        """Close the batch.

        Raises
        ------
        QuorumNotMetError
            If fewer sites answered than the quorum, or than the protection needs in a
            sum before it may be released.
        """
        current = self._require_round()
        for node_id in self._profiles:
            if node_id not in current.outcomes:
                self._record(node_id, SiteStatus.LATE, seconds=seconds)
        report = self._report(current, seconds)
        needed = max(self.deadline.quorum, self.protection.min_cohort)
        n_sites = len(report.answered)
        if n_sites < needed:
            reasons = "; ".join(
                f"{s.name}: {s.status.value} {s.error_code}".strip()
                for s in report.sites
                if s.status is not SiteStatus.ANSWERED
            )
            raise QuorumNotMetError(
                f"{n_sites} of {len(report.sites)} sites answered query"
                f" {current.asked.query_id} in {seconds:.1f} s, {needed} are needed ({reasons})",
                hint="raise deadline.timeout_s, lower quorum, or mend the sites named",
            )
        batch = CombinedBatch(
            query_id=current.asked.query_id,
            n_queries=current.asked.n_queries,
            n_sites=n_sites,
            total=current.side.total(),
        )
        self._round = None
        return batch, report

    # -- driving ----------------------------------------------------------------------

    def start(
        self,
        grid: Grid,
        queries: npt.NDArray[np.generic] | QueryJob,
        *,
        progress: Progress | None = None,
    ) -> InferenceResult:
        """Ask all queries and return the combined answers.

        Parameters
        ----------
        grid : Grid
            Flower's, of a simulation or of a SuperLink.
        queries : array of shape (n_queries, ...) or QueryJob
            A `QueryJob` comes from a querier elsewhere, who keeps the key. An array is
            for protections that have none.
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
        from fedinfer_flower.strategies.opening import job_for, open_here

        job, opener = job_for(queries, self)
        key_here = self._check_key(job)
        log.info("%s", self.summary())
        onboarding = self.configure_onboarding(grid, _run_id(grid))
        self._template = self._make_template(job)
        rule, reason = self._require_picked()
        batches: list[CombinedBatch] = []
        reports: list[QueryReport] = []
        done = 0
        for query_id, inputs in job.batches():
            batch, report = self._run_batch(grid, query_id, inputs)
            batches.append(batch)
            reports.append(_with_key_flag(report, key_here))
            done += batch.n_queries
            if progress is not None:
                progress(done, len(job.inputs))
        combined = CombinedAnswer(
            job_id=job.job_id,
            rule=rule.name,
            protection=self.protection.name,
            rule_options=rule.options(),
            protection_options=self.protection.options(),
            classes=self._template.classes,
            n_sites_asked=self._template.n_sites,
            key_id=job.key_id,
            batches=tuple(batches),
        )
        result = InferenceResult(
            combined=combined,
            reports=tuple(reports),
            profiles=self._profiles,
            prediction=open_here(opener, combined),
            onboarding_s=onboarding.seconds,
        )
        log.info("%s", result.summary())
        return result

    def summary(self) -> str:
        """Return a tree of the strategy's settings."""
        rule = "auto" if self.rule is None else self.rule.name
        return "\n".join(
            [
                "FedEnsemble",
                f"├── rule: {rule}",
                f"├── protection: {self.protection.name} {self.protection.options() or ''}".rstrip(),
                f"├── deadline: {self.deadline.timeout_s:g} s, quorum {self.deadline.quorum}",
                f"├── sites: fraction {self.fraction_query:g},"
                f" at least {self.min_query_nodes} asked, {self.min_available_nodes} online",
                f"└── batch: {self.batch_size} queries a message",
            ]
        )

    # -- parts ------------------------------------------------------------------------

    def _run_batch(
        self, grid: Grid, query_id: str, inputs: npt.NDArray[np.generic]
    ) -> tuple[CombinedBatch, QueryReport]:
        out = self.configure_query(query_id, inputs, grid)
        current = self._require_round()
        rule, _ = self._require_picked()
        expected = self.protection.payload_bytes(self._plan(rule, current.asked), len(inputs))
        seconds = 0.0
        for arrival in stream_replies(
            grid, out, timeout_s=self.deadline.timeout_s, reply_bytes=expected
        ):
            self.accumulate(arrival)
            seconds = arrival.seconds
        answered = [o for o in current.outcomes.values() if o.status is SiteStatus.ANSWERED]
        complete = len(answered) + len(self._failures) >= len(current.outcomes) == len(
            self._profiles
        ) + len(self._failures)
        return self.aggregate_query(seconds if complete else self.deadline.timeout_s)

    def _check_key(self, job: QueryJob) -> bool:
        if not self.protection.needs_key:
            return False
        if key_id_of(job.public_key) != job.key_id or not job.key_id:
            raise BindingError("the job's public key is not the one that its key id names")
        here = secret_in_process(job.key_id)
        if here and not self.allow_coordinator_key:
            raise KeyAtCoordinatorError(
                f"the secret key for {self.protection.name!r} is in the coordinator's process:"
                " it could read every site's answer",
                hint="make the job with a Querier in another process (see 'fedinfer querier"
                " new'), use protection 'dp', or accept it: allow_coordinator_key=True",
            )
        return here

    def _choose(self, profiles: dict[int, SiteProfile]) -> dict[int, SiteProfile]:
        wanted = max(
            math.ceil(self.fraction_query * len(profiles)),
            self.min_query_nodes,
            self.protection.min_cohort,
        )
        if len(profiles) < max(wanted, self.deadline.quorum):
            reasons = "; ".join(f"{n}: {e.code} {e.message}" for n, e in self._failures.items())
            raise QuorumNotMetError(
                f"{len(profiles)} sites can answer,"
                f" {max(wanted, self.deadline.quorum)} are needed ({reasons or 'none failed'})",
                hint="start more sites, or mend those named",
            )
        if wanted >= len(profiles):
            return profiles
        # The cohort is drawn once a run, not per batch: two overlapping cohorts of one
        # query would let their difference single out a site.
        lots = np.random.default_rng().permutation(sorted(profiles))[:wanted]
        return {node_id: profiles[node_id] for node_id in sorted(int(n) for n in lots)}

    def _make_template(self, job: QueryJob) -> Question:
        classes = job.classes or self.classes or shared_classes(self._profiles)
        totals, kind = class_totals(self._profiles, classes)
        if self.rule is None:
            options = self.protection.options()
            mechanism = options.get("mechanism")
            self._picked = pick_rule(
                list(self._profiles.values()),
                self.protection.name,
                None if mechanism is None else str(mechanism),
            )
            require_legal(self._picked[0], self.protection)
        else:
            self._picked = (self.rule, "asked for")
        rule = self._picked[0]
        self._require_evidence(rule, totals is not None)
        return Question(
            query_id="template",
            inputs=job.inputs[:0],
            classes=classes,
            n_sites=len(self._profiles),
            rule=rule.name,
            protection=self.protection.name,
            rule_options=rule.options(),
            protection_options=self.protection.options(),
            class_totals=totals,
            counts_kind=kind,
            public_key=job.public_key,
            key_id=job.key_id,
        )

    def _require_evidence(self, rule: EnsembleRule, have_totals: bool) -> None:
        if Evidence.CLASS_COUNTS in rule.needs and not have_totals:
            names = [p.name for p in self._profiles.values() if p.class_counts is None]
            raise IncompatibleProtection(
                f"rule {rule.name!r} needs class counts or presence bits;"
                f" withheld by {', '.join(names)}",
                hint="use rule 'auto', or ask those sites for share_counts='presence'",
            )
        if Evidence.FAMILIARITY in rule.needs:
            names = [p.name for p in self._profiles.values() if not p.familiarity]
            if names:
                raise IncompatibleProtection(
                    f"rule {rule.name!r} needs familiarity; {', '.join(names)} cannot measure it",
                    hint="use rule 'auto', or give LocalModel(reference_inputs=...) there",
                )

    def _plan(self, rule: EnsembleRule, asked: Question) -> ScorePlan:
        return ScorePlan.for_rule(rule, n_classes=len(asked.classes), n_sites_max=asked.n_sites)

    def _record(
        self,
        node_id: int,
        status: SiteStatus,
        *,
        error: FedInferError | None = None,
        payload_bytes: int = 0,
        seconds: float = 0.0,
    ) -> None:
        profile = self._profiles.get(node_id)
        name = str(node_id) if profile is None else profile.name
        if error is not None:
            error = error.at_site(name)
            log.warning("%s", error)
        self._require_round().outcomes[node_id] = SiteOutcome(
            site_id=SiteId(node_id),
            name=name,
            status=status,
            payload_bytes=payload_bytes,
            seconds=seconds,
            error_code="" if error is None else error.code,
            error="" if error is None else error.message,
        )

    def _report(self, current: _Round, seconds: float) -> QueryReport:
        rule, reason = self._require_picked()
        spent = self.protection.epsilon_delta(self._plan(rule, current.asked))
        return QueryReport(
            query_id=QueryId(current.asked.query_id),
            n_queries=current.asked.n_queries,
            rule=rule.name,
            protection=self.protection.name,
            rule_reason=reason,
            sites=tuple(current.outcomes[n] for n in sorted(current.outcomes)),
            seconds=seconds,
            request_bytes=current.request_bytes,
            epsilon_per_query=None if spent is None else spent[0],
            delta_per_query=None if spent is None else spent[1],
        )

    def _require_round(self) -> _Round:
        if self._round is None:
            raise ConfigError("no batch is open: call configure_query first")
        return self._round

    def _require_picked(self) -> tuple[EnsembleRule, str]:
        if self._picked is None:
            raise ConfigError("no rule is picked yet: call start")
        return self._picked
