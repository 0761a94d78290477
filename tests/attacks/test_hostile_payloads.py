"""Altered payloads change sums where nobody signs; malformed ones end in typed errors."""

from __future__ import annotations

import numpy as np
import pytest

from fedinfer_flower.attacks import hostile_payloads
from fedinfer_flower.attacks.hostile_bytes import HostileBytes
from fedinfer_flower.attacks.hostile_payloads import (
    HostilePayload,
    Outcomes,
    damaged,
    isolated_survey,
    survey,
    survey_protection,
)
from fedinfer_flower.attacks.tampering import Tampering, TamperingRun
from fedinfer_flower.ensemble.base import make_rule
from fedinfer_flower.errors import FedInferError
from fedinfer_flower.privacy.dp import DP
from fedinfer_flower.privacy.he import HomomorphicEncryption
from fedinfer_flower.privacy.plain import Plain
from fedinfer_flower.privacy.secagg import SecAgg

RULE = make_rule("mean-probability")


def scores() -> np.ndarray:
    return np.random.default_rng(0).dirichlet(np.ones(4), (3, 3))


def outcomes_of(protection, **options) -> Outcomes:
    return survey_protection(protection, RULE, scores(), n_classes=4, **options)


def test_plain_sums_are_changed_without_notice(federation) -> None:
    bare, signed = (
        Tampering().run(evidence) for evidence in Tampering().evidence(federation, Plain()).values()
    )

    assert bare.succeeded
    assert (signed.verdict, signed.claim) == ("stopped", "kept")
    # Nothing harmless either: a signature refuses every change.
    assert signed.detail["refused"] > 80
    assert signed.detail["harmless"] == 0


def test_masks_bind_a_payload_to_its_batch_and_do_not_keep_it_whole() -> None:
    outcomes = outcomes_of(SecAgg())

    for kind in ("another batch's", "another key's", "truncation", "extension"):
        assert kind not in outcomes.wrong
        assert outcomes.refused[kind]
    assert outcomes.wrong["bit flip"] > 0


def test_ciphertexts_are_bound_to_a_key_and_not_to_a_batch() -> None:
    outcomes = isolated_survey(
        HomomorphicEncryption(), RULE, scores(), n_classes=4, n_random=20, seed=1
    )

    assert not outcomes.died
    assert outcomes.untyped == {}
    assert outcomes.refused["another key's"] == 1
    assert outcomes.wrong["another batch's"] == 1


@pytest.mark.parametrize(
    "protection",
    [
        Plain(),
        DP(epsilon=1.0),
        DP(mechanism="randomised-response", epsilon=2.0),
        SecAgg(),
        SecAgg(self_mask=True),
    ],
    ids=lambda p: f"{p.name}-{list(p.options().values())}",
)
def test_no_malformed_payload_ends_in_an_untyped_error(federation, protection) -> None:
    rule = RULE if not protection.check_rule(RULE) else make_rule("majority-vote")
    attack = HostileBytes(n_random=100)
    (evidence,) = attack.evidence(federation.with_rule(rule), protection).values()

    result = attack.run(evidence)

    assert (result.verdict, result.claim) == ("stopped", "kept")
    assert result.detail["refused"] > 0


def test_a_receiver_without_checks_is_found_out() -> None:
    honest = np.zeros((1, 2), dtype="<f4").tobytes()

    def naive(payload: bytes) -> np.ndarray:
        return np.frombuffer(payload, "<f4").reshape(1, 2)

    payloads = damaged(honest, n_random=5, seed=0)
    outcomes = survey(payloads, naive, honest=np.zeros((1, 2)), tolerance=1e-6)
    run = TamperingRun(collect=lambda: outcomes, claimed=True)

    assert HostileBytes().run(run).claim == "broken"
    assert Tampering().run(run).claim == "broken"


def test_ends_are_counted_by_kind() -> None:
    ends = {
        b"r": FedInferError("refused"),
        b"u": RuntimeError("unforeseen"),
    }

    def deliver(payload: bytes) -> np.ndarray:
        if payload in ends:
            raise ends[payload]
        return np.array([[float(len(payload))]])

    payloads = [HostilePayload(kind="k", payload=p) for p in (b"r", b"u", b"x", b"xx")]
    outcomes = survey(payloads, deliver, honest=np.array([[1.0]]), tolerance=0.1)

    assert (outcomes.refused, outcomes.untyped) == ({"k": 1}, {"k": 1})
    assert (outcomes.harmless, outcomes.wrong) == ({"k": 1}, {"k": 1})
    assert outcomes.counts()["wrong by k"] == 1


def test_a_process_that_dies_counts_as_a_failure(monkeypatch) -> None:
    class Died:
        returncode, stdout = -11, ""

    monkeypatch.setattr(hostile_payloads.subprocess, "run", lambda *args, **options: Died())
    outcomes = isolated_survey(Plain(), RULE, scores(), n_classes=4)

    assert outcomes.died
    assert HostileBytes().run(TamperingRun(collect=lambda: outcomes, claimed=True)).value == 1.0


def test_the_isolated_survey_counts_what_the_one_in_this_process_counts() -> None:
    isolated = isolated_survey(Plain(), RULE, scores(), n_classes=4, n_random=10, seed=3)

    assert isolated == outcomes_of(Plain(), n_random=10, seed=3)
