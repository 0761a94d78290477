"""What a site did not agree to it refuses, before its model sees the query."""

from __future__ import annotations

import time

import numpy as np
import pytest

from fedinfer_flower import Querier
from fedinfer_flower.clients.local_model import LocalModel
from fedinfer_flower.privacy.base import make_protection
from fedinfer_flower.wire.directory import read_site_card
from fedinfer_flower.wire.identity import Identity, PublicIdentity
from fedinfer_flower.wire.roster import Roster, Seat

SECRET_NUMBER = 1234.5
NODE = 1000


@pytest.fixture
def asked_model():
    """Return (load_model, rows that the model was shown)."""
    shown = []

    def model(rows):
        shown.append(rows)
        return np.full((len(rows), 2), 0.5)

    return (lambda context: LocalModel(model=model, classes=["a", "b"])), shown


@pytest.fixture(scope="module")
def querier():
    return Querier(protection="he")


def he(querier) -> dict[str, object]:
    return {
        "protection": "he",
        "protection_options": {"scheme": "bfv"},
        "public_key": querier._keys.public_key,
        "key_id": querier.key_id,
    }


def dp(epsilon: float, mechanism: str = "gaussian") -> dict[str, object]:
    return {
        "protection": "dp",
        "rule": "majority-vote",
        "protection_options": {"epsilon": epsilon, "mechanism": mechanism},
    }


@pytest.mark.parametrize(
    ("consent", "question", "hint"),
    [
        ({"protections": ("he", "dp")}, {}, "dp or he"),
        ({"protections": ()}, {}, ""),
        ({"max_epsilon_per_query": 1.0}, dp(1.5), ""),
        ({"max_epsilon_per_query": 1.0}, dp(1.5, "randomised-response"), ""),
        ({"protections": ("dp",), "max_epsilon_per_query": 0.5}, dp(1.0), ""),
    ],
    ids=str,
)
def test_refusal_is_typed_and_names_no_data(make_site, asked_model, consent, question, hint):
    load_model, shown = asked_model
    site = make_site(load_model, **consent)

    error = site.error(inputs=np.full((2, 2), SECRET_NUMBER), **question)

    assert error.code == "FI308"
    assert hint in error.hint
    assert "1234" not in str(error)
    assert shown == []


@pytest.mark.parametrize(
    ("consent", "question"),
    [
        ({}, {}),
        ({"protections": ["plain"]}, {}),
        ({"max_epsilon_per_query": 0.1}, {}),  # plain spends none: it is another option's matter
        ({"max_epsilon_per_query": 1.5}, dp(1.5)),
        ({"protections": {"dp"}, "max_epsilon_per_query": 2.0}, dp(1.5, "randomised-response")),
    ],
    ids=str,
)
def test_question_within_the_consent_is_answered(make_site, asked_model, consent, question):
    load_model, shown = asked_model
    envelope = make_site(load_model, **consent).ask(**question)
    assert envelope.kind == "answer"
    assert len(shown) == 1


def test_key_of_an_unknown_querier_is_refused(make_site, asked_model, querier):
    load_model, shown = asked_model
    other = Querier(protection="he")

    error = make_site(load_model, querier_key_ids=[other.key_id]).error(**he(querier))

    assert error.code == "FI311"
    assert querier.key_id not in str(error)
    assert shown == []


@pytest.mark.parametrize("protection", ["plain", "dp"])
def test_question_that_nobody_signed_is_refused_where_queriers_are_named(
    make_site, asked_model, protection
):
    load_model, shown = asked_model
    site = make_site(load_model, querier_key_ids=["00" * 32])

    error = site.error(inputs=np.full((2, 2), SECRET_NUMBER), protection=protection)

    assert error.code == "FI311"
    assert "under seal" in error.hint
    assert "1234" not in str(error)
    assert shown == []


def test_question_in_clear_is_refused_where_a_seal_is_required(make_site, asked_model):
    load_model, shown = asked_model
    error = make_site(load_model, require_seal=True).error()
    assert error.code == "FI308"
    assert "sealed queries only" in error.message
    assert shown == []


def test_question_in_clear_that_names_a_querier_is_refused(make_site, asked_model):
    # Nothing shows that the querier it names ever saw it.
    load_model, shown = asked_model
    signer = Identity.generate().public
    error = make_site(load_model, querier_key_ids=[signer.key_id]).error(querier=signer)
    assert error.code == "FI301"
    assert shown == []


def seat(identity: PublicIdentity | None = None, commitment: str = "0" * 64) -> Seat:
    return Seat(identity=identity or Identity.generate().public, commitment=commitment)


def own_seat(site) -> Seat:
    return read_site_card(site.hello(), run_id=site.run_id, sender=NODE).seat


@pytest.mark.parametrize("n_known", [0, 1, 2])
def test_roster_of_unknown_sites_is_refused_where_peers_are_named(make_site, asked_model, n_known):
    load_model, shown = asked_model
    others = [seat(), seat()]
    known = [other.identity.key_id for other in others[:n_known]]
    site = make_site(load_model, peer_key_ids=known)
    roster = Roster((own_seat(site), *others))
    keys = make_protection("secagg").make_keys()
    question = {
        "protection": "secagg",
        "roster": roster,
        "public_key": keys.public_key,
        "key_id": keys.key_id,
    }

    envelope = site.ask(**question)

    # A sum of three sites may be opened, so this site must know the two others.
    assert (envelope.kind == "answer") == (n_known == 2)
    if n_known < 2:
        assert envelope.meta["code"] == "FI311"
        assert shown == []


def test_roster_without_this_site_is_refused(make_site, asked_model):
    load_model, shown = asked_model
    error = make_site(load_model).error(roster=Roster((seat(), seat(), seat())))
    assert error.code == "FI303"
    assert shown == []


def test_roster_that_names_another_model_of_this_site_is_refused(make_site, asked_model):
    load_model, shown = asked_model
    site = make_site(load_model)
    mine = seat(own_seat(site).identity, "1" * 64)
    error = site.error(roster=Roster((mine, seat(), seat())))
    assert error.code == "FI303"
    assert "another model" in error.message
    assert shown == []


def test_masked_question_without_a_roster_is_refused(make_site, asked_model):
    load_model, shown = asked_model
    keys = make_protection("secagg").make_keys()
    error = make_site(load_model).error(
        protection="secagg", public_key=keys.public_key, key_id=keys.key_id
    )
    assert error.code == "FI303"
    assert shown == []


def test_query_id_is_answered_once(make_site, asked_model):
    load_model, shown = asked_model
    site = make_site(load_model)
    assert site.ask(query_id="q-1").kind == "answer"
    assert site.error(query_id="q-1").code == "FI313"
    assert site.ask(query_id="q-2").kind == "answer"
    assert len(shown) == 2


def test_question_after_its_time_is_refused(make_site, asked_model):
    load_model, shown = asked_model
    site = make_site(load_model)
    assert site.error(expires_at=1.0).code == "FI314"
    assert shown == []
    # What was refused did not use up the id.
    assert site.ask(expires_at=time.time() + 600.0).kind == "answer"


def test_key_of_a_known_querier_is_accepted(make_site, asked_model, querier):
    load_model, _ = asked_model
    site = make_site(load_model, querier_key_ids=["00" * 32, querier.key_id], protections=["he"])
    assert site.ask(**he(querier)).kind == "answer"


def test_key_that_pretends_to_be_a_known_queriers_is_refused(make_site, asked_model, querier):
    load_model, shown = asked_model
    impostor = Querier(protection="he")
    question = he(impostor) | {"key_id": querier.key_id}

    error = make_site(load_model, querier_key_ids=[querier.key_id]).error(**question)

    assert error.code == "FI303"
    assert shown == []


def test_secret_key_sent_for_a_public_one_is_refused(make_site, asked_model, querier):
    from fedinfer_flower.privacy.base import key_id_of

    load_model, _ = asked_model
    secret = querier._keys.secret_key
    question = he(querier) | {"public_key": secret, "key_id": key_id_of(secret)}
    assert make_site(load_model).error(**question).code == "FI308"


@pytest.mark.parametrize("n_sites", [1, 2])
def test_cohort_too_small_to_hide_in_is_refused(make_site, asked_model, querier, n_sites):
    load_model, shown = asked_model
    error = make_site(load_model).error(n_sites=n_sites, **he(querier))
    assert error.code == "FI308"
    assert "at least 3 sites" in error.message
    assert shown == []
