"""Audits among other queries: hidden, and found again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedinfer_flower.errors import InvalidValueError, ShapeError
from fedinfer_flower.settlement import mix_audits


@given(st.integers(0, 30), st.integers(1, 30), st.integers(1, 9), st.booleans())
def test_audits_are_found_again_and_the_rest_keeps_its_order(n_rows, n_audits, batch, is_seeded):
    inputs = np.arange(n_rows, dtype=float)[:, None]
    audits = -1.0 - np.arange(n_audits, dtype=float)[:, None]

    mix = mix_audits(inputs, audits, np.arange(n_audits), seed=5 if is_seeded else None)

    assert (mix.without(mix.inputs) == inputs).all()
    # Each audit's label is still its own.
    assert (mix.inputs[mix.rows, 0] == -1.0 - mix.labels).all()
    for audit, row in zip(mix.located("job", batch), mix.rows, strict=True):
        assert int(audit.query_id.removeprefix("job-")) * batch + audit.row == row


def test_places_are_uniform():
    # 4000 draws of 1 place in 8: chi-square of 7 degrees at 1e-6 is 41.6.
    counts = np.zeros(8)
    for _ in range(4000):
        counts[mix_audits(np.zeros((7, 1)), np.ones((1, 1)), np.array([0])).rows[0]] += 1
    assert ((counts - 500.0) ** 2 / 500.0).sum() < 41.6


def test_order_of_audits_is_drawn_too():
    orders = {
        tuple(mix_audits(np.zeros((0, 1)), np.zeros((3, 1)), np.arange(3)).labels)
        for _ in range(200)
    }
    # Any of six orders stays away with probability (5/6)**200 < 2e-16.
    assert len(orders) == 6


def test_audits_that_stand_out_are_refused():
    inputs, labels = np.zeros((3, 2), dtype=np.float32), np.array([0])

    for audits in (np.zeros((1, 2)), np.zeros((1, 3), dtype=np.float32)):
        with pytest.raises(InvalidValueError, match="dtype or row shape"):
            mix_audits(inputs, audits, labels)


@pytest.mark.parametrize("labels", [np.array([0, 1]), np.array([0.5]), np.array([-1])])
def test_labels_that_do_not_fit_are_refused(labels):
    with pytest.raises(InvalidValueError):
        mix_audits(np.zeros((3, 2)), np.zeros((1, 2)), labels)


def test_arrays_of_another_length_are_refused():
    mix = mix_audits(np.zeros((3, 2)), np.zeros((1, 2)), np.array([0]))
    with pytest.raises(ShapeError):
        mix.without(np.zeros(3))
    with pytest.raises(InvalidValueError):
        mix.located("job", 0)
