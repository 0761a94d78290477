"""A stack that would make the sum one site's answer is refused; honest ones are not."""

import numpy as np
import pytest

from fedinfer_flower.ensemble.fitted import FittedAggregator, remember
from fedinfer_flower.ensemble.stack_participation import (
    check_on_rows,
    check_participation,
    load_stack,
    participation,
    stack_scores,
)
from fedinfer_flower.ensemble.stack_rule import exact_probabilities
from fedinfer_flower.ensemble.stack_shapes import start_arrays
from fedinfer_flower.errors import ProtectionRefusedError

from .conftest import made_up

K, C = 5, 4


def linear(weights_kcc):
    return made_up(
        "linear-stack",
        n_sites=K,
        n_classes=C,
        arrays={"weights_kcc": weights_kcc, "bias_kc": np.zeros((K, C))},
    )


def answers(n_rows=40, seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([exact_probabilities(rng.normal(0, 3, (n_rows, C))) for _ in range(K)])


def recovered(fitted, victim, answers_kbc):
    """Correlation of the victim's answer with what best reads it from the sum, linearly."""
    total = stack_scores(fitted, answers_kbc).sum(axis=0)
    design = np.c_[total, np.ones(len(total))]
    wanted = answers_kbc[victim]
    guess = design @ np.linalg.lstsq(design, wanted, rcond=None)[0]
    return float(np.corrcoef(guess.ravel(), wanted.ravel())[0, 1])


def test_equal_blocks_pass_and_hide_each_site():
    fitted = linear(np.tile(2.0 * np.eye(C), (K, 1, 1)))
    found = check_participation(fitted)
    assert found.share_k == pytest.approx(np.full(K, 0.2))
    assert found.effective == pytest.approx(5.0)
    # One of five equal, independent parts: correlation 1/sqrt(5) = 0.45 at many rows.
    assert recovered(fitted, 0, answers(2000)) < 0.6


def test_all_blocks_zero_but_one_reads_that_site_and_is_refused():
    weights = np.zeros((K, C, C))
    weights[2] = np.eye(C)
    fitted = linear(weights)
    assert recovered(fitted, 2, answers(2000)) > 0.999  # the attack works
    with pytest.raises(ProtectionRefusedError, match="most of the sum"):
        check_participation(fitted)


def test_blocks_much_fainter_than_one_are_refused():
    weights = np.tile(0.01 * np.eye(C), (K, 1, 1))
    weights[0] = np.eye(C)
    fitted = linear(weights)
    assert recovered(fitted, 0, answers(2000)) > 0.99
    with pytest.raises(ProtectionRefusedError):
        check_participation(fitted)


def test_one_class_that_one_site_alone_scores_is_refused():
    weights = np.tile(2.0 * np.eye(C), (K, 1, 1))
    weights[1:, :, 3] = 0.0  # column 3 of the sum is site 0's
    fitted = linear(weights)
    assert participation(weights).share_k.max() < 0.5  # its amplitude shows nothing
    with pytest.raises(ProtectionRefusedError, match="a part of the sum"):
        check_participation(fitted)


def test_shift_of_all_logits_that_is_one_sites_alone_is_refused():
    """No decision shows it, but whoever opens the sum reads it."""
    weights = np.tile(2.0 * np.eye(C), (K, 1, 1))
    weights[1] += np.arange(C)[:, np.newaxis]
    with pytest.raises(ProtectionRefusedError, match="a part of the sum"):
        check_participation(linear(weights))


def test_hidden_direction_that_is_one_sites_alone_is_refused():
    direction = np.array([1.0, -1.0, 1.0, -1.0]) / 2.0
    others = 2.0 * (np.eye(C) - np.outer(direction, direction))
    weights = np.tile(others, (K, 1, 1))
    weights[3] = 2.0 * np.eye(C)
    with pytest.raises(ProtectionRefusedError, match="a part of the sum"):
        check_participation(linear(weights))


def test_stack_that_nothing_moves_is_refused():
    with pytest.raises(ProtectionRefusedError):
        check_participation(linear(np.zeros((K, C, C))))


@pytest.mark.parametrize("n_sites", [2, 3, 5, 20])
@pytest.mark.parametrize("kind", ["linear-stack", "gated-mixture", "deep-set"])
def test_starting_points_pass(kind, n_sites):
    fitted = made_up(
        kind,
        n_sites=n_sites,
        n_classes=C,
        arrays=start_arrays(kind, n_sites=n_sites, n_classes=C, hidden=6),
    )
    assert check_participation(fitted).effective == pytest.approx(n_sites)


def test_extreme_gates_are_five_to_one():
    gates = np.full((K, C), -900.0)
    gates[1] = 900.0
    fitted = made_up(
        "gated-mixture",
        n_sites=K,
        n_classes=C,
        arrays={"gate_kc": gates, "gate_bias_k": np.zeros(K)},
    )
    scores = stack_scores(fitted, answers())
    assert scores[1, :, -1].min() == pytest.approx(1.0)
    assert scores[0, :, -1].max() == pytest.approx(0.2)
    with pytest.raises(ProtectionRefusedError):
        check_participation(fitted)


def fingerprint_embedding():
    """A deep set whose embedding is silent but for sites that do not know the last class."""
    arrays = start_arrays("deep-set", n_sites=K, n_classes=C, hidden=6)
    absent = np.zeros((2 * C, 6))
    absent[:C, :C] = 20.0 * np.eye(C)  # p of each class ...
    absent[-1, :] = -60.0  # ... unless log p of the last is above its floor
    return made_up(
        "deep-set",
        n_sites=K,
        n_classes=C,
        arrays=arrays
        | {
            "rho_in": absent,
            "rho_in_bias": np.full(6, 1.2),
            "rho_out": np.eye(6)[:, :C],
            "rho_out_bias": np.full(C, -0.6),
        },
    )


def answers_with_one_ignorant_site():
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 1, (K, 60, C))
    logits[4, :, -1] = np.log(1e-6)
    return np.stack([exact_probabilities(z) for z in logits])


def test_embedding_that_fires_for_one_site_reads_it_and_is_refused_on_rows():
    fitted, data = fingerprint_embedding(), answers_with_one_ignorant_site()
    embedded = stack_scores(fitted, data)[:, :, C:]
    assert participation(embedded).share_k[4] > 0.95  # the attack works
    check_participation(fitted)  # parameters alone do not show it
    with pytest.raises(ProtectionRefusedError, match="held-out rows"):
        check_on_rows(fitted, data)


def test_few_rows_cannot_tell():
    data = answers_with_one_ignorant_site()[:, :9]
    assert check_on_rows(fingerprint_embedding(), data) is None


def test_honest_embedding_passes_on_rows():
    fitted = made_up("deep-set", n_sites=K, n_classes=C)
    assert check_on_rows(fitted, answers()).share_k.max() < 0.4


def test_mlp_stack_is_not_checked_since_it_hides_nobody():
    assert check_participation(made_up("mlp-stack", n_sites=K, n_classes=C)) is None


def test_querier_refuses_a_saved_stack_that_reads_one_site(tmp_path):
    weights = np.zeros((K, C, C))
    weights[2] = np.eye(C)
    linear(weights).save(tmp_path / "bad")
    good = made_up("linear-stack", n_sites=K, n_classes=C)
    good.save(tmp_path / "good")
    with pytest.raises(ProtectionRefusedError):
        load_stack(tmp_path / "bad")
    assert load_stack(tmp_path / "good").stack == remember(good)
    assert isinstance(FittedAggregator.load(tmp_path / "bad"), FittedAggregator)


def test_one_site_has_all_of_any_direction():
    assert participation(np.random.default_rng(9).random((1, 6, 2))).direction_k == pytest.approx(
        [1.0]
    )
