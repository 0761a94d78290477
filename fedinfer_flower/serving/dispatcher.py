"""`Dispatcher`: takes jobs out of the queue, in batches, and has runners run them."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from fedinfer_flower.errors import FedInferError, GatewayError
from fedinfer_flower.observability.json_logs import about
from fedinfer_flower.observability.tracing import span
from fedinfer_flower.serving.asking import least_sites
from fedinfer_flower.serving.batching import Part, Piece, Queue
from fedinfer_flower.serving.jobs import JobKind
from fedinfer_flower.serving.open_job import OpenJob
from fedinfer_flower.serving.runners import Bench, PartOfJob, runner_of

__all__ = ["Dispatcher"]

log = logging.getLogger("fedinfer_flower.gateway")

_LONGEST_WAIT_S: Final = 1.0
_WHOLE: Final = 2**62
"""Rows in a batch of a job that is not cut."""

_Handle = tuple[str, Hashable]


class Dispatcher:
    """The gateway's queue, its dispatching thread, and the threads that run batches.

    Parameters
    ----------
    bench : Bench
    asking : callable
        Called with the jobs of a batch before it is asked.
    """

    def __init__(self, bench: Bench, *, asking: Callable[[Sequence[OpenJob]], None]) -> None:
        self._bench, self._asking = bench, asking
        settings = bench.config.batching
        self._queue = Queue(in_flight=settings.in_flight)
        self._jobs: dict[str, OpenJob] = {}
        self._least = {name: least_sites(m) for name, m in bench.config.models.items()}
        self._work = threading.Condition()
        self._closed = False
        self._pool = ThreadPoolExecutor(
            max_workers=max(settings.in_flight, 1) * len(bench.config.models),
            thread_name_prefix="fedinfer-batch",
        )
        self._thread = threading.Thread(target=self._run, name="fedinfer-dispatch", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread; batches that are being asked are left to themselves."""
        with self._work:
            self._closed = True
            self._work.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout=5.0)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def add(self, job: OpenJob, *, alone: bool = False) -> None:
        """Put a job in the queue.

        Parameters
        ----------
        alone : bool
            Not in one batch with other jobs.
        """
        request, settings = job.request, self._bench.config.batching
        rows = request.kind is JobKind.ROWS
        with self._work:
            handle = self._queue.lane(
                request.model,
                _lane_key(job),
                window_s=settings.window_s if rows else 0.0,
                max_rows=settings.max_rows if rows else _WHOLE,
                together=rows,
            )
            self._jobs[job.job_id] = job
            self._queue.add(
                handle,
                Piece(
                    job_id=job.job_id,
                    owner=request.owner,
                    since=time.monotonic(),
                    start=0,
                    stop=request.n_rows,
                    alone=alone,
                ),
            )
            self._work.notify_all()

    def remove(self, job_id: str) -> None:
        """Take a job out of the queue, as far as it is in it."""
        with self._work:
            self._jobs.pop(job_id, None)
            self._queue.remove(job_id)

    def nudge(self) -> None:
        """Look again whether something can be asked: other sites are there."""
        with self._work:
            self._work.notify_all()

    def missing(self) -> Mapping[str, tuple[int, int]]:
        """Return (sites that can be asked, sites needed) of models that lack sites."""
        n_cards = len(self._bench.membership.cards())
        n_online = sum(m.online for m in self._bench.membership.members())
        found = {}
        for name, model in self._bench.config.models.items():
            # Language sites introduce themselves to the runner, by another message.
            n_sites = n_cards if model.kind == "classifier" else n_online
            if n_sites < self._least[name]:
                found[name] = (n_sites, self._least[name])
        return found

    # -- threads -----------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            blocked = frozenset(self.missing())
            with self._work:
                if self._closed:
                    return
                now = time.monotonic()
                found = self._queue.next_batch(now=now, blocked=blocked)
                if found is None:
                    wait_s = self._queue.next_at(blocked=blocked) - now
                    self._work.wait(min(max(wait_s, 0.0005), _LONGEST_WAIT_S))
                    continue
                handle, parts = found
                jobs = {p.job_id: self._jobs[p.job_id] for p in parts if p.job_id in self._jobs}
            try:
                self._pool.submit(self._run_batch, handle, parts, jobs)
            except RuntimeError:  # closed meanwhile
                return

    def _run_batch(self, handle: _Handle, parts: list[Part], jobs: Mapping[str, OpenJob]) -> None:
        open_jobs = [job for job in jobs.values() if not job.cancelled]
        try:
            if open_jobs:
                self._asking(open_jobs)
                self._ask(parts, jobs, open_jobs)
        except FedInferError as exc:
            for job in open_jobs:
                job.fail(exc)
        except Exception as exc:
            # Its text may quote what was asked: the type alone is logged.
            log.error("a batch of %s failed (%s)", handle[0], type(exc).__name__)
            for job in open_jobs:
                job.fail(GatewayError("the gateway failed on this query", hint="see its log"))
        finally:
            with self._work:
                self._queue.ended(handle, parts)
                self._work.notify_all()

    def _ask(
        self, parts: list[Part], jobs: Mapping[str, OpenJob], open_jobs: list[OpenJob]
    ) -> None:
        request = open_jobs[0].request
        strategy = self._bench.model(request.model).strategy
        with (
            about(job_id=open_jobs[0].job_id, n_jobs=len(open_jobs)),
            span("gateway.batch", model=request.model, n_jobs=len(open_jobs)),
        ):
            if request.kind is not JobKind.ROWS:
                runner_of(strategy, request.kind).run(open_jobs, self._bench)
                self._fail_left(open_jobs)
                return
            from fedinfer_flower.serving.rows_runner import RowsRunner

            asked = [
                PartOfJob(job=jobs[p.job_id], start=p.start, stop=p.stop)
                for p in parts
                if p.job_id in jobs
            ]
            RowsRunner().run_parts(asked, self._bench)

    def _fail_left(self, jobs: Sequence[OpenJob]) -> None:
        for job in jobs:
            if not job.cancelled:
                job.fail(GatewayError("the gateway gave no answer to this query"))


def _lane_key(job: OpenJob) -> Hashable:
    request = job.request
    if request.kind is not JobKind.ROWS:
        return request.kind.value
    # A batch has the deadline of its most hurried job: jobs with twice the time or more are
    # not put together with it, or one caller could have the others' batches fail.
    hurry = max(job.left_s, 1e-3)
    shape = tuple(request.facts["shape"])[1:]
    return request.facts["dtype"], shape, math.floor(math.log2(hurry))
