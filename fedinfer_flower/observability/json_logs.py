"""Logs as JSON lines, without what was asked or answered.

A log line keeps fixed words, ids and numbers. Arrays, bytes, long texts and the texts of
other people's exceptions are replaced by their type: those are where inputs leak.
"""

from __future__ import annotations

import enum
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Final, TextIO

from fedinfer_flower.errors import FedInferError
from fedinfer_flower.observability.fact_names import FACT_NAMES, Fact, checked_facts, shown

__all__ = ["JsonFormatter", "about", "configure_json_logs"]

_about: ContextVar[Mapping[str, Fact]] = ContextVar("fedinfer_about", default={})  # noqa: B039

_MAX_FRAMES: Final = 6
_MAX_MESSAGE: Final = 2000
_OWN: Final = "fedinfer_flower"
_WITH_HANDLERS: Final = ("flwr", "uvicorn", "uvicorn.error", "uvicorn.access")
"""Loggers that come with handlers of their own, which know nothing of redaction."""


@contextmanager
def about(**facts: Fact) -> Iterator[None]:
    """Put facts on every record that is logged inside, in this thread or task.

    Parameters
    ----------
    **facts
        Of `FACT_NAMES`: ``query_id``, ``job_id``, ``site``. Inner ones win. A new thread
        starts without them.

    Raises
    ------
    InvalidValueError
        If a fact may not be written down.

    Examples
    --------
    >>> with about(query_id="q1"):
    ...     logging.getLogger("fedinfer_flower.example").debug("asked")
    """
    token = _about.set({**_about.get(), **checked_facts(facts)})
    try:
        yield
    finally:
        _about.reset(token)


def configure_json_logs(*, level: int | str = "INFO", stream: TextIO | None = None) -> None:
    """Write all logs of this process as JSON lines, and nothing else.

    For the main of a program: replaces the handlers of the root logger, Flower's and
    uvicorn's. Called again, it replaces itself.

    Parameters
    ----------
    level : int or str
        Least level that is written.
    stream : text file, optional
        Default standard error.

    Privacy
    -------
    Whoever reads the logs learns who asked when, as from the audit log. Numbers stay, so a
    score must not be logged on its own; a text that was put together *before* it was logged
    (an f-string) cannot be told from fixed words, and is only cut at 2000 characters. The
    package logs fixed words with arguments, tested with canaries.
    """
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
    for name in _WITH_HANDLERS:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
        logger.setLevel(logging.NOTSET)
    # Every request, and every migration of a file, at INFO.
    for name in ("alembic", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(True)


class JsonFormatter(logging.Formatter):
    """Format a record as one line of JSON.

    Keys: ``at`` (seconds since 1970), ``level``, ``logger``, ``message``; facts of `about`
    and of ``extra=`` by name; ``error`` with ``type``, for typed errors ``code`` and
    ``message``, and ``at``, the places in code, innermost last.

    Examples
    --------
    >>> record = logging.makeLogRecord({"msg": "%s rows", "args": (b"secret",), "name": "a"})
    >>> json.loads(JsonFormatter().format(record))["message"]
    '<bytes> rows'
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        line: dict[str, Any] = {
            "at": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
            **_about.get(),
        }
        for name in FACT_NAMES - {"name"}:  # a record has a `name` of its own: the logger's
            if name in record.__dict__ and (text := shown(record.__dict__[name])) is not None:
                value = record.__dict__[name]
                line[name] = text if isinstance(value, str) else value
        exc = record.exc_info[1] if record.exc_info else None
        if exc is not None:
            line["error"] = _error(exc)
        return json.dumps(line, ensure_ascii=True, default=lambda value: f"<{_type(value)}>")


def _message(record: logging.LogRecord) -> str:
    if not isinstance(record.msg, str):
        return str(_argument(record.msg))
    words, args = record.msg, record.args
    if record.name == "py.warnings":
        # Text of somebody's warning, already put together: it may quote an argument.
        return "a warning"
    if args:
        if isinstance(args, Mapping) and "%(" in words:
            told: Any = {name: _argument(value) for name, value in args.items()}
        else:
            # logging unwraps a mapping that is the only argument.
            several = (args,) if isinstance(args, Mapping) else args
            told = tuple(_argument(value) for value in several)
        try:
            words = words % told
        except (TypeError, ValueError, KeyError):
            # "%d" of what was replaced: the words as they stand say enough.
            words = f"{record.msg} <arguments not shown>"
    return words if len(words) <= _MAX_MESSAGE else f"{words[:_MAX_MESSAGE]}..."


def _argument(value: object) -> Any:
    if value is None or isinstance(value, FedInferError):
        return value
    if isinstance(value, BaseException):
        return f"<{_type(value)}>"
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Path):
        return value.name
    text = shown(value)
    if text is None:
        kind = f"text of {len(value)} characters" if isinstance(value, str) else _type(value)
        return f"<{kind}>"
    return text if isinstance(value, str) else value


def _error(exc: BaseException) -> dict[str, Any]:
    found: dict[str, Any] = {"type": _type(exc)}
    if isinstance(exc, FedInferError):
        found |= {"code": exc.code, "message": exc.message[:_MAX_MESSAGE]}
    places, frame = [], exc.__traceback__
    while frame is not None:
        code = frame.tb_frame.f_code
        places.append(f"{Path(code.co_filename).name}:{frame.tb_lineno} {code.co_name}")
        frame = frame.tb_next
    return {**found, "at": places[-_MAX_FRAMES:]}


def _type(value: object) -> str:
    return type(value).__name__[:64]
