"""Every registered rule passes the public checks; a new rule is tested by existing."""

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedinfer_flower.ensemble import RULES, make_rule
from fedinfer_flower.ensemble.checks import CHECKS, check_rule, check_score, check_sensitivity
from fedinfer_flower.ensemble.example_sites import example_sites

SEED = 20260302

# Options away from the defaults, where a bound could be wrong only there.
VARIANTS = [
    ("competence-vote", {"floor": 1.0}),
    ("consensus", {"beta": 100.0}),
    ("entropy-weighted", {"cap": 0.3}),
    ("geometric-median", {"iterations": 1, "smoothing": 1.0}),
    ("hybrid", {"beta": 0.0}),
    ("mean-logit", {"clip": 1.0}),
    ("prior-corrected-class-share", {"prior_floor": 1e-6}),
    ("product-of-experts", {"epsilon": 1e-6}),
    ("trimmed-mean", {"trim": 0}),
    ("tta-cosine", {"gamma": -4.0}),
    ("tta-js", {"gamma": 4.0, "top": 1}),
    ("tta-kl", {"max_instability": 0.5}),
    ("tta-l2", {"gamma": 4.0, "max_instability": 4.0}),
]

finite = st.floats(allow_nan=False, allow_infinity=False)
ordinary = st.floats(min_value=-30.0, max_value=30.0)
# Deterministic; each example builds small arrays, so the deadline would measure the machine.
thorough = settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def logits_of_two_sites(draw, elements):
    """Two answers and their augmented copies: shape (2, 3, n_queries, n_classes)."""
    shape = (2, 3, 2, draw(st.sampled_from([1, 2, 3, 6])))
    return draw(arrays(np.float64, shape, elements=elements))


def sites_of(drawn):
    sites = example_sites(np.random.default_rng(SEED), np.zeros_like(drawn[:, 0]))
    return [dataclasses.replace(s, augmented_tbc=d[1:]) for s, d in zip(sites, drawn, strict=True)]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", RULES.names())
def test_rule_at_default_options_passes_check(name, check):
    check(make_rule(name), SEED)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_rule_at_other_options_passes_all_checks(name, options):
    check_rule(RULES.get(name), options, seed=SEED)


@pytest.mark.parametrize("name", RULES.names())
@thorough
@given(drawn=st.one_of(logits_of_two_sites(finite), logits_of_two_sites(ordinary)))
def test_rule_for_any_finite_logits_keeps_its_bounds(name, drawn):
    rule, sites = make_rule(name), sites_of(drawn)

    for logits, site in zip(drawn[:, 0], sites, strict=True):
        check_score(rule, logits, site)

    check_sensitivity(rule, (drawn[0, 0], drawn[1, 0]), sites)


@pytest.mark.parametrize("name", RULES.names())
@thorough
@given(drawn=logits_of_two_sites(finite))
def test_rule_for_any_finite_logits_decides(name, drawn):
    rule = make_rule(name)
    n_classes = drawn.shape[-1]
    scores = [rule.score(z, s) for z, s in zip(drawn[:, 0], sites_of(drawn), strict=True)]

    total = rule.combine(np.stack(scores))
    prediction = rule.decide(total, 2, tuple(f"class-{c}" for c in range(n_classes)))

    # Sums of at most six floats of size one.
    assert np.allclose(prediction.probabilities.sum(axis=1), 1.0, rtol=0.0, atol=1e-12)
    assert (prediction.probabilities >= 0.0).all()
