"""Several receipts in one file: a gateway answers a large query in several jobs of its own."""

from __future__ import annotations

import json

from fedinfer_flower.errors import EnvelopeError
from fedinfer_flower.receipts.canonical import parse_object
from fedinfer_flower.receipts.checks import objects
from fedinfer_flower.receipts.receipt import MAX_RECEIPT_BYTES

__all__ = ["receipts_of"]


def receipts_of(
    data: bytes | memoryview, *, max_bytes: int = MAX_RECEIPT_BYTES
) -> tuple[bytes, ...]:
    """Return the receipts in a file: one, or those of ``{"receipts": [...]}``.

    Believe nothing of them before `verify`.

    Raises
    ------
    EnvelopeError
        If it is no JSON object, or a list without a receipt.
    SizeLimitError
        If it is longer than `max_bytes`.

    Examples
    --------
    >>> receipts_of(b'{"receipts": [{"version": 1}, {"version": 2}]}')
    (b'{"version": 1}', b'{"version": 2}')
    >>> receipts_of(b'{"version": 1}')
    (b'{"version": 1}',)
    """
    plain = parse_object(data, max_bytes=max_bytes, what="receipt")
    if set(plain) != {"receipts"}:
        return (bytes(data),)
    found = objects(plain, "receipts")
    if not found:
        raise EnvelopeError("a list of receipts without one")
    return tuple(json.dumps(one, allow_nan=False).encode() for one in found)
