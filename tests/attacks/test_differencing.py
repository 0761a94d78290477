"""Two exact sums give a site away; noise, or a guard at the other sites, does not."""

from __future__ import annotations

import pytest

from fedinfer_flower.attacks import TargetFederation
from fedinfer_flower.attacks.differencing import Differencing
from fedinfer_flower.privacy.dp import DP
from fedinfer_flower.privacy.he import HomomorphicEncryption
from fedinfer_flower.privacy.plain import Plain
from fedinfer_flower.privacy.secagg import SecAgg
from fedinfer_flower.privacy.secagg_dp import SecAggDP


def results(federation, protection):
    attack = Differencing()
    return [
        attack.run(evidence, mode=mode)
        for mode, evidence in attack.evidence(federation, protection).items()
    ]


@pytest.mark.parametrize("protection", [Plain(), HomomorphicEncryption(), SecAgg()])
def test_exact_sums_give_the_answer_away(federation, protection) -> None:
    bare = results(federation, protection)[0]

    # Exact but for the grid, 2^-16 or finer.
    assert bare.value > 0.99
    assert bare.claim == "none"


@pytest.mark.parametrize("protection", [HomomorphicEncryption(), SecAgg()])
def test_a_cohort_guard_refuses_the_second_cohort(federation, protection) -> None:
    _, guarded = results(federation, protection)

    assert guarded.detail["refused"] == "FI316"
    assert (guarded.verdict, guarded.claim) == ("stopped", "kept")


@pytest.mark.parametrize("protection", [DP(epsilon=1.0), SecAggDP(epsilon=1.0)])
def test_noise_drowns_the_difference(federation, protection) -> None:
    (result,) = results(federation, protection)

    # Noise of 7 and more an entry over 200 entries, where a guess errs by 0.27.
    assert (result.verdict, result.claim) == ("stopped", "kept")


def test_a_cohort_that_is_too_small_without_the_site_is_not_asked(federation) -> None:
    three = TargetFederation(
        sites=federation.sites[:3],
        inputs=federation.inputs,
        labels=federation.labels,
        n_classes=10,
    )

    assert Differencing().evidence(three, SecAgg()) == {}
    assert Differencing().evidence(three, Plain())
