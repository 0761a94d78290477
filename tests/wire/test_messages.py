"""Readers of each kind of envelope: right fields in, typed errors for everything else."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedinfer_flower import errors
from fedinfer_flower.errors import (
    BindingError,
    EnvelopeError,
    FedInferError,
    ProtocolError,
    ShapeError,
    SignatureError,
    SizeLimitError,
)
from fedinfer_flower.query import CountsKind, SiteProfile
from fedinfer_flower.wire import messages
from fedinfer_flower.wire.directory import SiteCard, read_site_card, site_card
from fedinfer_flower.wire.envelope import Envelope, Kind, WireLimits, decode, encode
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.messages import Question
from fedinfer_flower.wire.roster import Roster, Seat

RUN, NODE = 77, 1001
PROFILE = SiteProfile(
    name="Klinik Nord",
    classes=("cat", "dog"),
    counts_kind=CountsKind.COUNTS,
    class_counts=(3.0, 4.0),
    calibrated=True,
    temperature=1.5,
    familiarity=True,
    model_card={"kind": "forest"},
    price_per_query=0.25,
    model_digest="sha256:0a",
    record_epsilon=2.0,
    record_delta=1e-5,
)
SITE, QUERIER = Identity.generate(), Identity.generate()
ROSTER = Roster(
    (
        Seat(identity=SITE.public, commitment=PROFILE.commitment()),
        Seat(identity=Identity.generate().public, commitment="0" * 64),
        Seat(identity=Identity.generate().public, commitment="f" * 64),
    )
)
QUESTION = Question(
    query_id="q-0",
    inputs=np.arange(6, dtype=np.float32).reshape(2, 3),
    classes=("cat", "dog"),
    n_sites=3,
    rule="class-share",
    protection="plain",
    rule_options={"a": 1, "b": 0.5, "c": "x", "d": True},
    class_totals=np.array([9.0, 8.0]),
    counts_kind=CountsKind.COUNTS,
    public_key=b"key",
    key_id="0f" * 32,
    roster=ROSTER,
    querier=QUERIER.public,
    expires_at=1.5e9,
    relay=True,
)
WRONG = (None, True, 1, -1, 2.5, 10**400, "x", "\ud800", [], [None], {}, {"a": []}, [[1]])


def travelled(envelope: Envelope) -> Envelope:
    return decode(encode(envelope))


def with_meta(envelope: Envelope, **changes: object) -> Envelope:
    return dataclasses.replace(envelope, meta=dict(envelope.meta) | changes)


def profile_envelope(profile: SiteProfile = PROFILE) -> Envelope:
    return site_card(SiteCard.signed(profile, identity=SITE, run_id=RUN), sender=NODE)


def read_profile(envelope: Envelope) -> SiteProfile:
    return read_site_card(envelope, run_id=RUN, sender=NODE).profile


def answer_envelope(**changes: object) -> Envelope:
    whole = messages.answer(
        QUESTION, run_id=RUN, sender=NODE, payload=bytes(16), width=2, commitment="c" * 64
    )
    return dataclasses.replace(whole, **changes)


def read_answer(envelope: Envelope) -> bytes:
    payload = messages.read_answer(
        envelope, QUESTION, n_queries=2, run_id=RUN, sender=NODE, width=2, commitment="c" * 64
    )
    return bytes(payload)


# -- questions ---------------------------------------------------------------------------


def test_question_after_a_round_trip_is_the_same():
    seen = messages.read_question(travelled(messages.question(QUESTION, run_id=RUN)))

    for field in dataclasses.fields(Question):
        before, after = getattr(QUESTION, field.name), getattr(seen, field.name)
        if isinstance(before, np.ndarray):
            np.testing.assert_array_equal(after, before)
            assert after.dtype == before.dtype
        else:
            assert after == before, field.name
    assert not seen.inputs.flags.writeable


def with_section(name: str, data: bytes) -> dict[str, object]:
    whole = messages.question(QUESTION, run_id=RUN)
    return {"sections": tuple((n, data if n == name else d) for n, d in whole.sections)}


# For each field the values of `WRONG` that are right for it.
RIGHT_IN_QUESTION = {
    "classes": (),
    "class-totals": (None,),
    "counts-kind": (),
    "sites": (),  # 1 is not the number of sites in the roster
    "rule": ("x",),
    "rule-options": ({},),
    "protection": ("x",),
    "protection-options": ({},),
    "expires-at": (1, -1, 2.5),
    "relay": (True,),
}


@pytest.mark.parametrize("value", WRONG, ids=lambda v: repr(v)[:12])
@pytest.mark.parametrize("field", RIGHT_IN_QUESTION)
def test_question_with_a_field_of_wrong_type_raises_typed_error(field, value):
    bad = with_meta(messages.question(QUESTION, run_id=RUN), **{field: value})
    right = RIGHT_IN_QUESTION[field]
    if any(type(value) is type(r) and value == r for r in right):
        messages.read_question(bad)
        return
    with pytest.raises(ProtocolError):
        messages.read_question(bad)


@pytest.mark.parametrize(
    "changes",
    [
        {"classes": ["cat", "cat"]},
        {"classes": ["cat", 3]},
        {"classes": ["x" * 257, "y"]},
        {"class-totals": [1.0]},
        {"class-totals": [1.0, float("inf")]},
        {"class-totals": [1.0, "2"]},
        {"counts-kind": "COUNTS"},
        {"sites": 0},
        {"sites": 1_000_001},
        {"rule": "x" * 65},
        {"rule-options": {f"o{i}": 1 for i in range(33)}},
        {"rule-options": {"x" * 65: 1}},
        {"rule-options": {"x": float("nan")}},
        {"unknown": 1},
    ],
    ids=str,
)
def test_question_with_a_value_out_of_range_raises_typed_error(changes):
    with pytest.raises(ProtocolError):
        messages.read_question(with_meta(messages.question(QUESTION, run_id=RUN), **changes))


@pytest.mark.parametrize("name", RIGHT_IN_QUESTION)
def test_question_without_a_field_raises_typed_error(name):
    whole = messages.question(QUESTION, run_id=RUN)
    meta = {key: value for key, value in whole.meta.items() if key != name}
    with pytest.raises(EnvelopeError, match="lacks a field"):
        messages.read_question(dataclasses.replace(whole, meta=meta))


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": ()},
        {"shape": (2, 4)},
        {"shape": (2**40, 3)},
        {"shape": (0, 3)},
        {"codec": "object"},
        {"codec": "float64"},
        {"query_id": ""},
        {"kind": Kind.ANSWER},
        {"sections": ()},
        {"sections": (("inputs", bytes(24)),)},
        {"sections": (("inputs", bytes(24)), ("public-key", b""), ("more", b""))},
        with_section("roster", ROSTER.to_bytes()[:-1]),
        with_section("roster", ROSTER.to_bytes()[96:]),  # a site fewer than "sites" says
        with_section("roster", ROSTER.to_bytes()[96:] + ROSTER.to_bytes()[:96]),  # order
        with_section("roster", ROSTER.to_bytes()[:96] * 3),
        with_section("querier", QUERIER.public.to_bytes()[:-1]),
        with_section("querier", QUERIER.public.to_bytes() + b"x"),
        with_section("inputs", bytes(23)),
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_question_with_wrong_outer_field_raises_typed_error(changes):
    whole = messages.question(QUESTION, run_id=RUN)
    with pytest.raises(ProtocolError):
        messages.read_question(dataclasses.replace(whole, **changes))


def test_question_without_roster_and_querier_is_read():
    plain = dataclasses.replace(QUESTION, roster=Roster(()), querier=None, n_sites=7)
    seen = messages.read_question(travelled(messages.question(plain, run_id=RUN)))
    assert (len(seen.roster), seen.querier, seen.n_sites) == (0, None, 7)


def test_question_with_more_rows_than_accepted_raises_size_limit():
    whole = messages.question(QUESTION, run_id=RUN)
    assert messages.read_question(whole, limits=WireLimits(max_rows=2)).n_queries == 2
    with pytest.raises(SizeLimitError):
        messages.read_question(whole, limits=WireLimits(max_rows=1))


# -- profiles ----------------------------------------------------------------------------


def test_profile_after_a_round_trip_is_the_same():
    seen = read_profile(travelled(profile_envelope()))
    assert seen == PROFILE
    assert seen.commitment() == PROFILE.commitment()


def test_profile_of_whole_numbers_commits_to_the_same_after_a_round_trip():
    # 1 and 1.0 are equal, and so must be what is digested of them.
    loose = SiteProfile(
        name="a",
        classes=("x",),
        counts_kind=CountsKind.COUNTS,
        class_counts=(np.int64(3),),
        temperature=2,
        price_per_query=np.float32(1),
        model_card={"trees": 100},
    )
    seen = read_profile(travelled(profile_envelope(loose)))

    assert seen.commitment() == loose.commitment()
    assert seen == loose


RIGHT_IN_PROFILE = {
    "name": ("x",),
    "classes": (),
    "counts_kind": (),
    "class_counts": (),
    "calibrated": (True,),
    "temperature": (1, 2.5),
    "familiarity": (True,),
    "model_card": ({},),
    "price_per_query": (1, 2.5),
    "model_digest": ("x",),
    "record_epsilon": (1, 2.5),
    "record_delta": (),
}


@pytest.mark.parametrize("value", WRONG, ids=lambda v: repr(v)[:12])
@pytest.mark.parametrize("field", RIGHT_IN_PROFILE)
def test_profile_with_a_field_of_wrong_type_raises_typed_error(field, value):
    bad = with_meta(profile_envelope(), **{field: value})
    if any(type(value) is type(r) and value == r for r in RIGHT_IN_PROFILE[field]):
        # Right for the field, but not what the site signed, unless it says the same.
        if getattr(PROFILE, field) != value:
            with pytest.raises(SignatureError):
                read_profile(bad)
        read_profile(profile_envelope(dataclasses.replace(PROFILE, **{field: value})))
        return
    with pytest.raises(EnvelopeError):
        read_profile(bad)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ""},
        {"name": "x" * 129},
        {"name": "a\nFI000 b"},  # would write a line of its own into the coordinator's log
        {"name": "\x1b[31mred"},
        {"classes": ["cat", "cat"]},
        {"class_counts": [1.0]},
        {"class_counts": [1.0, -1.0]},
        {"class_counts": [1.0, 1e300]},
        {"class_counts": None},
        {"counts_kind": "presence"},  # 3 and 4 are no presence bits
        {"counts_kind": "withheld"},
        {"temperature": 0.0},
        {"temperature": 1e3},
        {"price_per_query": -1.0},
        {"model_card": {f"k{i}": "v" for i in range(33)}},
        {"extra": 1},
        {"model_digest": "x" * 129},
        {"model_digest": "a\nb"},
        {"record_epsilon": -1.0},
        {"record_epsilon": None},  # without its delta's
        {"record_delta": 1.0},
    ],
    ids=str,
)
def test_profile_with_a_value_out_of_range_raises_typed_error(changes):
    with pytest.raises(EnvelopeError):
        read_profile(with_meta(profile_envelope(), **changes))


@pytest.mark.parametrize(
    "changes", [{"run_id": RUN + 1}, {"sender": NODE + 1}, {"sender": 0}, {"query_id": "q"}]
)
def test_profile_bound_elsewhere_raises_binding_error(changes):
    with pytest.raises(BindingError):
        read_profile(dataclasses.replace(profile_envelope(), **changes))


@pytest.mark.parametrize(
    "sections",
    [
        (("identity", SITE.public.to_bytes()), ("signature", bytes(64))),
        (("identity", QUERIER.public.to_bytes()), profile_envelope().sections[1]),
        (
            profile_envelope().sections[0],
            ("signature", profile_envelope().section("signature")[:-1]),
        ),
    ],
    ids=["no signature", "other keys", "cut"],
)
def test_profile_that_its_keys_did_not_sign_raises_signature_error(sections):
    with pytest.raises(SignatureError):
        read_profile(dataclasses.replace(profile_envelope(), sections=sections))


@pytest.mark.parametrize(
    "sections",
    [
        (),
        (("identity", SITE.public.to_bytes()),),
        (("identity", bytes(63)), ("signature", bytes(64))),
        (*profile_envelope().sections, ("more", b"")),
    ],
    ids=["none", "no signature", "short keys", "one more"],
)
def test_profile_with_other_sections_raises_envelope_error(sections):
    with pytest.raises(EnvelopeError):
        read_profile(dataclasses.replace(profile_envelope(), sections=sections))


@pytest.mark.parametrize("point", [bytes(32), b"\x01" + bytes(31)])
def test_profile_with_an_agreement_key_of_low_order_raises_typed_error(point):
    # Everybody would know what is agreed on with such a key.
    keys = dataclasses.replace(SITE.public, agreement_key=point)
    sections = (("identity", keys.to_bytes()), profile_envelope().sections[1])
    with pytest.raises(EnvelopeError):
        read_profile(dataclasses.replace(profile_envelope(), sections=sections))


def test_profile_signed_for_another_run_raises_signature_error():
    other = SiteCard.signed(PROFILE, identity=SITE, run_id=RUN + 1)
    replayed = dataclasses.replace(site_card(other, sender=NODE), run_id=RUN)
    with pytest.raises(SignatureError):
        read_profile(replayed)


# -- answers -----------------------------------------------------------------------------


def test_answer_after_a_round_trip_gives_the_payload():
    assert read_answer(travelled(answer_envelope())) == bytes(16)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"kind": Kind.PROFILE}, EnvelopeError),
        ({"run_id": RUN + 1}, BindingError),
        ({"sender": NODE + 1}, BindingError),
        ({"query_id": "q-1"}, BindingError),
        ({"key_id": ""}, BindingError),
        ({"key_id": "ff" * 32}, BindingError),
        ({"codec": "dp"}, BindingError),
        ({"codec": ""}, BindingError),
        ({"meta": {"commitment": "d" * 64}}, BindingError),
        ({"meta": {"commitment": ""}}, BindingError),
        ({"meta": {"commitment": None}}, EnvelopeError),
        ({"meta": {"commitment": ["c" * 64]}}, EnvelopeError),
        ({"meta": {"commitment": "\ud800"}}, EnvelopeError),
        ({"meta": {}}, EnvelopeError),
        ({"meta": {"commitment": "c" * 64, "weight": 5}}, EnvelopeError),
        ({"shape": (2, 3)}, ShapeError),
        ({"shape": (4,)}, ShapeError),
        ({"shape": ()}, ShapeError),
        ({"shape": (2, 2, 1)}, ShapeError),
        ({"sections": ()}, EnvelopeError),
        ({"sections": (("payload", bytes(16)),)}, EnvelopeError),
        ({"sections": (("scores", bytes(16)), ("more", b"x"))}, EnvelopeError),
        ({"sections": (("scores", bytes(16)),)}, EnvelopeError),
        ({"sections": (("statement", b""), ("scores", bytes(16)), ("more", b""))}, EnvelopeError),
    ],
    ids=str,
)
def test_answer_that_is_not_the_one_asked_for_raises_typed_error(changes, error):
    with pytest.raises(error):
        read_answer(answer_envelope(**changes))


# -- errors ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name != "error_class"])
def test_error_of_every_class_after_a_round_trip_is_the_same(name):
    sent = getattr(errors, name)("what", hint="fix it")
    envelope = travelled(messages.error(sent, run_id=RUN, sender=NODE, query_id="q-0"))

    seen = messages.read_error(envelope, run_id=RUN, sender=NODE)

    assert type(seen) is type(sent)
    assert (seen.message, seen.hint) == ("what", "fix it")


def test_error_with_control_characters_is_read_as_one_line():
    sent = FedInferError("a\n\x1b[31mb\r\u2028c\x00", hint="d\te")
    seen = messages.read_error(
        travelled(messages.error(sent, run_id=RUN, sender=NODE)), run_id=RUN, sender=NODE
    )
    assert seen.message.isprintable()
    assert seen.hint == "d e"


def test_error_with_long_text_is_cut_and_still_read():
    sent = FedInferError("m" * 5000, hint="h" * 5000)
    seen = messages.read_error(
        travelled(messages.error(sent, run_id=RUN, sender=NODE)), run_id=RUN, sender=NODE
    )
    assert (len(seen.message), len(seen.hint)) == (1000, 1000)


@pytest.mark.parametrize("value", [v for v in WRONG if v != "x"], ids=lambda v: repr(v)[:12])
@pytest.mark.parametrize("field", ["code", "message", "hint"])
def test_error_with_a_field_of_wrong_type_raises_typed_error(field, value):
    whole = messages.error(FedInferError("m"), run_id=RUN, sender=NODE)
    with pytest.raises(EnvelopeError):
        messages.read_error(with_meta(whole, **{field: value}), run_id=RUN, sender=NODE)


def test_error_of_another_sender_raises_binding_error():
    whole = messages.error(FedInferError("m"), run_id=RUN, sender=NODE)
    for run_id, sender in ((RUN + 1, NODE), (RUN, NODE + 1)):
        with pytest.raises(BindingError):
            messages.read_error(whole, run_id=run_id, sender=sender)


# -- any envelope at any reader ----------------------------------------------------------

META_VALUES = st.sampled_from(WRONG) | st.text(max_size=5) | st.lists(st.floats(), max_size=3)
META_NAMES = st.sampled_from(
    ["commitment", "code", "message", "hint", *RIGHT_IN_QUESTION, *RIGHT_IN_PROFILE]
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(Kind),
    meta=st.dictionaries(META_NAMES, META_VALUES, max_size=9),
    shape=st.lists(st.sampled_from([0, 1, 2, 3, 2**63]), max_size=3).map(tuple),
    payload=st.binary(max_size=24),
    name=st.sampled_from(["scores", "inputs", "other"]),
)
def test_readers_of_any_envelope_raise_only_typed_errors(kind, meta, shape, payload, name):
    envelope = Envelope(
        kind=kind,
        run_id=RUN,
        sender=NODE,
        query_id="q-0",
        shape=shape,
        codec="plain",
        meta=meta,
        sections=((name, payload),),
    )
    readers = (
        lambda: messages.read_question(envelope),
        lambda: read_profile(envelope),
        lambda: read_answer(envelope),
        lambda: messages.read_error(envelope, run_id=RUN, sender=NODE),
    )
    for reader in readers:
        with pytest.raises(ProtocolError):  # none of these is complete
            reader()
