"""The key directory: each card signed by its site, for one run, with keys that work."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedinfer_flower.errors import (
    BindingError,
    EnvelopeError,
    InvalidValueError,
    ProtocolError,
    SignatureError,
    UntrustedKeyError,
)
from fedinfer_flower.query import CountsKind, SiteProfile
from fedinfer_flower.wire.directory import Directory, SiteCard, read_site_card, site_card
from fedinfer_flower.wire.envelope import Envelope, Kind, decode, encode
from fedinfer_flower.wire.identity import Identity, PublicIdentity
from fedinfer_flower.wire.pins import Pins

RUN, NODE = 7, 1000
IDENTITIES = [Identity.generate() for _ in range(3)]
PROFILES = [
    SiteProfile(
        name=f"site-{i}",
        classes=("a", "b"),
        counts_kind=CountsKind.COUNTS,
        class_counts=(3.0, i),
        model_digest="0" * 64,
    )
    for i in range(3)
]
CARDS = tuple(
    SiteCard.signed(profile, identity=identity, run_id=RUN)
    for profile, identity in zip(PROFILES, IDENTITIES, strict=True)
)
DIRECTORY = Directory(run_id=RUN, cards=CARDS)

names = st.text("abc äß-", min_size=1, max_size=20)
profiles = st.builds(
    SiteProfile,
    name=names,
    classes=st.lists(names, min_size=1, max_size=4, unique=True).map(tuple),
    calibrated=st.booleans(),
    temperature=st.floats(0.01, 100.0),
    familiarity=st.booleans(),
    model_card=st.dictionaries(names, names, max_size=3),
    price_per_query=st.floats(0.0, 1e6),
)


@settings(max_examples=50)
@given(profiles)
def test_card_and_directory_round_trip(profile):
    card = SiteCard.signed(profile, identity=IDENTITIES[0], run_id=RUN)
    there = read_site_card(decode(encode(site_card(card, sender=NODE))), run_id=RUN, sender=NODE)
    assert there == card
    assert there.profile.commitment() == profile.commitment()
    directory = Directory(run_id=RUN, cards=(card,))
    assert Directory.from_bytes(directory.to_bytes()) == directory


def test_card_of_another_run_sender_or_query_is_refused():
    envelope = site_card(CARDS[0], sender=NODE)
    for run_id, sender in ((RUN + 1, NODE), (RUN, NODE + 1)):
        with pytest.raises(BindingError):
            read_site_card(envelope, run_id=run_id, sender=sender)
    with pytest.raises(BindingError):
        read_site_card(dataclasses.replace(envelope, query_id="q"), run_id=RUN, sender=NODE)


def test_card_taken_to_another_run_does_not_verify():
    envelope = dataclasses.replace(site_card(CARDS[0], sender=NODE), run_id=RUN + 1)
    with pytest.raises(SignatureError):
        read_site_card(envelope, run_id=RUN + 1, sender=NODE)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"classes": ("b", "a")},
        {"class_counts": (3.0, 1e6)},
        {"temperature": 2.0},
        {"calibrated": True},
        {"familiarity": True},
        {"model_digest": "1" * 64},
        {"model_card": {"kind": "x"}},
        {"price_per_query": 1.0},
        {"record_epsilon": 1.0, "record_delta": 1e-5},
        {"counts_kind": CountsKind.WITHHELD, "class_counts": None},
    ],
    ids=str,
)
def test_profile_that_the_coordinator_changed_does_not_verify(changes):
    changed = dataclasses.replace(
        CARDS[0], profile=dataclasses.replace(CARDS[0].profile, **changes)
    )
    with pytest.raises(SignatureError):
        Directory(run_id=RUN, cards=(changed, *CARDS[1:]))


def test_keys_swapped_between_cards_or_for_own_ones_do_not_verify():
    for identity in (IDENTITIES[1].public, Identity.generate().public):
        with pytest.raises(SignatureError):
            Directory(run_id=RUN, cards=(dataclasses.replace(CARDS[0], identity=identity),))
    mixed = PublicIdentity(
        signing_key=IDENTITIES[0].public.signing_key,
        agreement_key=Identity.generate().public.agreement_key,
    )
    with pytest.raises(SignatureError):
        Directory(run_id=RUN, cards=(dataclasses.replace(CARDS[0], identity=mixed),))


def test_every_altered_byte_of_a_directory_is_refused_or_says_nothing():
    raw = DIRECTORY.to_bytes()
    for place in range(len(raw)):
        changed = raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]
        try:
            found = Directory.from_bytes(changed)
        except ProtocolError:
            continue
        assert found == DIRECTORY  # a header field that a directory does not use


def test_every_altered_key_or_signature_is_refused_even_with_a_fresh_checksum():
    envelope = decode(DIRECTORY.to_bytes())
    for name in ("identities", "signatures"):
        good = bytes(envelope.section(name))
        for place in range(0, len(good), 3):
            bad = good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :]
            sections = tuple((n, bad if n == name else d) for n, d in envelope.sections)
            with pytest.raises((SignatureError, EnvelopeError)):
                Directory.from_bytes(encode(dataclasses.replace(envelope, sections=sections)))


def test_cut_directory_is_refused():
    raw = DIRECTORY.to_bytes()
    for n in range(0, len(raw), 5):
        with pytest.raises(EnvelopeError):
            Directory.from_bytes(raw[:n])


def envelope_with(**changes) -> bytes:
    envelope = decode(DIRECTORY.to_bytes())
    meta = {**envelope.meta, **changes.pop("meta", {})}
    return encode(dataclasses.replace(envelope, meta=meta, **changes))


@pytest.mark.parametrize(
    "data",
    [
        envelope_with(kind=Kind.JOB),
        envelope_with(meta={"profiles": []}),
        envelope_with(meta={"profiles": {}}),
        envelope_with(meta={"profiles": [1, 2, 3]}),
        envelope_with(meta={"profiles": [{}, {}, {}]}),
        envelope_with(meta={"more": 1}),
        envelope_with(sections=()),
        envelope_with(sections=(("identities", b""), ("signatures", b""))),
    ],
)
def test_malformed_directory_is_refused(data):
    with pytest.raises(EnvelopeError):
        Directory.from_bytes(data)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ""},
        {"name": "a\x1b[2J"},
        {"name": 7},
        {"classes": []},
        {"classes": ["a", "a"]},
        {"class_counts": [1.0]},
        {"class_counts": [-1.0, 1.0]},
        {"counts_kind": "all"},
        {"temperature": 0.0},
        {"temperature": True},
        {"record_epsilon": 1.0},
        {"model_digest": "x" * 200},
        {"unknown": 1},
    ],
    ids=str,
)
def test_malformed_profile_is_refused(changes):
    envelope = site_card(CARDS[0], sender=NODE)
    with pytest.raises(EnvelopeError):
        read_site_card(
            dataclasses.replace(envelope, meta={**envelope.meta, **changes}),
            run_id=RUN,
            sender=NODE,
        )


@pytest.mark.parametrize("key", [bytes(32), b"\x01" + bytes(31)])
def test_card_with_an_agreement_key_of_low_order_is_refused(key):
    # Sealing to it is impossible: one such card would keep a querier from asking anybody.
    me = IDENTITIES[0]
    public = PublicIdentity(signing_key=me.public.signing_key, agreement_key=key)
    statement = RUN.to_bytes(8, "big") + public.to_bytes()
    statement += bytes.fromhex(PROFILES[0].commitment())
    card = SiteCard(
        run_id=RUN,
        profile=PROFILES[0],
        identity=public,
        signature=me.sign("site card", statement),
    )
    with pytest.raises(EnvelopeError, match="no X25519 public key"):
        read_site_card(site_card(card, sender=NODE), run_id=RUN, sender=NODE)
    with pytest.raises(EnvelopeError):
        Directory(run_id=RUN, cards=(card,))


def test_same_card_twice_is_refused():
    with pytest.raises(EnvelopeError, match="same key twice"):
        Directory(run_id=RUN, cards=(CARDS[0], CARDS[0]))


def test_only_keeps_the_named_sites():
    assert DIRECTORY.only(["site-2"]).roster.key_ids == (IDENTITIES[2].key_id,)
    with pytest.raises(InvalidValueError, match="nobody"):
        DIRECTORY.only(["site-1", "nobody"])


def test_pins_name_the_site_whose_key_was_swapped():
    pins = Pins(sites={p.name: i.key_id for p, i in zip(PROFILES, IDENTITIES, strict=True)})
    DIRECTORY.require_pinned(pins)
    # The coordinator makes a card of its own under the site's name: it verifies by itself.
    forged = SiteCard.signed(PROFILES[1], identity=Identity.generate(), run_id=RUN)
    swapped = Directory(run_id=RUN, cards=(CARDS[0], forged, CARDS[2]))
    with pytest.raises(UntrustedKeyError, match="'site-1'"):
        swapped.require_pinned(pins)
    # Beside the real one, it is caught as well.
    with pytest.raises(UntrustedKeyError, match="'site-1'"):
        Directory(run_id=RUN, cards=(*CARDS, forged)).require_pinned(pins)


def test_pins_do_not_notice_a_site_that_was_left_out():
    pins = Pins(sites={p.name: i.key_id for p, i in zip(PROFILES, IDENTITIES, strict=True)})
    DIRECTORY.only(["site-0", "site-1"]).require_pinned(pins)


@settings(max_examples=50)
@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_a_typed_error(raw):
    with pytest.raises(ProtocolError):
        Directory.from_bytes(raw)


def test_card_as_another_kind_is_refused():
    envelope = Envelope(kind=Kind.HELLO, run_id=RUN)
    with pytest.raises(EnvelopeError):
        read_site_card(envelope, run_id=RUN, sender=NODE)
    assert np.isfinite(CARDS[0].profile.temperature)
