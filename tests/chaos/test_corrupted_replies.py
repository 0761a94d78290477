"""Ten thousand corrupted replies: each a typed error that names its site, and no trace in the sum.

Bits that flip into other valid scores are noticed by the payload's digest in the header. A
site that sends other scores on purpose makes a right digest for them: nobody can notice
that, and it is not tested here.

Under masks a site whose reply was refused has dropped out: the others make good for it, while
their own replies of the recovery round are corrupted as well before the right ones come.

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
from fedinfer_flower.privacy.base import CoordinatorSide, ScorePlan, make_protection
from fedinfer_flower.privacy.cohort import Cohort
from fedinfer_flower.privacy.mask_recovery import MaskedSum
from fedinfer_flower.query import SiteProfile, SiteStatus
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.strategies.pull_loop import Arrival
from fedinfer_flower.strategies.query_round import QueryRound
from fedinfer_flower.wire import messages
from fedinfer_flower.wire.directory import SiteCard
from fedinfer_flower.wire.documents import CombinedBatch
from fedinfer_flower.wire.envelope import DEFAULT_LIMITS, Envelope, Kind, encode
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.messages import Question
from fedinfer_flower.wire.recovery import recovered
from fedinfer_flower.wire.roster import Roster

SEED = 20_261
N_REPLIES = {"plain": 4700, "dp": 3000, "he": 1000, "secagg": 1000, "secagg-self": 300}
OPTIONS = {"secagg-self": ("secagg", {"self_mask": True})}
N_HONEST, N_BAD = 4, 46
# Of twelve sites under masks at least eight must answer.
COHORTS = {"secagg": (8, 4), "secagg-self": (8, 4)}
N_QUERIES, CLASSES = 4, ("a", "b", "c")
CANARY = "CANARY-7f3a"


def _sections(scores: bytes, statement: bytes = b"") -> tuple[tuple[str, bytes], ...]:
    return (("scores", scores), ("statement", statement), ("evidence", b""))


class Chaos:
    """One protection, one question, honest payloads, and ways to spoil a reply."""

    def __init__(self, protection: str, seed: int) -> None:
        self.rng = random.Random(seed)  # noqa: S311 - reproducible, not secret
        self.grid = LocalGrid(ClientApp(), num_supernodes=1, workers=0)
        self.protection = make_protection(*OPTIONS.get(protection, (protection, {})))
        self.rule = make_rule("mean-probability")
        self.keys = self.protection.make_keys()
        self.n_honest, self.n_bad = COHORTS.get(protection, (N_HONEST, N_BAD))
        self.masked = self.protection.needs_roster
        self.sites = {
            node: Identity.generate() for node in range(1, self.n_honest + self.n_bad + 1)
        }
        self.cards = {
            node: SiteCard.signed(
                SiteProfile(name=f"hospital-{node}", classes=CLASSES),
                identity=identity,
                run_id=self.grid.run_id,
            )
            for node, identity in self.sites.items()
        }
        self.asked = Question(
            query_id="0a-0",
            inputs=np.zeros((N_QUERIES, 2), dtype=np.float32),
            classes=CLASSES,
            n_sites=len(self.cards),
            rule=self.rule.name,
            protection=self.protection.name,
            public_key=self.keys.public_key,
            key_id=self.keys.key_id,
            roster=Roster(tuple(card.seat for card in self.cards.values())),
        )
        self.cohort = Cohort(
            query_id="0a-0", roster=self.asked.roster, public_key=self.keys.public_key
        )
        self.plan = ScorePlan.for_rule(
            self.rule, n_classes=len(CLASSES), n_sites_max=len(self.cards)
        )
        n_payloads = len(self.sites) if self.masked else self.n_honest + 1
        self.scores = np.random.default_rng(seed).dirichlet(np.ones(3), (n_payloads, N_QUERIES))
        self.payloads = [
            self.protection.site_side(
                self.plan,
                public_key=self.keys.public_key,
                cohort=self.cohort,
                identity=self.sites[number + 1],
            ).protect(part)
            for number, part in enumerate(self.scores)
        ]
        self.query = Message(RecordDict(), 1, "query.fi_predict", ttl=600.0)
        self.n_bad_recovery_replies = 0

    def payload_of(self, node: int) -> bytes:
        """Return what this node would send; under masks every site has a payload of its own."""
        return self.payloads[node - 1] if self.masked else self.payloads[-1]

    def coordinator(self) -> CoordinatorSide:
        return self.protection.coordinator_side(
            self.plan,
            n_queries=N_QUERIES,
            rule=self.rule,
            public_key=self.keys.public_key,
            cohort=self.cohort,
        )

    def envelope(self, node: int, payload: bytes) -> Envelope:
        return messages.answer(
            self.asked,
            run_id=self.grid.run_id,
            sender=node,
            payload=payload,
            width=len(CLASSES),
            commitment=self.cards[node].profile.commitment(),
        )

    def reply(self, data: bytes) -> Message:
        if self.rng.randrange(2):  # either form is read, whatever the size
            return self.content(RecordDict({"fedinfer": ConfigRecord({"envelope": data})}))
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
        rng, payload = self.rng, self.payload_of(node)
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
            "wrong codec": {"codec": rng.choice(["", "plainer", "secagg+dp", "he-dp"])},
            "wrong commitment": {"meta": {"commitment": rng.randbytes(32).hex()}},
            "odd meta": {
                "meta": rng.choice([{}, {"commitment": None}, dict(good.meta) | {"w": CANARY}])
            },
            "wrong query id": {"query_id": rng.choice(["0a-1", "", "0a", CANARY])},
            "wrong run": {"run_id": rng.randrange(2**48)},
            "wrong sender": {"sender": (good.sender + rng.randrange(1, N_BAD)) % 2**32},
            "wrong kind": {"kind": rng.choice([k for k in Kind if k is not Kind.ANSWER])},
            "impossible scores": {"sections": _sections(self._impossible(payload))},
            "wrong payload length": {
                "sections": _sections(rng.choice([payload[:-1], payload + b"\0", b"", 2 * payload]))
            },
            "odd statement": {"sections": _sections(payload, rng.randbytes(rng.randint(1, 300)))},
            "extra section": {"sections": (*good.sections, ("weights", rng.randbytes(4)))},
            "other section": {"sections": (("score", payload), ("statement", b""))},
        }

    def _impossible(self, payload: bytes) -> bytes:
        """Return a payload of the right length that no site can send."""
        if self.protection.name == "he":  # the largest residues are no residues
            return payload[:-64] + b"\xff" * 64
        if self.protection.name == "dp":
            return np.full(
                len(payload) // 4, self.rng.choice([2**31 - 1, -(2**31)]), "<i4"
            ).tobytes()
        if self.masked:  # any vector is possible; not one whose masks are of another batch
            return payload[:4] + self.rng.randbytes(32) + payload[36:]
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
            RecordDict({"fedinfer": ConfigRecord({"envelope": data.hex()})}),
            RecordDict({"fedinfer": ConfigRecord({"envelope": data, "more": 1})}),
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
            n_queries=N_QUERIES,
            run_id=self.grid.run_id,
            rule=self.rule,
            rule_reason="",
            protection=self.protection,
            cards=self.cards,
            failures={},
            limits=DEFAULT_LIMITS,
        )
        nodes = self.rng.sample(sorted(self.cards), self.n_honest + len(kinds))
        plan = ["honest"] * self.n_honest + kinds
        self.rng.shuffle(plan)
        clear, spoiled, honest = self.coordinator(), {}, []
        for node, kind in zip(nodes, plan, strict=True):
            if kind == "honest":
                payload = self.payloads[node - 1 if self.masked else len(honest)]
                reply = self.reply(encode(self.envelope(node, payload)))
                clear.add(payload, sender=self.cards[node].key_id)
                honest.append(node)
            else:
                spoiled[node] = kind
                reply = self.spoiled(kind, node)
            state.accumulate(Arrival(node_id=node, reply=reply, seconds=0.1))
        self._recover(state, clear)
        batch, report = state.close(
            seconds=1.0, quorum=1, request_bytes=0, key_at_coordinator=False
        )
        assert batch.total == clear.total(), "the honest sites' sum changed"
        if self.masked:
            self._check_opened(batch, honest)
        return self._checked(report, spoiled)

    def _recover(self, state: QueryRound, clear: CoordinatorSide) -> None:
        """Let survivors help both sums; their replies to the first come corrupted, then right."""
        while calls := state.recovery_calls():
            assert isinstance(clear, MaskedSum)
            requests = clear.recovery_requests()
            for node, call in calls.items():
                identity = self.sites[node]
                assert call.request == requests[identity.key_id]
                reply = self.protection.recovery_reply(  # type: ignore[attr-defined]
                    call.request, cohort=self.cohort, identity=identity, admit=lambda dropped: None
                )
                clear.add_recovery(reply, sender=identity.key_id)
                good = encode(
                    recovered(reply, query_id="0a-0", run_id=self.grid.run_id, sender=node)
                )
                for bad in self._bad_recovery_replies(node, good, reply):
                    self.n_bad_recovery_replies += 1
                    state.accumulate_recovery(Arrival(node_id=node, reply=bad, seconds=0.1))
                right = Arrival(node_id=node, reply=self.reply(good), seconds=0.1)
                state.accumulate_recovery(right)
            # Whoever is no survivor is not heard.
            outsider = next(n for n in self.sites if n not in calls)
            if len(calls) == self.n_honest:
                self.n_bad_recovery_replies += 1
                data = recovered(reply, query_id="0a-0", run_id=self.grid.run_id, sender=outsider)
                stray = Arrival(node_id=outsider, reply=self.reply(encode(data)), seconds=0.1)
                state.accumulate_recovery(stray)
        if isinstance(clear, MaskedSum):
            assert not clear.recovery_requests()

    def _bad_recovery_replies(self, node: int, good: bytes, reply: bytes) -> list[Message]:
        run_id = self.grid.run_id
        other = recovered(reply + b"x", query_id="0a-0", run_id=run_id, sender=node)
        another = recovered(reply, query_id="0a-1", run_id=run_id, sender=node)
        choices = [
            self.reply(self.flipped(good, 0, len(good))),
            self.reply(good[: self.rng.randrange(len(good))]),
            self.reply(encode(other)),
            self.reply(encode(another)),
            self.reply(encode(recovered(b"", query_id="0a-0", run_id=run_id, sender=node))),
            self.content(RecordDict({"fedinfer": MetricRecord({CANARY: 1.0})})),
            Message(Error(3, CANARY), reply_to=self.query),
        ]
        return self.rng.sample(choices, 2)

    def _check_opened(self, batch: CombinedBatch, honest: list[int]) -> None:
        querier = self.protection.querier_side(self.plan, keys=self.keys, cohort=self.cohort)
        opened = querier.open(batch.total, n_queries=N_QUERIES, n_sites=batch.n_sites)
        exact = self.scores[[node - 1 for node in honest]].sum(axis=0)
        # 16 fraction bits for so few sites, each rounds by half a step.
        np.testing.assert_allclose(opened, exact, rtol=0.0, atol=len(honest) * 2.0**-17)

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
        for start in range(0, len(queue), chaos.n_bad):
            for name, counts in chaos.run_round(queue[start : start + chaos.n_bad]).items():
                total[name] += counts
    finally:
        log.removeHandler(handler)
        log.propagate = propagate
    assert len(handler.lines) == sum(total["caught"].values()) + chaos.n_bad_recovery_replies
    assert bool(chaos.n_bad_recovery_replies) == chaos.masked
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


@pytest.mark.parametrize("protection", ["plain", "dp", "secagg", "secagg-self"])
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
