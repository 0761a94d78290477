"""Three routes that a warm SuperNode adds to its Runtime API, for its worker on this machine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from flwr.supercore.constant import TASK_TOKEN_HEADER
from flwr.supernode.nodestate import NodeStateFactory

from fedinfer_flower.flower_internals.node_desk import NodeDesk
from fedinfer_flower.flower_internals.node_key import (
    CHALLENGE_HEADER,
    NONCE_HEADER,
    PROOF_HEADER,
    fresh,
    is_proof,
    node_proof,
    worker_proof,
)
from fedinfer_flower.flower_internals.task_frames import (
    BEAT,
    GIVE,
    KEY_HEADER,
    MAX_INLINE_BYTES,
    PINNED_HEADER,
    PREFIX,
    TAKE,
    WAIT_HEADER,
    WITH_FAB_HEADER,
    WORKER_HEADER,
    OtherFab,
    frames_from_bytes,
    frames_to_bytes,
)

__all__ = ["TaskRoutes"]

log = logging.getLogger("fedinfer_flower.site")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_MAX_WAIT_S: Final = 5.0
_MAX_BODY_BYTES: Final = 2 * MAX_INLINE_BYTES


class TaskRoutes:
    """An ASGI app: the worker's routes, and Flower's Runtime API for everything else.

    Parameters
    ----------
    app : callable
        Flower's ASGI app.
    desk : NodeDesk
    states : NodeStateFactory
    key : str
        What the worker has to show; empty for nothing, as in Flower's own Runtime API.

    Privacy
    -------
    Without a key, any process on this machine that reaches the loopback port can take a task,
    read its message and reply in the site's name: that is so with Flower's own
    ``--isolation process`` too.
    """

    def __init__(self, app: App, desk: NodeDesk, states: NodeStateFactory, *, key: str) -> None:
        self._app = app
        self._desk = desk
        self._states = states
        self._key = key
        self._challenge = fresh()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event."""
        if scope["type"] != "http" or not scope["path"].startswith(PREFIX):
            await self._app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        port = int((scope.get("server") or ("", 0))[1] or 0)
        status, content, proof = 404, b"", {}
        if scope["method"] != "POST" or not headers.get(WORKER_HEADER):
            status = 400
        elif not self._knows(headers.get(KEY_HEADER, ""), port):
            # Before the body is read: nobody else can fill the memory with one.
            status, proof = 403, {CHALLENGE_HEADER: self._challenge}
        elif (body := await _read(receive)) is None:
            status = 413
        else:
            try:
                status, content = await asyncio.to_thread(
                    self._serve, str(scope["path"]), headers, body
                )
            except Exception as exc:
                # Its text may quote the message.
                log.warning("a worker's request failed (%s)", type(exc).__name__)
                status = 500
            if self._key:
                nonce = headers.get(NONCE_HEADER, "")
                proof = {PROOF_HEADER: node_proof(self._key, port=port, nonce=nonce)}
        await _send(send, status, content, proof)

    def _knows(self, proof: str, port: int) -> bool:
        if not self._key:
            return not proof
        return is_proof(proof, worker_proof(self._key, port=port, challenge=self._challenge))

    def _serve(self, path: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
        state: Any = self._states.state()
        token = headers.get(TASK_TOKEN_HEADER, "")
        if path == TAKE:
            found = self._desk.take(
                state,
                worker=headers[WORKER_HEADER],
                pinned=headers.get(PINNED_HEADER, ""),
                with_fab=headers.get(WITH_FAB_HEADER) == "1",
                wait_s=min(max(float(headers.get(WAIT_HEADER, "0")), 0.0), _MAX_WAIT_S),
            )
            if found is None:
                return 204, b""
            if isinstance(found, OtherFab):
                return 409, found.fab_hash.encode()
            return 200, frames_to_bytes(found)
        if path == GIVE:
            taken = self._desk.give(state, token=token, frames=frames_from_bytes(body))
            return (200 if taken else 410), b""
        if path == BEAT:
            return (200 if self._desk.beat(state, token=token) else 410), b""
        return 404, b""


async def _read(receive: Receive) -> bytes | None:
    """Return the body of a request; None if it is too large."""
    parts: list[bytes] = []
    size = 0
    while True:
        event = await receive()
        if event["type"] != "http.request":
            return None
        parts.append(event.get("body", b""))
        size += len(parts[-1])
        if size > _MAX_BODY_BYTES:
            return None
        if not event.get("more_body"):
            return b"".join(parts)


async def _send(send: Send, status: int, content: bytes, more: dict[str, str]) -> None:
    length = (b"content-length", str(len(content)).encode())
    start: dict[str, Any] = {"type": "http.response.start", "status": status}
    # A 204 has no body and must not say how long it is.
    start["headers"] = [] if status == 204 else [length]
    start["headers"] += [(name.encode(), value.encode()) for name, value in more.items()]
    await send(start)
    await send({"type": "http.response.body", "body": content})
