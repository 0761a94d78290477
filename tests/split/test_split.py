"""Split models. Statistical tests have a significance of 1e-6: the noise has no seed."""

from __future__ import annotations

import doctest
import importlib
import math
import pkgutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from torch import nn

import fedinfer_flower.split as package
from fedinfer_flower.errors import InvalidValueError, ModelAnswerError, ShapeError
from fedinfer_flower.privacy.gaussian_dp import delta_of
from fedinfer_flower.simulation.data import load_dataset
from fedinfer_flower.split import (
    SiteFront,
    SplitFront,
    embedding_noise_std,
    front_digest,
    split_back,
    split_network,
    train_split,
)
from fedinfer_flower.split.front import clip_rows

SIGNIFICANCE = 1e-6
MODULES = [f"{package.__name__}.{module.name}" for module in pkgutil.iter_modules(package.__path__)]


def identity(rows: np.ndarray) -> np.ndarray:
    return rows


def seeded(seed: int, *layers) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(*[make() for make in layers])


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


# -- clipping and noise -------------------------------------------------------------------


@given(
    hnp.arrays(
        float,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=6),
        elements=st.floats(-1e300, 1e300),
    ),
    st.floats(1e-3, 1e3),
)
def test_clipped_rows_are_short_and_keep_their_direction(rows, clip_norm) -> None:
    clipped = clip_rows(rows, clip_norm)

    norms = np.linalg.norm(clipped, axis=1)
    # A few roundings of float64.
    assert (norms <= clip_norm * (1 + 1e-12)).all()
    assert (np.sign(clipped) * np.sign(rows) >= 0).all()
    short = np.abs(rows).max(axis=1) <= clip_norm / math.sqrt(rows.shape[1]) / 2
    np.testing.assert_array_equal(clipped[short], rows[short])


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 8.0, 64.0])
@pytest.mark.parametrize("n_dimensions", [1, 8, 4096])
def test_noise_covers_the_distance_of_any_two_queries(epsilon, n_dimensions) -> None:
    front = SplitFront(identity, clip_norm=3.0, epsilon=epsilon)
    # Two rows of opposite sign, and rounding to the grid of 2^-20 of the clipping norm.
    farthest = 3.0 * (2.0 + math.sqrt(n_dimensions) * 2.0**-20)

    mu = farthest / front.noise_std(n_dimensions)
    assert delta_of(epsilon, mu) <= 1e-5
    assert front.noise_std(n_dimensions) == pytest.approx(
        embedding_noise_std(clip_norm=3.0, epsilon=epsilon, delta=1e-5), rel=1e-4
    )


def test_noise_has_the_claimed_deviation_and_no_seed() -> None:
    front = SplitFront(identity, clip_norm=2.0, epsilon=4.0)
    rows = np.tile([3.0, 4.0, 0.0, 0.0], (20_000, 1))
    runs = []
    for _ in range(2):
        np.random.seed(1)  # noqa: NPY002 - to show that it has no influence
        torch.manual_seed(1)
        runs.append(front.embed(rows).astype(float))

    assert not np.array_equal(runs[0], runs[1])
    noise = (runs[0] - [1.2, 1.6, 0.0, 0.0]) / front.noise_std(4)
    assert stats.kstest(noise.ravel(), "norm").pvalue > SIGNIFICANCE
    statistic = float((noise**2).sum())
    assert SIGNIFICANCE / 2 < stats.chi2.cdf(statistic, noise.size) < 1 - SIGNIFICANCE / 2


def test_what_leaves_lies_on_the_grid_whatever_the_query() -> None:
    front = SplitFront(identity, clip_norm=1.0, epsilon=16.0)
    for value in (0.0, 0.1, 1 / 3):
        sent = front.embed(np.full((2000, 3), value)).astype(float)
        steps = sent * 2.0**20
        # float32 keeps 24 bits; below 2^23 steps every whole number is one.
        small = np.abs(steps) < 2**23
        assert small.all()
        np.testing.assert_array_equal(steps, np.rint(steps))


def test_epsilon_of_many_rows_composes_and_none_is_no_promise() -> None:
    front = SplitFront(identity, clip_norm=1.0, epsilon=1.0)
    totals = [front.total_epsilon_delta(n)[0] for n in (1, 4, 100)]
    assert totals[0] <= 1.0 + 1e-9
    assert totals == sorted(totals)
    assert totals[2] > 10.0

    clear = SplitFront(identity, clip_norm=1.0)
    assert clear.noise_std(8) == 0.0
    with pytest.raises(InvalidValueError, match="not private"):
        clear.total_epsilon_delta(1)
    with pytest.raises(InvalidValueError, match="n_rows"):
        front.total_epsilon_delta(0)


@pytest.mark.parametrize(
    "options",
    [
        {"clip_norm": 0.0},
        {"clip_norm": math.inf},
        {"clip_norm": 1.0, "epsilon": 0.0},
        {"clip_norm": 1.0, "epsilon": 65.0},
        {"clip_norm": 1.0, "epsilon": math.nan},
        {"clip_norm": 1.0, "epsilon": 1.0, "delta": 0.1},
        {"clip_norm": 1.0, "epsilon": 1.0, "delta": 0.0},
    ],
)
def test_option_out_of_range_is_refused(options) -> None:
    with pytest.raises(InvalidValueError):
        SplitFront(identity, **options)


@pytest.mark.parametrize(
    "front",
    [lambda rows: rows[:-1], lambda rows: rows[:, 0], lambda rows: rows * np.nan],
    ids=["rows", "flat", "nan"],
)
def test_front_that_fails_is_an_error_without_the_query(front) -> None:
    secret = 0.123456
    with pytest.raises(ModelAnswerError) as caught:
        SplitFront(front, clip_norm=1.0).embed(np.full((3, 2), secret))
    assert str(secret) not in str(caught.value)


@pytest.mark.parametrize("inputs", [np.zeros(3), np.zeros((0, 3))])
def test_no_queries_are_refused(inputs) -> None:
    with pytest.raises(InvalidValueError, match="n_queries"):
        SplitFront(identity, clip_norm=1.0).embed(inputs)


# -- halves -------------------------------------------------------------------------------


def test_halves_apart_answer_as_the_network_does_whole() -> None:
    front = seeded(1, lambda: nn.Conv2d(1, 2, 3), nn.ReLU)
    back = seeded(2, nn.Flatten, lambda: nn.Linear(8, 3))
    images = np.random.default_rng(0).standard_normal((5, 1, 4, 4)).astype(np.float32)
    network = split_network(front, back, clip_norm=1.0, noise_std=9.0).eval()

    sent = SplitFront(front, clip_norm=1.0).embed(images)
    with torch.inference_mode():
        apart = split_back(back, embedding_shape=(2, 2, 2))(torch.from_numpy(sent))
        whole = network(torch.from_numpy(images))

    # Clipping in float64 here and in float32 there.
    torch.testing.assert_close(apart, whole, rtol=1e-5, atol=1e-6)
    norms = np.linalg.norm(SplitFront(front, clip_norm=1e9).embed(images), axis=1)
    assert (norms > 1.0).any()  # else the clipping was not tested


def test_network_is_noisy_in_training_only() -> None:
    network = split_network(nn.Identity(), nn.Identity(), clip_norm=1.0, noise_std=2.0)
    rows = torch.zeros(4000, 4)

    assert float(network.train()(rows).std()) == pytest.approx(2.0, rel=0.05)  # 9 deviations
    assert torch.equal(network.eval()(rows), rows)


@pytest.mark.parametrize("frozen", ["front", "back"])
def test_training_leaves_the_frozen_half_and_the_originals_alone(frozen) -> None:
    front, back = nn.BatchNorm1d(4), nn.Linear(4, 2)
    before = front_digest(front), front_digest(back)
    trained = train_split(
        front,
        back,
        torch.randn(40, 4, generator=torch.Generator().manual_seed(0)),
        torch.arange(40) % 2,
        clip_norm=1.0,
        epochs=2,
        seed=1,
        **{f"train_{frozen}": False},
    )

    assert (front_digest(front), front_digest(back)) == before
    after = front_digest(trained.front), front_digest(trained.back)
    assert [a == b for a, b in zip(after, before, strict=True)] == [
        frozen == "front",
        frozen == "back",
    ]
    assert all(p.grad is None for p in trained.front.parameters())


def test_training_of_nothing_is_refused() -> None:
    data = torch.zeros(4, 2), torch.zeros(4).long()
    with pytest.raises(InvalidValueError, match="neither half"):
        train_split(
            nn.Linear(2, 2),
            nn.Linear(2, 2),
            *data,
            clip_norm=1.0,
            train_front=False,
            train_back=False,
        )


@pytest.mark.parametrize("options", [{"clip_norm": 0.0}, {"clip_norm": 1.0, "noise_std": -1.0}])
def test_network_with_impossible_numbers_is_refused(options) -> None:
    with pytest.raises(InvalidValueError):
        split_network(nn.Identity(), nn.Identity(), **options)


@pytest.mark.parametrize("shape", [(), (2, 0)])
def test_back_of_an_impossible_embedding_is_refused(shape) -> None:
    with pytest.raises(InvalidValueError):
        split_back(nn.Identity(), embedding_shape=shape)


def test_digest_tells_fronts_apart_by_weights_and_names() -> None:
    layer = nn.Linear(2, 2, bias=False)
    other = nn.Linear(2, 2, bias=False)
    other.load_state_dict(layer.state_dict())
    assert front_digest(layer) == front_digest(other)
    assert front_digest(nn.Sequential(layer)) != front_digest(layer)
    with torch.no_grad():
        other.weight[0, 0] += 1e-6
    assert front_digest(layer) != front_digest(other)


# -- leakage ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits_front():
    """A front of 32 dimensions trained on 400 public digits; 800 others are private."""
    dataset = load_dataset("digits", seed=0)
    images, labels = dataset.train_inputs.astype(np.float32), dataset.train_labels
    front = seeded(1, lambda: nn.Linear(64, 32), nn.Tanh)
    back = seeded(2, lambda: nn.Linear(32, 10))
    trained = train_split(front, back, images[:400], labels[:400], clip_norm=4.0, epochs=20, seed=3)
    return trained, images, labels


def attack(front: SplitFront, public: np.ndarray, private: np.ndarray) -> tuple[float, float]:
    """Return (share of pixel variance rebuilt, share of queries found among all of them)."""
    design = np.c_[front.embed(public), np.ones(len(public))].astype(float)
    gram = design.T @ design + 1e-3 * np.eye(design.shape[1])
    weights = np.linalg.solve(gram, design.T @ public)
    sent = front.embed(private)
    rebuilt = np.c_[sent, np.ones(len(sent))] @ weights
    distances = ((rebuilt[:, None] - private[None]) ** 2).sum(axis=-1)
    found = float((distances.argmin(axis=1) == np.arange(len(private))).mean())
    error = ((rebuilt - private) ** 2).sum() / ((private - public.mean(axis=0)) ** 2).sum()
    return 1.0 - float(error), found


def test_clear_embeddings_invert_and_noisy_ones_do_not(digits_front) -> None:
    trained, images, labels = digits_front
    public, private = images[:400], images[400:800]

    def accuracy(front: SplitFront) -> float:
        with torch.inference_mode():
            votes = trained.back(torch.from_numpy(front.embed(private))).argmax(dim=1).numpy()
        return float((votes == labels[400:800]).mean())

    clear = SplitFront(trained.front, clip_norm=4.0)
    noisy = SplitFront(trained.front, clip_norm=4.0, epsilon=1.0)

    rebuilt, found = attack(clear, public, private)
    assert rebuilt > 0.75
    assert found > 0.8
    assert accuracy(clear) > 0.9

    rebuilt, found = attack(noisy, public, private)
    assert rebuilt < 0.1
    # (e^1 / 400 + 1e-5) of 400 queries is 2.7 expected; 20 or more have a chance of 1e-11.
    assert found < 20 / 400
    assert accuracy(noisy) < 0.5  # the price


def test_site_front_refuses_other_widths_and_norms_that_the_rule_would_cut() -> None:
    with pytest.raises(InvalidValueError, match="clip_norm"):
        SiteFront(identity, n_dimensions=2, clip_norm=16.0)
    with pytest.raises(ShapeError):
        SiteFront(identity, n_dimensions=2, clip_norm=1.0)(np.zeros((4, 3)))
