"""Coalition values against their definitions, one coalition at a time."""

import itertools
from math import factorial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.incentives import AuditedAnswers, PublicFacts, make_scheme
from fedinfer_flower.incentives.games import (
    Utility,
    all_coalition_values,
    as_utility,
    coalition_values,
    marginal_bound,
    members_of,
)
from fedinfer_flower.incentives.shapley import shapley_of
from fedinfer_flower.incentives.smooth_shapley import diagonal_weights

thorough = settings(max_examples=25, derandomize=True, deadline=None)

# Sums of some hundred floats of size one.
ROUNDING = 1e-9


def answers_of(seed, *, n_sites=4, n_queries=12, n_classes=3):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(n_classes, 0.5), size=(n_sites, n_queries))
    labels = rng.integers(0, n_classes, n_queries)
    return AuditedAnswers(probabilities_ktc=p, labels=labels)


def accuracy_of(answers, members):
    """The accuracy game by its definition, query by query."""
    n_classes = answers.n_classes
    if not members:
        return 1 / n_classes
    worth = 0.0
    for t, label in enumerate(answers.labels):
        mean = sum(answers.probabilities_ktc[k, t] for k in members) / len(members)
        best = [c for c in range(n_classes) if mean[c] > mean.max() - 1e-12]
        worth += (label in best) / len(best)
    return worth / answers.n_queries


def brier_of(answers, members):
    """The Brier game by its definition, query by query."""
    n_classes, worth = answers.n_classes, 0.0
    for t, label in enumerate(answers.labels):
        s = np.zeros(n_classes)
        for k in members:
            s += (answers.probabilities_ktc[k, t] - 1 / n_classes) / answers.n_sites
        worth += 2 * s[label] - s @ s
    return worth / answers.n_queries


GAMES = {Utility.ACCURACY: accuracy_of, Utility.BRIER: brier_of}


def brute_force(game, answers):
    """Shapley and Banzhaf values, from the definitions."""
    n_sites = answers.n_sites
    shapley, banzhaf = np.zeros(n_sites), np.zeros(n_sites)
    for k in range(n_sites):
        others = [j for j in range(n_sites) if j != k]
        for size in range(n_sites):
            weight = factorial(size) * factorial(n_sites - size - 1) / factorial(n_sites)
            for group in itertools.combinations(others, size):
                gain = game(answers, (*group, k)) - game(answers, group)
                shapley[k] += weight * gain
                banzhaf[k] += gain / 2 ** (n_sites - 1)
    return shapley, banzhaf


@pytest.mark.parametrize("utility", list(Utility))
@pytest.mark.parametrize("seed", range(3))
def test_values_of_all_coalitions_are_the_definition(utility, seed):
    answers = answers_of(seed)

    values = all_coalition_values(answers, utility)

    members = members_of(4)
    for place, value in enumerate(values):
        group = tuple(np.flatnonzero(members[place]))
        assert value == pytest.approx(GAMES[utility](answers, group), abs=ROUNDING)
    assert np.allclose(coalition_values(answers, members, utility), values, atol=ROUNDING)


@pytest.mark.parametrize("utility", list(Utility))
def test_values_do_not_depend_on_how_queries_are_cut_into_chunks(utility, monkeypatch):
    answers = answers_of(5)
    whole = all_coalition_values(answers, utility)
    some = coalition_values(answers, members_of(4), utility)

    monkeypatch.setattr("fedinfer_flower.incentives.games._CHUNK_VALUES", 100)

    assert np.allclose(all_coalition_values(answers, utility), whole, atol=ROUNDING)
    assert np.allclose(coalition_values(answers, members_of(4), utility), some, atol=ROUNDING)


def test_accuracy_shares_a_tie_between_classes():
    p = np.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    answers = AuditedAnswers(probabilities_ktc=p, labels=np.array([0]))

    assert all_coalition_values(answers, Utility.ACCURACY).tolist() == [0.5, 1.0, 0.0, 0.5]


@pytest.mark.parametrize("utility", list(Utility))
@thorough
@given(seed=st.integers(0, 10_000), n_classes=st.integers(2, 4))
def test_no_marginal_exceeds_its_bound(utility, seed, n_classes):
    rng = np.random.default_rng(seed)
    sure = np.eye(n_classes)[rng.integers(0, n_classes, (4, 3))]  # the extreme answers
    answers = AuditedAnswers(probabilities_ktc=sure, labels=rng.integers(0, n_classes, 3))
    values = all_coalition_values(answers, utility)

    for k in range(4):
        without = np.flatnonzero(~members_of(4)[:, k])
        gains = values[without | (1 << k)] - values[without]
        assert np.abs(gains).max() <= marginal_bound(utility, 4) + ROUNDING


def test_unknown_utility_is_refused_when_a_scheme_is_built():
    with pytest.raises(InvalidValueError, match="utility"):
        as_utility("log")
    for name in ("shapley", "shapley-sampled", "banzhaf", "banzhaf-coalitions", "leave-one-out"):
        with pytest.raises(InvalidValueError, match="utility"):
            make_scheme(name, {"utility": "log"})


# -- values ----------------------------------------------------------------------------------


@pytest.mark.parametrize("utility", list(Utility))
@pytest.mark.parametrize("seed", range(4))
def test_shapley_and_banzhaf_are_brute_force(utility, seed):
    answers = answers_of(seed, n_classes=2 + seed)
    shapley, banzhaf = brute_force(GAMES[utility], answers)
    options = {"utility": utility.value}

    assert np.allclose(make_scheme("shapley", options).contributions(answers), shapley, atol=1e-9)
    assert np.allclose(make_scheme("banzhaf", options).contributions(answers), banzhaf, atol=1e-9)


@thorough
@given(seed=st.integers(0, 10_000), n_classes=st.integers(2, 5))
def test_brier_shapley_is_both_exact_values_of_its_game(seed, n_classes):
    answers = answers_of(seed, n_sites=4, n_queries=5, n_classes=n_classes)
    shapley, banzhaf = brute_force(brier_of, answers)

    values = make_scheme("brier-shapley").contributions(answers)

    assert np.allclose(values, shapley, atol=1e-9)
    assert np.allclose(values, banzhaf, atol=1e-9)
    assert values.sum() == pytest.approx(brier_of(answers, (0, 1, 2, 3)), abs=1e-9)


def test_closed_form_is_right_for_a_thousand_sites():
    answers = answers_of(1, n_sites=1000, n_queries=20, n_classes=10)

    values = make_scheme("brier-shapley").contributions(answers)

    # Efficiency against the game itself is all that 2^1000 coalitions leave to check.
    everybody = np.ones((1, 1000), dtype=bool)
    worth = coalition_values(answers, everybody, Utility.BRIER)[0]
    assert values.sum() == pytest.approx(worth, abs=1e-9)


def test_leave_one_out_is_what_is_lost():
    answers = answers_of(3)

    values = make_scheme("leave-one-out").contributions(answers)

    everybody = (0, 1, 2, 3)
    for k in everybody:
        rest = tuple(j for j in everybody if j != k)
        lost = accuracy_of(answers, everybody) - accuracy_of(answers, rest)
        assert values[k] == pytest.approx(lost, abs=ROUNDING)


# -- axioms, for any game ----------------------------------------------------------------------

games = st.integers(1, 6).flatmap(
    lambda n: st.lists(st.floats(-100, 100), min_size=2**n, max_size=2**n).map(np.array)
)


@thorough
@given(values=games)
def test_shapley_shares_out_everything(values):
    assert shapley_of(values).sum() == pytest.approx(values[-1] - values[0], abs=1e-9)


@thorough
@given(values=games, data=st.data())
def test_shapley_treats_equal_players_equally(values, data):
    n_players = len(values).bit_length() - 1
    if n_players < 2:
        return
    i, j = data.draw(st.permutations(range(n_players)))[:2]
    places = np.arange(len(values))
    # Whoever of the two is in alone, the coalition is worth the same.
    only_i = places[(places >> i & 1 == 1) & (places >> j & 1 == 0)]
    only_j = only_i ^ (1 << i) ^ (1 << j)
    values = values.copy()
    values[only_j] = values[only_i]

    phi = shapley_of(values)

    assert phi[i] == pytest.approx(phi[j], abs=1e-9)


@thorough
@given(values=games, data=st.data())
def test_shapley_gives_nothing_to_a_player_who_changes_nothing(values, data):
    n_players = len(values).bit_length() - 1
    k = data.draw(st.integers(0, n_players - 1))
    places = np.arange(len(values))
    null = values[places & ~(1 << k)]

    assert shapley_of(null)[k] == pytest.approx(0.0, abs=1e-9)


@thorough
@given(values=games, factor=st.floats(-3, 3), seed=st.integers(0, 100))
def test_shapley_adds_up_over_games(values, factor, seed):
    other = np.random.default_rng(seed).normal(size=len(values))

    both = shapley_of(factor * values + other)

    assert np.allclose(both, factor * shapley_of(values) + shapley_of(other), atol=1e-9)


# -- smooth accuracy ---------------------------------------------------------------------------


def smooth_accuracy(total_tc, labels, gain):
    logits = gain * total_tc
    chances = np.exp(logits - logits.max(axis=1, keepdims=True))
    chances /= chances.sum(axis=1, keepdims=True)
    return chances[np.arange(len(labels)), labels].mean()


@pytest.mark.parametrize("n_sites", [2, 5, 20])
def test_smooth_shapley_shares_out_the_smooth_accuracy(n_sites):
    answers = answers_of(8, n_sites=n_sites, n_queries=60)
    joint = answers.probabilities_ktc.mean(axis=0) - 1 / 3

    values = make_scheme("smooth-shapley").contributions(answers)

    worth = smooth_accuracy(joint, answers.labels, 9.0 * np.sqrt(n_sites)) - 1 / 3
    # The quadrature's own error; see _NODES.
    assert values.sum() == pytest.approx(worth, abs=1e-6)


def test_smooth_shapley_weights_are_the_mean_gradient_along_the_diagonal():
    answers = answers_of(9, n_queries=3)
    facts, gain, step = answers.public(), 3.0 * np.sqrt(4), 1e-5
    joint = facts.total_tc / 4 - 1 / 3
    taus = (np.arange(2000) + 0.5) / 2000

    weights = diagonal_weights(facts, 3.0)

    for t in range(3):
        for c in range(3):
            bump = np.zeros_like(joint)
            bump[t, c] = step
            slopes = [
                smooth_accuracy(tau * joint + bump, answers.labels, gain)
                - smooth_accuracy(tau * joint - bump, answers.labels, gain)
                for tau in taus
            ]
            # Midpoint rule of 2000 steps and central differences: about 1e-7 each.
            assert weights[t, c] * 4 == pytest.approx(np.mean(slopes) / (2 * step), abs=1e-5)


def test_smooth_shapley_needs_labels_also_as_weights():
    facts = PublicFacts(total_tc=np.ones((2, 2)), n_sites=2)

    for name in ("smooth-shapley", "audited-blend"):
        with pytest.raises(InvalidValueError, match="labels"):
            make_scheme(name).weights(facts)


@pytest.mark.parametrize("agreement", [0.0, 0.25, 1.0])
def test_audited_blend_is_the_weighted_sum_of_its_parts(agreement):
    answers = answers_of(10)

    options = {"agreement": agreement, "centred": False}
    blend = make_scheme("audited-blend", options).contributions(answers)

    moving = make_scheme("smooth-shapley").contributions(answers) * 4
    agreeing = make_scheme("linear-ca").contributions(answers)
    assert np.allclose(blend, (1 - agreement) * moving + agreement * agreeing, atol=ROUNDING)
