"""Sites that are slower than the others, once there are enough answers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedinfer_flower import Deadline, FedEnsemble
from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.query import SiteStatus
from fedinfer_flower.strategies.stragglers import Stragglers

SLOW_S = 1.5


def strategy(protection: str, **deadline) -> FedEnsemble:
    return FedEnsemble(
        rule="mean-probability",
        protection=protection,
        min_available_nodes=5,
        deadline=Deadline(timeout_s=30.0, **deadline),
    )


@pytest.mark.parametrize("straggler_s", [-0.1, math.nan, math.inf])
def test_straggler_s_is_a_number_of_seconds(straggler_s):
    with pytest.raises(InvalidValueError, match="straggler_s"):
        Deadline(straggler_s=straggler_s)


@pytest.mark.parametrize("protection", ["plain", "secagg"])
def test_the_rest_is_not_waited_for_once_the_quorum_has_answered(federation, protection):
    slow = 1004

    with federation.grid(workers=5, latency_s=lambda n: SLOW_S if n == slow else 0.0) as grid:
        asked = strategy(protection, quorum=4, straggler_s=0.05)
        # Its profile is waited for: only then is it known to be there.
        _, _, result = federation.ask(asked, grid)

    (report,) = result.reports
    late = [s.site_id for s in report.sites if s.status is SiteStatus.LATE]
    assert late == [slow]
    assert result.degraded
    assert report.seconds < SLOW_S
    assert len(report.answered) == 4


def test_without_it_all_are_waited_for(federation):
    with federation.grid(workers=5, latency_s=lambda n: 0.3 if n == 1004 else 0.0) as grid:
        _, _, result = federation.ask(strategy("plain", quorum=1), grid)
    assert not result.degraded


def test_masks_need_their_own_least_number_whatever_the_quorum(federation):
    with federation.grid(workers=5, latency_s=lambda n: 0.3 if n >= 1002 else 0.0) as grid:
        totals, _, result = federation.ask(strategy("secagg", quorum=1, straggler_s=0.001), grid)
    # Two answered at once; a sum of two may not be opened.
    assert len(result.reports[0].answered) >= 3
    assert np.isfinite(totals).all()


def test_wait_never_passes_the_deadline():
    rest = Stragglers(Deadline(timeout_s=1.0, straggler_s=5.0), least=1, timeout_s=1.0)
    rest.note(1, 0.5)
    assert rest.ends_s() == 1.0
