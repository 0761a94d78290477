"""Seals: the named recipients read, nobody else, and nothing altered opens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedinfer_flower.errors import EnvelopeError, SealError
from fedinfer_flower.wire.identity import Identity, PublicIdentity
from fedinfer_flower.wire.sealing import SealedBody, open_body, open_sealed, seal_for, seal_to

SITES = [Identity.generate() for _ in range(3)]
STRANGER = Identity.generate()
TEXT = b"the text that was sealed"
RECORD = 112


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@given(plaintext=st.binary(max_size=500), info=st.binary(max_size=50))
def test_recipient_opens_what_was_sealed(plaintext, info):
    sealed = seal_to(SITES[0].public, plaintext, info=info)
    assert len(sealed) == len(plaintext) + 48
    assert open_sealed(SITES[0], memoryview(sealed), info=info) == plaintext


@given(plaintext=st.binary(max_size=500), n=st.integers(1, 3))
def test_every_recipient_opens_a_body(plaintext, n):
    sealed = seal_for([s.public for s in SITES[:n]], plaintext, info=b"i")
    assert len(sealed.wraps) == RECORD * n
    for site in SITES[:n]:
        assert open_body(site, sealed, info=b"i") == plaintext


def test_sealing_twice_gives_other_bytes():
    one, two = (seal_for([SITES[0].public], TEXT, info=b"") for _ in range(2))
    assert one.body != two.body
    assert one.wraps != two.wraps


def test_stranger_and_other_purpose_are_refused():
    sealed = seal_to(SITES[0].public, TEXT, info=b"a")
    body = seal_for([SITES[0].public], TEXT, info=b"a")
    for identity, info in ((STRANGER, b"a"), (SITES[0], b"b"), (SITES[0], b"")):
        with pytest.raises(SealError):
            open_sealed(identity, sealed, info=info)
        with pytest.raises(SealError):
            open_body(identity, body, info=info)


def test_every_altered_byte_of_a_seal_is_noticed():
    sealed = seal_to(SITES[0].public, TEXT, info=b"")
    for place in range(len(sealed)):
        with pytest.raises(SealError):
            open_sealed(SITES[0], flipped(sealed, place), info=b"")


def test_every_altered_byte_of_a_body_or_of_the_own_wrap_is_noticed():
    sealed = seal_for([s.public for s in SITES], TEXT, info=b"")
    body, wraps = bytes(sealed.body), bytes(sealed.wraps)
    for place in range(len(body)):
        with pytest.raises(SealError):
            open_body(SITES[1], SealedBody(body=flipped(body, place), wraps=wraps), info=b"")
    for place in range(RECORD, 2 * RECORD):
        with pytest.raises(SealError):
            open_body(SITES[1], SealedBody(body=body, wraps=flipped(wraps, place)), info=b"")


def test_cut_or_lengthened_parts_are_refused():
    sealed = seal_for([SITES[0].public], TEXT, info=b"")
    body, wraps = bytes(sealed.body), bytes(sealed.wraps)
    broken = [(body[:n], wraps) for n in range(len(body))]
    broken += [(body, wraps[:n]) for n in range(len(wraps))]
    broken += [(body + b"\0", wraps), (b"", b"")]
    for part, table in broken:
        with pytest.raises(SealError):
            open_body(SITES[0], SealedBody(body=part, wraps=table), info=b"")


def test_wrap_of_another_body_or_under_another_name_does_not_open():
    one = seal_for([SITES[0].public], TEXT, info=b"")
    two = seal_for([SITES[0].public], TEXT, info=b"")
    with pytest.raises(SealError):
        open_body(SITES[0], SealedBody(body=one.body, wraps=two.wraps), info=b"")
    other = bytes.fromhex(SITES[1].key_id) + bytes(one.wraps)[32:]
    with pytest.raises(SealError):
        open_body(SITES[1], SealedBody(body=one.body, wraps=other), info=b"")


def test_of_duplicated_wraps_the_first_counts():
    sealed = seal_for([SITES[0].public], TEXT, info=b"")
    other = bytes(seal_for([SITES[0].public], TEXT, info=b"").wraps)
    own = bytes(sealed.wraps)
    assert open_body(SITES[0], SealedBody(body=sealed.body, wraps=own + other), info=b"") == TEXT
    with pytest.raises(SealError):
        open_body(SITES[0], SealedBody(body=sealed.body, wraps=other + own), info=b"")


def test_body_without_recipients_opens_for_nobody():
    with pytest.raises(SealError, match="not sealed to this party"):
        open_body(SITES[0], seal_for([], TEXT, info=b""), info=b"")


@given(st.binary(max_size=400), st.binary(max_size=300))
def test_arbitrary_bytes_never_open(body, wraps):
    with pytest.raises(SealError):
        open_body(SITES[0], SealedBody(body=body, wraps=wraps), info=b"")
    with pytest.raises(SealError):
        open_sealed(SITES[0], body, info=b"")


def test_many_wraps_of_others_are_read_over():
    sealed = seal_for([SITES[0].public], TEXT, info=b"")
    table = bytes(RECORD) * 10_000 + bytes(sealed.wraps)
    assert open_body(SITES[0], SealedBody(body=sealed.body, wraps=table), info=b"") == TEXT


@pytest.mark.parametrize("key", [bytes(32), b"\x01" + bytes(31)])
def test_recipient_with_a_key_of_low_order_is_refused(key):
    public = PublicIdentity(signing_key=STRANGER.public.signing_key, agreement_key=key)
    with pytest.raises(EnvelopeError):
        seal_to(public, TEXT, info=b"")


def test_sealed_body_is_not_shown():
    sealed = seal_for([SITES[0].public], TEXT, info=b"")
    assert repr(sealed) == "SealedBody()"
