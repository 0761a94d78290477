"""One task, whole, in one HTTP body: what worker and warm SuperNode pass to each other.

Flower's worker asks sixteen times a task: for the task, its input, its message, each object of
the message, and the same back. Each question costs milliseconds on both sides. Here everything
travels at once, as length-prefixed parts that are Flower's own protobuf messages and objects.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

__all__ = [
    "BEAT",
    "GIVE",
    "KEY_HEADER",
    "MAX_INLINE_BYTES",
    "PINNED_HEADER",
    "PREFIX",
    "TAKE",
    "WAIT_HEADER",
    "WITH_FAB_HEADER",
    "WORKER_HEADER",
    "OtherFab",
    "frames_from_bytes",
    "frames_to_bytes",
]

PREFIX: Final = "/v1/fedinfer/"
TAKE: Final = PREFIX + "take"
GIVE: Final = PREFIX + "give"
BEAT: Final = PREFIX + "beat"

WORKER_HEADER: Final = "fedinfer-worker"
"""Random name of a worker process; a page in a browser cannot set it unasked."""
KEY_HEADER: Final = "fedinfer-worker-key"
PINNED_HEADER: Final = "fedinfer-pinned-fab"
WITH_FAB_HEADER: Final = "fedinfer-with-fab"
WAIT_HEADER: Final = "fedinfer-wait-s"

MAX_INLINE_BYTES: Final = 16 << 20
"""Larger messages travel object by object, as Flower sends them."""


@dataclass(frozen=True)
class OtherFab:
    """A task waits, but for another app bundle than the worker's; nobody has taken it."""

    fab_hash: str


_SIZE: Final = struct.Struct(">I")


def frames_to_bytes(frames: Sequence[bytes]) -> bytes:
    """Return the parts as one body.

    Examples
    --------
    >>> frames_from_bytes(frames_to_bytes([b"a", b"", b"bc"]))
    [b'a', b'', b'bc']
    """
    parts: list[bytes] = []
    for frame in frames:
        parts += (_SIZE.pack(len(frame)), frame)
    return b"".join(parts)


def frames_from_bytes(body: bytes) -> list[bytes]:
    """Return the parts of a body.

    Raises
    ------
    ValueError
        If it is cut off.
    """
    frames = []
    at = 0
    while at < len(body):
        if at + _SIZE.size > len(body):
            raise ValueError("a part's length is cut off")
        (size,) = _SIZE.unpack_from(body, at)
        at += _SIZE.size
        if at + size > len(body):
            raise ValueError("a part is cut off")
        frames.append(body[at : at + size])
        at += size
    return frames
