"""Why a query failed, as its caller is told."""

from __future__ import annotations

import pytest

from fedinfer_flower.errors import PolicyRefusedError, QuorumNotMetError, SiteFailedError
from fedinfer_flower.query import SiteId, SiteOutcome, SiteStatus
from fedinfer_flower.serving.asking import cause_of

TOO_FEW = QuorumNotMetError("1 of 3 sites answered, 2 are needed")


def outcomes(*codes):
    return [
        SiteOutcome(
            site_id=SiteId(i),
            name=f"site-{i}",
            status=SiteStatus.FAILED if code else SiteStatus.ANSWERED,
            error_code=code,
            error="37 rows are left" if code else "",
        )
        for i, code in enumerate(codes)
    ]


def test_policies_that_kept_the_quorum_away_are_the_cause():
    cause = cause_of(TOO_FEW, outcomes("", "FI322", "FI322"))
    assert isinstance(cause, PolicyRefusedError)
    assert cause.message == "2 of 3 sites refused the query by their policies (site-1, site-2)"
    # What a site says of its limits is for who may see the gateway's status.
    assert "37" not in str(cause)


@pytest.mark.parametrize(
    ("error", "codes"),
    [
        (TOO_FEW, ("", "FI322", "FI401")),
        (TOO_FEW, ("", "", "")),
        (TOO_FEW, ()),
        (SiteFailedError("crashed"), ("FI322", "FI322")),
    ],
    ids=["another-reason-too", "nobody-refused", "nobody-asked", "another-error"],
)
def test_other_causes_stay_what_they_are(error, codes):
    assert cause_of(error, outcomes(*codes)) is error
