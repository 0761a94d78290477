"""Rosters: one byte form, one order, no key twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedinfer_flower.errors import BindingError, EnvelopeError
from fedinfer_flower.wire.identity import Identity, PublicIdentity
from fedinfer_flower.wire.roster import Roster, Seat

SEATS = [Seat(identity=Identity.generate().public, commitment=f"{i:064x}") for i in range(6)]


@given(st.permutations(SEATS), st.integers(0, 6))
def test_order_of_the_seats_does_not_matter(order, n):
    chosen = SEATS[:n]
    one, two = Roster(tuple(chosen)), Roster(tuple(s for s in order if s in chosen))
    assert one == two
    assert (one.digest(), one.to_bytes()) == (two.digest(), two.to_bytes())
    assert Roster.from_bytes(memoryview(one.to_bytes())) == one
    assert [one.place_of(key_id) for key_id in one.key_ids] == list(range(n))
    assert list(one.key_ids) == sorted(one.key_ids)


def test_site_without_a_seat_is_a_binding_error():
    with pytest.raises(BindingError, match="not in the query's roster"):
        Roster(tuple(SEATS[:2])).place_of(SEATS[3].identity.key_id)


def test_same_key_twice_is_refused_even_under_another_commitment():
    again = Seat(identity=SEATS[0].identity, commitment="f" * 64)
    for second in (SEATS[0], again):
        with pytest.raises(EnvelopeError, match="same key twice"):
            Roster((SEATS[0], second))


def test_same_agreement_key_under_another_signing_key_is_refused():
    mixed = PublicIdentity(
        signing_key=SEATS[1].identity.signing_key, agreement_key=SEATS[0].identity.agreement_key
    )
    with pytest.raises(EnvelopeError, match="same key twice"):
        Roster((SEATS[0], Seat(identity=mixed, commitment="0" * 64)))


def test_digest_changes_with_every_byte():
    raw = Roster(tuple(SEATS[:2])).to_bytes()
    digest = Roster.from_bytes(raw).digest()
    for place in range(len(raw)):
        changed = raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]
        try:
            other = Roster.from_bytes(changed)
        except EnvelopeError:  # the order of the key ids changed with it
            continue
        assert other.digest() != digest


def test_bytes_in_another_order_or_cut_are_refused():
    raw = Roster(tuple(SEATS[:3])).to_bytes()
    parts = [raw[i : i + 96] for i in range(0, len(raw), 96)]
    with pytest.raises(EnvelopeError, match="order"):
        Roster.from_bytes(parts[1] + parts[0] + parts[2])
    with pytest.raises(EnvelopeError, match="twice"):
        Roster.from_bytes(parts[0] + parts[0])
    for n in range(1, len(raw)):
        if n % 96:
            with pytest.raises(EnvelopeError, match="length"):
                Roster.from_bytes(raw[:n])


@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_a_roster_or_a_typed_error(raw):
    try:
        roster = Roster.from_bytes(raw)
    except EnvelopeError:
        return
    assert roster.to_bytes() == raw


@pytest.mark.parametrize(
    "commitment", ["", "0" * 63, "0" * 65, "G" * 64, "A" * 64, "0" * 63 + "\n"]
)
def test_commitment_that_is_no_digest_is_refused(commitment):
    with pytest.raises(EnvelopeError):
        Seat(identity=SEATS[0].identity, commitment=commitment)


def test_large_roster_finds_everybody():
    seats = [Seat(identity=Identity.generate().public, commitment="0" * 64) for _ in range(60)]
    roster = Roster(tuple(seats))
    for seat in seats:
        assert roster.seats[roster.place_of(seat.identity.key_id)] == seat
