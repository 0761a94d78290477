"""Metrics of a gateway: names, labels, and that labels stay few."""

from __future__ import annotations

import sys
import threading

import pytest

from fedinfer_flower.errors import InvalidValueError, MissingExtraError
from fedinfer_flower.observability.metrics import GatewayMetrics, Instrument

CANARY = "canary-7f31"


@pytest.fixture
def metrics() -> GatewayMetrics:
    pytest.importorskip("prometheus_client")
    return GatewayMetrics()


def text_of(metrics: GatewayMetrics) -> str:
    return metrics.render()[0].decode()


def test_metrics_are_shown_in_prometheus_form(metrics):
    metrics.jobs_accepted.inc(model="wine", kind="rows")
    metrics.jobs_ended.inc(model="wine", state="failed", code="FI402")
    metrics.rows.inc(5, model="wine")
    metrics.site_answers.inc(site="north", status="ok")
    metrics.refused.inc(code="FI415")
    metrics.job_seconds.observe(0.2, model="wine")
    metrics.round_seconds.observe(0.1, model="wine")
    metrics.http_seconds.observe(0.3, route="/v1/query", status=200)
    metrics.queue_rows.set(7)
    metrics.sites_online.set(3)
    metrics.epsilon_spent.set(0.75, site="north")

    body, kind = metrics.render()
    lines = set(body.decode().splitlines())

    assert kind.startswith("text/plain")
    assert {
        'fedinfer_jobs_accepted_total{kind="rows",model="wine"} 1.0',
        'fedinfer_jobs_ended_total{code="FI402",model="wine",state="failed"} 1.0',
        'fedinfer_rows_total{model="wine"} 5.0',
        'fedinfer_site_answers_total{site="north",status="ok"} 1.0',
        'fedinfer_refused_total{code="FI415"} 1.0',
        'fedinfer_job_seconds_bucket{le="0.25",model="wine"} 1.0',
        'fedinfer_round_seconds_count{model="wine"} 1.0',
        'fedinfer_http_seconds_sum{route="/v1/query",status="200"} 0.3',
        "fedinfer_queue_rows 7.0",
        "fedinfer_sites_online 3.0",
        'fedinfer_epsilon_spent{site="north"} 0.75',
    } <= lines


def test_two_gateways_in_a_process_count_apart(metrics):
    metrics.queue_rows.set(7)

    assert "fedinfer_queue_rows 0.0" in text_of(GatewayMetrics())


def test_a_label_takes_so_many_values_and_no_more(metrics):
    for place in range(1000):
        metrics.site_answers.inc(site=f"site-{place}", status="ok")

    shown = [
        x for x in text_of(metrics).splitlines() if x.startswith("fedinfer_site_answers_total")
    ]
    assert len(shown) == 257
    assert 'fedinfer_site_answers_total{site="other",status="ok"} 744.0' in shown


@pytest.mark.parametrize(
    "value", [CANARY.encode(), [CANARY], CANARY * 40, f"{CANARY}\n", None, float("nan")], ids=repr
)
def test_a_label_that_may_hold_data_is_other(metrics, value):
    metrics.refused.inc(code=value)

    assert CANARY not in text_of(metrics)
    assert 'fedinfer_refused_total{code="other"} 1.0' in text_of(metrics)


@pytest.mark.parametrize("labels", [{}, {"site": "a"}, {"site": "a", "code": "b"}], ids=str)
def test_labels_are_those_of_the_metric(metrics, labels):
    with pytest.raises(InvalidValueError, match="has the labels"):
        metrics.site_answers.inc(**labels)


def test_labels_are_checked_without_prometheus_too():
    with pytest.raises(InvalidValueError):
        Instrument(None, labels=("site",)).inc()


def test_many_threads_count_right(metrics):
    def count():
        for place in range(200):
            metrics.rows.inc(model=f"m{place % 4}")

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert 'fedinfer_rows_total{model="m3"} 200.0' in text_of(metrics)


def test_without_prometheus_everything_but_render_does_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    metrics = GatewayMetrics()
    metrics.jobs_accepted.inc(model="wine", kind="rows")
    metrics.job_seconds.observe(1.0, model="wine")
    metrics.queue_rows.set(3)

    with pytest.raises(MissingExtraError) as caught:
        metrics.render()
    assert "fedinfer-flower[metrics]" in caught.value.hint
