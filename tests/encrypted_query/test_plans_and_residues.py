"""Fixed parameters are what the library works out; bytes of other roles are checked."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedinfer_flower.encrypted_query.engine import Engine
from fedinfer_flower.encrypted_query.native import ciphertext_message, key_message
from fedinfer_flower.encrypted_query.plans import HIDDEN_LAYER, LINEAR, plan_of
from fedinfer_flower.encrypted_query.residues import (
    pack_pair,
    packed_bytes,
    read_pair,
    read_pairs,
)
from fedinfer_flower.errors import EnvelopeError, InvalidCiphertextError

PLANS = [pytest.param(plan, id=plan.name) for plan in (LINEAR, HIDDEN_LAYER)]
# Most bits of primes at 128-bit security: homomorphicencryption.org standard, table 1.
MOST_BITS = {4096: 109, 8192: 218}

pytest.importorskip("tenseal")


@pytest.mark.parametrize("plan", PLANS)
def test_primes_are_within_the_security_standard(plan):
    assert sum(prime.bit_length() for prime in plan.key_primes) <= MOST_BITS[plan.degree]
    assert math.prod(plan.key_primes).bit_length() <= MOST_BITS[plan.degree]
    for prime in plan.key_primes:
        assert prime % (2 * plan.degree) == 1
    assert len(set(plan.key_primes)) == len(plan.key_primes)


@pytest.mark.parametrize("plan", PLANS)
def test_library_accepts_the_parameters_at_128_bits_and_names_levels_alike(plan):
    engine = Engine(plan)

    assert engine.context.parameters_set()
    assert engine.context.first_parms_id() == engine.level(len(plan.primes))
    assert engine.context.last_parms_id() == engine.level(1)
    for prime in plan.key_primes:
        assert engine.seal.Modulus(prime).is_prime()


def test_plan_of_unknown_name_is_refused():
    with pytest.raises(EnvelopeError):
        plan_of("deep")


def residues_of(degree, primes, seed):
    rng = np.random.default_rng(seed)
    return np.concatenate(
        [rng.integers(0, prime, degree, dtype=np.uint64) for prime in (*primes, *primes)]
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), primes=st.sampled_from([LINEAR.primes, LINEAR.key_primes]))
def test_packing_and_reading_are_inverse(seed, primes):
    degree = 64
    residues = residues_of(degree, primes, seed)
    residues[:2] = [0, primes[0] - 1]

    packed = pack_pair(residues, degree, primes)

    assert len(packed) == packed_bytes(degree, primes)
    np.testing.assert_array_equal(read_pair(packed, degree, primes), residues)
    np.testing.assert_array_equal(read_pair(memoryview(packed), degree, primes), residues)


@pytest.mark.parametrize("place", range(0, 4 * 64, 63))
def test_residue_that_is_not_below_its_prime_is_refused(place):
    primes = LINEAR.primes
    residues = residues_of(64, primes, 1)
    residues[place] = (primes * 2)[place // 64]
    with pytest.raises(InvalidCiphertextError, match="below its prime"):
        read_pair(pack_pair(residues, 64, primes), 64, primes)


@pytest.mark.parametrize("prime", [0, 1])
def test_ciphertext_whose_second_polynomial_is_zero_is_refused(prime):
    residues = residues_of(64, LINEAR.primes, 1)
    residues[(2 + prime) * 64 : (3 + prime) * 64] = 0
    with pytest.raises(InvalidCiphertextError, match="hides nothing"):
        read_pair(pack_pair(residues, 64, LINEAR.primes), 64, LINEAR.primes)


@pytest.mark.parametrize("change", [-1, 1, 64])
def test_another_length_is_refused(change):
    packed = pack_pair(residues_of(64, LINEAR.primes, 1), 64, LINEAR.primes)
    wrong = packed[:change] if change < 0 else packed + bytes(change)
    with pytest.raises(InvalidCiphertextError, match="bytes"):
        read_pair(wrong, 64, LINEAR.primes)
    with pytest.raises(InvalidCiphertextError, match="bytes"):
        list(read_pairs(wrong, count=1, degree=64, primes=LINEAR.primes))


@pytest.mark.parametrize("plan", PLANS)
def test_only_residues_of_a_native_message_depend_on_the_sender(plan):
    one = residues_of(plan.degree, plan.key_primes, 1)
    other = residues_of(plan.degree, plan.key_primes, 2)
    messages = [key_message(residues, plan, (4, 3)) for residues in (one, other)]
    start = messages[0].index(one.tobytes())
    assert messages[0][:start] == messages[1][:start]
    assert messages[0][start + one.nbytes :] == messages[1][start + one.nbytes :] == b""
    short = residues_of(plan.degree, plan.reply_primes, 1)
    assert len(ciphertext_message(short, plan, plan.reply_primes, (4, 3))) < short.nbytes + 200
