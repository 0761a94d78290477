"""Queriers and coordinators whom a site does not know, and what a site's consent stops."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fedinfer_flower import Querier
from fedinfer_flower.clients.consent import Consent, OptionLimits
from fedinfer_flower.errors import (
    DifferencingError,
    ProtectionRefusedError,
    QuorumNotMetError,
    UntrustedKeyError,
)
from fedinfer_flower.privacy.base import ScorePlan, make_protection
from fedinfer_flower.privacy.site_budget import BudgetPolicy, SiteBudget
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.messages import Question
from fedinfer_flower.wire.roster import Roster, Seat

from .conftest import CLASSES, ROWS

PLAN = ScorePlan(width=3, bound=1.0, sensitivity_l2=1.0, n_sites_max=5, n_classes=3)


def seat(identity: Identity) -> Seat:
    return Seat(identity=identity.public, commitment="0" * 64)


def question(protection: str, sites: list[Identity], n_sites: int = 5, **changes) -> Question:
    facts = {
        "query_id": "q",
        "inputs": ROWS,
        "classes": CLASSES,
        "n_sites": n_sites,
        "rule": "mean-probability",
        "protection": protection,
        "roster": Roster(tuple(seat(site) for site in sites)),
    }
    return Question(**facts | changes)


def check(consent: Consent, asked: Question, *, sealed: bool = True, **options) -> None:
    consent.check(
        asked,
        make_protection(asked.protection),
        PLAN,
        sealed=sealed,
        **{"budgeted": False} | options,
    )


# -- who asks ------------------------------------------------------------------------------


@pytest.mark.parametrize("protection", ["plain", "secagg", "he"])
def test_querier_that_the_sites_do_not_know_is_refused(make_federation, protection):
    known = Identity.generate()
    federation = make_federation(querier_key_ids=[known.key_id])
    strategy = federation.strategy(protection)
    with pytest.raises(QuorumNotMetError, match="FI311"):
        federation.ask(strategy)
    assert federation.seen_inputs == []
    querier, _, result = federation.ask(strategy, identity=known)
    assert len(querier.open(result.combined)) == len(ROWS)


def test_sites_that_know_their_queriers_refuse_clear_queries(make_federation):
    federation = make_federation(querier_key_ids=[Identity.generate().key_id])
    with pytest.raises(QuorumNotMetError, match="FI311"):
        federation.strategy("plain").start(federation.grid, ROWS)


@pytest.mark.parametrize("protection", ["plain", "secagg"])
def test_sites_that_require_a_seal_refuse_clear_queries(make_federation, protection):
    federation = make_federation(require_seal=True)
    strategy = federation.strategy(protection)
    clear = Querier(protection=strategy.protection)
    with pytest.raises(QuorumNotMetError, match="FI308"):
        strategy.start(federation.grid, clear.ask(ROWS, clear=True))
    assert federation.seen_inputs == []
    querier, _, result = federation.ask(strategy)
    assert len(querier.open(result.combined)) == len(ROWS)


def test_known_encryption_key_admits_a_clear_query_under_he_only():
    keys = make_protection("plain").make_keys()
    asked = question("plain", [], key_id="1" * 64, public_key=b"x")
    assert keys.key_id == ""
    with pytest.raises(UntrustedKeyError):
        check(Consent(querier_key_ids=frozenset({"1" * 64})), asked, sealed=False)
    encrypted = dataclasses.replace(asked, protection="he")
    check(Consent(querier_key_ids=frozenset({"1" * 64})), encrypted, sealed=False)


def test_name_of_a_known_querier_counts_only_under_seal():
    me = Identity.generate()
    consent = Consent(querier_key_ids=frozenset({me.key_id}))
    asked = question("plain", [], querier=me.public)
    check(consent, asked, sealed=True)
    with pytest.raises(UntrustedKeyError):
        check(consent, asked, sealed=False)


# -- with whom -----------------------------------------------------------------------------

PEERS = [Identity.generate() for _ in range(4)]
OWN = Identity.generate()
MADE_UP = [Identity.generate() for _ in range(4)]


def test_peers_that_were_made_up_are_refused():
    consent = Consent(peer_key_ids=frozenset(p.key_id for p in PEERS))
    check(consent, question("secagg", [OWN, *PEERS]), own_key_id=OWN.key_id)
    # Of five, four must be in the sum: with this site three known ones.
    check(consent, question("secagg", [OWN, *PEERS[:3], MADE_UP[0]]), own_key_id=OWN.key_id)
    with pytest.raises(UntrustedKeyError, match="knows 2 of the other 4"):
        check(consent, question("secagg", [OWN, *PEERS[:2], *MADE_UP[:2]]), own_key_id=OWN.key_id)


@pytest.mark.parametrize("protection", ["he", "secagg"])
def test_query_without_a_roster_does_not_pass_by_the_peers(protection):
    consent = Consent(peer_key_ids=frozenset(p.key_id for p in PEERS))
    with pytest.raises(UntrustedKeyError, match="knows 0"):
        check(consent, question(protection, []), own_key_id=OWN.key_id)


def test_own_key_in_the_list_of_peers_is_no_peer():
    # The same list at every site is what a careful operator writes.
    everyone = Consent(peer_key_ids=frozenset(p.key_id for p in [OWN, *PEERS]))
    asked = question("secagg", [OWN, *PEERS[:2], *MADE_UP[:2]])
    with pytest.raises(UntrustedKeyError):
        check(everyone, asked, own_key_id=OWN.key_id)


def test_own_key_in_the_list_of_peers_is_no_peer_at_a_site(make_federation):
    federation = make_federation()
    directory = federation.strategy("secagg").directory(federation.grid)
    first = directory.cards[0]
    known = {card.key_id for card in directory.cards[:3]}
    federation.per_site[0] = {"peer_key_ids": known}
    federation.restart()
    assert first.key_id in known
    # Two other sites of four are known, three are needed.
    _, _, result = federation.ask(federation.strategy("secagg"))
    (dropped,) = [s for s in result.reports[0].sites if s.status.value != "answered"]
    assert (dropped.name, dropped.error_code) == (first.profile.name, "FI311")


def test_site_that_knows_its_peers_answers_them_only(make_federation):
    federation = make_federation(peer_key_ids=["0" * 64])
    with pytest.raises(QuorumNotMetError, match="FI311"):
        federation.ask(federation.strategy("secagg"))
    # Alone, no other site matters.
    querier, _, result = federation.ask(federation.strategy("plain"))
    assert len(querier.open(result.combined)) == len(ROWS)


# -- for what ------------------------------------------------------------------------------


def test_protection_that_a_site_did_not_agree_to_is_refused(make_federation):
    federation = make_federation(protections=["secagg"])
    with pytest.raises(QuorumNotMetError, match="FI308"):
        federation.ask(federation.strategy("plain"))
    querier, _, result = federation.ask(federation.strategy("secagg"))
    assert len(querier.open(result.combined)) == len(ROWS)


def test_too_much_epsilon_a_query_is_refused(make_federation):
    federation = make_federation(max_epsilon_per_query=20.0)
    with pytest.raises(QuorumNotMetError, match="FI308"):
        federation.ask(federation.strategy("secagg+dp"))  # 24
    assert federation.seen_inputs == []


@pytest.mark.parametrize("protection", ["secagg", "he"])
def test_claimed_cohort_of_too_few_is_refused(protection):
    with pytest.raises(ProtectionRefusedError, match="needs at least"):
        check(Consent(), question(protection, [OWN], n_sites=1))


STRICT = OptionLimits(
    require_self_mask=True, max_dropout_share=1 / 3, min_collusion_share=0.1, max_delta=1e-5
)
ACCEPTED = {"epsilon": 24.0, "self_mask": True, "collusion_share": 0.1, "dropout_share": 1 / 3}
WEAKENED = [
    ({"self_mask": False}, "a mask of its own"),
    ({"self_mask": False, "dropout_share": 0.45}, "a mask of its own|dropout_share"),
    ({"collusion_share": 0.0}, "collusion_share from 0.1"),
    ({"delta": 1e-3}, "delta up to 1e-05"),
]


@pytest.mark.parametrize(("changes", "named"), WEAKENED, ids=str)
def test_options_that_a_strict_site_does_not_accept_are_refused_by_name(changes, named):
    asked = question("secagg+dp", [OWN])
    strict = Consent(option_limits=STRICT)
    accepted = make_protection("secagg+dp", ACCEPTED)
    strict.check(asked, accepted, PLAN, sealed=True, budgeted=False)
    weak = make_protection("secagg+dp", ACCEPTED | changes)
    Consent().check(asked, weak, PLAN, sealed=True, budgeted=False)
    with pytest.raises(ProtectionRefusedError, match=named):
        strict.check(asked, weak, PLAN, sealed=True, budgeted=False)


def test_share_of_dropouts_that_a_strict_site_does_not_accept_is_refused_by_name():
    # With self_mask no more than a third can be built: here the limit on its own.
    strict = Consent(option_limits=OptionLimits(max_dropout_share=1 / 3))
    for name in ("secagg", "secagg+dp"):
        weak = make_protection(name, {"dropout_share": 0.45})
        with pytest.raises(ProtectionRefusedError, match=r"dropout_share up to 0\.333"):
            strict.check(question(name, [OWN]), weak, PLAN, sealed=True, budgeted=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"self_mask": False},
        {"self_mask": False, "dropout_share": 0.45},
        {"collusion_share": 0.0},
        {"delta": 1e-3},
    ],
    ids=str,
)
def test_strict_sites_refuse_weak_options_before_anything_is_spent(make_federation, home, changes):
    policy = BudgetPolicy(epsilon_per_querier=200.0, epsilon_global=400.0, delta=1e-5)
    federation = make_federation(home=home, budget=policy, option_limits=STRICT)
    me = Identity.generate()
    with pytest.raises(QuorumNotMetError, match="FI308"):
        federation.ask(
            federation.strategy(make_protection("secagg+dp", ACCEPTED | changes)), identity=me
        )
    assert federation.seen_inputs == []
    for database in home.glob("partition-*/budget.sqlite"):
        assert SiteBudget(database, policy).spent(me.key_id)[0] == 0.0
    accepted = federation.strategy(make_protection("secagg+dp", ACCEPTED))
    querier, _, result = federation.ask(accepted, identity=me)
    assert len(querier.open(result.combined)) == len(ROWS)
    databases = list(home.glob("partition-*/budget.sqlite"))
    assert len(databases) == 5
    for database in databases:
        assert SiteBudget(database, policy).spent(me.key_id)[0] > 0.0


# -- differencing --------------------------------------------------------------------------


def test_two_exact_sums_give_away_a_site_without_a_home(make_federation):
    """The attack that the next tests stop."""
    federation = make_federation()
    strategy = federation.strategy("secagg")
    one, _, all_of_them = federation.ask(strategy)
    names = tuple(f"site-{k}" for k in range(4))
    two, _, fewer = federation.ask(strategy, only=names)
    difference = one.totals(all_of_them.combined) - two.totals(fewer.combined)
    np.testing.assert_allclose(difference, federation.probabilities()[4], atol=1e-3)


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("rule", ["mean-probability", "majority-vote"])
def test_same_rows_to_a_smaller_cohort_are_refused_with_a_home(
    make_federation, home, restarted, rule
):
    federation = make_federation(home=home)
    strategy = federation.strategy("secagg")
    federation.ask(strategy)
    if restarted:
        federation.restart()
        federation.forget_contexts()
    asked = len(federation.seen_inputs)
    names = tuple(f"site-{k}" for k in range(4))
    with pytest.raises(QuorumNotMetError, match="FI316"):
        federation.ask(strategy, ROWS[2:4].astype(np.float64), only=names, rule=rule)
    assert DifferencingError.code == "FI316"
    assert len(federation.seen_inputs) == asked


def test_same_rows_to_the_same_cohort_are_summed_again_with_a_home(make_federation, home):
    federation = make_federation(home=home)
    strategy = federation.strategy("secagg")
    for _ in range(2):
        querier, _, result = federation.ask(strategy)
        expected = federation.probabilities().sum(axis=0)
        np.testing.assert_allclose(querier.totals(result.combined), expected, atol=1e-3)


def test_same_rows_under_he_are_refused_with_a_home(make_federation, home):
    # Sites cannot tell who is in such a sum: one time a row.
    federation = make_federation(home=home)
    strategy = federation.strategy("he")
    federation.ask(strategy)
    with pytest.raises(QuorumNotMetError, match="FI316"):
        federation.ask(strategy)


def test_row_changed_in_its_last_bit_is_another_row(make_federation, home):
    """What the guard does not stop, in an exact sum; see the docs of `CohortGuard`."""
    federation = make_federation(home=home)
    strategy = federation.strategy("secagg")
    one, _, all_of_them = federation.ask(strategy)
    names = tuple(f"site-{k}" for k in range(4))
    near = np.nextafter(ROWS, np.inf)
    two, _, fewer = federation.ask(strategy, near, only=names)
    difference = one.totals(all_of_them.combined) - two.totals(fewer.combined)
    np.testing.assert_allclose(difference, federation.probabilities()[4], atol=1e-3)
