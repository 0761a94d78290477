"""What flooding hides: each attack works against a reply without it."""

from __future__ import annotations

import numpy as np
import pytest

from fedinfer_flower.encrypted_query.flooding import MIN_MARGIN_BITS, Flooding
from fedinfer_flower.encrypted_query.plans import HIDDEN_LAYER, LINEAR
from fedinfer_flower.encrypted_query.quadratic import QuadraticForm
from fedinfer_flower.errors import CapacityError, InvalidValueError

pytest.importorskip("tenseal")

FLOODING = Flooding(std=2.0**-8, error_rms=2.0**-26)


def test_margin_is_the_ratio_in_bits():
    assert FLOODING.margin_bits == 18.0


def test_distance_bounds_the_exact_value_and_grows_with_the_logits():
    from math import erf, sqrt

    for n in (1, 100, 5000):
        shift = sqrt(n) * FLOODING.error_rms / FLOODING.std
        exact = erf(shift / (2.0 * sqrt(2.0)))  # 2 Phi(d / 2) - 1
        assert exact <= FLOODING.distance(n) <= 1.01 * exact


def test_too_little_noise_is_refused():
    with pytest.raises(CapacityError, match="bits"):
        Flooding(std=1.0, error_rms=2.0 ** (1.0 - MIN_MARGIN_BITS))
    with pytest.raises(InvalidValueError):
        Flooding.of_scale(1.0, error_rms=1e-9, tolerance_bits=0)


def test_noise_is_small_where_a_query_is_and_large_elsewhere():
    noise = FLOODING.draw(LINEAR, n_classes=4, n_queries=500, n_sites=1)
    assert noise.shape == (4, LINEAR.slots)
    spill = LINEAR.spill_std(1)
    # 2000 samples and more: the sample deviation is within 10 % beyond six of its own.
    assert noise[:, :500].real.std() == pytest.approx(FLOODING.std, rel=0.1)
    assert noise[:, 500:].real.std() == pytest.approx(spill, rel=0.1)
    assert noise.imag.std() == pytest.approx(spill, rel=0.1)
    again = FLOODING.draw(LINEAR, n_classes=4, n_queries=500, n_sites=1)
    assert not np.array_equal(noise, again)


def test_large_noise_leaves_no_grid_on_which_the_error_would_show():
    noise = FLOODING.draw(LINEAR, n_classes=1, n_queries=1, n_sites=1)
    step = LINEAR.spill_std(1) * 2.0**-39
    assert step < FLOODING.std / 64  # the fine noise spans many steps
    for part in (noise.real[0, 1:], noise.imag[0]):
        remainder = part / step - np.rint(part / step)
        # Uniform in [-1/2, 1/2]: deviation 0.2887, of a sample of 2047 within 0.02 of that.
        assert remainder.std() == pytest.approx(12.0**-0.5, abs=0.02)


@pytest.mark.parametrize("n_sites", [1, 16])
@pytest.mark.parametrize("plan", [LINEAR, HIDDEN_LAYER], ids=lambda plan: plan.name)
def test_largest_noise_and_largest_logits_fit_together(keys, public, plan, n_sites):
    # All logits of the cohort at the capacity, beside the noise of all sites.
    form = QuadraticForm.linear(np.zeros((1, 1)), np.array([plan.capacity]))
    drawn = [FLOODING.draw(plan, n_classes=1, n_queries=5, n_sites=n_sites) for _ in range(n_sites)]
    reply = public[plan].evaluate(form, keys[plan].encrypt(np.zeros((5, 1))), noise=sum(drawn))
    opened = keys[plan].decrypt(reply, n_classes=1)[0, :5].real
    # Eight deviations of the noise, and what floats lose beside numbers of 2**22.
    assert np.abs(opened - plan.capacity).max() < 8 * FLOODING.std * n_sites**0.5 + 1e-6


def smuggled_weights(keys, public, noise):
    """Ask one row, and in further slots one row for each feature; read the weights off."""
    form = QuadraticForm.linear(np.array([[0.75], [-1.25], [0.5]]), np.array([2.0]))
    rows = np.vstack([np.zeros(3), np.eye(3)])
    reply = public[LINEAR].evaluate(form, keys[LINEAR].encrypt(rows), noise=noise)
    opened = keys[LINEAR].decrypt(reply, n_classes=1)[0].real
    return opened[0], opened[1:4] - opened[0]


def test_further_rows_in_unused_slots_read_all_weights_without_flooding(keys, public):
    answer, weights = smuggled_weights(
        keys, public, np.zeros((1, LINEAR.slots), dtype=np.complex128)
    )
    assert answer == pytest.approx(2.0, abs=1e-5)
    np.testing.assert_allclose(weights, [0.75, -1.25, 0.5], atol=1e-5)


def test_further_rows_in_unused_slots_are_drowned_by_flooding(keys, public):
    noise = FLOODING.draw(LINEAR, n_classes=1, n_queries=1, n_sites=1)
    answer, weights = smuggled_weights(keys, public, noise)
    assert answer == pytest.approx(2.0, abs=8 * FLOODING.std)
    # Noise of deviation 2**14 and more: all three within 10 happens once in 2**30.
    assert np.abs(weights - [0.75, -1.25, 0.5]).max() > 10.0


def weight_from_errors(keys, public, plan, noise):
    """Estimate a weight from the reply's errors, as the holder of the key can.

    Both inputs are 1 in every row and the weights cancel: the logits, all zero, say nothing
    about them. The errors of the query are known to the querier, and come back multiplied.
    """
    rows = np.ones((plan.slots, 2))
    form = QuadraticForm.linear(np.array([[2000.0], [-2000.0]]), np.array([0.0]))
    query = keys[plan].encrypt(rows)
    engine, decryptor = keys[plan]._engine, keys[plan]._decryptor
    own = []
    for one in engine.ciphertexts(query, count=2, primes=plan.primes):
        plain = engine.seal.Plaintext()
        decryptor.decrypt(one, plain)
        own.append(np.array(engine.encoder.decode_complex(plain)) - 1.0)
    reply = public[plan].evaluate(form, query, noise=noise)
    error = keys[plan].decrypt(reply, n_classes=1)[0]
    known = np.stack(own, axis=1)
    return np.linalg.lstsq(known, error, rcond=None)[0].real


def test_errors_of_a_reply_give_a_weight_away_without_flooding(keys, public):
    silence = np.zeros((1, LINEAR.slots), dtype=np.complex128)
    found = weight_from_errors(keys, public, LINEAR, silence)
    # The estimate has a deviation of about 2: errors of rounding over 2048 complex slots.
    np.testing.assert_allclose(found, [2000.0, -2000.0], atol=40.0)


def test_errors_of_a_reply_give_no_weight_away_with_flooding(keys, public):
    noise = FLOODING.draw(LINEAR, n_classes=1, n_queries=LINEAR.slots, n_sites=1)
    found = weight_from_errors(keys, public, LINEAR, noise)
    # Now the deviation is above 1e5: an estimate within 1e3 would be chance, twice 1 %.
    assert np.abs(found - [2000.0, -2000.0]).max() > 1e3
