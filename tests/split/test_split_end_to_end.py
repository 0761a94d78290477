"""Split models on LocalGrid: what travels is an embedding, and the answers are the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.clientapp import ClientApp
from torch import nn

from fedinfer_flower import FedEnsemble, InferenceMod, LocalModel, Querier
from fedinfer_flower.errors import InvalidValueError, ShapeError
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.split import EmbeddingTail, SiteFront, SplitFront, front_digest
from fedinfer_flower.split.tail import MAX_CLIP_NORM


def identity(rows: np.ndarray) -> np.ndarray:
    return rows


def seeded(seed: int, *layers) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(*[make() for make in layers])


N_SITES, N_DIMENSIONS = 3, 6


def ask(load_model, rows: np.ndarray, *, rule: str, protection: str = "plain", classes=None):
    app = InferenceMod(load_model).attach(ClientApp())
    querier = Querier(protection=protection)
    strategy = FedEnsemble(
        rule=rule,
        protection=protection,
        min_available_nodes=N_SITES,
        allow_coordinator_key=protection == "he",
    )
    with LocalGrid(app, num_supernodes=N_SITES) as grid:
        result = strategy.start(grid, querier.ask(rows, clear=True, classes=classes, batch_size=7))
    return querier, result.combined


def test_split_ensemble_answers_as_the_unsplit_one() -> None:
    front = seeded(1, lambda: nn.Linear(5, N_DIMENSIONS), nn.Tanh)
    backs = [seeded(10 + k, lambda: nn.Linear(N_DIMENSIONS, 4)) for k in range(N_SITES)]
    inputs = np.random.default_rng(0).standard_normal((20, 5)).astype(np.float32)

    def whole(context) -> LocalModel:
        model = nn.Sequential(front, backs[context.node_config["partition-id"]])
        return LocalModel(model=model, classes=["a", "b", "c", "d"])

    def rest(context) -> LocalModel:
        back = backs[context.node_config["partition-id"]]
        card = {"split-front": front_digest(front)}
        return LocalModel(model=back, classes=["a", "b", "c", "d"], model_card=card)

    # Longer than any embedding is: nothing is clipped.
    sent = SplitFront(front, clip_norm=10.0).embed(inputs)
    predictions = []
    for load_model, rows in ((whole, inputs), (rest, sent)):
        querier, combined = ask(load_model, rows, rule="mean-probability")
        predictions.append(querier.open(combined))

    unsplit, split = predictions
    # Payloads and embeddings are float32.
    np.testing.assert_allclose(split.probabilities, unsplit.probabilities, atol=1e-6)
    np.testing.assert_array_equal(split.labels, unsplit.labels)
    assert len(set(np.asarray(split.labels).tolist())) > 1


def test_noisy_embeddings_are_ordinary_queries() -> None:
    back = seeded(3, lambda: nn.Linear(N_DIMENSIONS, 2))
    front = SplitFront(identity, clip_norm=1.0, epsilon=4.0)
    rows = front.embed(np.ones((9, N_DIMENSIONS)))
    querier, combined = ask(
        lambda context: LocalModel(model=back, classes=["a", "b"]), rows, rule="mean-probability"
    )
    assert querier.open(combined).probabilities.shape == (9, 2)


@pytest.mark.parametrize("protection", ["plain", "he", "secagg"])
def test_tail_at_the_querier_sees_the_mean_of_the_embeddings(protection) -> None:
    norm = MAX_CLIP_NORM
    # Wide enough that many embeddings are clipped and reach the edge of the rule's range.
    fronts = [seeded(20 + k, lambda: nn.Linear(5, N_DIMENSIONS)) for k in range(N_SITES)]
    inputs = 30.0 * np.random.default_rng(0).standard_normal((20, 5)).astype(np.float32)
    sites = [SiteFront(f, n_dimensions=N_DIMENSIONS, clip_norm=norm) for f in fronts]
    tail = EmbeddingTail(seeded(5, lambda: nn.Linear(N_DIMENSIONS, 3)), n_dimensions=N_DIMENSIONS)

    def load_model(context) -> LocalModel:
        site = sites[context.node_config["partition-id"]]
        return LocalModel(model=site, classes=site.classes, outputs="logits")

    querier, combined = ask(
        load_model, inputs, rule="mean-logit", protection=protection, classes=tail.classes
    )
    outputs = tail.open(querier, combined)

    embeddings = np.stack([site(inputs) for site in sites])
    assert np.isclose(np.linalg.norm(embeddings, axis=-1), norm).any()
    expected = tail.answer(embeddings.sum(axis=0), N_SITES)
    # Each site's entry is rounded: to float32, or to a grid of 2^-12 or finer.
    np.testing.assert_allclose(outputs, expected, atol=1e-3)


def test_tail_refuses_answers_that_are_no_sums_of_embeddings() -> None:
    tail = EmbeddingTail(identity, n_dimensions=2)
    querier, combined = ask(
        lambda context: LocalModel(model=identity, classes=["a", "b"], outputs="logits"),
        np.eye(2),
        rule="mean-logit",
    )
    with pytest.raises(InvalidValueError, match="not a sum of embeddings"):
        tail.open(querier, combined)
    with pytest.raises(ShapeError):
        tail.answer(np.zeros((3, 5)), 1)
    with pytest.raises(InvalidValueError, match="at least one site"):
        tail.answer(np.zeros((3, 2)), np.array([1, 0, 1]))
