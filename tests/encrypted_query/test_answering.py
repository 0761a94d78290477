"""What a site answers, and what it refuses before a ciphertext is touched."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fedinfer_flower.clients.consent import Consent
from fedinfer_flower.clients.encrypted_answering import (
    EncryptedPolicy,
    RowLimit,
    answer_encrypted,
)
from fedinfer_flower.clients.local_model import LocalModel
from fedinfer_flower.clients.site_model import prepare
from fedinfer_flower.encrypted_query.documents import NAME, EncryptedQuestion
from fedinfer_flower.errors import (
    BindingError,
    BudgetExceededError,
    InvalidCiphertextError,
    InvalidValueError,
    LabelSpaceError,
    ModelError,
    ProtectionRefusedError,
    ShapeError,
    SizeLimitError,
)
from fedinfer_flower.querier.encrypted_querier import EncryptedQuerier
from fedinfer_flower.query import CountsKind
from fedinfer_flower.wire.envelope import WireLimits

pytest.importorskip("tenseal")

ROWS = np.random.default_rng(1).uniform(-1.0, 1.0, (5, 4))


@pytest.fixture(scope="module")
def calibration():
    rng = np.random.default_rng(0)
    inputs = rng.uniform(-1.0, 1.0, (90, 4))
    return inputs, (inputs[:, 0] > 0).astype(int) + (inputs[:, 1] > 0)


@pytest.fixture(scope="module")
def site(calibration):
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression().fit(*calibration)
    local = LocalModel(model=model, holdout=calibration)
    return prepare(local, name="site", share_counts=CountsKind.PRESENCE)


@pytest.fixture(scope="module")
def querier():
    return EncryptedQuerier(depth=1)


@pytest.fixture(scope="module")
def asked(querier):
    job = querier.ask(ROWS)
    return EncryptedQuestion(
        query_id=job.batches[0].query_id,
        n_queries=5,
        n_features=4,
        classes=("0", "1", "2"),
        plan=job.plan,
        input_bound=1.0,
        n_sites=3,
        min_sites=3,
        public_key=job.public_key,
        inputs=job.batches[0].inputs,
        key_id=job.key_id,
    )


@pytest.fixture(scope="module")
def consent(querier):
    return Consent(protections=frozenset({NAME}), querier_key_ids=frozenset({querier.key_id}))


def answered(asked, site, consent, **options):
    return answer_encrypted(
        asked.to_envelope(run_id=7), site, consent, run_id=7, sender=5, **options
    )


def test_answer_opens_to_the_calibrated_centred_logits(asked, site, consent, querier):
    envelope = answered(asked, site, consent)
    opened = querier._keys.decrypt(envelope.section("logits"), n_classes=3)[:, :5].real.T
    logits = np.log(site.local.model.predict_proba(ROWS)) / site.profile.temperature
    expected = logits - logits.mean(axis=1, keepdims=True)
    # Flooding has a deviation of about 1/1000 of the logits' scale: eight of them.
    assert np.abs(opened - expected).max() < 8 * 2.0**-10 * np.abs(expected).max()
    assert np.abs(opened - expected).max() > 1e-6  # and it is there
    assert envelope.meta == {"commitment": site.profile.commitment(), "agreement": None}


def test_same_query_twice_gets_different_noise(asked, site, consent):
    one, other = (answered(asked, site, consent).section("logits") for _ in range(2))
    assert one != other


def test_agreement_is_shared_only_if_the_site_says_so(asked, site, consent):
    policy = EncryptedPolicy(share_fidelity=True)
    assert answered(asked, site, consent, policy=policy).meta["agreement"] == 1.0


@pytest.mark.parametrize(
    ("protections", "pins_key", "words"),
    [
        (None, True, "does not answer encrypted"),
        (frozenset({"he"}), True, "does not answer encrypted"),
        (frozenset({NAME}), None, "has not pinned"),
        (frozenset({NAME}), False, "has not pinned"),
    ],
)
def test_site_that_did_not_opt_in_refuses(asked, site, querier, protections, pins_key, words):
    keys = {True: frozenset({querier.key_id}), False: frozenset({"0" * 64}), None: None}
    with pytest.raises(ProtectionRefusedError, match=words):
        answered(asked, site, Consent(protections=protections, querier_key_ids=keys[pins_key]))


def test_site_refuses_to_be_alone_unless_it_agreed(asked, site, consent):
    alone = dataclasses.replace(asked, n_sites=1, min_sites=1)
    with pytest.raises(ProtectionRefusedError, match="at least 3"):
        answered(alone, site, consent)
    answered(alone, site, consent, policy=EncryptedPolicy(min_sites=1))


def test_query_of_another_run_features_classes_or_size_is_refused(asked, site, consent, querier):
    with pytest.raises(BindingError):
        answer_encrypted(asked.to_envelope(run_id=8), site, consent, run_id=7, sender=5)
    with pytest.raises(LabelSpaceError):
        answered(dataclasses.replace(asked, classes=("x", "y")), site, consent)
    with pytest.raises(SizeLimitError):
        answered(asked, site, consent, limits=WireLimits(max_rows=4))
    job = querier.ask(ROWS[:, :2])
    narrow = dataclasses.replace(asked, n_features=2, inputs=job.batches[0].inputs)
    with pytest.raises(ShapeError, match="features"):
        answered(narrow, site, consent)


def test_bytes_that_are_no_ciphertext_are_refused(asked, site, consent):
    bad = dataclasses.replace(asked, inputs=b"\xff" * len(asked.inputs))
    with pytest.raises(InvalidCiphertextError):
        answered(bad, site, consent)


def test_model_that_does_not_fit_is_refused_with_an_alternative(asked, consent, calibration):
    from sklearn.ensemble import RandomForestClassifier

    forest = LocalModel(model=RandomForestClassifier(5).fit(*calibration), holdout=calibration)
    bare = LocalModel(model=lambda rows: rows, classes=["0", "1"])
    for local, words in ((forest, "RandomForest"), (bare, "no rows")):
        site = prepare(local, name="site", share_counts=CountsKind.WITHHELD)
        with pytest.raises(ModelError, match=words) as caught:
            answered(asked, site, consent)
        assert caught.value.hint


def test_row_limit_is_charged_before_the_answer_and_per_key(asked, site, consent):
    limit = RowLimit(12)
    policy = EncryptedPolicy(row_limit=limit)
    for _ in range(2):
        answered(asked, site, consent, policy=policy)
    with pytest.raises(BudgetExceededError, match="2 are left"):
        answered(asked, site, consent, policy=policy)
    limit.charge("another key", 12)
    with pytest.raises(InvalidValueError):
        RowLimit(0)


def test_torch_network_answers_through_the_plan_for_a_hidden_layer(calibration):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    layers = (torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    local = LocalModel(
        model=torch.nn.Sequential(*layers), classes=["0", "1", "2"], holdout=calibration
    )
    site = prepare(local, name="site", share_counts=CountsKind.WITHHELD)
    querier = EncryptedQuerier(depth=2)
    job = querier.ask(ROWS)
    asked = EncryptedQuestion(
        query_id=job.batches[0].query_id,
        n_queries=5,
        n_features=4,
        classes=("0", "1", "2"),
        plan=job.plan,
        input_bound=1.0,
        n_sites=3,
        min_sites=3,
        public_key=job.public_key,
        inputs=job.batches[0].inputs,
        key_id=job.key_id,
    )
    consent = Consent(protections=frozenset({NAME}), querier_key_ids=frozenset({querier.key_id}))
    policy = EncryptedPolicy(min_agreement=0.5, share_fidelity=True)

    envelope = answered(asked, site, consent, policy=policy)

    opened = querier._keys.decrypt(envelope.section("logits"), n_classes=3)[:, :5].real.T
    logits = site.calibrated_logits(ROWS, ("0", "1", "2"))
    # A fit of degree 2 to ReLU over about [-1, 1]: off by some hundredths, weights below 1.
    assert np.abs(opened - logits + logits.mean(axis=1, keepdims=True)).max() < 0.2
    assert 0.5 <= envelope.meta["agreement"] <= 1.0


def test_stricter_policy_is_not_served_from_what_a_laxer_one_made(asked, site, consent):
    answered(asked, site, consent)
    with pytest.raises(ModelError, match="agrees with the model on"):
        prepared_for_impossible(asked, site, consent)


def prepared_for_impossible(asked, site, consent):
    policy = EncryptedPolicy(min_agreement=1.0)
    object.__setattr__(policy, "min_agreement", 1.01)
    return answered(asked, site, consent, policy=policy)
