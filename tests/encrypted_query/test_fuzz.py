"""Random damage to everything that another role sends: the process survives."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("tenseal")

# Runs in a process of its own: what is under test is that the process survives.
FUZZ = """
import json, random, sys
import numpy as np
from fedinfer_flower.encrypted_query.ckks_batch import PublicKeys, ReplySum, SecretKeys
from fedinfer_flower.encrypted_query.plans import plan_of
from fedinfer_flower.encrypted_query.quadratic import QuadraticForm
from fedinfer_flower.errors import FedInferError

plan, seed, rounds = plan_of(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
rng = random.Random(seed)
keys = SecretKeys(plan)
H = 2 if plan.relinearises else 0
draw = np.random.default_rng(seed).normal
form = QuadraticForm(hidden_weights=draw(size=(2, H)), hidden_bias=draw(size=H),
                     square_weights=draw(size=(H, 1)), linear_weights=draw(size=(2, 1)),
                     offset=draw(size=1))
noise = np.zeros((1, plan.slots), dtype=complex)
public = PublicKeys(plan, keys.public_key)
query = keys.encrypt(np.full((3, 2), 0.5))
reply = public.evaluate(form, query, noise=noise)
seen = {"refused": 0, "accepted": 0}

def damaged(data):
    data = bytearray(data)
    kind = rng.randrange(5)
    reach = len(data) if rng.random() < 0.8 else min(64, len(data))
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(reach)
        if kind == 0: data[at] ^= 1 << rng.randrange(8)
        elif kind == 1: data[at] = rng.randrange(256)
        elif kind == 2: del data[at:at + rng.randrange(1, 40)]
        elif kind == 3: data[at:at] = rng.randbytes(rng.randrange(1, 40))
        else: data[at:at + 8] = rng.randbytes(len(data[at:at + 8]))
        reach = min(reach, len(data))
    return bytes(data)

def attempt(action):
    try:
        action()
        seen["accepted"] += 1
    except FedInferError:
        seen["refused"] += 1

def summed(bad):
    total = ReplySum(plan, n_classes=1)
    total.add(reply)
    total.add(bad)
    keys.decrypt(total.total(), n_classes=1)

for number in range(rounds):
    attempt(lambda: keys.decrypt(damaged(reply), n_classes=1))
    attempt(lambda: summed(damaged(reply)))
    if number % 4 == 0:
        def answered():
            keys.decrypt(public.evaluate(form, damaged(query), noise=noise), n_classes=1)
        attempt(answered)
    if number % 8 == 0:
        def loaded():
            other = PublicKeys(plan, damaged(keys.public_key))
            keys.decrypt(other.evaluate(form, query, noise=noise), n_classes=1)
        attempt(loaded)
print(json.dumps(seen))
"""


@pytest.mark.parametrize(
    ("plan", "seed", "rounds"), [("linear", 11, 800), ("hidden-layer", 12, 250)]
)
def test_random_damage_never_ends_the_process(plan, seed, rounds):
    done = subprocess.run(
        [sys.executable, "-c", FUZZ, plan, str(seed), str(rounds)],
        capture_output=True,
        text=True,
        timeout=240,
    )

    # Any error that is not one of ours ends the script with a traceback and code 1.
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-2000:]}"
    seen = json.loads(done.stdout)
    assert seen["refused"] + seen["accepted"] >= 2 * rounds
    assert seen["refused"] > rounds // 2
    assert seen["accepted"] > 0  # the damage also reached what stands behind the gate
