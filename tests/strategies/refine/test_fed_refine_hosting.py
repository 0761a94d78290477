"""Fusers at the coordinator, as in the FedRefine paper: same answers, and it reads the caches."""

from __future__ import annotations

import numpy as np
import pytest

from fedinfer_flower.errors import FuserError
from fedinfer_flower.kv.gate import make_gate
from fedinfer_flower.strategies.refine_hosting import FuserHost

from .conftest import OPEN, Federation, bank_for

AGREES = type(OPEN)(
    cache=True, text=True, coordinator_fusers=True, share_evidence=True, share_speeds=False
)
KEEPS_EVIDENCE = type(OPEN)(cache=True, text=True, coordinator_fusers=True, share_speeds=False)
TWO_PHASES = type(OPEN)(
    cache=True, coordinator_fusers=True, share_evidence=True, one_phase_bytes=0, share_speeds=False
)


def hosted(untrained, policy=AGREES, **options) -> Federation:
    sites = {name: {"policy": policy} for name in ("north", "south", "west")} | options
    return Federation(untrained, fusers=False, options=sites)


def bank(untrained):
    return bank_for(untrained[0], untrained)


def test_coordinators_fusers_project_and_the_receiver_joins(untrained, questions):
    federation = hosted(untrained)
    result = federation.ask(questions, fusers=bank(untrained))
    alone = Federation(untrained).ask(questions, medium="own")

    assert all(set(row) == {"south", "west"} for row in result.receivers[0].used)
    assert not result.degraded
    assert result.answers != alone.answers


def test_coordinator_reads_the_rewritten_questions_that_it_relays(untrained, questions):
    federation = hosted(untrained)
    federation.ask(questions, fusers=bank(untrained))

    at_the_sharer = b"".join(data for name, _, data in federation.seen if name == "south")
    assert questions[0].split()[3].encode() in at_the_sharer


def test_site_that_did_not_agree_gives_text_instead(untrained, questions):
    federation = hosted(untrained, south={"policy": OPEN})
    result = federation.ask(questions, fusers=bank(untrained), sharers=["south", "west"])

    plans = {plan.sharer: plan.medium for plan in result.plans}
    assert plans == {"south": "text", "west": "cache"}


def test_gate_chooses_sharers_from_evidence(untrained, questions):
    one = hosted(untrained).ask(questions, fusers=bank(untrained), gate="top-k")
    every = hosted(untrained).ask(questions, fusers=bank(untrained), gate=make_gate("none"))

    assert all(len(row) <= 1 for row in one.receivers[0].used)
    assert all(len(row) == 2 for row in every.receivers[0].used)


def test_gate_fetches_only_what_it_chose(untrained, questions):
    federation = hosted(untrained, TWO_PHASES)
    result = federation.ask(questions[:1], fusers=bank(untrained), gate="top-k")

    fetched = [n for n in ("south", "west") if "fetch" in federation.verbs(n)]
    helped = set(result.receivers[0].used[0])
    assert set(fetched) == helped
    assert len(fetched) <= 1
    assert {o.sharer: o.payload_bytes > 0 for o in result.outcomes} == {
        name: name in fetched for name in ("south", "west")
    }


def test_gate_without_the_receivers_evidence_leaves_the_own_answer(untrained, questions):
    federation = hosted(untrained, KEEPS_EVIDENCE)
    result = federation.ask(questions, fusers=bank(untrained), gate="top-k")
    alone = Federation(untrained).ask(questions, medium="own")

    assert result.answers == alone.answers
    assert [(o.sharer, o.error_code) for o in result.failures] == [("north", "FI409")]


def test_no_fuser_for_a_pair_falls_back_on_text(untrained, questions):
    only_south = bank_for(untrained[0], untrained[:2])
    result = hosted(untrained).ask(questions, fusers=only_south)

    assert {plan.sharer: plan.medium for plan in result.plans} == {"south": "cache", "west": "text"}


def test_choice_of_all_needs_no_evidence(untrained):
    host = FuserHost(bank(untrained))

    np.testing.assert_array_equal(host.choose(None, [None, None], 3), np.ones((3, 2)))
    gated = FuserHost(bank(untrained), make_gate("top-k"))
    with pytest.raises(FuserError, match="keeps its evidence"):
        gated.choose(None, [None], 3)
    own = np.full((3, 4), 0.1, np.float32)
    assert not gated.choose(own, [None], 3).any()
