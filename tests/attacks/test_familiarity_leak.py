"""Familiarity gives unusual records away, alone and in a sum; noise hides them."""

from __future__ import annotations

import numpy as np
import pytest

from fedinfer_flower.attacks import TargetFederation
from fedinfer_flower.attacks.familiarity import FamiliarityLeak, unusual_records
from fedinfer_flower.privacy.dp import DP
from fedinfer_flower.privacy.plain import Plain
from fedinfer_flower.privacy.secagg import SecAgg
from fedinfer_flower.privacy.secagg_dp import SecAggDP


def result_of(federation, protection):
    attack = FamiliarityLeak()
    (evidence,) = attack.evidence(federation, protection).values()
    return attack.run(evidence)


@pytest.mark.parametrize("protection", [Plain(), SecAgg()])
def test_unusual_records_are_found_in_exact_scores(federation, protection) -> None:
    result = result_of(federation, protection)

    # Lengths are 1 or nearly 0: nothing statistical about it.
    assert result.value == 1.0
    assert result.claim == "none"


@pytest.mark.parametrize("protection", [DP(epsilon=1.0), SecAggDP(epsilon=1.0)])
def test_noise_hides_them(federation, protection) -> None:
    result = result_of(federation, protection)

    # The limit is a binomial bound at 1e-4 for the bound of dp.
    assert result.claim == "kept"
    # A length has noise of 17 where 1 is to be seen.
    assert not result.succeeded


def test_unusual_records_resemble_nothing(federation) -> None:
    records = unusual_records(federation.inputs, count=50, seed=1)
    others = np.concatenate([federation.inputs, records])

    distances = np.linalg.norm(records[:, None] - others[None], axis=-1)
    distances[np.arange(50), len(federation.inputs) + np.arange(50)] = np.inf
    own = np.linalg.norm(federation.inputs[:200, None] - federation.inputs[None], axis=-1)
    own[np.arange(200), np.arange(200)] = np.inf

    # No planted record has another one, or a real one, as near as real ones have each other.
    assert distances.min() > np.quantile(own.min(axis=1), 0.9)


def test_sites_without_their_rows_cannot_be_audited(federation) -> None:
    bare = TargetFederation(
        sites=federation.sites,
        inputs=federation.inputs,
        labels=federation.labels,
        n_classes=10,
    )
    assert FamiliarityLeak().evidence(bare, Plain()) == {}
