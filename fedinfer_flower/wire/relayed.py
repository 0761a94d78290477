"""Answers that the coordinator passes on one by one, sealed to the querier."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from fedinfer_flower.errors import EnvelopeError

__all__ = ["pack_relayed", "read_relayed"]

_KEY_ID_BYTES: Final = 32
_LENGTH_BYTES: Final = 8


def pack_relayed(answers: Iterable[tuple[str, bytes | memoryview]]) -> bytes:
    """Return key id, length and bytes of each answer, one after the other.

    Examples
    --------
    >>> read_relayed(pack_relayed([("0" * 64, b"abc")]))
    [('0000000000000000000000000000000000000000000000000000000000000000', b'abc')]
    """
    parts: list[bytes | memoryview] = []
    for key_id, data in answers:
        parts += [bytes.fromhex(key_id), len(data).to_bytes(_LENGTH_BYTES, "big"), data]
    return b"".join(parts)


def read_relayed(raw: bytes | memoryview) -> list[tuple[str, bytes]]:
    """Read what `pack_relayed` wrote.

    Raises
    ------
    EnvelopeError
        If it is cut short, or a site comes twice.
    """
    view, answers = memoryview(raw), []
    while view:
        head = _KEY_ID_BYTES + _LENGTH_BYTES
        length = int.from_bytes(view[_KEY_ID_BYTES:head], "big")
        if len(view) < head or len(view) < head + length:
            raise EnvelopeError("relayed answers that are cut short")
        answers.append((bytes(view[:_KEY_ID_BYTES]).hex(), bytes(view[head : head + length])))
        view = view[head + length :]
    if len({key_id for key_id, _ in answers}) != len(answers):
        raise EnvelopeError("relayed answers with a site twice")
    return answers
