"""From the querier to the sites and back, over Flower's wire format."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
import warnings

import numpy as np
import pytest
from flwr.app import Message
from flwr.clientapp import ClientApp

from fedinfer_flower.clients.encrypted_answering import EncryptedPolicy
from fedinfer_flower.clients.local_model import LocalModel
from fedinfer_flower.clients.mod import InferenceMod
from fedinfer_flower.encrypted_query.documents import ACTION, NAME, EncryptedJob
from fedinfer_flower.encrypted_query.network import MISSING_LOGIT
from fedinfer_flower.errors import (
    BindingError,
    ConfigError,
    InvalidValueError,
    KeyAtCoordinatorError,
    ProtectionRefusedError,
    QuorumNotMetError,
    ReplayError,
)
from fedinfer_flower.privacy.site_budget import BudgetPolicy
from fedinfer_flower.querier.encrypted_querier import EncryptedQuerier
from fedinfer_flower.query import Deadline
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.strategies.fed_encrypted_query import FedEncryptedQuery
from fedinfer_flower.wire.actions import ACTIONS, ENCRYPTED
from fedinfer_flower.wire.records import pack, unpack

pytest.importorskip("tenseal")

CLASSES = (("a", "b", "c"), ("b", "c", "d"), ("d", "a", "c"), ("a", "b", "d"))
QUERIES = np.random.default_rng(9).uniform(-1.0, 1.0, (6, 3))
DEADLINE = Deadline(timeout_s=120.0)
LAX = EncryptedPolicy(min_agreement=0.8)


@functools.cache
def local_model(partition: int) -> LocalModel:
    """Linear models at sites 0 to 2, a network with one hidden layer at site 3."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier

    rng = np.random.default_rng(partition)
    inputs = rng.uniform(-1.0, 1.0, (150, 3))
    names = np.array(CLASSES[partition])
    labels = names[(inputs @ rng.normal(size=(3, 3))).argmax(axis=1)]
    if partition < 3:
        model = LogisticRegression(C=10.0)
    else:
        model = MLPClassifier((4,), solver="lbfgs", max_iter=40, random_state=0, alpha=0.1)
    return LocalModel(model=model.fit(inputs, labels), holdout=(inputs, labels))


def load_model(context):
    return local_model(context.node_config["partition-id"])


@pytest.fixture(scope="module", autouse=True)
def fitted_models():
    # Here, once: forty steps do not converge, and threads share their warning filters.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [local_model(partition) for partition in range(4)]


@pytest.fixture(scope="module")
def querier():
    return EncryptedQuerier(depth=2)


@pytest.fixture(scope="module")
def job(querier):
    return querier.ask(QUERIES)


def app_of(querier, *, policy=None, wrap=None, **options):
    mod = InferenceMod(
        load_model,
        protections=(NAME,),
        querier_key_ids=(querier.key_id,),
        encrypted=policy or EncryptedPolicy(min_agreement=0.8, share_fidelity=True),
        **options,
    )
    if wrap is None:
        return mod.attach(ClientApp())
    app = ClientApp()
    for action in ACTIONS:
        app.query(action)(mod.handle if action != ENCRYPTED else wrapped(mod, wrap))
    return app


def wrapped(mod, wrap):
    return lambda message, context: wrap(mod.handle(message, context), message, context)


def strategy(**options):
    return FedEncryptedQuery(**({"deadline": DEADLINE, "allow_coordinator_key": True} | options))


def expected_logits(partition, classes, temperature):
    local = local_model(partition)
    if hasattr(local.model, "coefs_"):
        from fedinfer_flower.encrypted_query.network import EncryptedNetwork

        network = EncryptedNetwork.from_sklearn(local.model, local.holdout[0], min_agreement=0.5)
        logits = network.logits(QUERIES)
    else:
        logits = local.model.decision_function(QUERIES)
    logits = (logits - logits.mean(axis=1, keepdims=True)) / temperature
    full = np.full((len(QUERIES), len(classes)), MISSING_LOGIT)
    for column, name in enumerate(local.model.classes_):
        full[:, classes.index(str(name))] = logits[:, column]
    return full


def test_sum_of_encrypted_logits_is_the_sum_in_clear(querier, job):
    with LocalGrid(app_of(querier), num_supernodes=4) as grid:
        result = strategy(min_available_nodes=4).start(grid, job)

    assert result.combined.classes == ("a", "b", "c", "d")
    profiles = [result.profiles[node] for node in sorted(result.profiles)]
    expected = sum(
        expected_logits(k, ("a", "b", "c", "d"), profile.temperature)
        for k, profile in enumerate(profiles)
    )
    totals = querier.totals(result.combined)
    # Four floods of at most 2**-10 of about 10 each; eight deviations.
    np.testing.assert_allclose(totals, expected, atol=8 * 2 * 2.0**-10 * 10)
    prediction = querier.open(result.combined)
    np.testing.assert_array_equal(prediction.labels, expected.argmax(axis=1))
    assert not result.degraded
    assert len(result.agreements) == 4
    assert all(0.8 <= share <= 1.0 for share in result.agreements.values())
    assert result.reports[0].key_at_coordinator
    assert "encrypted-query" in result.summary()
    assert result.to_dict()["epsilon_total"] is None


def test_site_that_sends_garbage_is_left_out_of_the_sum(querier, job):
    def garbage(reply, message, context):
        if context.node_config["partition-id"] != 1:
            return reply
        envelope = unpack(reply.content)
        logits = b"\xff" * len(envelope.section("logits"))
        envelope = dataclasses.replace(envelope, sections=(("logits", logits),))
        return Message(pack(envelope), reply_to=message)

    with LocalGrid(app_of(querier, wrap=garbage), num_supernodes=4) as grid:
        result = strategy(min_available_nodes=4).start(grid, job)

    assert result.degraded
    assert [s.error_code for s in result.reports[0].sites] == ["", "FI307", "", ""]
    assert result.combined.batches[0].n_sites == 3
    assert np.abs(querier.totals(result.combined)).max() < 100.0


def test_too_few_sites_release_nothing(querier, job):
    def broken(reply, message, context):
        if context.node_config["partition-id"] < 2:
            raise RuntimeError("the site's app died")
        return reply

    with (
        LocalGrid(app_of(querier, wrap=broken), num_supernodes=4) as grid,
        pytest.raises(QuorumNotMetError, match="2 of 4 sites"),
    ):
        strategy(min_available_nodes=4).start(grid, job)


def test_one_site_is_relayed_if_it_agreed(querier, job):
    policy = EncryptedPolicy(min_sites=1)
    with LocalGrid(app_of(querier, policy=policy), num_supernodes=1) as grid:
        result = strategy(n_sites=1, min_sites=1).start(grid, job)
    profile = next(iter(result.profiles.values()))
    expected = expected_logits(0, ("a", "b", "c"), profile.temperature)
    np.testing.assert_allclose(querier.totals(result.combined), expected, atol=0.1)
    assert result.agreements == {}

    with (
        LocalGrid(app_of(querier), num_supernodes=1) as grid,
        pytest.raises(QuorumNotMetError, match="FI308"),
    ):
        strategy(n_sites=1, min_sites=1).start(grid, job)


def test_sites_that_pinned_another_key_refuse(querier, job):
    with (
        LocalGrid(app_of(EncryptedQuerier(depth=1)), num_supernodes=3) as grid,
        pytest.raises(QuorumNotMetError, match="FI308"),
    ):
        strategy(min_available_nodes=3).start(grid, job)


def test_secret_key_in_the_coordinators_process_is_refused(querier, job):
    with LocalGrid(ClientApp(), num_supernodes=1) as grid:
        with pytest.raises(KeyAtCoordinatorError, match="every query"):
            FedEncryptedQuery().start(grid, job)
        with pytest.raises(KeyAtCoordinatorError):
            FedEncryptedQuery(allow_coordinator_key=True).start(grid, querier)
        swapped = dataclasses.replace(job, key_id="0" * 64)
        with pytest.raises(BindingError):
            FedEncryptedQuery(allow_coordinator_key=True).start(grid, swapped)


def test_job_of_another_process_is_no_secret_here(tmp_path):
    path = tmp_path / "job"
    code = (
        "import sys, numpy as np\n"
        "from fedinfer_flower.querier.encrypted_querier import EncryptedQuerier\n"
        "job = EncryptedQuerier(depth=1).ask(np.zeros((1, 2)))\n"
        "open(sys.argv[1], 'wb').write(job.to_bytes())\n"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, timeout=120)
    job = EncryptedJob.from_bytes(path.read_bytes())
    assert FedEncryptedQuery()._secret_is_here(job) is False


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(InvalidValueError, match="fewer than"):
        FedEncryptedQuery(n_sites=1)
    with pytest.raises(InvalidValueError):
        FedEncryptedQuery(min_sites=0)


def test_action_of_documents_and_handlers_is_one():
    assert ACTION == ENCRYPTED
    assert ENCRYPTED in ACTIONS


def test_query_id_is_answered_once(querier, job):
    with LocalGrid(app_of(querier), num_supernodes=3) as grid:
        strategy(min_available_nodes=3).start(grid, job)
        with pytest.raises(QuorumNotMetError, match=ReplayError.code):
            strategy(min_available_nodes=3).start(grid, job)


def test_site_with_a_home_remembers_query_ids_over_runs(querier, job, tmp_path):
    for error in ("", ReplayError.code):
        with LocalGrid(app_of(querier, home=tmp_path), num_supernodes=3) as grid:
            if not error:
                strategy(min_available_nodes=3).start(grid, job)
                continue
            with pytest.raises(QuorumNotMetError, match=error):
                strategy(min_available_nodes=3).start(grid, job)


def test_pin_file_of_the_home_serves_as_pins(querier, job, tmp_path):
    (tmp_path / "pins.toml").write_text(f'[queriers]\nlab = "{querier.key_id}"\n')
    mod = InferenceMod(load_model, protections=(NAME,), home=tmp_path, encrypted=LAX)
    with LocalGrid(mod.attach(ClientApp()), num_supernodes=3) as grid:
        result = strategy(min_available_nodes=3).start(grid, job)
    assert not result.degraded


@pytest.mark.parametrize("consent", [{}, {"protections": (NAME,)}, {"querier_key_ids": ("own",)}])
def test_site_without_both_consents_refuses(querier, job, consent):
    options = {k: (querier.key_id,) if v == ("own",) else v for k, v in consent.items()}
    mod = InferenceMod(load_model, **options)
    with (
        LocalGrid(mod.attach(ClientApp()), num_supernodes=3) as grid,
        pytest.raises(QuorumNotMetError, match=ProtectionRefusedError.code),
    ):
        strategy(min_available_nodes=3).start(grid, job)


def test_privacy_budget_beside_encrypted_queries_is_refused(tmp_path):
    policy = BudgetPolicy(epsilon_per_querier=1.0, epsilon_global=10.0)
    with pytest.raises(ConfigError, match="privacy budget"):
        InferenceMod(load_model, protections=(NAME,), home=tmp_path, budget=policy)


def test_terms_without_consent_are_refused():
    with pytest.raises(ConfigError, match="not agreed"):
        InferenceMod(load_model, encrypted=EncryptedPolicy())
    with pytest.raises(ConfigError, match="not agreed"):
        InferenceMod(load_model, protections=("he",), encrypted=EncryptedPolicy())
