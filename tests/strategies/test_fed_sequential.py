"""Group after group: the same answer as asking all, from fewer sites, and never a small sum."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from flwr.clientapp import ClientApp

from fedinfer_flower import FedEnsemble, InferenceMod, LocalModel, Querier
from fedinfer_flower.errors import BindingError, ConfigError, QueryError
from fedinfer_flower.querier.sequential_querier import SequentialQuerier
from fedinfer_flower.query import Deadline
from fedinfer_flower.selection import make_selector
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.strategies.fed_sequential import FedSequential

N_SITES, N_QUERIES, CLASSES = 7, 24, ("a", "b", "c")
ROWS = np.random.default_rng(11).standard_normal((N_QUERIES, 4))


def load_model(context) -> LocalModel:
    """Sites that agree on most rows: one teacher, and a little noise of their own."""
    teacher = np.random.default_rng(1).standard_normal((4, 3))
    own = np.random.default_rng(50 + context.node_config["partition-id"])
    weights = 3.0 * teacher + own.standard_normal((4, 3))
    return LocalModel(
        model=lambda rows: np.asarray(rows, dtype=float) @ weights,
        classes=CLASSES,
        outputs="logits",
        class_counts={"a": 10.0, "b": 20.0, "c": 5.0 + context.node_config["partition-id"]},
    )


def app(load=load_model) -> ClientApp:
    return InferenceMod(load, share_counts="counts").attach(ClientApp())


@pytest.fixture
def grid() -> Iterator[LocalGrid]:
    with LocalGrid(app(), num_supernodes=N_SITES) as grid:
        yield grid


@pytest.fixture(scope="module")
def whole() -> np.ndarray:
    with LocalGrid(app(), num_supernodes=N_SITES) as grid:
        strategy = FedEnsemble(rule="class-share", protection="secagg", min_available_nodes=N_SITES)
        return strategy.start(grid, ROWS).prediction.labels


def sequential(**options) -> FedSequential:
    return FedSequential(
        rule="class-share", protection="secagg", min_available_nodes=N_SITES, **options
    )


def test_lossless_exit_gives_the_labels_of_asking_all(grid, whole):
    selector = make_selector("early-exit", {"stop": "lossless"})
    result = sequential(selector=selector).start(grid, ROWS)

    np.testing.assert_array_equal(result.prediction.labels, whole)
    assert not result.degraded


def test_margin_exit_asks_fewer_sites_about_clear_rows(grid, whole):
    selector = make_selector("early-exit", {"tau": 0.3, "least_groups": 1})
    result = sequential(selector=selector).start(grid, ROWS)

    assert set(result.n_sites_asked) == {3, N_SITES}
    assert result.n_sites_asked.mean() < N_SITES
    assert (result.prediction.labels == whole).mean() > 0.9
    assert "of asking all" in result.summary()


def test_no_sum_of_fewer_than_three_sites_is_ever_opened(grid):
    result = sequential().start(grid, ROWS)

    assert all(batch.n_sites >= 3 for r in result.groups for batch in r.combined.batches)
    members = [site for group in result.plan.groups for site in group]
    assert len(members) == len(set(members)) == N_SITES


def test_group_that_fails_is_skipped_and_reported(whole):
    def load(context):
        if context.node_config["partition-id"] in (0, 1, 2, 3, 4):
            return load_model(context)
        raise RuntimeError("no model here")

    with LocalGrid(app(load), num_supernodes=N_SITES) as grid:
        strategy = FedSequential(
            rule="class-share", protection="secagg", deadline=Deadline(timeout_s=20, quorum=3)
        )
        result = strategy.start(grid, ROWS)

    assert len(result.plan.site_ids) == 5
    assert (result.n_sites_asked <= 5).all()


def test_without_any_answer_there_is_a_typed_error():
    answers = {"n": 0}

    def load(context):
        model = load_model(context)

        def refuse(rows):
            answers["n"] += 1
            raise RuntimeError("broken")

        return LocalModel(model=refuse, classes=CLASSES, class_counts=model.class_counts)

    with LocalGrid(app(load), num_supernodes=N_SITES) as grid, pytest.raises(QueryError):
        sequential(deadline=Deadline(timeout_s=10)).start(grid, ROWS)
    assert answers["n"]


def test_selector_that_asks_all_at_once_is_refused_when_built():
    with pytest.raises(ConfigError, match="everybody at once"):
        FedSequential(selector="all")


def test_lossless_under_noise_is_refused_when_built():
    selector = make_selector("early-exit", {"stop": "lossless"})
    with pytest.raises(ConfigError, match="noise"):
        FedSequential(selector=selector, protection="secagg+dp", rule="mean-probability")


def test_stopping_by_sets_asks_one_more_group_while_two_classes_are_left(grid):
    def sets(prediction):
        # All classes within 0.3 of the best: few rows have one class after three sites.
        top = prediction.probabilities.max(axis=1, keepdims=True)
        return prediction.probabilities > top - 0.3

    selector = make_selector("early-exit", {"stop": "set", "least_groups": 1})
    result = sequential(selector=selector, sets=sets).start(grid, ROWS)

    went_on = result.n_sites_asked == N_SITES
    assert 0 < went_on.sum() < len(ROWS)
    first = result.groups[0].prediction
    np.testing.assert_array_equal(sets(first).sum(axis=1) > 1, went_on)


def test_stopping_by_sets_without_any_is_refused_when_built():
    with pytest.raises(ConfigError, match="prediction sets"):
        FedSequential(selector=make_selector("early-exit", {"stop": "set"}))


def test_querier_elsewhere_asks_in_groups_under_seal(grid, whole):
    strategy = FedEnsemble(protection="secagg", min_available_nodes=N_SITES)
    asker = SequentialQuerier(
        Querier(protection="secagg"),
        directory=strategy.directory(grid),
        inputs=ROWS,
        rule="class-share",
        selector=make_selector("early-exit", {"stop": "lossless"}),
    )
    rosters = []
    while (job := asker.next_job()) is not None:
        rosters.append(len(job.roster))
        asker.add(strategy.start(grid, job).combined)

    np.testing.assert_array_equal(asker.decide().labels, whole)
    assert all(size >= 3 for size in rosters)
    assert asker.n_sites_asked.max() <= N_SITES


def test_querier_refuses_the_answer_to_another_job(grid):
    strategy = FedEnsemble(protection="secagg", min_available_nodes=N_SITES)
    directory = strategy.directory(grid)
    first = SequentialQuerier(Querier(protection="secagg"), directory=directory, inputs=ROWS)
    other = SequentialQuerier(Querier(protection="secagg"), directory=directory, inputs=ROWS)
    first.next_job()
    with pytest.raises(BindingError):
        first.add(strategy.start(grid, other.next_job()).combined)
