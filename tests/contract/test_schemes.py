"""Every registered scheme passes the same checks; a new scheme is tested by existing."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedinfer_flower.errors import InvalidValueError, UnknownNameError
from fedinfer_flower.incentives import (
    SCHEMES,
    AuditedAnswers,
    LinearScheme,
    PublicFacts,
    Sight,
    make_scheme,
)

SEED = 20260302

# Draw at random: equal only up to their sampling error, which their own tests bound.
DRAWN = {"shapley-sampled", "banzhaf-coalitions"}
EXACT = [name for name in SCHEMES.names() if name not in DRAWN]
LINEAR = [name for name in SCHEMES.names() if issubclass(SCHEMES.get(name), LinearScheme)]
thorough = settings(max_examples=20, derandomize=True, deadline=None)

# Sums of at most a thousand floats of size one, in another order.
ROUNDING = 1e-9


def answers_of(seed, *, n_sites=5, n_queries=40, n_classes=3, skill=2.0, **given_values):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_classes, n_queries)
    logits = rng.normal(size=(n_sites, n_queries, n_classes))
    skills = np.linspace(0.0, skill, n_sites)
    logits += skills[:, None, None] * np.eye(n_classes)[labels]
    p = np.exp(logits)
    p /= p.sum(axis=-1, keepdims=True)
    return AuditedAnswers(probabilities_ktc=p, **{"labels": labels, **given_values})


@pytest.mark.parametrize("name", SCHEMES.names())
def test_scheme_gives_one_finite_score_a_site(name):
    for seed in range(3):
        values = make_scheme(name).contributions(answers_of(seed))

        assert values.shape == (5,)
        assert values.dtype == np.float64
        assert np.isfinite(values).all()


@pytest.mark.parametrize("name", SCHEMES.names())
@pytest.mark.parametrize("owners", [None, ("a",) * 5, ("a", "b", "a", "c", "c")])
def test_scheme_takes_owners_and_answers_without_labels_where_it_may(name, owners):
    scheme = make_scheme(name)
    labels = {} if scheme.needs_labels else {"labels": None}

    values = scheme.contributions(answers_of(1, owners=owners, **labels))

    assert np.isfinite(values).all()


@pytest.mark.parametrize("name", SCHEMES.names())
def test_scheme_scores_sure_answers_and_one_site_alone(name):
    sure = np.eye(3)[np.arange(24) % 3][None]

    values = make_scheme(name).contributions(
        AuditedAnswers(probabilities_ktc=sure, labels=np.arange(24) % 3)
    )

    assert np.isfinite(values).all()


@pytest.mark.parametrize("name", SCHEMES.names())
def test_scheme_is_the_same_every_time_and_leaves_answers_alone(name):
    answers = answers_of(2)
    before = answers.probabilities_ktc.copy()

    first = make_scheme(name).contributions(answers)
    second = make_scheme(name).contributions(answers)

    assert np.array_equal(first, second)
    assert np.array_equal(before, answers.probabilities_ktc)


@pytest.mark.parametrize("name", EXACT)
@thorough
@given(seed=st.integers(0, 10_000), order=st.permutations(range(5)))
def test_scheme_does_not_care_for_the_order_of_sites(name, seed, order):
    answers = answers_of(seed)
    shuffled = dataclasses.replace(answers, probabilities_ktc=answers.probabilities_ktc[order])
    scheme = make_scheme(name)

    assert np.allclose(
        scheme.contributions(shuffled), scheme.contributions(answers)[order], atol=ROUNDING
    )


@pytest.mark.parametrize("name", EXACT)
@thorough
@given(seed=st.integers(0, 10_000))
def test_scheme_gives_equal_answers_equal_scores(name, seed):
    answers = answers_of(seed)
    p = answers.probabilities_ktc.copy()
    p[3] = p[1]

    values = make_scheme(name).contributions(dataclasses.replace(answers, probabilities_ktc=p))

    assert values[1] == pytest.approx(values[3], abs=ROUNDING)


@pytest.mark.parametrize("name", [n for n in SCHEMES.names() if n not in {"equal", "dmi"}])
def test_scheme_ranks_a_good_site_above_a_guessing_one(name):
    # 4 logits of skill are right nine times out of ten; 1000 audits leave no doubt. The
    # determinant has nothing to say of pairs with a guesser, hence the exception.
    answers = answers_of(3, n_queries=1000, skill=4.0)

    values = make_scheme(name).contributions(answers)

    assert values[4] > values[0]


@pytest.mark.parametrize("name", SCHEMES.names())
def test_scheme_says_whether_it_needs_labels(name):
    scheme = make_scheme(name)
    answers = answers_of(4, labels=None)

    if scheme.needs_labels:
        with pytest.raises(InvalidValueError, match="labels"):
            scheme.contributions(answers)
    else:
        scheme.contributions(answers)


@pytest.mark.parametrize("name", SCHEMES.names())
def test_scheme_says_how_many_sites_it_takes(name):
    scheme = make_scheme(name)
    if scheme.max_sites is None:
        answers = answers_of(4, n_sites=40, n_queries=10)
        assert scheme.contributions(answers).shape == (40,)
    else:
        with pytest.raises(InvalidValueError, match="at most"):
            scheme.contributions(answers_of(4, n_sites=scheme.max_sites + 1))


@pytest.mark.parametrize("name", SCHEMES.names())
def test_scheme_is_made_again_from_its_options(name):
    scheme = make_scheme(name)

    assert make_scheme(name, scheme.options()) == scheme
    assert scheme.name == name
    assert scheme.sees in Sight


@pytest.mark.parametrize("name", SCHEMES.names())
def test_scheme_refuses_an_option_that_it_does_not_have(name):
    with pytest.raises(InvalidValueError, match="no option"):
        make_scheme(name, {"no-such": 1})


def test_unknown_scheme_is_named_with_its_nearest():
    with pytest.raises(UnknownNameError, match="shaply") as caught:
        make_scheme("shaply")

    assert "shapley" in caught.value.hint


# -- linear schemes ------------------------------------------------------------------------


@pytest.mark.parametrize("name", LINEAR)
@thorough
@given(seed=st.integers(0, 10_000))
def test_linear_scheme_is_a_row_sum_with_weights_from_public_facts_alone(name, seed):
    answers = answers_of(seed)
    facts = PublicFacts(
        total_tc=answers.probabilities_ktc.sum(axis=0), n_sites=5, labels=answers.labels
    )
    scheme = make_scheme(name)

    weights = scheme.weights(facts)

    assert weights.shape == facts.total_tc.shape
    row_sums = ((answers.probabilities_ktc - 1 / 3) * weights).sum(axis=(1, 2))
    assert np.allclose(scheme.contributions(answers), row_sums, atol=ROUNDING)


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("n_classes", [2, 3, 10])
def test_linear_scheme_pays_a_uniform_answer_nothing(name, n_classes):
    answers = answers_of(5, n_classes=n_classes)
    p = answers.probabilities_ktc.copy()
    p[2] = 1 / n_classes

    values = make_scheme(name).contributions(dataclasses.replace(answers, probabilities_ktc=p))

    assert values[2] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("name", LINEAR)
def test_linear_scheme_weighs_no_query_out_of_proportion(name):
    # A weight on few queries would open the answers to them. Sharp weights of smooth
    # accuracy go with its gradient, which is below sharpness * sqrt(K) / 4 for each query.
    facts = answers_of(6, n_queries=200).public()

    weights = np.abs(make_scheme(name).weights(facts)).sum(axis=1)

    assert weights.max() / weights.sum() < 0.05
