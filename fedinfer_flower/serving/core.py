"""`GatewayCore`: accepts jobs, has them asked, and says how they ended."""

from __future__ import annotations

import dataclasses
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from flwr.serverapp import Grid

from fedinfer_flower.errors import (
    FedInferError,
    QueryCancelledError,
    UnavailableError,
    UnknownQueryError,
)
from fedinfer_flower.observability.audit_log import AuditLog
from fedinfer_flower.observability.metrics import GatewayMetrics
from fedinfer_flower.serving.accounting import Accounts, Money
from fedinfer_flower.serving.admission import (
    SeenRows,
    check_models,
    checked_request,
    has_exact_sums,
)
from fedinfer_flower.serving.config import GatewayConfig
from fedinfer_flower.serving.dispatcher import Dispatcher
from fedinfer_flower.serving.endings import Endings
from fedinfer_flower.serving.hub import GridHub
from fedinfer_flower.serving.jobs import Job, JobKind, JobRequest, JobState, Unsubscribe
from fedinfer_flower.serving.membership import Membership
from fedinfer_flower.serving.open_job import OpenJob
from fedinfer_flower.serving.outbox import Outbox, Stored
from fedinfer_flower.serving.restart import verdict
from fedinfer_flower.serving.room import Room
from fedinfer_flower.serving.rows_runner import rows_of
from fedinfer_flower.serving.runners import Bench
from fedinfer_flower.serving.shown import gateway_status, models_shown
from fedinfer_flower.serving.status import Chronicle
from fedinfer_flower.wire.identity import Identity

__all__ = ["GatewayCore"]

log = logging.getLogger("fedinfer_flower.gateway")

_TICK_S: Final = 0.25
_EXPIRE_S: Final = 15.0
_UNKNOWN: Final = "no query of this id, or not this key's"


class GatewayCore:
    """The gateway without its HTTP face; implements `serving.jobs.Board`.

    Parameters
    ----------
    config : GatewayConfig
        Its folder `state` has to be there.
    grid : Grid
        Flower's, which nobody else calls from now on.
    run_id : int
    identity : Identity
        Asks queries in clear, and signs receipts.
    audit : AuditLog, optional
    metrics : GatewayMetrics, optional
    clock : callable
        Seconds since 1970.
    lost_after_s : float
        Seconds without an answer of the SuperLink after which the gateway gives up.

    Raises
    ------
    ConfigError
        If a model could never be asked, or the outbox or the ledger cannot be used.

    Privacy
    -------
    The gateway is the coordinator, and of queries in clear the querier as well: it reads
    them, and what the protection shows of the answers. Sealed jobs it cannot read. Of
    the callers it knows the ids of their API keys; sites are not told of them.
    """

    def __init__(
        self,
        config: GatewayConfig,
        grid: Grid,
        *,
        run_id: int,
        identity: Identity,
        audit: AuditLog | None = None,
        metrics: GatewayMetrics | None = None,
        clock: Callable[[], float] = time.time,
        lost_after_s: float = 20.0,
    ) -> None:
        check_models(config)
        self._config, self._run_id, self._clock = config, run_id, clock
        self._lost_after_s = lost_after_s
        self._metrics = GatewayMetrics() if metrics is None else metrics
        self._accounts = Accounts.at(config.ledger)
        self._outbox = Outbox(config.state / "outbox.db", result_ttl_s=config.limits.result_ttl_s)
        self._chronicle = Chronicle(clock=clock)
        self._hub = GridHub(grid)
        pins = config.pins()
        self._members = Membership(
            self._hub, run_id=run_id, changed=self._changed, clock=clock, pins=pins
        )
        self._bench = Bench(
            hub=self._hub,
            run_id=run_id,
            membership=self._members,
            config=config,
            identity=identity,
            metrics=self._metrics,
            chronicle=self._chronicle,
            pins=pins,
        )
        self._work = Dispatcher(self._bench, asking=self._asking)
        self._open: dict[str, OpenJob] = {}
        self._lock = threading.Condition()
        self._keyed = threading.Lock()
        self._seen = {n: SeenRows() for n, m in config.models.items() if has_exact_sums(m)}
        self._ends = Endings(
            outbox=self._outbox,
            accounts=self._accounts,
            audit=audit,
            metrics=self._metrics,
            chronicle=self._chronicle,
            gone=self._gone,
            clock=clock,
        )
        self._room = Room(config.limits)
        self._draining = self._closed = False
        self._keeper = threading.Thread(target=self._keep, name="fedinfer-keeper", daemon=True)

    # -- its life ----------------------------------------------------------------------

    def start(self) -> None:
        """Start the threads, and take up what the outbox still holds."""
        self._hub.start()
        self._members.start()
        self._work.start()
        self._take_up()
        self._keeper.start()

    def drain(self, timeout_s: float) -> bool:
        """Accept nothing more, and wait for what was accepted; return whether all ended."""
        with self._lock:
            self._draining = True
            return self._lock.wait_for(lambda: not self._open, timeout=timeout_s)

    def close(self) -> None:
        """End the threads. What has not ended stays in the outbox, for the next start."""
        with self._lock:
            self._draining = self._closed = True
            self._lock.notify_all()
        if self._keeper.is_alive():
            self._keeper.join(timeout=5.0)
        self._ends.close()
        self._work.close()
        self._members.close()
        self._hub.close()
        self._outbox.close()

    @property
    def lost(self) -> str:
        """Why this run cannot go on; empty while it can."""
        if self._hub.silent_s < self._lost_after_s:
            return ""
        return f"the SuperLink has not answered for {self._hub.silent_s:.0f} s"

    def _take_up(self) -> None:
        for stored in self._outbox.unsettled():
            self._ends.settle(stored.job.job_id, Money.from_json(stored.money))
        for stored in self._outbox.unfinished():
            self._room.take(stored.request, always=True)
            job = self._opened(stored)
            refused = verdict(stored, self._config, run_id=self._run_id, now=self._clock())
            if refused is not None:
                job.fail(refused)
            else:
                self._enqueue(job)

    # -- the board ---------------------------------------------------------------------

    def submit(self, request: JobRequest) -> Job:
        """Accept a job; see `Board.submit`."""
        try:
            if request.idempotency_key:
                # One at a time, so that nobody is told of a job that is then refused.
                with self._keyed:
                    return self._submit(request)
            return self._submit(request)
        except FedInferError as exc:
            self._metrics.refused.inc(code=exc.code)
            raise

    def _submit(self, request: JobRequest) -> Job:
        if why := self._closing():
            raise UnavailableError(why, hint="ask again in a while")
        request = checked_request(request, self._config, run_id=self._run_id, now=self._clock())
        if (earlier := self._outbox.find_key(request)) is not None:
            return self._as_it_stands(earlier)
        self._room.take(request)
        try:
            stored = self._written(request)
        except BaseException:
            self._give_room(request)
            raise
        self._metrics.queue_rows.set(self._room.n_rows)
        job = self._opened(stored)
        self._ends.accepted(job)
        self._enqueue(job)
        return job.job

    def find(self, job_id: str, *, owner: str) -> Job:
        """Return a job; see `Board.find`."""
        if (job := self._open.get(job_id)) is not None:
            if job.request.owner == owner:
                return job.job
            raise UnknownQueryError(_UNKNOWN)
        stored = self._outbox.find(job_id)
        if stored is None or stored.job.owner != owner:
            raise UnknownQueryError(_UNKNOWN)
        return self._as_it_stands(stored)

    def cancel(self, job_id: str, *, owner: str) -> Job:
        """Call a job off; see `Board.cancel`."""
        self.find(job_id, owner=owner)
        if (job := self._open.get(job_id)) is not None:
            error = QueryCancelledError("the query was called off by its owner")
            self._ends.end(job, JobState.CANCELLED, error=error)
        return self.find(job_id, owner=owner)

    def listen(self, job_id: str, *, owner: str, tell: Callable[[Job], None]) -> Unsubscribe:
        """Call `tell` at every change; see `Board.listen`."""
        found = self.find(job_id, owner=owner)
        if (job := self._open.get(job_id)) is not None:
            return job.listen(tell)
        # It ended, perhaps just now.
        tell(found if found.state.ended else self.find(job_id, owner=owner))
        return lambda: None

    def models(self) -> tuple[Mapping[str, Any], ...]:
        """Return what `/v1/models` shows."""
        return models_shown(self._config, created_at=self._chronicle.started_at)

    def directory(self, model: str) -> bytes:
        """Return `Directory.to_bytes` of the sites; see `Board.directory`."""
        settings = self._config.models.get(model)
        if settings is None:
            raise UnavailableError("no model of this name has a directory")
        return self._members.directory().to_bytes()

    def status(self) -> Mapping[str, Any]:
        """Return what the dashboard shows."""
        ready, why = self.ready()
        rewards = {} if self._accounts is None else self._accounts.rewards()
        return gateway_status(
            self._config,
            self._members,
            self._chronicle,
            run_id=self._run_id,
            ready=ready,
            why=why,
            queue_rows=self._room.n_rows,
            rewards=rewards,
        )

    def ready(self) -> tuple[bool, str]:
        """Return (whether queries would be answered now, why not)."""
        why = self._closing() or self.lost or self._ends.broken
        if why:
            return False, why
        missing = self._work.missing()
        if len(missing) == len(self._config.models):
            name, (here, needed) = next(iter(missing.items()))
            return False, f"model {name!r} needs {needed} sites, {here} can be asked"
        return True, ""

    # -- within ------------------------------------------------------------------------

    def _closing(self) -> str:
        return "the gateway is closing" if self._draining else ""

    def _give_room(self, request: JobRequest) -> None:
        self._room.give_back(request)
        self._metrics.queue_rows.set(self._room.n_rows)
        with self._lock:
            self._lock.notify_all()

    def _written(self, request: JobRequest) -> Stored:
        """Write a job to the outbox, and have its fee set aside."""
        now = self._clock()
        job = Job(
            job_id=secrets.token_hex(16),
            owner=request.owner,
            model=request.model,
            kind=request.kind,
            n_rows=request.n_rows,
            state=JobState.ACCEPTED,
            accepted_at=now,
            deadline_at=now + request.timeout_s,
        )
        accounts = self._accounts
        money = None
        if accounts is not None:
            model = self._config.models[job.model]
            money = accounts.price(job, model, self._members.cards())
        text = "" if money is None else money.to_json()
        stored, _ = self._outbox.add(job, request, run_id=self._run_id, money=text)
        if money is None or accounts is None:
            return stored
        try:
            accounts.reserve(money)
        except FedInferError:
            self._outbox.forget(job.job_id)
            raise
        held = money.held().to_json()
        self._outbox.set_money(job.job_id, held)
        return dataclasses.replace(stored, money=held)

    def _opened(self, stored: Stored) -> OpenJob:
        job = OpenJob(
            stored.job, stored.request, ends=self._ends, money=stored.money, clock=self._clock
        )
        with self._lock:
            if self._closed:
                raise UnavailableError("the gateway is closing")
            self._open[job.job_id] = job
        return job

    def _enqueue(self, job: OpenJob) -> None:
        seen = self._seen.get(job.request.model)
        alone = seen is not None and job.request.kind is JobKind.ROWS and seen.note(rows_of(job))
        self._work.add(job, alone=alone)
        if job.cancelled:  # called off meanwhile
            self._work.remove(job.job_id)

    def _as_it_stands(self, stored: Stored) -> Job:
        job = self._open.get(stored.job.job_id)
        if job is not None:
            return job.job
        if stored.job.state.ended:
            return stored.job
        # It ended between the two looks.
        latest = self._outbox.find(stored.job.job_id)
        return stored.job if latest is None else latest.job

    def _asking(self, jobs: Sequence[OpenJob]) -> None:
        self._outbox.mark_asking([job.job_id for job in jobs], run_id=self._run_id)
        for job in jobs:
            job.begin()

    def _gone(self, job: OpenJob) -> None:
        self._work.remove(job.job_id)
        with self._lock:
            self._open.pop(job.job_id, None)
        self._give_room(job.request)

    def _changed(self) -> None:
        self._metrics.sites_online.set(len(self._members.cards()))
        self._work.nudge()

    def _keep(self) -> None:
        """End jobs at their deadlines, whatever the sites and the runners do."""
        expire_at = 0.0
        while not self._closed:
            jobs = list(self._open.values())
            for job in jobs:
                if job.left_s <= 0.0:
                    self._ends.late(job, missing=self._work.missing().get(job.request.model))
            if time.monotonic() >= expire_at:
                expire_at = time.monotonic() + _EXPIRE_S
                self._tidy()
            next_s = min((job.left_s for job in jobs if job.left_s > 0.0), default=_TICK_S)
            with self._lock:
                self._lock.wait_for(lambda: self._closed, timeout=min(next_s + 0.001, _TICK_S))

    def _tidy(self) -> None:
        try:
            self._outbox.expire(self._clock())
            for stored in self._outbox.unsettled():
                self._ends.settle(stored.job.job_id, Money.from_json(stored.money))
        except FedInferError as exc:
            log.error("tidying the outbox: %s", exc.code)
