"""Learned rules with trained parameters: bounds, sensitivities, order of sites, label space.

The public checks of every rule run on the untrained form (`tests/contract`). Trained
parameters belong to classes and sites, so renaming those is meant to change the answer.
"""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedinfer_flower.clients.stack_training import stack_logits
from fedinfer_flower.ensemble import Disclosure, SiteContext, make_rule
from fedinfer_flower.ensemble.checks import check_score, check_sensitivity
from fedinfer_flower.ensemble.example_sites import HARD_ROWS
from fedinfer_flower.ensemble.fitted import remember
from fedinfer_flower.ensemble.stack_rule import exact_probabilities
from fedinfer_flower.ensemble.stack_shapes import KINDS
from fedinfer_flower.errors import (
    BindingError,
    IncompatibleProtection,
    InvalidValueError,
    LabelSpaceError,
)
from fedinfer_flower.privacy.base import make_protection
from fedinfer_flower.privacy.legality import require_legal

from .conftest import key_id, made_up

N_SITES, N_CLASSES = 4, 3
CLASSES = tuple(f"class-{c}" for c in range(N_CLASSES))
finite = st.floats(allow_nan=False, allow_infinity=False)


def trained(kind, **options):
    fitted = made_up(kind, n_sites=N_SITES, n_classes=N_CLASSES, **options)
    return make_rule(kind, {"stack": remember(fitted)}), fitted


def site(k):
    return SiteContext(present=np.ones(N_CLASSES, np.bool_), key_id=key_id(k))


def scores_of(rule, logits_kbc):
    return np.stack([rule.score(z, site(k)) for k, z in enumerate(logits_kbc)])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(pair=arrays(np.float64, (2, 4, N_CLASSES), elements=finite), k=st.integers(0, N_SITES - 1))
def test_scores_of_any_logits_keep_bound_and_sensitivity(kind, pair, k):
    rule, _ = trained(kind, seed=k)
    check_score(rule, pair[0], site(k))
    check_sensitivity(rule, (pair[0], pair[1]), [site(k), site(k)])


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_hard_logits_keep_the_bound(kind):
    rule, _ = trained(kind)
    check_score(rule, HARD_ROWS, site(2))


@pytest.mark.parametrize("kind", KINDS)
def test_sensitivity_is_at_most_the_box_and_at_least_what_sure_answers_move(kind):
    rule, _ = trained(kind, seed=5)
    sure = 1e3 * np.eye(N_CLASSES)
    moved = max(
        np.linalg.norm(s[:, np.newaxis] - s, axis=-1).max()
        for s in (rule.score(sure, site(k)) for k in range(N_SITES))
    )
    box = 2.0 * rule.score_bound(N_CLASSES) * np.sqrt(rule.score_width(N_CLASSES))
    assert moved <= rule.sensitivity_l2(N_CLASSES) <= box


def test_bounds_of_a_linear_stack_are_tight():
    rule, fitted = trained("linear-stack", seed=5)
    scores = scores_of(rule, np.tile(1e3 * np.eye(N_CLASSES), (N_SITES, 1, 1)))
    # A sure answer is the floor of 1e-6 away from a corner of the simplex.
    assert np.abs(scores).max() == pytest.approx(rule.score_bound(N_CLASSES), rel=1e-4)
    assert np.abs(fitted.arrays["weights_kcc"]).max() > 1.0  # the bound is not the default's


@pytest.mark.parametrize("kind", KINDS)
def test_order_of_the_scores_does_not_matter(kind):
    rule, _ = trained(kind)
    logits = np.random.default_rng(3).normal(0.0, 3.0, (N_SITES, 7, N_CLASSES))
    scores = scores_of(rule, logits)
    # Sums of four float64 of size one.
    assert np.allclose(rule.combine(scores), rule.combine(scores[::-1]), rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_rule_decides_what_was_trained(kind):
    rule, fitted = trained(kind)
    logits = np.random.default_rng(4).normal(0.0, 3.0, (N_SITES, 9, N_CLASSES))
    answers = np.stack([exact_probabilities(z) for z in logits])

    prediction = rule.decide(rule.combine(scores_of(rule, logits)), N_SITES, CLASSES)

    wanted = stack_logits(kind, fitted.arrays, answers)
    wanted = np.exp(wanted - wanted.max(axis=1, keepdims=True))
    wanted /= wanted.sum(axis=1, keepdims=True)
    # Both are float64; tanh, exp and sums of tens differ in the last digits.
    assert np.allclose(prediction.probabilities, wanted, rtol=0.0, atol=1e-10)
    assert (prediction.labels == wanted.argmax(axis=1)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_noisy_sums_give_finite_probabilities(kind):
    rule, _ = trained(kind)
    rng = np.random.default_rng(0)
    for size in (1.0, 1e3):
        total = size * rng.standard_normal((50, rule.score_width(N_CLASSES)))
        rows = rule.decide(total, N_SITES, CLASSES).probabilities
        assert np.isfinite(rows).all()
        assert np.allclose(rows.sum(axis=1), 1.0, rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("kind", ["linear-stack", "gated-mixture", "mlp-stack"])
def test_site_outside_the_roster_is_refused(kind):
    rule, _ = trained(kind)
    stranger = dataclasses.replace(site(0), key_id="f" * 64)
    with pytest.raises(BindingError, match="not one of those"):
        rule.score(np.zeros((1, N_CLASSES)), stranger)


def test_deep_set_takes_a_site_that_was_not_trained_with():
    rule, _ = trained("deep-set")
    stranger = dataclasses.replace(site(0), key_id="f" * 64)
    logits = np.zeros((1, N_CLASSES))
    assert np.array_equal(rule.score(logits, stranger), rule.score(logits, site(0)))


@pytest.mark.parametrize("kind", KINDS)
def test_other_label_space_is_refused(kind):
    rule, _ = trained(kind)
    with pytest.raises(LabelSpaceError, match="2"):
        rule.score(np.zeros((1, 2)), site(0))
    total = np.zeros((1, rule.score_width(N_CLASSES)))
    with pytest.raises(LabelSpaceError, match="in its order"):
        rule.decide(total, N_SITES, CLASSES[::-1])


def test_aggregator_of_another_kind_is_refused_when_built():
    digest = remember(made_up("linear-stack"))
    with pytest.raises(InvalidValueError, match="is a linear-stack, not a gated-mixture"):
        make_rule("gated-mixture", {"stack": digest})


def test_unknown_aggregator_is_refused_when_built():
    with pytest.raises(InvalidValueError, match="no fitted aggregator"):
        make_rule("linear-stack", {"stack": "0" * 64})


@pytest.mark.parametrize("kind", KINDS)
def test_legality_follows_what_is_disclosed(kind):
    rule, _ = trained(kind)
    require_legal(rule, make_protection("plain"))
    if rule.discloses is Disclosure.SUM:
        require_legal(rule, make_protection("secagg"))
        require_legal(rule, make_protection("he"))
    else:
        with pytest.raises(IncompatibleProtection):
            require_legal(rule, make_protection("secagg"))


def test_sum_of_mlp_scores_is_every_answer():
    """Why it is declared SCORES though its scores only need adding."""
    rule, _ = trained("mlp-stack")
    logits = np.random.default_rng(1).normal(size=(N_SITES, 5, N_CLASSES))
    total = rule.combine(scores_of(rule, logits))
    blocks = total.reshape(5, N_SITES, N_CLASSES).transpose(1, 0, 2)
    assert np.array_equal(blocks, np.stack([exact_probabilities(z) for z in logits]))
    assert rule.discloses is Disclosure.SCORES
