"""What a site signs of an answer, and what it says where it cannot say more."""

from __future__ import annotations

import hashlib
import sys

import numpy as np
import pytest

from fedinfer_flower.clients.answering import Answer
from fedinfer_flower.clients.remembered import Charged
from fedinfer_flower.clients.site_memory import HomeMemory
from fedinfer_flower.clients.stating import signed_statement
from fedinfer_flower.ensemble.base import make_rule
from fedinfer_flower.errors import MissingExtraError
from fedinfer_flower.privacy.base import make_protection
from fedinfer_flower.privacy.charge import Charge
from fedinfer_flower.query import SiteProfile
from fedinfer_flower.receipts.statement import SignedStatement
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.messages import Question
from fedinfer_flower.wire.roster import Roster, Seat

QUERIER = Identity.generate()


@pytest.fixture
def state(tmp_path):
    """Return a function that makes a statement of one answer."""
    memory = HomeMemory(tmp_path)

    def make(*, charged=None, protection="plain", sealed=True, digest="", **options):
        seat = Seat(identity=memory.identity.public, commitment="0" * 64)
        asked = Question(
            query_id="job-0",
            inputs=np.zeros((3, 2)),
            classes=("a", "b"),
            n_sites=1,
            rule="mean-probability",
            protection=protection,
            protection_options=options,
            roster=Roster((seat,)),
            querier=QUERIER.public,
        )
        answer = Answer(
            payload=b"payload",
            width=2,
            protection=make_protection(protection, options),
            rule=make_rule("mean-probability", {}),
            charged=charged or Charged(),
        )
        profile = SiteProfile(name="north", classes=("a", "b"), model_digest=digest)
        signed = signed_statement(
            answer, asked, profile=profile, memory=memory, run_id=5, sealed=sealed, now_s=1.9e9
        )
        signed = SignedStatement.from_bytes(signed.to_bytes())
        signed.verify()
        return signed.statement

    return make


def test_statement_says_who_asked_and_digests_what_left(state):
    said = state()
    assert said.querier_key_id == QUERIER.key_id
    assert said.payload_digest == hashlib.sha256(b"payload").hexdigest()
    assert (said.run_id, said.n_rows, said.n_fresh_rows) == (5, 3, 3)
    assert (said.epsilon, said.delta, said.charge) == (None, None, Charge())


def test_querier_of_a_clear_query_is_not_believed(state):
    said = state(sealed=False)
    assert (said.querier_key_id, said.query_sealed) == ("", False)


def charged(charge: Charge) -> Charged:
    return Charged(querier="q", to_querier=charge, to_all=charge, n_fresh=charge.n_rows)


def test_epsilon_is_that_of_the_charge(state):
    protection = make_protection("dp", {"epsilon": 2.0, "delta": 1e-6})
    said = state(charged=charged(Charge.gaussian(0.5, 2)), protection="dp", epsilon=2.0, delta=1e-6)
    assert said.n_fresh_rows == 2
    assert said.delta == pytest.approx(1e-6)
    # mu of two rows is 0.71; at this delta between 2 and 4 (Balle and Wang, 2018).
    assert 2.0 < said.epsilon < 4.0
    assert protection.options()["delta"] == 1e-6


def test_repeats_cost_nothing(state):
    said = state(charged=charged(Charge.gaussian(0.5, 0)), protection="dp")
    assert (said.epsilon, said.delta, said.n_fresh_rows) == (0.0, 0.0, 0)


def without_scipy(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "scipy"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("scipy", "scipy.special", "scipy.optimize"):
        monkeypatch.setitem(sys.modules, name, None)


def test_randomised_response_is_stated_without_the_extra(state, monkeypatch):
    without_scipy(monkeypatch)
    cost = charged(Charge.pure(2.0, 3))
    said = state(charged=cost, protection="dp", mechanism="randomised-response", epsilon=2.0)
    assert (said.epsilon, said.delta) == (6.0, 0.0)


def test_gaussian_noise_is_not_stated_without_the_extra(state, monkeypatch):
    without_scipy(monkeypatch)
    with pytest.raises(MissingExtraError):
        state(charged=charged(Charge.gaussian(0.5, 2)), protection="dp")


@pytest.mark.parametrize(
    ("digest", "stated"),
    [
        ("", ""),
        ("a" * 64, "a" * 64),
        ("sha256:" + "b" * 64, "b" * 64),
        ("release 7", ""),
        ("A" * 64, ""),
    ],
)
def test_model_that_is_named_otherwise_can_be_stated(state, digest, stated):
    # The commitment has the text of the profile in it in any case.
    assert state(digest=digest).model_digest == stated
