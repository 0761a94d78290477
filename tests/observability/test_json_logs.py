"""JSON logs: what stays, and that canaries do not."""

from __future__ import annotations

import enum
import io
import json
import logging
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest

from fedinfer_flower.errors import BudgetExceededError, InvalidValueError
from fedinfer_flower.observability.json_logs import JsonFormatter, about, configure_json_logs

CANARY = "canary-7f31"
OWN = "fedinfer_flower.site"


class Carrier:
    def __repr__(self) -> str:
        return CANARY

    __str__ = __repr__


class Colour(enum.Enum):
    RED = CANARY


@pytest.fixture
def stream():
    """Yield where the logs go; every logger is as it was afterwards."""
    loggers = [logging.getLogger(name) for name in ("", "flwr", "uvicorn", "uvicorn.error", OWN)]
    before = [(x, list(x.handlers), x.propagate, x.level) for x in loggers]
    out = io.StringIO()
    configure_json_logs(level="DEBUG", stream=out)
    yield out
    logging.captureWarnings(False)
    for logger, handlers, propagate, level in before:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def lines(stream: io.StringIO) -> list[dict]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def last(stream: io.StringIO) -> dict:
    return lines(stream)[-1]


def test_a_line_says_when_where_how_grave_and_what(stream):
    logging.getLogger(OWN).warning("%s asked for %d rows, epsilon %.2f", "north", 3, 0.5)

    line = last(stream)

    assert line["message"] == "north asked for 3 rows, epsilon 0.50"
    assert (line["level"], line["logger"]) == ("warning", OWN)
    assert isinstance(line["at"], float)


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (CANARY.encode(), "<bytes>"),
        (np.array([CANARY]), "<ndarray>"),
        ([CANARY], "<list>"),
        ({"a": CANARY, "b": 1}, "<dict>"),
        (CANARY * 30, f"<text of {30 * len(CANARY)} characters>"),
        (f"{CANARY}\nfaked", f"<text of {len(CANARY) + 6} characters>"),
        (Carrier(), "<Carrier>"),
        (ValueError(CANARY), "<ValueError>"),
        (Colour.RED, "RED"),
        (Path(f"/{CANARY}/name"), "name"),
        (None, "None"),
    ],
    ids=[
        *("bytes", "array", "list", "dict", "long", "line-end", "object", "exception", "enum"),
        *("path", "none"),
    ],
)
def test_an_argument_that_may_hold_data_is_replaced(stream, value, kept):
    logging.getLogger(OWN).error("got %s", value)
    logging.getLogger(OWN).error("%(what)s", {"what": value})
    if not isinstance(value, str):  # a text alone is the words
        logging.getLogger(OWN).error(value)

    assert CANARY not in stream.getvalue()
    assert [line["message"] for line in lines(stream)[:2]] == [f"got {kept}", kept]
    assert len(lines(stream)) == 3 - isinstance(value, str)


def test_a_mapping_with_names_in_the_words_keeps_short_texts(stream):
    logging.getLogger(OWN).error("%(site)s of %(n)d", {"site": "north", "n": 3, "x": CANARY})

    assert last(stream)["message"] == "north of 3"


def test_a_number_format_of_what_was_replaced_keeps_the_words():
    def message(words: str, *args: object) -> str:
        record = logging.makeLogRecord({"msg": words, "args": args})
        return json.loads(JsonFormatter().format(record))["message"]

    assert message("%d rows", CANARY.encode()) == "%d rows <arguments not shown>"
    assert message("%d rows of %s", [1], CANARY) == "%d rows of %s <arguments not shown>"


def raised(exc: BaseException) -> None:
    local = CANARY  # noqa: F841  (a traceback with values would show it)
    raise exc


def test_a_foreign_exception_leaves_its_type_and_place(stream):
    try:
        raised(ValueError(f"could not read {CANARY}"))
    except ValueError:
        logging.getLogger(OWN).exception("the model failed")

    line = last(stream)
    assert line["error"]["type"] == "ValueError"
    assert "message" not in line["error"]
    assert line["error"]["at"][-1].startswith("test_json_logs.py:")
    assert CANARY not in stream.getvalue()


def test_a_cause_leaves_nothing(stream):
    try:
        try:
            raised(ValueError(CANARY))
        except ValueError as exc:
            raise RuntimeError(CANARY) from exc
    except RuntimeError:
        logging.getLogger("flwr").error("ClientApp raised an exception", exc_info=True)

    assert last(stream)["error"]["type"] == "RuntimeError"
    assert CANARY not in stream.getvalue()


def test_a_typed_error_keeps_its_fixed_words(stream):
    error = BudgetExceededError("the budget does not cover 3 rows", hint="wait").at_site("north")
    try:
        raised(error)
    except BudgetExceededError as exc:
        logging.getLogger(OWN).error("refused: %s", exc, exc_info=True)

    line = last(stream)
    assert line["error"]["code"] == "FI315"
    assert line["error"]["message"] == "the budget does not cover 3 rows"
    assert "FI315" in line["message"]


def test_facts_are_on_every_record_inside(stream):
    log = logging.getLogger(OWN)
    with about(query_id="q1", site="north"):
        with about(job_id="j1", query_id="q2"):
            log.info("inner")
        log.info("outer")
    log.info("outside")

    inner, outer, outside = lines(stream)
    assert (inner["query_id"], inner["job_id"], inner["site"]) == ("q2", "j1", "north")
    assert outer["query_id"] == "q1"
    assert "job_id" not in outer
    assert "query_id" not in outside


def test_facts_of_one_thread_are_not_on_records_of_another(stream):
    def other():
        logging.getLogger(OWN).info("other")

    with about(query_id="q1"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    # From Python 3.14 on some builds let a thread begin with its parent's context.
    assert ("query_id" in last(stream)) == bool(getattr(sys.flags, "thread_inherit_context", 0))


@pytest.mark.parametrize(
    "facts", [{"inputs": CANARY}, {"query_id": CANARY * 30}], ids=["name", "long"]
)
def test_facts_that_may_not_be_written_are_refused(facts):
    with pytest.raises(InvalidValueError) as caught, about(**facts):
        pass
    assert CANARY not in str(caught.value)


def test_extra_fields_are_written_by_name_and_others_dropped(stream):
    facts = {"route": "/v1/query", "status": 200, "seconds": 0.25, "key_id": "ab", "body": CANARY}
    logging.getLogger(OWN).info("request", extra=facts)
    logging.getLogger(OWN).info("request", extra={"route": [CANARY], "site": CANARY * 40})

    first, second = lines(stream)
    assert {name: first[name] for name in ("route", "status", "seconds", "key_id")} == {
        name: facts[name] for name in ("route", "status", "seconds", "key_id")
    }
    assert not {"body"} & first.keys()
    assert not {"route", "site"} & second.keys()
    assert CANARY not in stream.getvalue()


def test_a_warning_is_told_without_its_text(stream):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn(CANARY, UserWarning, stacklevel=1)

    assert last(stream)["message"] == "a warning"
    assert CANARY not in stream.getvalue()


@pytest.mark.parametrize("name", ["flwr", "uvicorn", "uvicorn.error", "uvicorn.access"])
def test_loggers_with_handlers_of_their_own_write_the_same_way(stream, name):
    assert logging.getLogger(name).handlers == []
    logging.getLogger(name).info("%s", CANARY.encode())

    assert last(stream)["logger"] == name
    assert CANARY not in stream.getvalue()


def test_configuring_twice_writes_each_line_once(stream):
    configure_json_logs(level="INFO", stream=stream)
    logging.getLogger(OWN).info("once")
    logging.getLogger(OWN).debug("not at this level")

    assert [line["message"] for line in lines(stream)] == ["once"]


def test_a_text_that_was_put_together_before_is_cut(stream):
    logging.getLogger("elsewhere").info("x" * 9999)

    assert len(last(stream)["message"]) == 2003
