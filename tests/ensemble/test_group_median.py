"""Medians of group means stay between honest groups; so does the strategy that asks for them."""

import numpy as np
import pytest
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st

from fedinfer_flower import InferenceMod, LocalModel
from fedinfer_flower.ensemble.group_median import (
    MIN_GROUPS,
    draw_groups,
    group_median,
    withstands,
)
from fedinfer_flower.errors import IncompatibleProtection, InvalidValueError, ShapeError
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.strategies.fed_group_median import FedGroupMedian

N_SITES, N_GROUPS, N_QUERIES = 15, 5, 40
SEED = 8  # deals the first four sites into two groups
WEIGHTS = np.random.default_rng(0).normal(size=(4, 3))
QUERIES = np.random.default_rng(1).normal(size=(N_QUERIES, 4))
TRUTH = (QUERIES @ WEIGHTS).argmax(axis=1)

N_HOSTILE = 4


def honest(partition):
    # Alike, not equal: every site has its own error.
    own = WEIGHTS + 0.2 * np.random.default_rng(100 + partition).normal(size=WEIGHTS.shape)
    return lambda rows: np.asarray(rows, dtype=float) @ own


def hostile(rows):
    """All mass on the class after the right one."""
    right = (np.asarray(rows, dtype=float) @ WEIGHTS).argmax(axis=1)
    return 50.0 * np.eye(3)[(right + 1) % 3]


def app_with(n_hostile, *, skewed=False):
    def load_model(context):
        partition = context.node_config["partition-id"]
        counts = {"a": 50, "b": 50, "c": 50}
        if skewed:
            counts = {name: 140 if i == partition % 3 else 5 for i, name in enumerate("abc")}
        return LocalModel(
            model=hostile if partition < n_hostile else honest(partition),
            classes=["a", "b", "c"],
            outputs="logits",
            class_counts=counts,
        )

    return InferenceMod(load_model, share_counts="counts").attach(ClientApp())


def run(n_hostile, **options):
    skewed = options.pop("skewed", False)
    strategy = FedGroupMedian(
        n_groups=N_GROUPS, min_available_nodes=N_SITES, group_seed=SEED, **options
    )
    with LocalGrid(app_with(n_hostile, skewed=skewed), num_supernodes=N_SITES) as grid:
        return strategy.start(grid, QUERIES)


@given(
    n_groups=st.integers(MIN_GROUPS, 9),
    least=st.integers(1, 4),
    spare=st.integers(0, 6),
    seed=st.integers(0, 99),
)
def test_groups_are_disjoint_even_and_complete(n_groups, least, spare, seed):
    sites = range(1000, 1000 + n_groups * least + spare)
    groups = draw_groups(sites, n_groups=n_groups, least=least, seed=seed)

    assert sorted(site for group in groups for site in group) == list(sites)
    sizes = [len(group) for group in groups]
    assert min(sizes) >= least
    assert max(sizes) - min(sizes) <= 1


def test_groups_without_a_seed_cannot_be_foreseen():
    assert len({draw_groups(range(60), n_groups=3) for _ in range(5)}) == 5


def test_groups_that_hide_too_little_are_refused():
    with pytest.raises(InvalidValueError):
        draw_groups(range(8), n_groups=3)
    with pytest.raises(InvalidValueError):
        draw_groups(range(8), n_groups=2)
    with pytest.raises(InvalidValueError):
        draw_groups([1, 1, 2, 3], n_groups=3, least=1)
    with pytest.raises(ShapeError):
        group_median(np.ones((2, 4, 3)))


@settings(max_examples=50)
@given(n_groups=st.integers(3, 9), seed=st.integers(0, 1000))
def test_median_stays_between_honest_groups_whatever_a_minority_sends(n_groups, seed):
    rng = np.random.default_rng(seed)
    means = rng.dirichlet([1.0] * 4, size=(n_groups, 6))
    f = withstands(n_groups)
    means[:f] = rng.choice([0.0, 1.0, 1e6], size=(f, 6, 4))
    before = np.median(means, axis=0)

    assert (before >= means[f:].min(axis=0)).all()
    assert (before <= means[f:].max(axis=0)).all()
    rows = group_median(means)
    # Sums of four floats of size one.
    assert np.allclose(rows.sum(axis=1), 1.0, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("protection", ["plain", "secagg"])
def test_colluders_that_break_the_mean_do_not_break_the_median_of_groups(protection):
    groups = draw_groups(range(N_SITES), n_groups=N_GROUPS, seed=SEED)
    hit = sum(min(group) < N_HOSTILE for group in groups)
    assert hit == withstands(N_GROUPS)

    result = run(N_HOSTILE, protection=protection)

    clean = run(0, protection=protection).prediction.accuracy(TRUTH)
    # The unprotected form: the mean over all sites.
    means = np.stack([r.prediction.probabilities for r in result.results])
    sizes = np.array([len(group) for group in result.groups], dtype=float)
    pooled = (means * sizes[:, None, None]).sum(axis=0).argmax(axis=1)
    assert result.withstands == hit
    assert clean > 0.9
    assert (pooled == TRUTH).mean() < clean - 0.2
    assert result.prediction.accuracy(TRUTH) > clean - 0.2
    assert result.prediction.accuracy(TRUTH) > (pooled == TRUTH).mean() + 0.1


def test_secure_sums_of_groups_give_the_median_of_clear_means():
    result = run(2, protection="secagg")
    clear = run(2, protection="plain")

    assert result.groups == clear.groups
    # Fixed point of at least 8 binary digits in secagg, 24 in float32.
    assert np.allclose(
        result.prediction.probabilities, clear.prediction.probabilities, rtol=0.0, atol=1e-2
    )
    assert "5 groups" in result.summary()


def test_skewed_sites_are_refused_unless_asked_for():
    with pytest.raises(IncompatibleProtection, match="skew"):
        run(0, skewed=True, protection="plain")
    assert run(0, skewed=True, protection="plain", allow_skew=True).warning.startswith("WARNING")


@pytest.mark.parametrize(
    "options",
    [
        {"n_groups": 2},
        {"rule": "median", "protection": "plain"},
        {"rule": "auto"},
        {"fraction_query": 0.5},
    ],
)
def test_options_that_cannot_work_are_refused_when_built(options):
    with pytest.raises(InvalidValueError):
        FedGroupMedian(**options)
