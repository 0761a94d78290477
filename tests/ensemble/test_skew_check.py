"""Order statistics run where sites are alike, and are refused where they are not."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedinfer_flower.ensemble import RULES
from fedinfer_flower.ensemble.auto import pick_rule
from fedinfer_flower.ensemble.skew_check import (
    COUNTS_LIMIT,
    ORDER_STATISTICS,
    label_skew,
    measured_skew,
    require_low_skew,
)
from fedinfer_flower.errors import IncompatibleProtection, ShapeError
from fedinfer_flower.query import CountsKind, SiteProfile

CLASSES = ("a", "b", "c")


def site(counts, kind=CountsKind.COUNTS):
    withheld = kind is CountsKind.WITHHELD
    return SiteProfile(
        name="site",
        classes=CLASSES,
        counts_kind=kind,
        class_counts=None if withheld else tuple(float(n) for n in counts),
    )


ALIKE = [site((50, 50, 40)), site((45, 55, 50)), site((5, 4, 5))]
APART = [site((90, 5, 5)), site((5, 90, 5)), site((5, 5, 90))]


@given(arrays(np.float64, (4, 3), elements=st.floats(0.0, 1e6)), st.permutations(range(4)))
def test_skew_is_a_share_that_depends_on_neither_order_nor_size(counts, order):
    skew = label_skew(counts)

    assert 0.0 <= skew < 1.0
    # Sums of four numbers in [0, 1], in another order.
    assert label_skew(counts[order]) == pytest.approx(skew, abs=1e-12)
    assert label_skew(counts * 4.0) == pytest.approx(skew, abs=1e-9)


def test_skew_of_known_tables():
    assert label_skew(np.eye(4)) == pytest.approx(0.75)
    assert label_skew(np.ones((3, 5))) == pytest.approx(0.0, abs=1e-15)
    assert label_skew(np.array([[1.0, 1.0], [0.0, 0.0]])) == 0.0
    with pytest.raises(ShapeError):
        label_skew(np.array([1.0, 2.0]))


def test_large_site_is_not_its_own_yardstick():
    counts = np.array([[1e6, 0.0], [0.0, 10.0], [0.0, 10.0]])
    assert label_skew(counts) > COUNTS_LIMIT


@pytest.mark.parametrize("rule", sorted(ORDER_STATISTICS))
def test_order_statistic_under_skew_is_refused_unless_asked_for(rule):
    assert require_low_skew(rule, ALIKE, CLASSES) == ""
    with pytest.raises(IncompatibleProtection, match="skew") as refused:
        require_low_skew(rule, APART, CLASSES)
    assert "allow_skew" in refused.value.hint
    assert require_low_skew(rule, APART, CLASSES, allow_skew=True).startswith("WARNING")


def test_presence_and_withheld_counts_are_said_to_show_less():
    bits = [site((1, 1, 1), CountsKind.PRESENCE)] * 3
    assert "presence" in require_low_skew("median", bits, CLASSES)
    assert "hidden" in require_low_skew("median", [site((), CountsKind.WITHHELD)] * 3, CLASSES)
    missing = [site((1, 0, 0), CountsKind.PRESENCE), *bits]
    assert measured_skew(missing, CLASSES)[0] > 0.1
    with pytest.raises(IncompatibleProtection):
        require_low_skew("median", missing, CLASSES)


@pytest.mark.parametrize("rule", sorted(set(RULES.names()) - ORDER_STATISTICS))
def test_other_rules_are_never_refused(rule):
    assert require_low_skew(rule, APART, CLASSES) == ""


@pytest.mark.parametrize("profiles", [ALIKE, APART])
def test_auto_never_picks_an_order_statistic(profiles):
    for protection in ("plain", "secagg", "he", "dp"):
        rule, _ = pick_rule(profiles, protection, "gaussian" if protection == "dp" else None)
        assert rule.name not in ORDER_STATISTICS


def test_median_fails_under_the_skew_that_is_refused():
    # The unprotected form: 7 sites, class c is known to one of them only.
    rng = np.random.default_rng(0)
    labels = np.full(200, 2)
    answers = np.tile([0.5, 0.5, 1e-6], (7, 200, 1)) + rng.random((7, 200, 3)) * 1e-3
    answers[0] = [0.01, 0.01, 0.98]
    answers /= answers.sum(axis=-1, keepdims=True)
    counts = np.array([[1.0, 1.0, 98.0]] + [[50.0, 50.0, 0.0]] * 6)

    median = RULES.get("median")().combine(answers).argmax(axis=1)
    share = (counts / counts.sum(axis=0))[:, np.newaxis] * answers

    assert (median == labels).mean() == 0.0
    assert (share.sum(axis=0).argmax(axis=1) == labels).mean() == 1.0
    with pytest.raises(IncompatibleProtection):
        require_low_skew("median", [site(row) for row in counts[[0, 0, 1, 1]]], CLASSES)
