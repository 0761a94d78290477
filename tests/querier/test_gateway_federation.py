"""`Gateway` and a whole gateway: HTTP, core, strategies, three sites, all in this process."""

from __future__ import annotations

import numpy as np
import pytest

from fedinfer_flower.querier.federated_classifier import FederatedClassifier
from fedinfer_flower.querier.gateway_client import Gateway
from fedinfer_flower.serving.config import GatewayConfig
from fedinfer_flower.serving.core import GatewayCore
from fedinfer_flower.serving.http_app import create_app
from fedinfer_flower.serving.key_store import KeyStore
from fedinfer_flower.wire.identity import Identity

from .conftest import LABELS, ROWS, Server, TestBoard


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    folder = tmp_path_factory.mktemp("core")
    (folder / "gateway-state").mkdir(mode=0o700)
    config = GatewayConfig.from_mapping(
        {
            "models": {
                "triage": {"protection": "secagg", "min-sites": 3, "quorum": 3},
                "plain": {"protection": "plain", "min-sites": 3, "quorum": 3},
            }
        },
        folder=folder,
    )
    grid = TestBoard().grid
    core = GatewayCore(config, grid, run_id=grid.run_id, identity=Identity.generate())
    core.start()
    store = KeyStore(folder / "keys.db")
    key = store.create("tests", scopes=["query", "sealed", "status"])
    server = Server(create_app(core, config, keys=store))
    with Gateway(server.url, api_key=key, timeout_s=30.0) as found:
        yield found
    server.stop()
    core.drain(2.0)
    core.close()
    store.close()


@pytest.mark.parametrize("model", ["triage", "plain"])
@pytest.mark.parametrize("seal", [True, False], ids=["sealed", "clear"])
def test_answer_of_a_whole_gateway_is_the_sites(gateway, model, seal):
    answer = gateway.ask(ROWS, model=model, seal=seal)
    assert answer.prediction.labels.tolist() == LABELS.tolist()
    assert answer.provenance["sites_answered"] == 3
    if seal:
        assert answer.checks is not None
        assert answer.checks.ok


def test_classifier_over_a_whole_gateway_predicts(gateway):
    classifier = FederatedClassifier(gateway, model="triage").fit(ROWS, LABELS)
    assert np.array_equal(classifier.predict(ROWS), LABELS)
