"""The language card: signed by its site for one run, and strictly read."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedinfer_flower.errors import BindingError, EnvelopeError, ProtocolError, SignatureError
from fedinfer_flower.wire.envelope import decode, encode
from fedinfer_flower.wire.identity import Identity, PublicIdentity
from fedinfer_flower.wire.language_card import (
    FuserNote,
    LanguageCard,
    Speeds,
    read_language_card,
)

RUN, NODE = 7, 1000
SITE = Identity.generate()
LAYOUT = json.dumps({"model_digest": "ab" * 32, "layers": 2})
CARD = LanguageCard(
    run_id=RUN,
    name="north",
    layout=LAYOUT,
    node_id=NODE,
    media=("cache", "text"),
    codecs=("int8",),
    speeds=Speeds(prefill_s=0.01, prefill_s_per_token=1e-4, decode_s=0.002),
    fusers=(
        FuserNote(sharer_digest="cd" * 32, kind="last-token", share={"last": 1, "hidden": False}),
    ),
).signed(SITE)

speeds = st.builds(Speeds, **{n: st.floats(0, 1e5) for n in Speeds.__dataclass_fields__})
cards = st.builds(
    LanguageCard,
    run_id=st.integers(0, 2**64 - 1),
    name=st.text("abc äß-", max_size=20),
    node_id=st.just(NODE),
    layout=st.just(LAYOUT),
    media=st.permutations(["cache", "full-cache", "text"]).map(tuple),
    answers=st.booleans(),
    coordinator_fusers=st.booleans(),
    candidates=st.booleans(),
    codecs=st.lists(st.sampled_from(["int4", "int8"]), unique=True).map(tuple),
    max_questions=st.integers(1, 4096),
    one_phase_bytes=st.integers(0, 1 << 20),
    speeds=st.none() | speeds,
)


@settings(max_examples=50)
@given(cards)
def test_card_round_trips(card):
    signed = card.signed(SITE)
    assert LanguageCard.from_bytes(signed.to_bytes(), run_id=card.run_id) == signed
    there = decode(encode(signed.to_envelope(sender=NODE)))
    assert read_language_card(there, run_id=card.run_id, sender=NODE) == signed


def test_card_names_its_model_and_its_keys():
    assert CARD.model_digest == "ab" * 32
    assert CARD.key_id == SITE.key_id


@pytest.mark.parametrize(
    "change",
    [
        {"name": "south"},
        {"media": ("cache", "full-cache", "text")},
        {"answers": False},
        {"coordinator_fusers": True},
        {"codecs": ("int4",)},
        {"speeds": None},
        {"fusers": ()},
        {"layout": LAYOUT.replace("ab", "cd")},
        {"identity": Identity.generate().public},
        {"run_id": RUN + 1},
        {"signature": bytes(64)},
    ],
)
def test_card_that_was_altered_does_not_verify(change):
    with pytest.raises(SignatureError):
        LanguageCard.from_bytes(dataclasses.replace(CARD, **change).to_bytes())


def test_card_that_another_node_replays_as_its_own_is_refused():
    with pytest.raises(BindingError, match="another node"):
        read_language_card(CARD.to_envelope(sender=NODE + 1), run_id=RUN, sender=NODE + 1)


def test_card_of_another_run_sender_or_query_is_refused():
    envelope = CARD.to_envelope(sender=NODE)
    for run_id, sender in ((RUN + 1, NODE), (RUN, NODE + 1)):
        with pytest.raises(BindingError):
            read_language_card(envelope, run_id=run_id, sender=sender)
    with pytest.raises(BindingError):
        read_language_card(dataclasses.replace(envelope, query_id="q"), run_id=RUN, sender=NODE)


def test_card_with_keys_that_nothing_can_be_sealed_to_is_refused():
    broken = PublicIdentity(signing_key=SITE.public.signing_key, agreement_key=bytes(32))
    with pytest.raises(EnvelopeError):
        dataclasses.replace(CARD, identity=broken).require_signature()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("media", ["caches"]),
        ("media", ["text", "text"]),
        ("media", None),
        ("layout", "nonsense"),
        ("layout", "[]"),
        ("layout", json.dumps({"model_digest": "AB" * 32})),
        ("layout", "[" * 5000),
        ("speeds", {"prefill_s": 1.0}),
        ("speeds", {"prefill_s": -1.0, "prefill_s_per_token": 0.0, "decode_s": 0.0}),
        ("speeds", []),
        ("fusers", [{"sharer": "0", "kind": "x", "share": {}}]),
        ("fusers", {"a": 1}),
        ("fusers", [3]),
        ("answers", 1),
        ("max_questions", 0),
        ("one_phase_bytes", True),
        ("codecs", "int8"),
        ("more", 1),
    ],
)
def test_card_with_a_wrong_field_is_refused(name, value):
    envelope = CARD.to_envelope()
    meta = {**envelope.meta, "card": {**envelope.meta["card"], name: value}}
    with pytest.raises(EnvelopeError):
        LanguageCard.from_bytes(encode(dataclasses.replace(envelope, meta=meta)))


@pytest.mark.parametrize("name", LanguageCard.__dataclass_fields__)
def test_card_that_lacks_a_field_is_refused(name):
    envelope = CARD.to_envelope()
    card = {key: value for key, value in envelope.meta["card"].items() if key != name}
    if len(card) < len(envelope.meta["card"]):
        meta = {**envelope.meta, "card": card}
        with pytest.raises(EnvelopeError):
            LanguageCard.from_bytes(encode(dataclasses.replace(envelope, meta=meta)))


@settings(max_examples=200)
@given(st.data())
def test_card_with_random_bytes_in_it_is_a_typed_error(data):
    good = CARD.to_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != good[at]))
    with pytest.raises(ProtocolError):
        LanguageCard.from_bytes(good[:at] + bytes([byte]) + good[at + 1 :])


def test_card_of_absurd_size_is_refused():
    with pytest.raises(EnvelopeError):
        LanguageCard.from_bytes(bytes(2 << 20))
