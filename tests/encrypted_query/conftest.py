from __future__ import annotations

import numpy as np
import pytest

from fedinfer_flower.encrypted_query.ckks_batch import PublicKeys, SecretKeys
from fedinfer_flower.encrypted_query.plans import HIDDEN_LAYER, LINEAR, Plan
from fedinfer_flower.encrypted_query.quadratic import QuadraticForm


@pytest.fixture(scope="session")
def keys() -> dict[Plan, SecretKeys]:
    return {plan: SecretKeys(plan) for plan in (LINEAR, HIDDEN_LAYER)}


@pytest.fixture(scope="session")
def public(keys) -> dict[Plan, PublicKeys]:
    return {plan: PublicKeys(plan, held.public_key) for plan, held in keys.items()}


@pytest.fixture
def make_form():
    def build(n_features=4, n_hidden=3, n_classes=2, seed=0, *, linear_part=True):
        rng = np.random.default_rng(seed)
        return QuadraticForm(
            hidden_weights=rng.normal(size=(n_features, n_hidden)),
            hidden_bias=rng.normal(size=n_hidden),
            square_weights=rng.normal(size=(n_hidden, n_classes)),
            linear_weights=linear_part * rng.normal(size=(n_features, n_classes)),
            offset=rng.normal(size=n_classes),
        )

    return build
