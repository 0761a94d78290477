"""One site's step: gradients are right, and their mean is the gradient of all rows."""

import numpy as np
import pytest

from fedinfer_flower.clients.stack_training import local_step, stack_logits
from fedinfer_flower.ensemble.stack_shapes import KINDS
from fedinfer_flower.errors import InvalidValueError

from .conftest import made_up

K, C = 4, 3


def rows_of(n_rows, seed):
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.ones(C), (K, n_rows)), rng.integers(0, C, n_rows)


def loss_of(kind, arrays, answers, labels):
    logits = stack_logits(kind, arrays, answers)
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return -log_p[np.arange(len(labels)), labels].mean()


@pytest.mark.parametrize("kind", KINDS)
def test_step_follows_the_numerical_gradient(kind):
    arrays = dict(made_up(kind, n_sites=K, n_classes=C).arrays)
    answers, labels = rows_of(20, seed=1)

    moved, loss = local_step(kind, arrays, answers, labels, decay=0.0)

    assert loss == pytest.approx(loss_of(kind, arrays, answers, labels))
    rng = np.random.default_rng(0)
    for name, array in arrays.items():
        for _ in range(3):
            at = tuple(rng.integers(0, n) for n in array.shape)
            step = np.zeros(array.shape)
            step[at] = 1e-5
            up = loss_of(kind, arrays | {name: array + step}, answers, labels)
            down = loss_of(kind, arrays | {name: array - step}, answers, labels)
            # Central differences of step 1e-5 are right to about 1e-9 here.
            assert array[at] - moved[name][at] == pytest.approx((up - down) / 2e-5, abs=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_weighted_mean_of_the_sites_steps_is_the_step_on_all_rows(kind):
    arrays = dict(made_up(kind, n_sites=K, n_classes=C).arrays)
    parts = [rows_of(n, seed=n) for n in (7, 12, 31)]

    steps = [local_step(kind, arrays, a, y)[0] for a, y in parts]
    pooled, _ = local_step(
        kind,
        arrays,
        np.concatenate([a for a, _ in parts], axis=1),
        np.concatenate([y for _, y in parts]),
    )

    for name in arrays:
        mean = sum(n * s[name] for n, s in zip((7, 12, 31), steps, strict=True)) / 50
        # The same float64 sums in another order.
        assert np.allclose(mean, pooled[name], rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_lower_the_loss(kind):
    arrays = dict(made_up(kind, n_sites=K, n_classes=C).arrays)
    answers, labels = rows_of(40, seed=2)
    before = loss_of(kind, arrays, answers, labels)
    moved, _ = local_step(kind, arrays, answers, labels, steps=20, learning_rate=0.1)
    assert loss_of(kind, moved, answers, labels) < before


def test_step_that_diverges_is_a_typed_error():
    arrays = dict(made_up("linear-stack", n_sites=K, n_classes=C).arrays)
    answers, labels = rows_of(5, seed=3)
    with np.errstate(all="ignore"), pytest.raises(InvalidValueError, match="diverged"):
        local_step(
            "linear-stack", arrays, answers, labels, steps=400, learning_rate=99.0, decay=1.0
        )


def test_bias_gradient_shows_a_site_of_one_class_which_it_is():
    """What the coordinator can read of a site's labels; `FedStack` says so."""
    arrays = dict(made_up("linear-stack", n_sites=K, n_classes=C).arrays)
    answers, _ = rows_of(30, seed=4)
    for label in range(C):
        moved, _ = local_step("linear-stack", arrays, answers, np.full(30, label))
        risen = (moved["bias_kc"] - arrays["bias_kc"]).sum(axis=0) > 0.0
        assert risen.tolist() == [c == label for c in range(C)]
