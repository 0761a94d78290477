"""Traces that start at the querier and end at the sites, without a byte more on the wire.

Every role knows the query id, and works the trace id out of it: spans of one query join in
one trace, wherever they were exported from. Without opentelemetry all of this does nothing.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from fedinfer_flower.errors import DeploymentError, FedInferError, MissingExtraError
from fedinfer_flower.observability.fact_names import FACT_NAMES, Fact, shown

if TYPE_CHECKING:
    from opentelemetry.context import Context

__all__ = ["configure_tracing", "from_headers", "headers_out", "span", "trace_id"]

_DOMAIN: Final = b"fedinfer trace v1\0"
_SCOPE: Final = "fedinfer_flower"
_TRACEPARENT: Final = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_HIDDEN: Final = frozenset({"query_id", "job_id", "querier", "key_id"})
"""Facts that name a person's query: a trace goes to a third party's server more often than a
log does, and its id joins the spans already."""


def trace_id(query_id: str) -> str:
    """Return the trace id of a query, 32 hex digits.

    Examples
    --------
    >>> trace_id("q1")
    'b07a9b4b9bbe78dc929b28cfb4612260'
    """
    return _ids(query_id)[0].to_bytes(16, "big").hex()


@contextmanager
def span(name: str, *, query_id: str = "", **attributes: Fact) -> Iterator[None]:
    """Trace what happens inside.

    Parameters
    ----------
    name : str
        Fixed words: ``"site.answer"``, ``"gateway.round"``.
    query_id : str
        Whose trace it belongs to. Inside a span of the same trace it is a child of that;
        else it hangs under the trace's root, which no role exports. Empty: a child of
        whatever is current.
    **attributes
        Of `FACT_NAMES`; others, and values that are not short texts or numbers, are left
        out, as are ids of queries and callers.

    Privacy
    -------
    The exporter's server learns that a query happened, how long each part took, and the
    attributes; exceptions leave their type and code, never their text. Who knows a query id
    knows its trace id; the reverse does not hold. Servers of several institutions that put
    their spans together see the whole path of a query.

    Examples
    --------
    >>> with span("example", query_id="q1", n_rows=3):
    ...     pass
    """
    if not _installed():
        yield
        return
    from opentelemetry import trace

    current = trace.get_current_span().get_span_context()
    parent, links = None, []
    if query_id and current.trace_id != _ids(query_id)[0]:
        parent = _root(query_id)
        if current.is_valid:
            links = [trace.Link(current)]
    opened = trace.get_tracer(_SCOPE).start_as_current_span(
        name,
        context=parent,
        links=links,
        attributes=_shown_attributes(attributes),
        record_exception=False,
        set_status_on_exception=False,
    )
    with opened as inner:
        try:
            yield
        except BaseException as exc:
            inner.set_attribute("error.type", type(exc).__name__[:64])
            if isinstance(exc, FedInferError):
                inner.set_attribute("fedinfer.code", exc.code)
            inner.set_status(trace.StatusCode.ERROR)
            raise


def headers_out() -> dict[str, str]:
    """Return HTTP headers that name the current span: ``traceparent``, or none.

    Examples
    --------
    >>> headers_out()
    {}
    """
    if not _installed():
        return {}
    from opentelemetry import trace

    found = trace.get_current_span().get_span_context()
    if not found.is_valid:
        return {}
    ids = f"{found.trace_id:032x}-{found.span_id:016x}"
    return {"traceparent": f"00-{ids}-{int(found.trace_flags) & 1:02x}"}


@contextmanager
def from_headers(headers: Mapping[str, str]) -> Iterator[None]:
    """Make the caller's span the current one, if the headers name one.

    Parameters
    ----------
    headers : mapping
        With lower-case names, or one that does not tell cases apart. A ``traceparent`` of
        another form is ignored, as the standard asks.

    Privacy
    -------
    The caller chooses these ids: with an authenticated caller only, and for nothing but
    traces. ``tracestate`` and ``baggage`` are not read.
    """
    found = _TRACEPARENT.fullmatch(headers.get("traceparent", ""))
    if found is None or not _installed():
        yield
        return
    from opentelemetry import context, trace

    remote = trace.SpanContext(
        trace_id=int(found[1], 16),
        span_id=int(found[2], 16),
        is_remote=True,
        trace_flags=trace.TraceFlags(int(found[3], 16) & 1),
    )
    if not remote.is_valid:
        yield
        return
    token = context.attach(trace.set_span_in_context(trace.NonRecordingSpan(remote)))
    try:
        yield
    finally:
        context.detach(token)


def configure_tracing(*, service: str) -> bool:
    """Export spans as the environment says, for the main of a program.

    Parameters
    ----------
    service : str
        Name of the process in traces: ``"fedinfer-gateway"``.

    Returns
    -------
    bool
        Whether spans are exported: if ``OTEL_EXPORTER_OTLP_ENDPOINT`` is set. Further
        variables, the sampler for one, are opentelemetry's.

    Raises
    ------
    MissingExtraError
        If the variable is set and the extra ``tracing`` is not installed.
    DeploymentError
        If the exporter refuses its settings.
    """
    if not os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        return False
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise MissingExtraError(
            "OTEL_EXPORTER_OTLP_ENDPOINT is set, opentelemetry's exporter is not installed",
            hint="pip install 'fedinfer-flower[tracing]'",
        ) from None
    try:
        # Only the name: the SDK's detectors would add the command line and the host.
        provider = TracerProvider(resource=Resource({SERVICE_NAME: service}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    except Exception as exc:
        # Whatever it raises may hold the endpoint, and a password in it.
        raise DeploymentError(
            f"the exporter of traces refuses its settings: {type(exc).__name__}",
            hint="see the variables OTEL_EXPORTER_OTLP_*",
        ) from None
    trace.set_tracer_provider(provider)
    return True


@cache
def _installed() -> bool:
    return importlib.util.find_spec("opentelemetry") is not None


def _ids(query_id: str) -> tuple[int, int]:
    """Return the trace's id, and that of its root span."""
    digest = hashlib.sha256(_DOMAIN + query_id.encode()).digest()
    return int.from_bytes(digest[:16], "big"), int.from_bytes(digest[16:24], "big")


def _root(query_id: str) -> Context:
    from opentelemetry import trace

    of_trace, of_span = _ids(query_id)
    root = trace.SpanContext(
        trace_id=of_trace,
        span_id=of_span,
        is_remote=True,
        trace_flags=trace.TraceFlags(trace.TraceFlags.SAMPLED),
    )
    return trace.set_span_in_context(trace.NonRecordingSpan(root))


def _shown_attributes(attributes: Mapping[str, Any]) -> dict[str, Fact]:
    allowed = attributes.keys() & (FACT_NAMES - _HIDDEN)
    return {
        f"fedinfer.{name}": attributes[name]
        for name in sorted(allowed)
        if shown(attributes[name]) is not None
    }
