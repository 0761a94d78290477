"""Encrypted evaluation equals evaluation in clear, and nothing passes the gate unchecked."""

from __future__ import annotations

import numpy as np
import pytest

from fedinfer_flower.encrypted_query.ckks_batch import (
    PublicKeys,
    ReplySum,
    SecretKeys,
    public_key_bytes,
    query_bytes,
    reply_bytes,
)
from fedinfer_flower.encrypted_query.plans import HIDDEN_LAYER, LINEAR
from fedinfer_flower.encrypted_query.quadratic import QuadraticForm
from fedinfer_flower.errors import (
    BindingError,
    CapacityError,
    EnvelopeError,
    InvalidCiphertextError,
)

pytest.importorskip("tenseal")

ROWS = np.random.default_rng(3).uniform(-1.0, 1.0, (7, 4))
# Measured errors at this scale are below 1e-7; ten times as much is still far from any
# mistake in a bias, a scale or a weight, which would be of the size of the logits.
TOLERANCE = 1e-6


def silence(plan, n_classes):
    return np.zeros((n_classes, plan.slots), dtype=np.complex128)


def evaluated(keys, public, plan, form, rows=ROWS):
    reply = public[plan].evaluate(
        form, keys[plan].encrypt(rows), noise=silence(plan, form.n_classes)
    )
    assert len(reply) == reply_bytes(plan, form.n_classes)
    return keys[plan].decrypt(reply, n_classes=form.n_classes)[:, : len(rows)].real.T


@pytest.mark.parametrize("linear_part", [True, False])
def test_hidden_layer_with_biases_equals_clear(keys, public, make_form, linear_part):
    form = make_form(linear_part=linear_part)
    np.testing.assert_allclose(
        evaluated(keys, public, HIDDEN_LAYER, form), form(ROWS), atol=TOLERANCE
    )


def test_biases_alone_come_through(keys, public):
    # Folding a bias in the wrong place is silently wrong: here everything else is zero.
    form = QuadraticForm(
        hidden_weights=np.full((4, 1), 1e-9),
        hidden_bias=np.array([3.0]),
        square_weights=np.array([[2.0]]),
        linear_weights=np.zeros((4, 1)),
        offset=np.array([-5.0]),
    )
    np.testing.assert_allclose(
        evaluated(keys, public, HIDDEN_LAYER, form), np.full((7, 1), 13.0), atol=1e-6
    )


@pytest.mark.parametrize("plan", [LINEAR, HIDDEN_LAYER], ids=lambda plan: plan.name)
def test_linear_model_equals_clear_under_both_plans(keys, public, make_form, plan):
    form = make_form(n_hidden=0)
    np.testing.assert_allclose(evaluated(keys, public, plan, form), form(ROWS), atol=TOLERANCE)


def test_form_of_zeros_answers_its_offset(keys, public):
    form = QuadraticForm.linear(np.zeros((4, 2)), np.array([1.5, -2.5]))
    np.testing.assert_allclose(
        evaluated(keys, public, LINEAR, form), np.tile(form.offset, (7, 1)), atol=TOLERANCE
    )


def test_full_batch_equals_clear(keys, public, make_form):
    rows = np.random.default_rng(0).uniform(-1, 1, (HIDDEN_LAYER.slots, 4))
    form = make_form()
    opened = evaluated(keys, public, HIDDEN_LAYER, form, rows)
    np.testing.assert_allclose(opened, form(rows), atol=TOLERANCE)


def test_batch_of_more_rows_than_slots_is_refused(keys):
    with pytest.raises(CapacityError):
        keys[LINEAR].encrypt(np.zeros((LINEAR.slots + 1, 1)))


def test_values_beyond_the_capacity_wrap_silently(keys, public):
    # Why bounds are checked before: nothing notices here. All slots are alike, which makes
    # the largest coefficient as large as the value itself.
    half = 4.0 * LINEAR.capacity
    form = QuadraticForm.linear(np.full((4, 1), 1.5 * half / 4.0), np.zeros(1))
    opened = evaluated(keys, public, LINEAR, form, np.ones((LINEAR.slots, 4)))
    np.testing.assert_allclose(opened, np.full((LINEAR.slots, 1), -0.5 * half), rtol=1e-6)


def test_replies_of_sites_add_up(keys, public, make_form):
    forms = [make_form(seed=seed) for seed in range(3)]
    query = keys[HIDDEN_LAYER].encrypt(ROWS)
    total = ReplySum(HIDDEN_LAYER, n_classes=2)
    for form in forms:
        total.add(public[HIDDEN_LAYER].evaluate(form, query, noise=silence(HIDDEN_LAYER, 2)))
    opened = keys[HIDDEN_LAYER].decrypt(total.total(), n_classes=2)[:, :7].real.T
    assert total.n_sites == 3
    np.testing.assert_allclose(opened, sum(form(ROWS) for form in forms), atol=3 * TOLERANCE)


def test_refused_reply_leaves_no_trace_in_the_sum(keys, public, make_form):
    query, form = keys[HIDDEN_LAYER].encrypt(ROWS), make_form()
    reply = public[HIDDEN_LAYER].evaluate(form, query, noise=silence(HIDDEN_LAYER, 2))
    total = ReplySum(HIDDEN_LAYER, n_classes=2)
    total.add(reply)
    for bad in (reply[:-1], reply + b"\0", b"\xff" * len(reply), bytes(len(reply))):
        with pytest.raises(InvalidCiphertextError):
            total.add(bad)
    assert total.n_sites == 1
    assert total.total() == reply


def test_query_of_another_size_is_refused(public, keys, make_form):
    query = keys[LINEAR].encrypt(ROWS)
    assert len(query) == query_bytes(LINEAR, 4)
    for bad in (query[:-1], query + b"\0", b"", b"\xff" * len(query)):
        with pytest.raises(InvalidCiphertextError):
            public[LINEAR].evaluate(make_form(n_hidden=0), bad, noise=silence(LINEAR, 2))


def test_reply_opened_with_another_key_is_garbage(keys, public, make_form):
    form = make_form(n_hidden=0)
    reply = public[LINEAR].evaluate(form, keys[LINEAR].encrypt(ROWS), noise=silence(LINEAR, 2))
    opened = SecretKeys(LINEAR).decrypt(reply, n_classes=2)[:, :7].real.T
    # Uniform in the modulus: far from the logits, and mostly beyond the capacity.
    assert np.abs(opened - form(ROWS)).min() > 1.0


@pytest.mark.parametrize("plan", [LINEAR, HIDDEN_LAYER], ids=lambda plan: plan.name)
def test_public_bytes_have_one_size_and_hold_no_secret(keys, plan):
    held = keys[plan]
    assert len(held.public_key) == public_key_bytes(plan)
    assert "secret hidden" in repr(held)
    assert held.key_id not in (SecretKeys(plan).key_id, "")
    # Public bytes are residues and a header of five bytes: they load as nothing else.
    PublicKeys(plan, held.public_key)


def test_public_bytes_of_another_form_are_refused(keys):
    good = keys[LINEAR].public_key
    with pytest.raises(EnvelopeError):
        PublicKeys(LINEAR, good[:3])
    with pytest.raises(EnvelopeError):
        PublicKeys(LINEAR, b"x" + good[1:])
    with pytest.raises(BindingError):
        PublicKeys(HIDDEN_LAYER, good)
    for bad in (good[:-1], good + b"\0", good[:5] + b"\xff" * (len(good) - 5)):
        with pytest.raises(InvalidCiphertextError):
            PublicKeys(LINEAR, bad)
