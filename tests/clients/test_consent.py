"""What a site did not agree to it refuses, before its model sees the query."""

from __future__ import annotations

import numpy as np
import pytest

from fedinfer_flower import Querier
from fedinfer_flower.clients.local_model import LocalModel

SECRET_NUMBER = 1234.5


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
        ({"querier_key_ids": ()}, {}),  # plain encrypts for nobody
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

    assert error.code == "FI308"
    assert querier.key_id not in str(error)
    assert shown == []


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
