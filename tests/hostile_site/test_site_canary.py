"""A marker in what is asked is in nothing that a site writes, however its model fails."""

from __future__ import annotations

import io
import logging
import os
import warnings

import numpy as np
import pytest

from fedinfer_flower.clients.worker_reply import safe_reply
from fedinfer_flower.clients.worker_status import StatusFile
from fedinfer_flower.errors import BindingError, ModelAnswerError, PolicyRefusedError
from fedinfer_flower.observability.json_logs import JsonFormatter
from fedinfer_flower.wire.actions import PREDICT, message_type
from fedinfer_flower.wire.envelope import Kind
from fedinfer_flower.wire.records import unpack

CANARY = 1234.5625
CANARY_TEXT = "CANARY-7c21"
NEEDLES = (
    b"1234.5",
    CANARY_TEXT.encode(),
    np.float64(CANARY).tobytes(),
    np.float32(CANARY).tobytes(),
)


class Panic(BaseException):
    """As a panic of native code arrives: no `Exception`."""


FAILURES = {
    "value-error": ValueError,
    "typed": ModelAnswerError,
    "typed-refusal": PolicyRefusedError,
    "typed-binding": BindingError,
    "system-exit": SystemExit,
    "keyboard-interrupt": KeyboardInterrupt,
    "memory-error": MemoryError,
    "recursion-error": RecursionError,
    "stop-iteration": StopIteration,
    "panic": Panic,
}


@pytest.fixture(params=["json", "plain"])
def log(request):
    """All that is logged at DEBUG: as a worker writes it, and as a stock SuperNode would."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    if request.param == "json":
        handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield stream
    root.removeHandler(handler)
    root.setLevel(level)


def assert_nowhere(folder, *texts: bytes) -> None:
    found = {"text": b"".join(texts)}
    for path in folder.rglob("*"):
        if path.is_file():
            found[path.name] = path.read_bytes()
    assert len(found) > 3, "the site wrote nothing that could be searched"
    for name, content in found.items():
        for needle in NEEDLES:
            assert needle not in content, (name, needle)


def asked(site, folder, log) -> tuple[Kind, str]:
    """Ask as a worker does, and search everything; return what came back."""
    message = site.message(site.sealed(site.question()), message_type(PREDICT))
    safe = safe_reply(message, site.context, lambda: site.app)
    status = StatusFile(folder / "worker.json", role="worker")
    status.done(safe.failed)
    status.write()
    envelope = unpack(safe.reply.message.content)
    assert_nowhere(folder, log.getvalue().encode(), *safe.reply.contents, repr(safe).encode())
    return envelope.kind, safe.failed


def fails_with(error):
    def model(rows):
        warnings.warn(f"{CANARY_TEXT} {rows}", stacklevel=1)
        logging.getLogger("somebody.else").debug("%s", rows)
        raise error(f"{CANARY_TEXT} {rows}")

    return model


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.filterwarnings("ignore:CANARY")
def test_model_that_fails_tells_nothing(make_site, ward, tmp_path, log, name, monkeypatch):
    ward.answer = fails_with(FAILURES[name])
    # What another package logs is its own affair in plain logs; ours redacts its arguments.
    monkeypatch.setattr(logging.getLogger("somebody.else"), "disabled", is_plain(log))
    site = make_site()
    kind, _ = asked(site, tmp_path, log)
    assert kind is Kind.ERROR
    assert ward.shown


def is_plain(log) -> bool:
    logging.getLogger("fedinfer_flower.test").warning("words")
    return not log.getvalue().startswith("{")


@pytest.mark.parametrize(
    "reply",
    [None, CANARY_TEXT, [[CANARY_TEXT]], object()],
    ids=["none", "text", "texts", "object"],
)
def test_model_that_answers_nonsense_tells_nothing(make_site, ward, tmp_path, log, reply):
    ward.answer = lambda rows: reply
    assert asked(make_site(), tmp_path, log)[0] is Kind.ERROR


def test_good_answer_leaves_no_trace_of_the_rows(make_site, ward, tmp_path, log):
    assert asked(make_site(), tmp_path, log)[0] is Kind.ANSWER
    assert ward.shown


@pytest.mark.filterwarnings("ignore:CANARY")
@pytest.mark.parametrize("log", ["json"], indirect=True)
def test_tracebacks_of_a_worker_hold_no_text(make_site, ward, tmp_path, log, monkeypatch):
    monkeypatch.setitem(os.environ, "FEDINFER_SITE_TRACEBACKS", "1")
    ward.answer = fails_with(ValueError)
    asked(make_site(), tmp_path, log)
    assert '"traceback"' in log.getvalue()
