"""Coalition sums through a real grid: who was in, what came out, and what that says."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.clientapp import ClientApp

from fedinfer_flower import InferenceMod, LocalModel
from fedinfer_flower.errors import InvalidValueError, ShapeError
from fedinfer_flower.incentives import make_scheme
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.strategies.fed_coalitions import FedCoalitions

CLASSES, N_SITES = ("a", "b"), 6
RNG = np.random.default_rng(3)
LABELS = RNG.integers(0, 2, 240)
ROWS = np.stack([np.where(LABELS == 0, 1.0, -1.0) + RNG.normal(0, 0.3, 240), LABELS * 0.0], axis=1)


def load_model(context) -> LocalModel:
    """Site 5 says the opposite of what it sees; the others are right."""
    sign = -1.0 if context.node_config["partition-id"] == 5 else 1.0

    def logits(rows):
        first = 2.0 * sign * np.asarray(rows)[:, 0]
        return np.stack([first, -first], axis=1)

    return LocalModel(model=logits, classes=CLASSES, outputs="logits")


@pytest.fixture(scope="module")
def rounds():
    app = InferenceMod(load_model).attach(ClientApp())
    with LocalGrid(app, num_supernodes=N_SITES) as grid:
        strategy = FedCoalitions(
            rows_per_coalition=6, protection="secagg", min_available_nodes=N_SITES, seed=1
        )
        yield strategy.start(grid, ROWS, LABELS), grid


def test_totals_are_sums_over_the_coalitions_of_at_least_three(rounds):
    sums = rounds[0].sums
    sizes = sums.members_tk.sum(axis=1)

    assert sizes.min() >= 3
    # Probabilities of each member sum to 1; the codec's step is far below the tolerance.
    np.testing.assert_allclose(sums.totals_tc.sum(axis=1), sizes, atol=1e-3)
    assert len(sums.labels) == len(ROWS)


def test_banzhaf_of_sums_alone_finds_the_site_that_misleads(rounds):
    found, _ = rounds
    values = make_scheme("banzhaf-coalitions").from_coalitions(found.sums)
    # Node ids are drawn at random: the misleading site is the one with the lowest value.
    assert len(values) == len(found.key_ids) == N_SITES
    # Honest sites are near 0 here, as any three of them are always right.
    lowest, second = np.sort(values)[:2]
    # With these coins: -0.13 for the one, -0.0001 to 0.07 for the others.
    assert lowest < -0.1
    assert second > -0.02


def test_labels_and_queries_have_one_length(rounds):
    with pytest.raises(ShapeError):
        FedCoalitions().start(rounds[1], ROWS, LABELS[:-1])


def test_too_few_sites_for_coalitions_is_said():
    app = InferenceMod(load_model).attach(ClientApp())
    with (
        LocalGrid(app, num_supernodes=3) as grid,
        pytest.raises(InvalidValueError, match="coalitions"),
    ):
        FedCoalitions(protection="secagg").start(grid, ROWS, LABELS)
