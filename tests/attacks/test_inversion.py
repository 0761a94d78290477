"""Embeddings lead back to their inputs; noise for a strong epsilon hides the way."""

from __future__ import annotations

import numpy as np
import pytest

from fedinfer_flower.attacks.federation import digits
from fedinfer_flower.attacks.inversion import Inversion, ObservedEmbeddings
from fedinfer_flower.attacks.shadow_models import train_mlps
from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.privacy.dp import DP
from fedinfer_flower.privacy.gaussian_dp import mu_for
from fedinfer_flower.privacy.plain import Plain
from fedinfer_flower.privacy.secagg import SecAgg


def embeddings(*, noise_std: float, clip: float, claimed: bool) -> ObservedEmbeddings:
    """Hidden layer of a trained network, clipped to a ball, with noise on what is observed."""
    inputs, labels = digits()
    net = train_mlps(inputs[None, :300], labels[None, :300], n_classes=10, seed=0)
    hidden = np.maximum(inputs @ net.weights_1[0] + net.bias_1[0], 0.0).astype(float)
    norms = np.linalg.norm(hidden, axis=1, keepdims=True)
    hidden = hidden * np.minimum(1.0, clip / norms)
    drawn = np.random.default_rng(0).normal(0.0, noise_std, (200, hidden.shape[1]))
    return ObservedEmbeddings(
        known_embeddings=hidden[500:],
        known_inputs=inputs[500:],
        observed=hidden[300:500] + drawn,
        inputs=inputs[300:500],
        noise_std=noise_std,
        claimed=claimed,
    )


def test_clear_embeddings_lead_back_to_the_record() -> None:
    result = Inversion().run(embeddings(noise_std=0.0, clip=1e9, claimed=False))

    assert result.value > 0.9
    assert result.detail["squared error over that of the mean"] < 0.3


def test_clipping_alone_does_not_help() -> None:
    result = Inversion().run(embeddings(noise_std=0.0, clip=1.0, claimed=False))

    assert result.value > 0.5


def test_noise_for_epsilon_one_hides_the_record() -> None:
    # A ball of radius 1: replacing an embedding moves it by 2 at most.
    std = 2.0 / mu_for(1.0, 1e-5)
    result = Inversion().run(embeddings(noise_std=std, clip=1.0, claimed=True))

    # 200 records, chance 0.005; the binomial threshold fails once in 10,000 by chance, and
    # the seed is fixed.
    assert (result.verdict, result.claim) == ("stopped", "kept")
    # No better than the mean of all records, within 5 %.
    assert result.detail["squared error over that of the mean"] > 0.95


def test_scores_of_one_site_point_to_the_record(federation) -> None:
    attack = Inversion()
    (clear,) = attack.evidence(federation, Plain()).values()
    (noisy,) = attack.evidence(federation, DP(epsilon=1.0)).values()

    # 0.3 against a chance of 0.005.
    assert attack.run(clear).value > 0.15
    assert attack.run(noisy).claim == "kept"
    assert attack.evidence(federation, SecAgg()) == {}


def test_embeddings_without_their_inputs_are_refused() -> None:
    some = np.ones((3, 2))
    with pytest.raises(InvalidValueError):
        ObservedEmbeddings(known_embeddings=some, known_inputs=some[:2], observed=some, inputs=some)
