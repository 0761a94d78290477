"""Local halves of rules against their formulas, where no golden vector covers them."""

import dataclasses
import math

import numpy as np
import pytest

from fedinfer_flower.ensemble import SiteContext, make_rule
from fedinfer_flower.ensemble.base import log_softmax, softmax
from fedinfer_flower.errors import InvalidValueError, ShapeError

PRESENT = np.ones(3, dtype=np.bool_)
PROBABILITIES = np.array([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]])
LOGITS = np.log(PROBABILITIES)

# Logarithms and exponentials of numbers of size one, undone.
TOLERANCE = 1e-12


def near(value, expected):
    np.testing.assert_allclose(value, expected, rtol=0.0, atol=TOLERANCE)


def test_log_softmax_of_huge_logits_is_finite_without_warning():
    assert np.isfinite(log_softmax(np.array([[1e308, -1e308]]))).all()


def test_softmax_of_any_row_sums_to_one_above_the_floor():
    rows = softmax(np.array([[1e308, -1e308, 0.0], [5e-324, 0.0, -0.0]]))

    near(rows.sum(axis=1), 1.0)
    assert rows.min() > 9e-7


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("entropy-weighted", lambda p: math.exp(sum(x * math.log(x) for x in p))),
        ("confidence-weighted", lambda p: max(p) - 1 / 3),
        ("margin-weighted", lambda p: sorted(p)[-1] - sorted(p)[-2]),
    ],
)
def test_weighted_rule_sends_weighted_probabilities_and_weight(name, weight):
    score = make_rule(name).score(LOGITS, SiteContext(present=PRESENT))

    for row, p in zip(score, PROBABILITIES, strict=True):
        near(row, [*(weight(p) * p), weight(p)])


def test_weighted_rule_where_nobody_weighs_anything_abstains():
    rule = make_rule("margin-weighted")
    hesitant = np.log(np.array([[0.45, 0.45, 0.1]]))

    score = rule.score(hesitant, SiteContext(present=PRESENT))
    prediction = rule.decide(3 * score, 3, ("a", "b", "c"))

    assert prediction.abstained.all()
    near(prediction.probabilities, 1 / 3)


def test_entropy_weighted_with_cap_limits_the_gain_of_overconfidence():
    rule = make_rule("entropy-weighted", {"cap": 0.5})
    sure = np.array([[40.0, 0.0, 0.0]])

    certain = rule.score(sure, SiteContext(present=PRESENT))[0, -1]
    ignorant = rule.score(np.zeros((1, 3)), SiteContext(present=PRESENT))[0, -1]

    assert certain == 0.5
    assert certain / ignorant == pytest.approx(0.5 * 3, abs=TOLERANCE)


@pytest.mark.parametrize("noise", [-0.5, -1e-15, 0.0])
def test_weighted_rule_with_noise_beyond_its_weight_still_ranks_by_numerator(noise):
    total = np.array([[0.1, 0.4, 0.2, noise]])

    prediction = make_rule("entropy-weighted").decide(total, 2, ("a", "b", "c"))

    assert prediction.labels.tolist() == [1]


def test_mean_logit_beyond_clip_cuts_from_below_only():
    score = make_rule("mean-logit", {"clip": 4.0}).score(
        np.array([[100.0, 99.0, -1e6]]), SiteContext(present=PRESENT)
    )

    near(score, [[5 / 3, 2 / 3, -7 / 3]])


def test_product_of_experts_multiplies_floored_probabilities():
    rule = make_rule("product-of-experts", {"epsilon": 0.15})
    site = SiteContext(present=PRESENT)

    total = rule.combine(np.stack([rule.score(LOGITS, site)] * 2))

    product = np.maximum(PROBABILITIES, 0.15) ** 2
    near(rule.probabilities(total, 2), product / product.sum(axis=1, keepdims=True))


def test_class_share_with_presence_bits_averages_over_those_who_know():
    site = SiteContext(
        present=PRESENT,
        class_counts=np.array([1.0, 0.0, 1.0]),
        class_totals=np.array([4.0, 2.0, 1.0]),
    )

    score = make_rule("class-share").score(LOGITS, site)

    near(score, PROBABILITIES * [0.25, 0.0, 1.0])


def test_prior_corrected_class_share_undoes_base_rates():
    counts = np.array([80.0, 20.0, 0.0])
    site = SiteContext(present=PRESENT, class_counts=counts, class_totals=2 * counts)

    score = make_rule("prior-corrected-class-share").score(LOGITS, site)

    for row, p in zip(score, PROBABILITIES, strict=True):
        corrected = p / [0.8, 0.2, 0.02]
        near(row, [0.5, 0.5, 0.0] * corrected / corrected.sum())


def test_competence_vote_reads_the_vote_through_the_confusion():
    confusion = np.array([[0.8, 0.2, 0.0], [0.3, 0.6, 0.1], [1 / 3, 1 / 3, 1 / 3]])
    site = SiteContext(present=PRESENT, confusion=confusion)

    score = make_rule("competence-vote", {"floor": 0.03}).score(LOGITS, site)

    near(np.exp(score), [[0.8, 0.3, 1 / 3], [0.01, 0.1, 1 / 3]])


def test_competence_vote_of_tied_logits_counts_both_in_equal_parts():
    confusion = np.array([[0.8, 0.2], [0.1, 0.9]])
    site = SiteContext(present=PRESENT[:2], confusion=confusion)

    score = make_rule("competence-vote").score(np.zeros((1, 2)), site)

    near(score, np.log(confusion).mean(axis=1)[np.newaxis])


@pytest.mark.parametrize(
    ("name", "lacking"),
    [
        ("class-share", "class_counts"),
        ("prior-corrected-class-share", "class_totals"),
        ("competence-vote", "confusion"),
        ("tta-soft", "augmented_tbc"),
        ("tta-js", "augmented_tbc"),
    ],
)
def test_rule_without_its_evidence_names_what_to_do(name, lacking):
    full = SiteContext(
        present=PRESENT, class_counts=np.ones(3), class_totals=np.ones(3), confusion=np.eye(3)
    )

    with pytest.raises(InvalidValueError, match="fix:"):
        make_rule(name).score(LOGITS, dataclasses.replace(full, **{lacking: None}))


@pytest.mark.parametrize(
    ("name", "evidence"),
    [
        ("competence-vote", {"confusion": np.eye(2)}),
        ("tta-soft", {"augmented_tbc": np.zeros((1, 2, 2))}),
        ("tta-kl", {"augmented_tbc": np.zeros((1, 1, 3))}),
    ],
)
def test_rule_with_evidence_of_another_shape_is_refused(name, evidence):
    with pytest.raises(ShapeError):
        make_rule(name).score(LOGITS, SiteContext(present=PRESENT, **evidence))


def test_tta_with_classes_tied_for_the_last_place_compares_them_all():
    # Two classes are compared; the second place is tied, and only one of the tied moves.
    logits = np.array([[3.0, 1.0, 1.0]])
    site = SiteContext(present=PRESENT, augmented_tbc=np.array([[[3.0, 1.0, 2.5]]]))
    swapped = SiteContext(present=PRESENT, augmented_tbc=np.array([[[3.0, 2.5, 1.0]]]))
    rule = make_rule("tta-l2", {"top": 2})

    weights = [rule.score(logits, s)[0, -1] for s in (site, swapped)]

    near(weights, math.exp(1.5))


def test_tta_ignores_classes_that_the_site_does_not_know():
    logits = np.array([[1.0, 0.0, -13.8]])
    copies = np.array([[[1.0, 0.0, 100.0]]])
    site = SiteContext(present=np.array([True, True, False]), augmented_tbc=copies)

    near(make_rule("tta-l2").score(logits, site)[0, -1], 1.0)


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("tta-l2", math.exp(4)),
        ("tta-kl", math.exp(4)),
        ("tta-cosine", math.exp(2)),
        ("tta-js", 2.0),
    ],
)
def test_tta_of_an_upset_model_reaches_its_bound_and_no_more(name, bound):
    logits = np.array([[60.0, -60.0]])
    site = SiteContext(present=PRESENT[:2], augmented_tbc=-logits[np.newaxis])
    rule = make_rule(name)

    weight = rule.score(logits, site)[0, -1]

    assert rule.score_bound(2) == pytest.approx(bound, rel=TOLERANCE)
    # The probability floor keeps the Jensen-Shannon divergence a little below log 2.
    assert bound * (1 - 1e-4) < weight <= rule.score_bound(2)


def test_tta_with_negative_gamma_weighs_unstable_models_less():
    logits = np.array([[1.0, 0.0]])
    weights = []
    for moved in (0.0, 1.0):
        site = SiteContext(present=PRESENT[:2], augmented_tbc=logits[np.newaxis] * (1 - moved))
        weights.append(make_rule("tta-l2", {"gamma": -1.0}).score(logits, site)[0, -1])

    near(weights, [1.0, math.exp(-1.0)])


def test_sensitivity_of_opposite_certain_answers_is_nearly_reached():
    # The stated numbers are not only bounds: noise in proportion to them is needed.
    certain = np.array([[40.0, -40.0]])
    site = SiteContext(present=PRESENT[:2])
    for name in ("majority-vote", "mean-probability", "entropy-weighted", "borda", "mean-logit"):
        rule = make_rule(name)
        moved = np.linalg.norm(rule.score(certain, site) - rule.score(-certain, site))
        assert moved >= 0.999 * rule.sensitivity_l2(2), name
