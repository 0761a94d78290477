"""Recovery envelopes: strict in form, bound to run, batch and sender."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedinfer_flower.errors import BindingError, EnvelopeError, ProtocolError
from fedinfer_flower.wire.envelope import Kind, decode, encode
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.recovery import (
    RecoveryCall,
    read_recovered,
    read_recovery,
    recovered,
    recovery,
)
from fedinfer_flower.wire.roster import Roster, Seat

RUN, NODE = 3, 1001
ROSTER = Roster(
    tuple(Seat(identity=Identity.generate().public, commitment="0" * 64) for _ in range(3))
)
CALL = RecoveryCall(
    query_id="job-0",
    protection="secagg",
    protection_options={"dropout_share": 0.25, "self_mask": True},
    public_key=b"k" * 32,
    roster=ROSTER,
    request=b"request",
)


@given(request=st.binary(max_size=100), key=st.binary(max_size=64))
def test_call_round_trip(request, key):
    call = dataclasses.replace(CALL, request=request, public_key=key)
    assert read_recovery(decode(encode(recovery(call, run_id=RUN)))) == call


@given(reply=st.binary(max_size=100))
def test_reply_round_trip(reply):
    envelope = decode(encode(recovered(reply, query_id="job-0", run_id=RUN, sender=NODE)))
    found = read_recovered(envelope, query_id="job-0", run_id=RUN, sender=NODE)
    assert bytes(found) == reply


@pytest.mark.parametrize(
    "changes", [{"query_id": "job-1"}, {"run_id": RUN + 1}, {"sender": NODE + 1}], ids=str
)
def test_reply_of_another_batch_run_or_sender_is_refused(changes):
    envelope = recovered(b"x", query_id="job-0", run_id=RUN, sender=NODE)
    with pytest.raises(BindingError):
        read_recovered(
            dataclasses.replace(envelope, **changes), query_id="job-0", run_id=RUN, sender=NODE
        )


def test_reply_of_another_kind_or_form_is_refused():
    envelope = recovered(b"x", query_id="job-0", run_id=RUN, sender=NODE)
    for changes in ({"kind": Kind.ANSWER}, {"sections": ()}):
        with pytest.raises(EnvelopeError):
            read_recovered(
                dataclasses.replace(envelope, **changes), query_id="job-0", run_id=RUN, sender=NODE
            )


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": Kind.QUERY},
        {"query_id": ""},
        {"meta": {}},
        {"meta": {"protection": "secagg", "protection-options": {}, "more": 1}},
        {"meta": {"protection": "x" * 65, "protection-options": {}}},
        {"meta": {"protection": "secagg", "protection-options": {"x": [1]}}},
        {"sections": ()},
        {"sections": (("request", b""), ("roster", b"x"), ("public-key", b""))},
        {"sections": (("roster", b""), ("request", b""), ("public-key", b""))},
    ],
    ids=str,
)
def test_malformed_call_is_refused(changes):
    with pytest.raises(EnvelopeError):
        read_recovery(dataclasses.replace(recovery(CALL, run_id=RUN), **changes))


def test_altered_and_cut_call_is_refused_or_another_call():
    raw = encode(recovery(CALL, run_id=RUN))
    for place in range(len(raw)):
        with pytest.raises(ProtocolError):
            decode(raw[:place])
        changed = raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]
        try:
            envelope = decode(changed)
            other = read_recovery(envelope)
        except ProtocolError:
            continue
        # Nothing of the payload changes unnoticed; the rest is bound at the site.
        assert (other.request, other.roster, other.public_key) == (
            CALL.request,
            CALL.roster,
            CALL.public_key,
        )


def test_call_shows_neither_key_nor_request():
    assert "request" not in repr(CALL)
    assert "kkkk" not in repr(CALL)
