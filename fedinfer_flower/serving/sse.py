"""Server-sent events: a job's progress, then its end."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any, Final

from starlette.responses import StreamingResponse

from fedinfer_flower.serving.jobs import Job

__all__ = ["BEAT_S", "COMMENT", "event", "stream"]

BEAT_S: Final = 15.0
"""After so many seconds without an event a comment goes out, for proxies that cut idle lines."""

COMMENT: Final = b": beat\n\n"


def event(name: str, value: Mapping[str, Any]) -> bytes:
    r"""Return one event.

    Examples
    --------
    >>> event("progress", {"rows_done": 1})
    b'event: progress\ndata: {"rows_done":1}\n\n'
    """
    # JSON escapes line ends, so a value cannot end the event.
    return f"event: {name}\ndata: {json.dumps(value, separators=(',', ':'))}\n\n".encode()


def stream(events: AsyncIterator[bytes]) -> StreamingResponse:
    """Return the response that sends events; a proxy is told not to keep them back."""
    return StreamingResponse(
        events,
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def job_events(
    states: AsyncGenerator[Job, None], *, shown: Any, ended: Any
) -> AsyncIterator[bytes]:
    """Yield ``progress`` for each state, comments between, and at the end what `ended` makes.

    Parameters
    ----------
    states : async generator of Job
        `Desk.watch` with `BEAT_S`.
    shown, ended : callable
        From a `Job` to a JSON value; from one that ended to (name of the event, JSON value).
    """
    last: Job | None = None
    async with contextlib.aclosing(states):
        async for job in states:
            if job.state.ended:
                yield event(*ended(job))
                return
            yield COMMENT if job == last else event("progress", shown(job))
            last = job
