"""Mask streams, the graph of pairs, shares of self-masks, and the bytes of recovery."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedinfer_flower.errors import BindingError, EnvelopeError, ProtocolError, SealError
from fedinfer_flower.privacy.cohort import Cohort, bitmap, places_of
from fedinfer_flower.privacy.mask_graph import (
    FULL_GRAPH_MAX,
    LEAST_PRESENT,
    neighbours,
    thinnest_window,
)
from fedinfer_flower.privacy.masked_answer import MaskedAnswer, MaskedTotal
from fedinfer_flower.privacy.masks import leaf, mask, pair_key
from fedinfer_flower.privacy.recovery_messages import (
    Phase,
    RecoveryRequest,
    pack_records,
    read_records,
    survivors_statement,
)
from fedinfer_flower.privacy.self_mask import (
    combine_shares,
    new_secret,
    open_share,
    seal_share,
    self_seed,
    share_threshold,
    split,
)
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.roster import Roster, Seat

SIGNIFICANCE = 1e-6
COHORT = Cohort(
    query_id="q-0",
    roster=Roster(
        tuple(Seat(identity=Identity.generate().public, commitment="0" * 64) for _ in range(11))
    ),
    public_key=bytes(32),
)


def public(key: X25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


# -- streams -----------------------------------------------------------------------------


def test_both_ends_of_a_pair_derive_the_same_stream() -> None:
    a, b = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    there = mask(leaf(pair_key(a, public(b), b"s"), "pair", "q-0"), 9)
    back = mask(leaf(pair_key(b, public(a), b"s"), "pair", "q-0"), 9)
    np.testing.assert_array_equal(there, back)


def test_streams_of_other_sessions_batches_purposes_and_pairs_differ() -> None:
    a, b, c = (X25519PrivateKey.generate() for _ in range(3))
    seeds = [
        leaf(pair_key(a, public(peer), session), purpose, query_id)
        for peer in (b, c)
        for session in (b"s", b"t")
        for purpose in ("pair", "querier", "share-0", "share-1")
        for query_id in ("q-0", "q-1")
    ]
    assert len(set(seeds)) == len(seeds)


def test_stream_is_chacha20_of_the_seed() -> None:
    # First words of ChaCha20 with key, nonce and counter zero: RFC 8439, appendix A.1.
    np.testing.assert_array_equal(
        mask(bytes(32), 4), np.array([0xADE0B876, 0x903DF1A0, 0xE56A5D40, 0x28BD8653], np.uint32)
    )


def test_stream_is_uniform_in_every_byte() -> None:
    stream = mask(hashlib.sha256(b"seed").digest(), 2**16)
    for shift in (0, 8, 16, 24):
        counts = np.bincount((stream >> shift) & 255, minlength=256)
        assert stats.chisquare(counts).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("seed", [b"", bytes(31), bytes(33)])
def test_seed_of_another_length_is_refused(seed: bytes) -> None:
    with pytest.raises(EnvelopeError):
        mask(seed, 1)


# The points of low order on Curve25519 and its twist: Bernstein, "Which public keys are safe?"
LOW_ORDER = [
    bytes(32),
    b"\x01" + bytes(31),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    bytes.fromhex("ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
    bytes.fromhex("edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
    bytes.fromhex("eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
]


@pytest.mark.parametrize("peer", [*LOW_ORDER, b"", bytes(31)], ids=lambda peer: peer.hex()[:8])
def test_peer_key_of_low_order_or_length_is_refused(peer: bytes) -> None:
    with pytest.raises(EnvelopeError):
        pair_key(X25519PrivateKey.generate(), peer, b"s")


# -- the graph ---------------------------------------------------------------------------


@pytest.mark.parametrize("n_sites", [2, 3, 50, 51, 52, 60, 200])
def test_graph_is_symmetric_and_of_the_promised_degree(n_sites: int) -> None:
    beside = [neighbours(place, n_sites, b"session") for place in range(n_sites)]
    degree = min(n_sites - 1, FULL_GRAPH_MAX)
    for place, others in enumerate(beside):
        assert len(others) == len(set(others)) == degree
        assert place not in others
        assert list(others) == sorted(others)
        assert all(place in beside[other] for other in others)


def test_circle_follows_from_the_session() -> None:
    assert neighbours(0, 200, b"a") == neighbours(0, 200, b"a")
    assert neighbours(0, 200, b"a") != neighbours(0, 200, b"b")


def parts_without(n_sites: int, gone: set[int]) -> int:
    """Count the connected parts of the graph that is left."""
    left, parts = set(range(n_sites)) - gone, 0
    while left:
        parts += 1
        stack = [left.pop()]
        while stack:
            reached = set(neighbours(stack.pop(), n_sites, b"s")) & left
            left -= reached
            stack += reached
    return parts


def test_graph_stays_in_one_piece_until_fifty_sites_are_gone() -> None:
    rng = np.random.default_rng(2)
    for n_sites in (60, 120):
        for _ in range(30):
            gone = set(rng.choice(n_sites, 49, replace=False).tolist())
            assert parts_without(n_sites, gone) == 1
    # Fifty can cut a site off: exactly its neighbours.
    assert parts_without(120, set(neighbours(7, 120, b"s"))) == 2


HALF_DEGREE = FULL_GRAPH_MAX // 2


def window_beside(place: int, n_sites: int) -> frozenset[int]:
    """Return the 25 places on one side of a place on the circle.

    The outermost neighbour on either side shares 24 neighbours with it; all others share more.
    """
    others = neighbours(place, n_sites, b"s")
    for first in others:
        side = {first} | (set(neighbours(first, n_sites, b"s")) & set(others))
        if len(side) == HALF_DEGREE:
            return frozenset(side)
    raise AssertionError("no end of the neighbourhood was found")


@settings(max_examples=50, deadline=None, derandomize=True)
@given(n_sites=st.integers(101, 300), place=st.integers(0, 100), data=st.data())
def test_thinnest_window_counts_who_is_left_of_any_25_side_by_side(
    n_sites: int, place: int, data: st.DataObject
) -> None:
    window = window_beside(place, n_sites)
    everyone = frozenset(range(n_sites))
    assert thinnest_window(everyone, n_sites, b"s") == HALF_DEGREE
    kept = data.draw(st.frozensets(st.sampled_from(sorted(window))))
    # A window that is k steps off loses at most k of those kept, and has k others.
    assert thinnest_window(everyone - window | kept, n_sites, b"s") == len(kept)
    # Fewer present never make it thicker.
    gone = data.draw(st.frozensets(st.integers(0, n_sites - 1), max_size=40))
    before = thinnest_window(everyone - window | kept, n_sites, b"s")
    assert thinnest_window((everyone - window | kept) - gone, n_sites, b"s") <= before


@settings(max_examples=20, deadline=None, derandomize=True)
@given(n_sites=st.integers(1, FULL_GRAPH_MAX + 1), data=st.data())
def test_thinnest_window_of_a_full_graph_is_everybody(n_sites: int, data: st.DataObject) -> None:
    present = data.draw(st.frozensets(st.integers(0, n_sites - 1)))
    assert thinnest_window(present, n_sites, b"s") == len(present)


def test_survivors_that_sites_accept_are_in_one_piece() -> None:
    rng = np.random.default_rng(5)
    n_sites, accepted = 150, 0
    for _ in range(60):
        # Dropouts as an attacker picks them: two windows, thinned out to what sites demand.
        first, second = (window_beside(int(p), n_sites) for p in rng.choice(n_sites, 2))
        stay = rng.permutation(sorted(first | second))[: int(rng.integers(0, 30))]
        present = frozenset(range(n_sites)) - ((first | second) - set(stay.tolist()))
        if thinnest_window(present, n_sites, b"s") >= LEAST_PRESENT:
            accepted += 1
            assert parts_without(n_sites, set(range(n_sites)) - present) == 1
    assert accepted > 5  # else nothing was tested


# -- bitmaps and records -------------------------------------------------------------------


@settings(max_examples=100, deadline=None, derandomize=True)
@given(size=st.integers(1, 70), data=st.data())
def test_bitmap_after_a_round_trip_is_the_same(size: int, data: st.DataObject) -> None:
    places = data.draw(st.frozensets(st.integers(0, size - 1)))
    assert places_of(bitmap(places, size), size) == places


@pytest.mark.parametrize(("raw", "size"), [(b"", 3), (b"\0\0", 3), (b"\x08", 3), (b"\0\2", 9)])
def test_bitmap_that_does_not_fit_is_refused(raw: bytes, size: int) -> None:
    with pytest.raises(EnvelopeError):
        places_of(raw, size)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    records=st.dictionaries(st.integers(0, 9), st.binary(min_size=16, max_size=16)),
    rest=st.binary(max_size=9),
)
def test_records_after_a_round_trip_are_the_same(records: dict[int, bytes], rest: bytes) -> None:
    assert read_records(pack_records(records, 16) + rest, 16, 10) == (records, rest)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0\0\0",
        b"\0\0\0\1",
        b"\0\0\0\1" + b"\0\0\0\0" + bytes(15),
        b"\0\0\0\1" + b"\0\0\0\x0a" + bytes(16),  # place 10 of 10
        b"\0\0\0\2" + 2 * (b"\0\0\0\1" + bytes(16)),  # a place twice
        b"\xff\xff\xff\xff",
        b"\0\0\0\x0b" + b"".join(bytes([0, 0, 0, n]) + bytes(16) for n in range(11)),
    ],
    ids=lambda raw: raw[:8].hex(),
)
def test_records_that_are_damaged_are_refused(raw: bytes) -> None:
    with pytest.raises(EnvelopeError):
        read_records(raw, 16, 10)


def request(**changes: object) -> RecoveryRequest:
    fields: dict[str, object] = {
        "phase": Phase.REVEAL,
        "context": COHORT.context(),
        "survivors": frozenset(range(9)),
        "signatures": {0: bytes(64), 5: b"\1" * 64},
        "shares": {2: bytes(32)},
    }
    return RecoveryRequest(**fields | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("phase", Phase)
def test_request_after_a_round_trip_is_the_same(phase: Phase) -> None:
    asked = request(phase=phase)
    assert RecoveryRequest.from_bytes(asked.to_bytes(11), COHORT) == asked


def test_request_of_another_batch_is_refused() -> None:
    with pytest.raises(BindingError):
        RecoveryRequest.from_bytes(request(context=bytes(32)).to_bytes(11), COHORT)


def test_damaged_requests_raise_only_typed_errors() -> None:
    good = request().to_bytes(11)
    for cut in range(len(good)):
        with pytest.raises(ProtocolError):
            RecoveryRequest.from_bytes(good[:cut], COHORT)
    with pytest.raises(EnvelopeError, match="left over"):
        RecoveryRequest.from_bytes(good + b"\0", COHORT)
    for phase in (0, 3, 255):
        with pytest.raises(EnvelopeError):
            RecoveryRequest.from_bytes(good[:4] + bytes([phase]) + good[5:], COHORT)


def test_statement_names_batch_and_survivors() -> None:
    others = Cohort(query_id="q-1", roster=COHORT.roster, public_key=bytes(32))
    said = {
        survivors_statement(cohort, survivors)
        for cohort in (COHORT, others)
        for survivors in (frozenset({0, 1, 2}), frozenset({0, 1, 3}))
    }
    assert len(said) == 4


# -- masked vectors ------------------------------------------------------------------------


def test_masked_vectors_after_a_round_trip_are_the_same() -> None:
    entries = np.array([0, 1, 2**32 - 1], dtype=np.uint32)
    shares = (b"a" * 32, b"b" * 32)
    answer = MaskedAnswer(context=COHORT.context(), entries=entries, shares=shares)
    raw = answer.to_bytes()
    assert len(raw) == MaskedAnswer.size(3, n_sites=3, self_mask=True)
    back = MaskedAnswer.from_bytes(raw, context=COHORT.context(), count=3, n_shares=2)
    np.testing.assert_array_equal(back.entries, entries)
    assert back.shares == shares

    total = MaskedTotal(context=COHORT.context(), survivors=frozenset({0, 10}), entries=entries)
    seen = MaskedTotal.from_bytes(total.to_bytes(11), context=COHORT.context(), count=3, n_sites=11)
    np.testing.assert_array_equal(seen.entries, entries)
    assert seen.survivors == {0, 10}


def test_sum_is_no_answer_and_an_answer_no_sum() -> None:
    entries = np.zeros(3, dtype=np.uint32)
    context = COHORT.context()
    answer = MaskedAnswer(context=context, entries=entries).to_bytes()
    total = MaskedTotal(context=context, survivors=frozenset(), entries=entries).to_bytes(11)
    with pytest.raises(ProtocolError):
        MaskedTotal.from_bytes(answer + b"\0\0", context=context, count=3, n_sites=11)
    with pytest.raises(ProtocolError):
        MaskedAnswer.from_bytes(total[:-2], context=context, count=3, n_shares=0)


# -- self-masks ----------------------------------------------------------------------------


@settings(max_examples=30, deadline=None, derandomize=True)
@given(n_shares=st.integers(2, 12), data=st.data())
def test_any_threshold_of_shares_gives_the_secret_and_one_fewer_does_not(
    n_shares: int, data: st.DataObject
) -> None:
    threshold = data.draw(st.integers(2, n_shares))
    order = data.draw(st.permutations(range(n_shares)))
    secret = new_secret()
    shares = split(secret, threshold, n_shares)
    chosen = {number: shares[number] for number in order[:threshold]}
    assert combine_shares(chosen) == secret
    fewer = {number: shares[number] for number in order[: threshold - 1]}
    assert combine_shares(fewer) != secret


def test_shares_below_the_threshold_are_uniform_whatever_the_secret() -> None:
    # Of a constant secret: one share alone, over many splits, in each of its bytes.
    first = np.array([list(split(bytes(16), 2, 3)[0]) for _ in range(6000)])
    for column in (0, 7, 15):
        counts = np.bincount(first[:, column] >> 4, minlength=16)
        assert stats.chisquare(counts).pvalue > SIGNIFICANCE


def test_share_opens_for_its_pair_batch_and_direction_alone() -> None:
    pair, other = bytes(32), b"\1" * 32
    sealed = seal_share(b"s" * 16, pair, "q-0", sender=3)
    assert len(sealed) == 32
    assert open_share(sealed, pair, "q-0", sender=3) == b"s" * 16
    wrong = [(other, "q-0", 3), (pair, "q-1", 3), (pair, "q-0", 4)]
    for key, query_id, sender in wrong:
        with pytest.raises(SealError):
            open_share(sealed, key, query_id, sender=sender)
    for place in (0, 20, 31):
        altered = sealed[:place] + bytes([sealed[place] ^ 1]) + sealed[place + 1 :]
        with pytest.raises(SealError):
            open_share(altered, pair, "q-0", sender=3)


def test_self_masks_of_two_batches_differ() -> None:
    assert self_seed(bytes(16), "q-0") != self_seed(bytes(16), "q-1")


@pytest.mark.parametrize("n_sites", range(3, 51))
def test_threshold_in_a_full_graph_is_what_the_most_dropouts_leave(n_sites: int) -> None:
    for dropped in range(n_sites - 2):
        assert share_threshold(n_sites - 1, dropped) == max(2, n_sites - 1 - dropped)


@pytest.mark.parametrize(("dropped", "threshold"), [(0, 50), (24, 26), (25, 20), (333, 20)])
def test_threshold_in_a_sparse_graph(dropped: int, threshold: int) -> None:
    assert share_threshold(50, dropped) == threshold
