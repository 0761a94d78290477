"""Keys: what is signed, agreed on, and kept in files."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from fedinfer_flower.errors import ConfigError, EnvelopeError, SignatureError
from fedinfer_flower.wire.identity import Identity, PublicIdentity

ME, OTHER = Identity.generate(), Identity.generate()
P = 2**255 - 19
LOW_ORDER = [
    0,
    1,
    P - 1,
    P,
    P + 1,
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
]
"""u-coordinates of order 1, 2, 4 and 8; see RFC 7748, section 6.1."""


# -- signatures ----------------------------------------------------------------------------


@given(domain=st.text(max_size=40), data=st.binary(max_size=200))
def test_signature_verifies_for_its_own_domain_and_data(domain, data):
    ME.public.verify(domain, data, ME.sign(domain, data))


@given(data=st.binary(max_size=64), bit=st.integers(0, 511))
def test_signature_with_any_bit_flipped_is_refused(data, bit):
    signature = bytearray(ME.sign("d", data))
    signature[bit // 8] ^= 1 << bit % 8
    with pytest.raises(SignatureError):
        ME.public.verify("d", data, bytes(signature))


@given(
    parts=st.tuples(st.text("ab|", max_size=4), st.binary(max_size=4)),
    others=st.tuples(st.text("ab|", max_size=4), st.binary(max_size=4)),
)
def test_signature_of_one_domain_and_data_never_serves_another(parts, others):
    # Short strings over few letters, so that wrong concatenations would collide.
    signature = ME.sign(*parts)
    if parts == others:
        ME.public.verify(*others, signature)
    else:
        with pytest.raises(SignatureError):
            ME.public.verify(*others, signature)


@pytest.mark.parametrize("signature", [b"", b"x", bytes(63), bytes(64), bytes(65), bytes(10_000)])
def test_bytes_that_are_no_signature_are_refused(signature):
    with pytest.raises(SignatureError):
        ME.public.verify("d", b"data", signature)


def test_signature_of_another_party_is_refused_and_the_text_names_the_key():
    with pytest.raises(SignatureError, match=ME.key_id[:16]):
        ME.public.verify("query", b"secret", OTHER.sign("query", b"secret"))


# -- agreement -----------------------------------------------------------------------------


def test_two_parties_agree_on_one_secret_that_is_no_one_elses():
    assert ME.agree(OTHER.public.agreement_key) == OTHER.agree(ME.public.agreement_key)
    assert Identity.generate().agree(ME.public.agreement_key) != ME.agree(
        OTHER.public.agreement_key
    )


@pytest.mark.parametrize("point", LOW_ORDER)
def test_key_of_low_order_is_refused(point):
    key = point.to_bytes(32, "little")
    with pytest.raises(EnvelopeError, match="no X25519 public key"):
        ME.agree(key)
    public = PublicIdentity(signing_key=ME.public.signing_key, agreement_key=key)
    with pytest.raises(EnvelopeError):
        public.require_usable()


def test_usable_key_passes():
    ME.public.require_usable()


@pytest.mark.parametrize("length", [0, 31, 33, 1000])
def test_key_of_another_length_is_refused(length):
    with pytest.raises(EnvelopeError):
        ME.agree(bytes(length))


@given(raw=st.binary(max_size=130))
def test_public_identity_reads_64_bytes_and_nothing_else(raw):
    if len(raw) == 64:
        assert PublicIdentity.from_bytes(raw).to_bytes() == raw
    else:
        with pytest.raises(EnvelopeError):
            PublicIdentity.from_bytes(raw)


def test_key_id_depends_on_both_keys():
    mixed = PublicIdentity(
        signing_key=ME.public.signing_key, agreement_key=OTHER.public.agreement_key
    )
    assert len({mixed.key_id, ME.key_id, OTHER.key_id}) == 3


def test_secret_is_not_shown(caplog):
    secret = ME.to_secret()
    for text in (repr(ME), str(ME), repr(ME.public)):
        assert secret["signing"] not in text
        assert secret["agreement"] not in text


# -- files ---------------------------------------------------------------------------------


def test_file_is_made_once_and_gives_the_same_identity(tmp_path):
    path = tmp_path / "new" / "identity.json"
    first = Identity.load_or_create(path)
    assert Identity.load_or_create(path).to_secret() == first.to_secret()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert os.listdir(path.parent) == ["identity.json"]  # no draft is left


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601, 0o644, 0o777])
def test_file_that_others_can_reach_is_refused(tmp_path, mode):
    path = tmp_path / "identity.json"
    secret = Identity.load_or_create(path).to_secret()
    path.chmod(mode)
    with pytest.raises(ConfigError, match="read by others") as caught:
        Identity.load_or_create(path)
    assert secret["signing"] not in str(caught.value)


DAMAGED = {
    "empty": b"",
    "half": b'{"signing": "00',
    "not text": b"\xff\xfe\x00",
    "list": b"[]",
    "number": b"1",
    "no keys": b"{}",
    "one key": json.dumps({"signing": "00" * 32}).encode(),
    "short key": json.dumps({"signing": "00" * 31, "agreement": "00" * 32}).encode(),
    "long key": json.dumps({"signing": "00" * 33, "agreement": "00" * 32}).encode(),
    "no hex": json.dumps({"signing": "zz" * 32, "agreement": "00" * 32}).encode(),
    "null": json.dumps({"signing": None, "agreement": None}).encode(),
    "number as key": json.dumps({"signing": 7, "agreement": 7}).encode(),
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_file_is_refused_and_left_as_it_is(tmp_path, content):
    path = tmp_path / "identity.json"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError) as caught:
        Identity.load_or_create(path)
    assert path.read_bytes() == content
    assert "zz" not in str(caught.value)


def test_path_that_is_a_folder_or_leads_nowhere_is_a_typed_error(tmp_path):
    (tmp_path / "folder").mkdir(mode=0o700)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    for path in ("folder", "dangling", "file/identity.json"):
        with pytest.raises(ConfigError, match="cannot be read or made"):
            Identity.load_or_create(tmp_path / path)


_RACE = """
import pathlib, sys, time
from fedinfer_flower.wire.identity import Identity
home = pathlib.Path(sys.argv[1])
(home / sys.argv[2]).touch()
while not (home / "start").exists():
    time.sleep(0.001)
print(Identity.load_or_create(home / "keys" / "identity.json").key_id)
"""


def test_processes_that_start_together_end_with_one_identity(tmp_path):
    names = [f"ready-{i}" for i in range(4)]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", _RACE, str(tmp_path), name], stdout=subprocess.PIPE, text=True
        )
        for name in names
    ]
    while not all((tmp_path / name).exists() for name in names):
        assert all(worker.poll() is None for worker in workers)
        time.sleep(0.01)
    (tmp_path / "start").touch()
    key_ids = {worker.communicate(timeout=30)[0].strip() for worker in workers}

    assert key_ids == {Identity.load_or_create(tmp_path / "keys" / "identity.json").key_id}
    assert os.listdir(tmp_path / "keys") == ["identity.json"]


def test_first_writer_wins(tmp_path, monkeypatch):
    path = tmp_path / "identity.json"
    mine = Identity.load_or_create(path).key_id
    real = Path.exists
    monkeypatch.setattr(Path, "exists", lambda self: False if self == path else real(self))
    assert Identity.load_or_create(path).key_id == mine


@given(st.binary(min_size=32, max_size=32))
def test_secret_round_trip(raw):
    identity = Identity(signing=ME.signing, agreement=X25519PrivateKey.from_private_bytes(raw))
    assert Identity.from_secret(identity.to_secret()).key_id == identity.key_id
