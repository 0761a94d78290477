"""What a site knows about its own model: temperature, confusion, familiarity."""

from __future__ import annotations

import numpy as np
import pytest

from fedinfer_flower.clients.calibration import (
    MIN_HOLDOUT,
    confusion_matrix,
    fit_temperature,
    negative_log_likelihood,
)
from fedinfer_flower.clients.familiarity import Familiarity
from fedinfer_flower.clients.local_model import LocalModel
from fedinfer_flower.clients.site_model import prepare
from fedinfer_flower.query import CountsKind


def labelled(seed: int, n: int, sharpness: float):
    """Return logits that are `sharpness` times as sure as the labels drawn from them allow."""
    rng = np.random.default_rng(seed)
    honest = rng.standard_normal((n, 4))
    odds = np.exp(honest) / np.exp(honest).sum(axis=1, keepdims=True)
    labels = np.array([rng.choice(4, p=row) for row in odds])
    return sharpness * honest, labels


# -- temperature -------------------------------------------------------------------------


def test_temperature_of_an_overconfident_model_improves_held_out_likelihood():
    logits, labels = labelled(0, 400, sharpness=5.0)
    fresh_logits, fresh_labels = labelled(1, 400, sharpness=5.0)

    tau = fit_temperature(logits, labels)

    # 5 up to sampling error: with 400 examples the standard error is about 0.5.
    assert 3.0 < tau < 7.0
    before = negative_log_likelihood(fresh_logits, fresh_labels, 1.0)
    assert negative_log_likelihood(fresh_logits, fresh_labels, tau) < before - 0.3


@pytest.mark.parametrize("sharpness", [0.01, 0.3, 1.0])
def test_temperature_is_never_below_one(sharpness):
    tau = fit_temperature(*labelled(2, 400, sharpness))
    assert 1.0 <= tau < 1.2


def test_temperature_is_the_best_of_a_grid():
    logits, labels = labelled(3, 200, sharpness=3.0)
    tau = fit_temperature(logits, labels)
    grid = np.linspace(1.0, 20.0, 400)
    best = min(negative_log_likelihood(logits, labels, t) for t in grid)
    # Never worse than the grid; the search ends within 1e-6 of the minimum.
    assert negative_log_likelihood(logits, labels, tau) <= best + 1e-9


def test_temperature_of_too_few_examples_is_one():
    logits, labels = labelled(0, 400, sharpness=5.0)
    assert fit_temperature(logits[: MIN_HOLDOUT - 1], labels[: MIN_HOLDOUT - 1]) == 1.0
    assert fit_temperature(logits[:0], labels[:0]) == 1.0


def test_temperature_of_a_model_that_is_always_wrong_stays_bounded():
    assert fit_temperature(np.array([[100.0, 0.0]] * 20), np.ones(20, dtype=np.int64)) <= 20.0


def site_with(holdout):
    logits = np.array([[4.0, 0.0]])
    local = LocalModel(
        model=lambda rows: np.repeat(logits, len(rows), axis=0),
        classes=["a", "b"],
        outputs="logits",
        holdout=holdout,
    )
    return prepare(local, name="s", share_counts=CountsKind.PRESENCE)


def test_site_with_holdout_is_calibrated_and_softens_its_answers(make_site):
    inputs = np.zeros((40, 2))
    site = site_with((inputs, ["a"] * 24 + ["b"] * 16))

    assert site.profile.calibrated
    odds = np.exp(site.calibrated_logits(inputs[:1], ("a", "b")))
    # The best constant answer is the share of labels: 24 of 40.
    np.testing.assert_allclose(odds, [[0.6, 0.4]], atol=1e-3)
    # Votes are all for a, whatever the truth.
    np.testing.assert_allclose(site.confusion[:, 0], 1.0, atol=2e-3)


@pytest.mark.parametrize(
    "holdout",
    [
        None,
        (np.zeros((9, 2)), ["a"] * 9),
        (np.zeros((20, 2)), ["z"] * 20),  # classes that the model does not know
        (np.zeros((20, 2)), ["a"] * 9 + ["z"] * 11),
        (np.zeros((20, 2)), ["a"] * 19),  # lengths differ
    ],
    ids=["none", "too few", "unknown", "too few known", "lengths"],
)
def test_site_without_usable_holdout_is_not_calibrated(holdout):
    site = site_with(holdout)
    assert (site.profile.calibrated, site.profile.temperature) == (False, 1.0)
    assert site.confusion is None


# -- confusion ---------------------------------------------------------------------------


def test_confusion_rows_are_shares_of_votes():
    truth = np.array([0] * 10 + [1] * 10)
    votes = np.array([0] * 8 + [1] * 2 + [1] * 10)

    confusion = confusion_matrix(votes, truth, 3)

    # 0.01 pseudo-counts on 10 examples move a share by at most 0.003.
    np.testing.assert_allclose(confusion[:2], [[0.8, 0.2, 0.0], [0.0, 1.0, 0.0]], atol=3e-3)
    np.testing.assert_allclose(confusion[2], 1 / 3)  # never seen
    np.testing.assert_allclose(confusion.sum(axis=1), 1.0)
    assert (confusion > 0).all()


# -- familiarity -------------------------------------------------------------------------

REFERENCE = np.random.default_rng(4).standard_normal((200, 3))


def test_familiarity_is_one_near_the_data_and_near_zero_far_away():
    familiarity = Familiarity.fit(REFERENCE)
    assert familiarity is not None

    near = familiarity.score(REFERENCE + 0.2 * familiarity.typical_distance / np.sqrt(3))
    far = familiarity.score(REFERENCE + 100.0)

    assert (near == 1.0).all()  # a plateau: a member scores no higher than its neighbour
    assert (familiarity.score(REFERENCE) == 1.0).all()
    assert (far < 1e-12).all()


def test_familiarity_falls_with_the_distance():
    familiarity = Familiarity.fit(REFERENCE)
    assert familiarity is not None
    scores = familiarity.score(np.array([[step, 0.0, 0.0] for step in np.linspace(2.5, 8.0, 12)]))
    assert (np.diff(scores) <= 0.0).all()
    assert scores[0] > scores[-1]


def test_familiarity_ignores_the_unit_of_a_feature():
    scaled = REFERENCE * [1.0, 1e3, 1.0]
    familiarity = Familiarity.fit(scaled)
    assert familiarity is not None
    strange_in_small = scaled[:5] + np.array([50.0, 0.0, 0.0])  # 50 is little beside 1000
    assert (familiarity.score(strange_in_small) < 1e-6).all()
    assert (familiarity.score(scaled[:5]) == 1.0).all()


def test_familiarity_takes_images_and_whole_numbers():
    images = np.random.default_rng(5).integers(0, 255, (30, 4, 4), dtype=np.uint8)
    familiarity = Familiarity.fit(images)
    assert familiarity is not None
    np.testing.assert_array_equal(familiarity.score(images), np.ones(30))


@pytest.mark.parametrize(
    "inputs",
    [np.zeros((0, 3)), REFERENCE[:4], np.ones((50, 3)), np.repeat(REFERENCE[:2], 25, axis=0)],
    ids=["none", "too few", "all alike", "duplicates"],
)
def test_familiarity_of_too_little_data_is_none(inputs):
    assert Familiarity.fit(inputs) is None


def test_familiarity_keeps_at_most_two_thousand_examples():
    inputs = np.random.default_rng(6).standard_normal((4100, 2))
    familiarity = Familiarity.fit(inputs)
    assert familiarity is not None
    assert 1000 <= len(familiarity.reference) <= 2000


def test_profile_says_whether_familiarity_can_be_measured():
    for inputs, known in ((REFERENCE, True), (REFERENCE[:3], False), (None, False)):
        local = LocalModel(model=lambda rows: rows, classes=["a"], reference_inputs=inputs)
        site = prepare(local, name="s", share_counts=CountsKind.PRESENCE)
        assert site.profile.familiarity is known
