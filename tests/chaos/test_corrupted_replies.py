"""Ten thousand corrupted replies: each a typed error that names its site, and no trace in the sum.

Bits that flip into other valid scores are noticed by the payload's digest in the header. A
site that sends other scores on purpose makes a right digest for them: nobody can notice
that, and it is not tested here.

Run as a program it prints its counts as JSON: under `he` the test does so, because a crash
of the native library would end the process and nothing could be reported from within it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import random
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp

from fedinfer_flower.ensemble.base import make_rule
from fedinfer_flower.errors import FedInferError
from fedinfer_flower.privacy.base import ScorePlan, make_protection
from fedinfer_flower.query import SiteProfile, SiteStatus
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.strategies.pull_loop import Arrival
from fedinfer_flower.strategies.query_round import QueryRound
from fedinfer_flower.wire import messages
from fedinfer_flower.wire.envelope import DEFAULT_LIMITS, Envelope, Kind, encode
from fedinfer_flower.wire.messages import Question

SEED = 20_261
N_REPLIES = {"plain": 5000, "dp": 4000, "he": 1000}
N_HONEST, N_BAD = 4, 46
N_QUERIES, CLASSES = 4, ("a", "b", "c")
CANARY = "CANARY-7f3a"


class Chaos:
    """One protection, one question, honest payloads, and ways to spoil a reply."""

    def __init__(self, protection: str, seed: int) -> None:
        self.rng = random.Random(seed)  # noqa: S311 - reproducible, not secret
        self.grid = LocalGrid(ClientApp(), num_supernodes=1, workers=0)
        self.protection = make_protection(protection)
        self.rule = make_rule("mean-probability")
        self.keys = self.protection.make_keys()
        self.profiles = {
            node: SiteProfile(name=f"hospital-{node}", classes=CLASSES)
            for node in range(1, N_HONEST + N_BAD + 1)
        }
        self.asked = Question(
            query_id="0a-0",
            inputs=np.zeros((N_QUERIES, 2), dtype=np.float32),
            classes=CLASSES,
            n_sites=len(self.profiles),
            rule=self.rule.name,
            protection=protection,
            public_key=self.keys.public_key,
            key_id=self.keys.key_id,
        )
        self.plan = ScorePlan.for_rule(
            self.rule, n_classes=len(CLASSES), n_sites_max=len(self.profiles)
        )
        site = self.protection.site_side(self.plan, public_key=self.keys.public_key)
        scores = np.random.default_rng(seed).dirichlet(np.ones(3), size=(N_HONEST + 1, N_QUERIES))
        self.payloads = [site.protect(part) for part in scores]
        self.query = Message(RecordDict(), 1, "query.fi_predict", ttl=600.0)

    def envelope(self, node: int, payload: bytes) -> Envelope:
        return messages.answer(
            self.asked,
            run_id=self.grid.run_id,
            sender=node,
            payload=payload,
            width=len(CLASSES),
            commitment=self.profiles[node].commitment(),
        )

    def reply(self, data: bytes) -> Message:
        array = Array(dtype="uint8", shape=(len(data),), stype="fedinfer.envelope", data=data)
        return self.content(RecordDict({"fedinfer": ArrayRecord({"envelope": array})}))

    def content(self, content: RecordDict) -> Message:
        return Message(content, reply_to=self.query)

    def flipped(self, data: bytes, low: int, high: int) -> bytes:
        bad = bytearray(data)
        for bit in self.rng.sample(range(8 * low, 8 * high), self.rng.randint(1, 6)):
            bad[bit // 8] ^= 1 << bit % 8
        return bytes(bad)

    def spoiled(self, kind: str, node: int) -> Message:
        """Return a reply of this node that is wrong in one way."""
        rng, payload = self.rng, self.payloads[-1]
        good = self.envelope(node, payload)
        data = encode(good)
        at = len(data) - len(payload)
        changed = self._changes(good, payload).get(kind)
        if changed is not None:
            return self.reply(encode(dataclasses.replace(good, **changed)))
        match kind:
            case "header flipped":
                return self.reply(self.flipped(data, 0, at))
            case "payload flipped":
                return self.reply(self.flipped(data, at, len(data)))
            case "truncated":
                return self.reply(data[: rng.randrange(len(data))])
            case "extended":
                return self.reply(data + rng.randbytes(rng.randint(1, 40)))
            case "bytes inserted":
                place = rng.randrange(at)
                return self.reply(data[:place] + rng.randbytes(rng.randint(1, 9)) + data[place:])
            case "bytes lost":
                place = rng.randrange(len(data) - 9)
                return self.reply(data[:place] + data[place + rng.randint(1, 9) :])
            case "garbage":
                return self.reply(rng.randbytes(rng.randrange(200)))
            case "garbage after the magic":
                return self.reply(data[: rng.randint(4, 20)] + rng.randbytes(rng.randrange(200)))
            case "flower error":
                return Message(Error(rng.randrange(12), CANARY), reply_to=self.query)
            case "own error":
                raw = messages.error(
                    FedInferError("x"), run_id=self.grid.run_id, sender=node, query_id="0a-0"
                )
                odd = rng.choice(["FI304", "FI999", "", 3, None, "a" * 9])
                meta = {"code": odd, "message": "m\n\x1b[31m", "hint": "\r"}
                return self.reply(encode(dataclasses.replace(raw, meta=meta)))
            case _:
                return self.content(rng.choice(self._other_contents(data)))

    def _changes(self, good: Envelope, payload: bytes) -> dict[str, dict[str, object]]:
        rng = self.rng
        return {
            "wrong shape": {"shape": rng.choice([(4, 2), (5, 3), (12,), (), (4, 3, 1), (3, 4)])},
            "wrong key id": {"key_id": rng.randbytes(32).hex()},
            "wrong codec": {"codec": rng.choice(["", "plainer", "secagg", "he-dp"])},
            "wrong commitment": {"meta": {"commitment": rng.randbytes(32).hex()}},
            "odd meta": {
                "meta": rng.choice([{}, {"commitment": None}, dict(good.meta) | {"w": CANARY}])
            },
            "wrong query id": {"query_id": rng.choice(["0a-1", "", "0a", CANARY])},
            "wrong run": {"run_id": rng.randrange(2**48)},
            "wrong sender": {"sender": (good.sender + rng.randrange(1, N_BAD)) % 2**32},
            "wrong kind": {"kind": rng.choice([k for k in Kind if k is not Kind.ANSWER])},
            "impossible scores": {"sections": (("scores", self._impossible(payload)),)},
            "wrong payload length": {
                "sections": (
                    ("scores", rng.choice([payload[:-1], payload + b"\0", b"", 2 * payload])),
                )
            },
            "extra section": {"sections": (*good.sections, ("weights", rng.randbytes(4)))},
            "other section": {"sections": (("score", payload),)},
        }

    def _impossible(self, payload: bytes) -> bytes:
        """Return a payload of the right length that no site can send."""
        if self.protection.name == "he":  # the largest residues are no residues
            return payload[:-64] + b"\xff" * 64
        if self.protection.name == "dp":
            return np.full(
                len(payload) // 4, self.rng.choice([2**31 - 1, -(2**31)]), "<i4"
            ).tobytes()
        scores = np.frombuffer(payload, dtype="<f4").copy()
        scores[self.rng.randrange(len(scores))] = self.rng.choice(
            [np.nan, np.inf, -np.inf, 1.001, -1.001, 3e38]
        )
        return scores.tobytes()

    def _other_contents(self, data: bytes) -> list[RecordDict]:
        array = Array(dtype="uint8", shape=(len(data),), stype="fedinfer.envelope", data=data)
        numpy_array = Array(np.frombuffer(data, dtype=np.uint8))
        return [
            RecordDict(),
            RecordDict({"fedinfer": ConfigRecord({"envelope": data})}),
            RecordDict({"fedinfer": MetricRecord({CANARY: 1.0})}),
            RecordDict({"fedinfer": ArrayRecord()}),
            RecordDict({"fedinfer": ArrayRecord({CANARY: array})}),
            RecordDict({CANARY: ArrayRecord({"envelope": array})}),
            RecordDict({"fedinfer": ArrayRecord({"envelope": numpy_array})}),
            RecordDict({"fedinfer": ArrayRecord({"envelope": array, "more": array})}),
            RecordDict({"fedinfer": ArrayRecord({"envelope": array}), "m": ConfigRecord()}),
        ]

    def kinds(self) -> list[str]:
        return [
            *self._changes(self.envelope(1, b""), self.payloads[0]),
            *("header flipped", "payload flipped", "truncated", "extended", "bytes inserted"),
            *("bytes lost", "garbage", "garbage after the magic", "flower error", "own error"),
            "other content",
        ]

    def run_round(self, kinds: list[str]) -> dict[str, Counter]:
        """Feed one round with honest and spoiled replies; check it; return what was seen."""
        state = QueryRound(
            asked=self.asked,
            run_id=self.grid.run_id,
            rule=self.rule,
            rule_reason="",
            protection=self.protection,
            profiles=self.profiles,
            failures={},
            limits=DEFAULT_LIMITS,
        )
        nodes = self.rng.sample(sorted(self.profiles), N_HONEST + len(kinds))
        plan = [("honest", self.payloads[i]) for i in range(N_HONEST)]
        plan += [(kind, b"") for kind in kinds]
        self.rng.shuffle(plan)
        clear = self.protection.coordinator_side(
            self.plan, n_queries=N_QUERIES, rule=self.rule, public_key=self.keys.public_key
        )
        spoiled = {}
        for node, (kind, payload) in zip(nodes, plan, strict=True):
            if kind == "honest":
                reply = self.reply(encode(self.envelope(node, payload)))
                clear.add(payload)
            else:
                spoiled[node] = kind
                reply = self.spoiled(kind, node)
            state.accumulate(Arrival(node_id=node, reply=reply, seconds=0.1))
        batch, report = state.close(
            seconds=1.0, quorum=1, request_bytes=0, key_at_coordinator=False
        )
        assert batch.total == clear.total(), "the honest sites' sum changed"
        return self._checked(report, spoiled)

    def _checked(self, report, spoiled: dict[int, str]) -> dict[str, Counter]:
        seen: dict[str, Counter] = {"caught": Counter(), "unnoticed": Counter(), "codes": Counter()}
        for site in report.sites:
            kind = spoiled.get(site.site_id)
            if kind is None:
                continue
            if site.status is SiteStatus.ANSWERED:
                seen["unnoticed"][kind] += 1
                continue
            seen["caught"][kind] += 1
            seen["codes"][site.error_code] += 1
            assert site.status is SiteStatus.FAILED, kind
            assert re.fullmatch(r"FI[34]\d\d|FI000", site.error_code), (kind, site.error_code)
            assert site.name == f"hospital-{site.site_id}", kind
            assert site.error, kind
            assert site.error.isprintable(), kind
            assert CANARY not in site.error, kind
        return seen


class Lines(logging.Handler):
    """Keeps what the coordinator would have logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def run(protection: str) -> dict[str, Counter]:
    """Feed all replies of one protection through rounds; return the counts."""
    chaos = Chaos(protection, SEED)
    kinds = chaos.kinds()
    total: dict[str, Counter] = {"caught": Counter(), "unnoticed": Counter(), "codes": Counter()}
    queue = [kinds[i % len(kinds)] for i in range(N_REPLIES[protection])]
    chaos.rng.shuffle(queue)
    log, handler = logging.getLogger("fedinfer_flower.coordinator"), Lines()
    log.addHandler(handler)
    propagate, log.propagate = log.propagate, False
    try:
        for start in range(0, len(queue), N_BAD):
            for name, counts in chaos.run_round(queue[start : start + N_BAD]).items():
                total[name] += counts
    finally:
        log.removeHandler(handler)
        log.propagate = propagate
    assert len(handler.lines) == sum(total["caught"].values())
    for line in handler.lines:
        assert "[site hospital-" in line
        assert CANARY not in line
    return total


def check(protection: str, counts: dict[str, Counter]) -> None:
    """Require that every single one was noticed."""
    caught, unnoticed = Counter(counts["caught"]), Counter(counts["unnoticed"])
    assert sum(caught.values()) + sum(unnoticed.values()) == N_REPLIES[protection]
    assert not unnoticed
    assert set(caught) == set(Chaos("plain", SEED).kinds())
    assert len(counts["codes"]) >= 6  # binding, shape, scores, sizes, ...: not one for all


@pytest.mark.parametrize("protection", ["plain", "dp"])
def test_corrupted_replies_are_typed_errors_and_leave_no_trace(protection):
    check(protection, run(protection))


def test_corrupted_ciphertexts_are_typed_errors_and_crash_nothing():
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", __file__, "he"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    check("he", json.loads(done.stdout))


def test_counts_add_up_to_ten_thousand():
    assert sum(N_REPLIES.values()) == 10_000


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run(sys.argv[1])))
