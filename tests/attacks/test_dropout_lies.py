"""A lie about dropouts opens an answer for a pool, unless there are self-masks."""

from __future__ import annotations

import pytest

from fedinfer_flower.attacks import TargetFederation
from fedinfer_flower.attacks.dropout_lies import DropoutLies
from fedinfer_flower.privacy.plain import Plain
from fedinfer_flower.privacy.secagg import SecAgg


def results(federation, protection):
    attack = DropoutLies()
    return [
        attack.run(evidence, mode=mode)
        for mode, evidence in attack.evidence(federation, protection).items()
    ]


def test_the_coordinator_alone_is_stopped_by_the_querier_mask(federation) -> None:
    alone, _ = results(federation, SecAgg())

    # A uniform mask is left on it: random numbers over the whole ring.
    assert alone.value == 0.0
    assert (alone.verdict, alone.claim) == ("stopped", "kept")


def test_coordinator_and_querier_open_the_answer(federation) -> None:
    _, pool = results(federation, SecAgg())

    # Exact but for the grid: the attack is real.
    assert pool.value > 0.99
    assert pool.claim == "none"


def test_self_masks_stop_both(federation) -> None:
    alone, pool = results(federation, SecAgg(self_mask=True))

    for result in (alone, pool):
        assert result.value == 0.0
        assert (result.verdict, result.claim) == ("stopped", "kept")


def test_a_lie_that_leaves_too_few_sites_is_refused(federation) -> None:
    strict = SecAgg(dropout_share=0.0)

    assert DropoutLies().evidence(federation, strict) == {}


@pytest.mark.parametrize("n_sites", [5, 8])
def test_the_victim_may_have_any_place_in_the_roster(federation, n_sites: int) -> None:
    # Places follow random keys; the sign of a mask depends on them.
    many = TargetFederation(
        sites=(federation.sites * 2)[:n_sites],
        inputs=federation.inputs,
        labels=federation.labels,
        n_classes=10,
    )
    assert all(results(many, SecAgg())[1].value > 0.99 for _ in range(5))


def test_without_masks_there_is_nothing_to_lie_about(federation) -> None:
    assert DropoutLies().evidence(federation, Plain()) == {}
