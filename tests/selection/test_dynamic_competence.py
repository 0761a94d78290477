"""Dynamic competence: only sites that can tell, and only rules that listen."""

import pytest

from fedinfer_flower.ensemble import RULES
from fedinfer_flower.ensemble.base import Evidence
from fedinfer_flower.errors import InvalidValueError, SelectionError
from fedinfer_flower.profile import SiteProfile
from fedinfer_flower.selection.base import SelectionNeed, make_selector
from fedinfer_flower.selection.candidate import Candidate

SELECTOR = make_selector("dynamic-competence")


def site(number, *, familiarity=True, classes=("x", "y")):
    profile = SiteProfile(name=f"s{number}", classes=classes, familiarity=familiarity)
    return Candidate(site_id=number, profile=profile)


def need(**limits):
    return SelectionNeed(**({"classes": ("x", "y"), "rule": "open-set"} | limits))


def test_sites_that_cannot_tell_are_left_out_with_the_reason():
    sites = [site(k, familiarity=k % 2 == 0) for k in range(6)]

    found = SELECTOR.select(sites, need())

    assert sorted(found.site_ids) == [0, 2, 4]
    assert set(found.refused) == {1, 3, 5}
    assert all("familiarity" in reason for reason in found.refused.values())
    assert [found.scores[k] for k in (1, 3, 5)] == [0.0, 0.0, 0.0]


def test_sites_that_cover_more_come_first():
    sites = [site(0, classes=("x",)), site(1), site(2, familiarity=False)]

    assert SELECTOR.select(sites, need(at_most=1)).site_ids == (1,)


def test_too_few_sites_that_can_tell_are_refused():
    sites = [site(0), site(1), site(2, familiarity=False)]

    with pytest.raises(SelectionError, match="measure familiarity"):
        SELECTOR.select(sites, need(at_least=3))


@pytest.mark.parametrize("rule", RULES.names())
def test_rule_is_accepted_exactly_if_it_uses_familiarity(rule):
    if Evidence.FAMILIARITY in RULES.get(rule).needs:
        assert SELECTOR.select([site(0)], need(rule=rule)).site_ids == (0,)
        return
    with pytest.raises(InvalidValueError) as caught:
        SELECTOR.select([site(0)], need(rule=rule))
    assert "open-set-class-share" in str(caught.value.hint)


def test_auto_is_accepted_unless_noise_may_make_it_a_vote():
    assert SELECTOR.select([site(0)], need(rule="auto", protection="secagg")).site_ids == (0,)
    for protection in ("dp", "secagg+dp", "he+dp"):
        with pytest.raises(InvalidValueError):
            SELECTOR.select([site(0)], need(rule="auto", protection=protection))
