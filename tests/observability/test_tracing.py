"""Traces: one query, one trace, whichever role made the span; and nothing of the query in it."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest

from fedinfer_flower.errors import BudgetExceededError, MissingExtraError
from fedinfer_flower.observability import tracing
from fedinfer_flower.observability.tracing import (
    configure_tracing,
    from_headers,
    headers_out,
    span,
    trace_id,
)

CANARY = "canary-7f31"


@pytest.fixture
def exported(monkeypatch):
    """Yield what was exported, of a provider that only this test sees."""
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    yield exporter.get_finished_spans
    provider.shutdown()


def in_trace(found) -> str:
    return f"{found.context.trace_id:032x}"


def test_trace_ids_are_a_digest_of_the_query_id():
    digest = hashlib.sha256(b"fedinfer trace v1\0" + b"q1").hexdigest()

    assert trace_id("q1") == digest[:32]
    assert trace_id("q2") != trace_id("q1")


def test_spans_of_three_roles_join_in_one_trace(exported):
    # Nothing passes between them: each role works the trace out of the query id.
    for name in ("querier.ask", "gateway.round", "site.answer"):
        with span(name, query_id="q1"):
            pass

    spans = exported()
    assert [s.name for s in spans] == ["querier.ask", "gateway.round", "site.answer"]
    assert {in_trace(s) for s in spans} == {trace_id("q1")}
    assert len({s.parent.span_id for s in spans}) == 1
    assert len({s.context.span_id for s in spans}) == 3


def test_a_span_inside_one_of_the_same_query_is_its_child(exported):
    with span("gateway.round", query_id="q1"):
        with span("gateway.open", query_id="q1"):
            pass
        with span("gateway.combine"):
            pass

    inner, other, outer = exported()
    assert inner.parent.span_id == other.parent.span_id == outer.context.span_id
    assert {in_trace(s) for s in exported()} == {trace_id("q1")}


def test_a_span_of_another_query_is_linked_to_what_it_is_in(exported):
    with span("gateway.job", query_id="job"), span("gateway.round", query_id="q1"):
        pass

    inner, outer = exported()
    assert in_trace(inner) == trace_id("q1")
    assert [link.context.span_id for link in inner.links] == [outer.context.span_id]


def test_attributes_are_of_the_list_and_without_ids_of_queries(exported):
    with span(
        "site.answer",
        query_id=f"{CANARY}-id",
        n_rows=3,
        protection="secagg+dp",
        prompt=CANARY,
        querier=CANARY,
        job_id=CANARY,
        model=CANARY * 40,
        rule=[CANARY],
    ):
        pass

    (found,) = exported()
    assert found.attributes == {"fedinfer.n_rows": 3, "fedinfer.protection": "secagg+dp"}
    assert CANARY not in found.to_json()


@pytest.mark.parametrize(
    ("error", "attributes"),
    [
        (ValueError(CANARY), {"error.type": "ValueError"}),
        (
            BudgetExceededError(CANARY),
            {"error.type": "BudgetExceededError", "fedinfer.code": "FI315"},
        ),
    ],
    ids=["foreign", "typed"],
)
def test_an_error_leaves_type_and_code_never_its_text(exported, error, attributes):
    with pytest.raises(type(error)), span("site.answer", query_id="q1"):
        raise error

    (found,) = exported()
    assert found.attributes == attributes
    assert not found.status.is_ok
    assert not found.events
    assert CANARY not in found.to_json()


def test_headers_carry_a_span_over_http(exported):
    with span("querier.request"):
        sent = headers_out()
    with from_headers(sent), span("gateway.request"):
        pass

    querier, gateway = exported()
    assert in_trace(gateway) == in_trace(querier)
    assert gateway.parent.span_id == querier.context.span_id
    assert sent["traceparent"].endswith("-01")


@pytest.mark.parametrize(
    "text",
    [
        "",
        CANARY,
        f"00-{'0' * 32}-{'1' * 16}-01",
        f"00-{'1' * 32}-{'0' * 16}-01",
        f"ff-{'1' * 32}-{'1' * 16}-01",
        f"00-{'1' * 32}-{'1' * 16}-01-more",
        f"00-{'G' * 32}-{'1' * 16}-01",
    ],
    ids=["none", "text", "no-trace", "no-span", "version", "long", "not-hex"],
)
def test_headers_of_another_form_are_ignored(exported, text):
    with from_headers({"traceparent": text}), span("gateway.request"):
        pass

    assert exported()[0].parent is None


def test_without_a_provider_nothing_is_sent():
    with span("querier.request"):
        assert headers_out() == {}


def test_without_opentelemetry_everything_does_nothing(monkeypatch):
    monkeypatch.setattr(tracing, "_installed", lambda: False)
    with from_headers({"traceparent": f"00-{'1' * 32}-{'1' * 16}-01"}), span("a", query_id="q"):
        assert headers_out() == {}
    with pytest.raises(KeyError), span("a"):
        raise KeyError


def test_nothing_is_configured_unless_the_environment_asks(monkeypatch):
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)

    assert not configure_tracing(service="fedinfer-gateway")


def test_an_exporter_that_is_not_installed_is_a_missing_extra(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)

    with pytest.raises(MissingExtraError, match="exporter"):
        configure_tracing(service="fedinfer-gateway")


def test_a_process_exports_over_otlp_what_the_environment_says():
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    code = """
import http.server, os, threading
got = []
class Take(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        got.append(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200); self.end_headers()
    def log_message(self, *args): pass
server = http.server.HTTPServer(("127.0.0.1", 0), Take)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
os.environ["OTEL_EXPORTER_OTLP_COMPRESSION"] = "none"
from fedinfer_flower.observability.tracing import configure_tracing, span, trace_id
assert configure_tracing(service="fedinfer-site")
with span("site.answer", query_id="q1", n_rows=3):
    pass
from opentelemetry import trace
trace.get_tracer_provider().force_flush()
trace.get_tracer_provider().shutdown()
body = b"".join(got)
assert b"site.answer" in body and b"fedinfer-site" in body
assert bytes.fromhex(trace_id("q1")) in body
assert os.uname().nodename.encode() not in body
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_all_roles_keep_the_same_share_of_queries(monkeypatch):
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.5")
    kept = []
    for role in ("gateway", "site"):
        exporter, provider = InMemorySpanExporter(), TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        with monkeypatch.context() as here:
            here.setattr(trace, "get_tracer", provider.get_tracer)
            for place in range(60):
                with span(f"{role}.round", query_id=f"q{place}"):
                    pass
        kept.append({in_trace(found) for found in exporter.get_finished_spans()})
        provider.shutdown()

    assert kept[0] == kept[1]
    assert 10 < len(kept[0]) < 50
