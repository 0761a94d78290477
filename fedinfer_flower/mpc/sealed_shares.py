"""Shares on their way: signed by their maker, sealed to one party, bound to one session.

With its shares, every maker gives the three parties a random secret. All makers' secrets
together name the parties' links (`link_id`). SPU sends over verified TLS only, but its
listener also takes connections without TLS: the name, which is part of the key of every
message, is what a stranger would have to know to slip a party a message.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import ShapeError
from fedinfer_flower.mpc.session import MpcSession
from fedinfer_flower.mpc.shares import (
    Words,
    encode_reals,
    held_from_bytes,
    held_to_bytes,
    split,
)
from fedinfer_flower.mpc.statement import read_signed, sign_document
from fedinfer_flower.wire.identity import Identity, PublicIdentity
from fedinfer_flower.wire.sealing import open_sealed, seal_to

__all__ = ["link_id", "open_result", "open_shares", "seal_result", "seal_shares", "split_bytes"]

_SHARES: Final = "mpc-shares"
_RESULT: Final = "mpc-result"
_SECRET_BYTES: Final = 32


def seal_shares(
    maker: Identity,
    session: MpcSession,
    arrays: Sequence[npt.NDArray[np.generic]],
    *,
    label: str,
) -> tuple[bytes, ...]:
    """Split arrays among the session's parties.

    Parameters
    ----------
    maker : Identity
        Of the querier, or of the owner of the weights.
    arrays : sequence of float array
    label : str
        What they are: ``query-<batch>`` or ``weights-<owner>``.

    Returns
    -------
    sealed : three bytes
        For party 0, 1 and 2.

    Privacy
    -------
    Whoever carries all three learns their length. One party learns nothing about the
    arrays, two that pool what they have learn everything.
    """
    held = [split(encode_reals(array)) for array in arrays]
    secret = secrets.token_bytes(_SECRET_BYTES)
    sealed = []
    for rank, place in enumerate(session.party_places):
        info = _info(session, label, rank)
        body = secret + b"".join(held_to_bytes(triple[rank]) for triple in held)
        signed = sign_document(maker, _SHARES, _bound(info, body))
        sealed.append(seal_to(place.identity, signed, info=info))
    return tuple(sealed)


def open_shares(
    party: Identity,
    session: MpcSession,
    sealed: bytes | memoryview,
    *,
    maker: PublicIdentity,
    label: str,
    shapes: Sequence[tuple[int, ...]],
) -> tuple[bytes, bytes]:
    """Return (the maker's secret, one party's shares of arrays of known shapes).

    See `split_bytes` for the shares and `link_id` for the secret.

    Raises
    ------
    SealError, SignatureError
        If they are not this party's, or not by `maker` for this session.
    ShapeError
        If they are of another length.
    """
    info = _info(session, label, session.rank_of(party.key_id))
    body = _unbound(info, read_signed(maker, _SHARES, open_sealed(party, sealed, info=info)))
    secret, held = body[:_SECRET_BYTES], body[_SECRET_BYTES:]
    if len(held) != sum(16 * math.prod(shape) for shape in shapes):
        raise ShapeError(f"the shares of {label} have {len(held)} bytes, not what the shape needs")
    return secret, held


def link_id(session: MpcSession, secrets_of_makers: Sequence[bytes]) -> str:
    """Return the name of the session's links: known to the parties, and to nobody else.

    Whoever wants to work it out needs the secrets of all owners and of the querier.
    """
    return hashlib.sha256(session.digest() + b"".join(secrets_of_makers)).hexdigest()


def split_bytes(body: bytes | memoryview, shapes: Sequence[tuple[int, ...]]) -> list[Words]:
    """Return what a party holds of each array, from all in one."""
    view, held = memoryview(body), []
    for shape in shapes:
        length = 16 * math.prod(shape)
        held.append(held_from_bytes(view[:length], shape))
        view = view[length:]
    return held


def seal_result(party: Identity, session: MpcSession, held: bytes, *, batch: int) -> bytes:
    """Sign and seal one party's shares of a result for the querier."""
    info = _info(session, f"result-{batch}", session.rank_of(party.key_id))
    signed = sign_document(party, _RESULT, _bound(info, held))
    return seal_to(session.querier, signed, info=info)


def open_result(
    querier: Identity, session: MpcSession, sealed: bytes | memoryview, *, batch: int, rank: int
) -> Words:
    """Open one party's shares of a result.

    Raises
    ------
    SealError, SignatureError, ShapeError
    """
    info = _info(session, f"result-{batch}", rank)
    maker = session.party_places[rank].identity
    body = _unbound(info, read_signed(maker, _RESULT, open_sealed(querier, sealed, info=info)))
    return held_from_bytes(body, session.computation.output_shape)


def _info(session: MpcSession, label: str, rank: int) -> bytes:
    return b"mpc|" + session.digest() + f"|{label}|{rank}".encode()


def _bound(info: bytes, body: bytes) -> bytes:
    # Under the signature too: shares that one party opened cannot be passed on as another's.
    return info + b"|" + body


def _unbound(info: bytes, bound: bytes) -> bytes:
    if not bound.startswith(info + b"|"):
        raise ShapeError("shares that were signed for another place")
    return bound[len(info) + 1 :]
