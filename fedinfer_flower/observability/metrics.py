"""Numbers of a gateway for Prometheus, with few and harmless labels."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Sequence
from typing import Any, Final

from fedinfer_flower.errors import InvalidValueError, MissingExtraError
from fedinfer_flower.observability.fact_names import shown

__all__ = ["GatewayMetrics", "Instrument"]

_OTHER: Final = "other"
_MAX_VALUES: Final = 256
_SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Instrument:
    """One metric. Each method takes its labels by name, all of them.

    Parameters
    ----------
    metric : object, optional
        Of prometheus_client; None counts nothing.
    labels : sequence of str
    max_values : int
        Distinct values that one label may take; what comes later is counted as ``"other"``,
        so that no caller can fill the memory.
    """

    def __init__(
        self, metric: Any, *, labels: Sequence[str] = (), max_values: int = _MAX_VALUES
    ) -> None:
        self._metric, self._labels = metric, tuple(labels)
        self._known: dict[str, set[str]] = {name: set() for name in labels}
        self._max_values, self._lock = max_values, threading.Lock()

    def inc(self, amount: float = 1.0, **labels: object) -> None:
        """Count; for counters and gauges."""
        if (child := self._child(labels)) is not None:
            child.inc(amount)

    def observe(self, value: float, **labels: object) -> None:
        """Put a value into a histogram."""
        if (child := self._child(labels)) is not None:
            child.observe(value)

    def set(self, value: float, **labels: object) -> None:
        """Set a gauge."""
        if (child := self._child(labels)) is not None:
            child.set(value)

    def _child(self, labels: dict[str, object]) -> Any:
        if labels.keys() != self._known.keys():
            raise InvalidValueError(f"this metric has the labels {', '.join(self._labels)}")
        if self._metric is None:
            return None
        if not labels:
            return self._metric
        return self._metric.labels(*(self._value(name, labels[name]) for name in self._labels))

    def _value(self, name: str, value: object) -> str:
        text = shown(value)
        if text is None:
            return _OTHER
        known = self._known[name]
        with self._lock:
            if text in known or len(known) < self._max_values:
                known.add(text)
                return text
        return _OTHER


class GatewayMetrics:
    """All metrics of one gateway, in a registry of their own.

    Without prometheus_client everything but `render` does nothing.

    Attributes
    ----------
    jobs_accepted : Instrument
        Counter; labels ``model``, ``kind``.
    jobs_ended : Instrument
        Counter; ``model``, ``state``, ``code`` (empty unless it failed).
    rows : Instrument
        Counter of rows answered; ``model``.
    site_answers : Instrument
        Counter; ``site``, ``status``: ``"ok"`` or an error code.
    refused : Instrument
        Counter of what was not accepted; ``code``.
    job_seconds : Instrument
        Histogram, from accepted to ended; ``model``.
    round_seconds : Instrument
        Histogram, one question to the sites; ``model``.
    http_seconds : Instrument
        Histogram; ``route`` (the template, never the path), ``status``.
    queue_rows : Instrument
        Gauge of rows that wait.
    sites_online : Instrument
        Gauge.
    epsilon_spent : Instrument
        Gauge; ``site``.

    Privacy
    -------
    Whoever may read ``/metrics`` learns volume, speed and failures by model and by site, and
    what each site has spent; no querier, no query. Counts of few queries are not anonymous:
    give the ``metrics`` scope to operators.

    Examples
    --------
    >>> metrics = GatewayMetrics()
    >>> metrics.jobs_accepted.inc(model="wine", kind="rows")
    >>> metrics.queue_rows.set(3)
    """

    def __init__(self) -> None:
        try:
            self._client: Any = importlib.import_module("prometheus_client")
        except ImportError:
            self._client = None
        self._registry = None if self._client is None else self._client.CollectorRegistry()
        count, time, gauge = "Counter", "Histogram", "Gauge"
        self.jobs_accepted = self._make(count, "jobs_accepted", "Jobs accepted", "model", "kind")
        self.jobs_ended = self._make(
            count, "jobs_ended", "Jobs that ended", "model", "state", "code"
        )
        self.rows = self._make(count, "rows", "Rows answered", "model")
        self.site_answers = self._make(count, "site_answers", "Answers of sites", "site", "status")
        self.refused = self._make(count, "refused", "Requests not accepted", "code")
        self.job_seconds = self._make(time, "job_seconds", "Accepted to ended", "model")
        self.round_seconds = self._make(time, "round_seconds", "One round of sites", "model")
        self.http_seconds = self._make(time, "http_seconds", "HTTP requests", "route", "status")
        self.queue_rows = self._make(gauge, "queue_rows", "Rows that wait")
        self.sites_online = self._make(gauge, "sites_online", "Sites that are online")
        self.epsilon_spent = self._make(gauge, "epsilon_spent", "Epsilon spent", "site")

    def render(self) -> tuple[bytes, str]:
        """Return (body, content type) of ``/metrics``.

        Raises
        ------
        MissingExtraError
            Without prometheus_client.
        """
        if self._client is None:
            raise MissingExtraError(
                "prometheus_client is not installed",
                hint="pip install 'fedinfer-flower[metrics]'",
            )
        body: bytes = self._client.generate_latest(self._registry)
        return body, str(self._client.CONTENT_TYPE_LATEST)

    def _make(self, kind: str, name: str, words: str, *labels: str) -> Instrument:
        if self._client is None:
            return Instrument(None, labels=labels)
        options = {"buckets": _SECONDS} if kind == "Histogram" else {}
        metric = getattr(self._client, kind)(
            f"fedinfer_{name}", words, labels, registry=self._registry, **options
        )
        return Instrument(metric, labels=labels)
