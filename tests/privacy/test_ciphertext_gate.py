"""The gate in front of the native library, and what random damage does behind it."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from fedinfer_flower.errors import InvalidCiphertextError, MissingExtraError
from fedinfer_flower.privacy import he_context
from fedinfer_flower.privacy.ciphertext_gate import (
    native_context,
    native_vector,
    pack_polynomials,
    packed_bytes,
    read_polynomials,
)
from fedinfer_flower.privacy.he_schemes import BFV, CKKS, DEGREE, Scheme

SCHEMES = [pytest.param(BFV, id="bfv"), pytest.param(CKKS, id="ckks")]


def ciphertext_of(scheme: Scheme) -> bytes:
    public, _ = he_context.new_keys(scheme)
    context = he_context.load_public(public, scheme)
    return he_context.encrypt(context, scheme, [1, 2, 3])


def random_residues(scheme: Scheme, *, key: bool = False) -> np.ndarray:
    rng = np.random.default_rng(1)
    primes = scheme.key_primes if key else scheme.ciphertext_primes
    blocks = [rng.integers(0, p.value, DEGREE, dtype=np.uint64) for _ in range(2) for p in primes]
    return np.concatenate(blocks)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_parameters_are_those_that_seal_works_out(scheme: Scheme) -> None:
    seal = he_context._new_context(scheme).seal_context().data

    assert np.array(seal.key_parms_id(), "<u8").tobytes() == scheme.parameter_id(scheme.key_primes)
    first = np.array(seal.first_parms_id(), "<u8").tobytes()
    assert first == scheme.parameter_id(scheme.ciphertext_primes)
    for prime in scheme.key_primes:
        assert prime.value % (2 * DEGREE) == 1
        assert prime.value < 256**prime.wire_bytes


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("key", [False, True])
def test_packing_and_reading_are_inverse(scheme: Scheme, key: bool) -> None:
    primes = scheme.key_primes if key else scheme.ciphertext_primes
    residues = random_residues(scheme, key=key)
    residues[:2] = [0, primes[0].value - 1]

    packed = pack_polynomials(residues, primes)

    assert len(packed) == packed_bytes(primes)
    np.testing.assert_array_equal(read_polynomials(packed, primes), residues)
    np.testing.assert_array_equal(read_polynomials(memoryview(packed), primes), residues)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_another_length_is_refused(scheme: Scheme) -> None:
    packed = ciphertext_of(scheme)
    for bad in (b"", packed[:-1], packed + b"\0", packed + packed, packed[: len(packed) // 2]):
        with pytest.raises(InvalidCiphertextError, match="bytes"):
            read_polynomials(bad, scheme.ciphertext_primes)


@pytest.mark.parametrize("at", [0, 1, DEGREE, 2 * DEGREE, 4 * DEGREE - 1])
def test_a_residue_that_is_not_below_its_prime_is_refused(at: int) -> None:
    residues = random_residues(BFV, key=True)
    prime = (BFV.key_primes * 2)[at // DEGREE]
    for value in (prime.value, 256**prime.wire_bytes - 1):
        residues[at] = value
        with pytest.raises(InvalidCiphertextError, match="below its prime"):
            read_polynomials(pack_polynomials(residues, BFV.key_primes), BFV.key_primes)


def test_a_ciphertext_that_hides_nothing_is_refused() -> None:
    residues = random_residues(BFV)
    residues[DEGREE:] = 0
    with pytest.raises(InvalidCiphertextError, match="hides nothing"):
        read_polynomials(pack_polynomials(residues, BFV.ciphertext_primes), BFV.ciphertext_primes)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_only_residues_of_a_native_message_depend_on_the_sender(scheme: Scheme) -> None:
    one = random_residues(scheme)
    other = (one + np.uint64(1)) % np.uint64(scheme.ciphertext_primes[0].value)
    messages = [native_vector(r, scheme, n_values=9, version=(4, 3)) for r in (one, other)]
    assert len(messages[0]) == len(messages[1])
    start = messages[0].index(one.tobytes())
    end = start + one.nbytes
    assert messages[0][:start] == messages[1][:start]
    assert messages[0][end:] == messages[1][end:]

    key = random_residues(scheme, key=True)
    context = native_context(key, scheme, version=(4, 3))
    assert key.tobytes() in context
    assert len(context) < key.nbytes + 300


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_library_with_another_layout_is_named(
    scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_layout(*args: object, **kwargs: object) -> bytes:
        return b""

    monkeypatch.setattr(he_context, "native_context", other_layout)
    with pytest.raises(MissingExtraError, match="stores ciphertexts"):
        he_context._native_version.__wrapped__(scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_random_residues_load_like_any_ciphertext(scheme: Scheme) -> None:
    # Whatever passes the gate is sound to the library, if meaningless.
    public, secret = he_context.new_keys(scheme)
    context = he_context.load_secret(secret, public, scheme)
    packed = pack_polynomials(random_residues(scheme), scheme.ciphertext_primes)

    vector = he_context.read_vector(context, scheme, memoryview(packed), scheme.slots)

    assert len(he_context.decrypt(vector)) == scheme.slots


# Runs in a process of its own: what is under test is that the process survives.
FUZZ = """
import json, random, sys
import numpy as np
from fedinfer_flower.ensemble.base import RULES
from fedinfer_flower.errors import FedInferError
from fedinfer_flower.privacy import ScorePlan, make_protection

scheme, seed, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rng = random.Random(seed)
he = make_protection("he", {"scheme": scheme})
rule = RULES.get("mean-probability")()
plan = ScorePlan.for_rule(rule, n_classes=10, n_sites_max=3)
keys = he.make_keys()
scores = np.full((20, 10), 0.1)
good = he.site_side(plan, public_key=keys.public_key).protect(scores)
querier = he.querier_side(plan, keys=keys)
seen = {"refused": 0, "accepted": 0}

def damaged(data):
    data = bytearray(data)
    kind = rng.randrange(4)
    # The first 42 bytes are the header; the rest is polynomials.
    reach = len(data) if rng.random() < 0.8 else min(42, len(data))
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(reach)
        if kind == 0: data[at] ^= 1 << rng.randrange(8)
        elif kind == 1: data[at] = rng.randrange(256)
        elif kind == 2: del data[at:at + rng.randrange(1, 40)]
        else: data[at:at] = rng.randbytes(rng.randrange(1, 40))
        reach = min(reach, len(data))
    return bytes(data)

def attempt(action):
    try:
        action()
        seen["accepted"] += 1
    except FedInferError:
        seen["refused"] += 1

def whole_round(payload):
    side = he.coordinator_side(plan, n_queries=20, rule=rule, public_key=keys.public_key)
    for one in (good, good, payload):
        side.add(one)
    querier.open(side.total(), n_queries=20, n_sites=3)

for _ in range(rounds):
    attempt(lambda: whole_round(damaged(good)))
    attempt(lambda: querier.open(damaged(good), n_queries=20, n_sites=3))
for _ in range(rounds // 20):
    bad = damaged(keys.public_key)
    attempt(lambda: he.site_side(plan, public_key=bad).protect(scores))
print(json.dumps(seen))
"""


@pytest.mark.parametrize(("scheme", "seed"), [("bfv", 101), ("ckks", 202)])
def test_random_damage_never_ends_the_process(scheme: str, seed: int) -> None:
    rounds = 2500
    done = subprocess.run(
        [sys.executable, "-c", FUZZ, scheme, str(seed), str(rounds)],
        capture_output=True,
        text=True,
        timeout=120,
    )

    # Any error that is not one of ours ends the script with a traceback and code 1.
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-2000:]}"
    seen = json.loads(done.stdout)
    assert seen["refused"] + seen["accepted"] == 2 * rounds + rounds // 20
    assert seen["refused"] > rounds
