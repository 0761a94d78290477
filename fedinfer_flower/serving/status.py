"""What the status page shows: counted as things happen, put together when asked."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final

from fedinfer_flower.errors import FedInferError
from fedinfer_flower.incentives.payments.base import MICRO
from fedinfer_flower.observability.metrics import GatewayMetrics
from fedinfer_flower.query import QueryReport, SiteOutcome, SiteStatus
from fedinfer_flower.serving.accounting import account_of_site
from fedinfer_flower.serving.config import GatewayConfig
from fedinfer_flower.serving.jobs import Job, JobState
from fedinfer_flower.serving.membership import Member
from fedinfer_flower.wire.directory import SiteCard

__all__ = ["Chronicle", "site_rows"]

_LAST: Final = 20
_MINUTES: Final = 60
_MAX_SPENT: Final = 4096
_OTHERS: Final = "others"


class Chronicle:
    """Counts what happens in this process; all methods may be called from any thread.

    Parameters
    ----------
    clock : callable
        Seconds since 1970.

    Privacy
    -------
    Numbers, names of sites and models, key ids, and texts of typed errors. Those of this
    gateway hold no inputs; those of a site are its own words, and hold what it puts there.
    """

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self.started_at = clock()
        self._minutes: Counter[int] = Counter()
        self._jobs: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._protected: Counter[str] = Counter()
        self._spent: dict[tuple[str, str], list[float]] = {}
        self._names: dict[str, str] = {}
        self._errors: deque[dict[str, Any]] = deque(maxlen=_LAST)
        self._receipts: deque[dict[str, Any]] = deque(maxlen=_LAST)

    def note_round(
        self,
        model: str,
        reports: Sequence[QueryReport],
        cards: Mapping[int, SiteCard],
        *,
        querier: str,
        metrics: GatewayMetrics,
    ) -> None:
        """Count what was asked, and what it cost the sites at most.

        Epsilon is counted for every row of every site that answered or may have: rows that a
        site remembers are free there, which nobody else can tell.
        """
        for report in reports:
            metrics.round_seconds.observe(report.seconds, model=model)
            for site in report.sites:
                metrics.site_answers.inc(site=site.name, status=_status(site))
        with self._lock:
            for report in reports:
                self._protected[report.protection] += report.n_queries
                for site in report.sites:
                    if report.epsilon_per_query is None or site.status is SiteStatus.FAILED:
                        continue
                    self._spend(site.name, querier, report)
            for card in cards.values():
                self._names[card.key_id] = card.profile.name
            spent: Counter[str] = Counter()
            for (site_name, _), (epsilon, _delta) in self._spent.items():
                spent[site_name] += epsilon  # type: ignore[assignment]
        for name, total in spent.items():
            metrics.epsilon_spent.set(total, site=name)

    def note_outcomes(self, outcomes: Collection[SiteOutcome]) -> None:
        """Keep the errors of sites in a round that came to nothing."""
        with self._lock:
            for site in outcomes:
                if site.error_code:
                    self._errors.append(
                        {
                            "at": self._clock(),
                            "code": site.error_code,
                            "message": f"[site {site.name}] {site.error}",
                            "job_id": "",
                        }
                    )

    def note_error(self, error: FedInferError, *, job_id: str = "") -> None:
        """Keep a typed error for the list of the last ones."""
        with self._lock:
            self._errors.append(
                {
                    "at": self._clock(),
                    "code": error.code,
                    "message": error.message,
                    "job_id": job_id,
                }
            )

    def note_end(self, job: Job) -> None:
        """Count a job that ended."""
        now = self._clock()
        with self._lock:
            self._jobs[job.model] += 1
            self._minutes[int(now // 60)] += job.n_rows if job.state is JobState.DONE else 0
            for minute in [m for m in self._minutes if m < now // 60 - _MINUTES]:
                del self._minutes[minute]
            if job.state is JobState.FAILED:
                self._failed[job.model] += 1
                self._errors.append(
                    {
                        "at": now,
                        "code": job.error.get("code", ""),
                        "message": job.error.get("message", ""),
                        "job_id": job.job_id,
                    }
                )
            if job.receipt:
                self._receipts.append(
                    {
                        "job_id": job.job_id,
                        "at": now,
                        "n_rows": job.n_rows,
                        "sites": job.provenance.get("sites_answered", 0),
                    }
                )

    def facts(self, config: GatewayConfig, *, rewards: Mapping[str, int]) -> dict[str, Any]:
        """Return the lists and counts of the status page that are not about sites."""
        minute = int(self._clock() // 60)
        with self._lock:
            names = {account_of_site(key_id): name for key_id, name in self._names.items()}
            return {
                "queries_a_minute": [
                    self._minutes[m] for m in range(minute - _MINUTES + 1, minute + 1)
                ],
                "models": [
                    {
                        "id": name,
                        "kind": model.kind,
                        "protection": model.protection,
                        "rule": model.rule,
                        "jobs": self._jobs[name],
                        "failed": self._failed[name],
                    }
                    for name, model in config.models.items()
                ],
                "protections": dict(self._protected),
                "epsilon": [
                    {"site": s, "querier": q, "spent": e, "cap": None, "delta": d}
                    for (s, q), (e, d) in sorted(self._spent.items())
                ],
                "rewards": [
                    {"site": names.get(account, account), "credits": amount / MICRO}
                    for account, amount in rewards.items()
                ],
                "errors": list(self._errors),
                "receipts": list(self._receipts),
            }

    def _spend(self, site: str, querier: str, report: QueryReport) -> None:
        key = (site, querier)
        if key not in self._spent and len(self._spent) >= _MAX_SPENT:
            # Whoever seals has a fresh key each time: they are counted, and not told apart.
            key = (site, _OTHERS)
        spent = self._spent.setdefault(key, [0.0, 0.0])
        spent[0] += report.n_queries * (report.epsilon_per_query or 0.0)
        spent[1] += report.n_queries * (report.delta_per_query or 0.0)


def site_rows(members: Sequence[Member], shown: Mapping[int, SiteCard]) -> list[dict[str, Any]]:
    """Return what the status page shows of each node; one that cannot be asked says why."""
    rows = []
    for member in members:
        card = member.card
        row: dict[str, Any] = {
            "name": str(member.node_id) if card is None else card.profile.name,
            "key_id": "" if card is None else card.key_id,
            "node_id": str(member.node_id),
            "online": member.online,
            "last_seen_at": member.last_seen_at,
            "latency_s": round(member.latency_s, 6),
            "answers": member.answers,
            "failures": member.failures,
            "price_per_query": 0.0 if card is None else card.profile.price_per_query,
            "asked": member.node_id in shown,
        }
        if member.error is not None:
            row["error"] = {"code": member.error.code, "message": member.error.message}
        rows.append(row)
    return rows


def _status(site: SiteOutcome) -> str:
    if site.status is SiteStatus.ANSWERED:
        return "ok"
    return site.error_code or site.status.value
