"""Thin evidence is drawn towards zero, by as much as it is thin."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedinfer_flower.errors import InvalidValueError, ShapeError
from fedinfer_flower.incentives import AuditedAnswers, make_scheme
from fedinfer_flower.incentives.shrinkage import posterior_mean, row_sum_variances, shrink

thorough = settings(max_examples=50, derandomize=True, deadline=None)
values = arrays(np.float64, 4, elements=st.floats(-10, 10))
counts = arrays(np.int64, 4, elements=st.integers(0, 10_000))


@thorough
@given(values=values, n_audits=counts, prior=st.floats(0, 1000))
def test_shrunk_values_keep_their_sign_and_lose_size(values, n_audits, prior):
    shrunk = shrink(values, n_audits, prior_audits=prior)

    assert (np.abs(shrunk) <= np.abs(values)).all()
    assert (shrunk * values >= 0).all()
    assert (shrunk[n_audits == 0] == 0).all()


def test_more_audits_shrink_less():
    shrunk = shrink(np.ones(3), np.array([10, 100, 1000]), prior_audits=100)

    assert shrunk.tolist() == pytest.approx([10 / 110, 0.5, 1000 / 1100])
    assert shrink(np.array([0.3]), 10, prior_audits=0.0).tolist() == [0.3]


@thorough
@given(values=values, variance=st.floats(0, 100))
def test_posterior_mean_lies_between_zero_and_what_was_seen(values, variance):
    shrunk = posterior_mean(values, variance)

    assert (np.abs(shrunk) <= np.abs(values)).all()
    assert np.isfinite(shrunk).all()


def test_posterior_mean_is_nearer_the_truth_than_what_was_seen():
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 0.5, 2000)
    noise = rng.uniform(0.1, 1.0, 2000)
    seen = truth + noise * rng.normal(size=2000)

    shrunk = posterior_mean(seen, noise**2)

    # Mean squared errors near 0.13 and 0.37: 2000 draws leave no doubt.
    assert np.square(shrunk - truth).mean() < 0.5 * np.square(seen - truth).mean()


def test_nothing_is_left_of_values_that_are_all_noise():
    assert posterior_mean(np.array([0.1, -0.1]), 1.0).tolist() == [0.0, 0.0]
    assert posterior_mean(np.array([0.5]), 0.0, prior_variance=1.0).tolist() == [0.5]


def test_variance_of_a_row_sum_is_what_fresh_audits_show():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, (400, 100))
    logits = (
        rng.normal(size=(400, 2, 100, 3))
        + np.array([2.0, 0.5])[:, None, None] * np.eye(3)[labels][:, None]
    )
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    scheme = make_scheme("linear-ca")
    runs = [AuditedAnswers(probabilities_ktc=x, labels=y) for x, y in zip(p, labels, strict=True)]

    guessed = np.mean([row_sum_variances(run, scheme) for run in runs], axis=0)
    seen = np.var([scheme.contributions(run) for run in runs], axis=0, ddof=1)

    # A variance of 400 runs has a standard error of 7 %.
    assert np.allclose(guessed, seen, rtol=0.35)


@pytest.mark.parametrize(
    "call",
    [
        lambda: shrink(np.ones(2), -1),
        lambda: shrink(np.ones(2), 1, prior_audits=-1.0),
        lambda: posterior_mean(np.ones(2), -1.0),
        lambda: posterior_mean(np.ones(2), np.nan),
    ],
)
def test_impossible_counts_and_variances_are_refused(call):
    with pytest.raises(InvalidValueError):
        call()


def test_one_audit_has_no_variance():
    answers = AuditedAnswers(probabilities_ktc=np.ones((2, 1, 1)), labels=np.array([0]))

    with pytest.raises(ShapeError):
        row_sum_variances(answers, make_scheme("linear-ca"))
