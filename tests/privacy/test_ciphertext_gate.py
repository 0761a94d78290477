"""The gate in front of the native library, and what random damage does behind it."""

from __future__ import annotations

import json
import struct
import subprocess
import sys

import pytest

from fedinfer_flower.errors import InvalidCiphertextError
from fedinfer_flower.privacy import he_context
from fedinfer_flower.privacy.ciphertext_gate import (
    check_ciphertext,
    check_public_key,
    public_key_has_secret,
)
from fedinfer_flower.privacy.he_context import BFV, CKKS, Scheme

SCHEMES = [pytest.param(BFV, id="bfv"), pytest.param(CKKS, id="ckks")]


def message_of(scheme: Scheme, n_values: int = 5) -> bytes:
    public, _ = he_context.new_keys(scheme)
    context = he_context.load_public(public, scheme)
    return he_context.encrypt(context, scheme, [1] * n_values)


def gate(scheme: Scheme, message: bytes, n_values: int = 5) -> None:
    check_ciphertext(
        message, n_values=n_values, scale=scheme.scale, most_bytes=scheme.ciphertext_bytes
    )


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("n_values", [1, 127, 128, 1024])
def test_honest_ciphertext_passes(scheme: Scheme, n_values: int) -> None:
    message = message_of(scheme, n_values)
    gate(scheme, message, n_values)
    assert len(message) <= scheme.message_bytes


@pytest.mark.parametrize("scheme", SCHEMES)
def test_other_forms_are_refused(scheme: Scheme) -> None:
    message = message_of(scheme)
    other = CKKS if scheme is BFV else BFV
    with pytest.raises(InvalidCiphertextError, match="number of values"):
        gate(scheme, message, n_values=6)
    with pytest.raises(InvalidCiphertextError, match="fields"):
        gate(other, message)
    with pytest.raises(InvalidCiphertextError, match="size"):
        check_ciphertext(message, n_values=5, scale=scheme.scale, most_bytes=20_000)
    for bad in (b"", message[:-1], message + b"\0", message + message, message[4:]):
        with pytest.raises(InvalidCiphertextError):
            gate(scheme, bad)


def test_another_scale_is_refused() -> None:
    message = message_of(CKKS)
    assert message[-8:] == struct.pack("<d", CKKS.scale)
    for scale in (2.0**25, 0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InvalidCiphertextError, match="scale"):
            gate(CKKS, message[:-8] + struct.pack("<d", scale))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_prefix_is_refused(scheme: Scheme) -> None:
    message = message_of(scheme)
    for end in [*range(64), *range(64, len(message), 997)]:
        with pytest.raises(InvalidCiphertextError):
            gate(scheme, message[:end])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_public_key_passes_and_everything_more_is_refused(scheme: Scheme) -> None:
    scale = -1.0 if scheme.scale is None else scheme.scale
    context = he_context._new_context(scheme)
    most = scheme.public_key_bytes
    lean = {"save_relin_keys": False, "save_galois_keys": False}
    public = context.serialize(save_secret_key=False, **lean)
    check_public_key(public, scale=scale, most_bytes=most)
    assert not public_key_has_secret(public)

    secret = context.serialize(save_secret_key=True, **lean)
    assert public_key_has_secret(secret)
    with_relin = context.serialize(save_secret_key=False, save_galois_keys=False)
    without_key = context.serialize(save_public_key=False, save_secret_key=False, **lean)
    for bad in (secret, with_relin, without_key, public[:-1], public + b"\0", b""):
        with pytest.raises(InvalidCiphertextError):
            check_public_key(bad, scale=scale, most_bytes=most)
    with pytest.raises(InvalidCiphertextError, match="scale"):
        check_public_key(public, scale=3.0, most_bytes=most)


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
    # The first 120 bytes are the structure, the rest is mostly one polynomial.
    reach = len(data) if rng.random() < 0.5 else min(120, len(data))
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
