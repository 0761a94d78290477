"""Conversions keep a model's answers, say how well, and refuse what does not fit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedinfer_flower.encrypted_query.layers import sklearn_stack, torch_stack
from fedinfer_flower.encrypted_query.network import MISSING_LOGIT, EncryptedNetwork
from fedinfer_flower.encrypted_query.plans import HIDDEN_LAYER, LINEAR
from fedinfer_flower.encrypted_query.polynomial import fit_units
from fedinfer_flower.encrypted_query.quadratic import QuadraticForm
from fedinfer_flower.errors import CapacityError, LabelSpaceError, ModelError

# Small networks on 300 rows do not converge in a second, and need not.
pytestmark = pytest.mark.filterwarnings("ignore:Stochastic Optimizer")


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    inputs, labels = load_digits(return_X_y=True)
    return inputs / 16.0, labels


def mlp(digits, activation, hidden=(16,), rows=slice(0, 600)):
    from sklearn.neural_network import MLPClassifier

    model = MLPClassifier(hidden, activation=activation, max_iter=60, random_state=0, alpha=0.01)
    return model.fit(digits[0][rows], digits[1][rows])


# -- polynomials -------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    coefficients=st.tuples(*[st.floats(-3, 3)] * 3),
    seed=st.integers(0, 2**16),
    shift=st.floats(-50, 50),
)
def test_polynomial_of_degree_two_is_recovered_exactly(coefficients, seed, shift):
    a, b, c = coefficients
    samples = np.random.default_rng(seed).normal(shift, 1.0, (40, 2))
    fit = fit_units(lambda h: a + b * h + c * h**2, samples)
    # Least squares in doubles on values up to 1e4.
    np.testing.assert_allclose(fit(samples), a + b * samples + c * samples**2, atol=1e-6)


def test_fit_of_relu_is_best_where_its_samples_are():
    rng = np.random.default_rng(0)
    samples = np.stack([rng.normal(3.0, 0.5, 500), rng.normal(-3.0, 0.5, 500)], axis=1)
    fit = fit_units(lambda h: np.maximum(h, 0.0), samples)
    # Units that are on, or off, nearly all the time: nearly exact; a joint fit is not.
    assert np.abs(fit(samples) - np.maximum(samples, 0.0)).mean() < 0.05


def test_share_outside_counts_what_the_fit_did_not_cover():
    fit = fit_units(np.tanh, np.linspace(-1, 1, 50)[:, None])
    assert fit.outside(np.array([[0.0], [1.4], [5.0], [-5.0]])) == 0.5


# -- forms -------------------------------------------------------------------------------


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # a function, without state
)
@given(seed=st.integers(0, 2**16), bound=st.floats(0.01, 100.0))
def test_bounds_hold_for_inputs_within_the_box(make_form, seed, bound):
    form = make_form(seed=seed)
    rows = np.random.default_rng(seed).uniform(-bound, bound, (50, 4))
    corners = np.sign(rows) * bound
    for inputs in (rows, corners):
        assert np.abs(form(inputs)).max() <= form.logit_bound(bound) * (1 + 1e-12)
        hidden = np.abs(inputs @ form.hidden_weights + form.hidden_bias).max()
        assert hidden <= form.hidden_bound(bound) * (1 + 1e-12)


def test_pruned_form_is_the_same_form(make_form):
    form = make_form()
    form.hidden_weights[:, 1] = 0.0
    rows = np.random.default_rng(1).normal(size=(5, 4))
    assert form.pruned().n_hidden == 2
    np.testing.assert_allclose(form.pruned()(rows), form(rows))


# -- conversions -------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "tanh", "logistic"])
def test_fitted_network_stays_within_a_point_of_its_model(digits, activation):
    inputs, labels = digits
    model = mlp(digits, activation, hidden=(32,), rows=slice(0, 1000))
    network = EncryptedNetwork.from_sklearn(model, inputs[1000:1300], labels[1000:1300])
    test, right = inputs[1300:], labels[1300:]

    clear = (model.predict(test) == right).mean()
    polynomial = (network.logits(test).argmax(axis=1) == right).mean()

    assert network.plan is HIDDEN_LAYER
    assert polynomial >= clear - 0.01  # five of 497 rows
    fidelity = network.fidelity
    assert fidelity.n_rows == 100
    assert fidelity.agreement >= 0.95
    assert 0.0 < fidelity.max_logit_error < 20.0
    assert fidelity.accuracy_clear is not None
    assert "agreement" in fidelity.summary()


def test_identity_network_and_linear_models_are_exact(digits):
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.linear_model import LogisticRegression

    inputs, labels = digits
    noisy = inputs + 0.01 * np.random.default_rng(0).normal(size=inputs.shape)
    models = (
        LogisticRegression(max_iter=200).fit(noisy[:500], labels[:500]),
        LinearDiscriminantAnalysis().fit(noisy[:500], labels[:500]),
        mlp(digits, "identity", hidden=(8, 8)),
    )
    for model in models:
        network = EncryptedNetwork.from_sklearn(model, noisy[500:600], labels[500:600])
        assert network.plan is LINEAR
        expected = np.log(np.maximum(model.predict_proba(noisy[600:700]), 1e-300))
        logits = network.logits(noisy[600:700])
        difference = logits - expected
        spread = difference - difference.mean(axis=1, keepdims=True)
        assert np.abs(spread[expected.min(axis=1) > -300]).max(initial=0.0) < 1e-6
        assert network.fidelity.agreement == 1.0


def test_two_classes_have_two_columns(digits):
    from sklearn.linear_model import LogisticRegression

    inputs, labels = digits
    rows = labels < 2
    for model in (LogisticRegression(), mlp((inputs[rows], labels[rows]), "relu", hidden=(4,))):
        model.fit(inputs[rows], labels[rows])
        network = EncryptedNetwork.from_sklearn(model, inputs[rows], labels[rows])
        assert network.form.n_classes == 2
        votes = network.logits(inputs[rows]).argmax(axis=1)
        # What was measured on a third of these rows holds on all of them, nearly.
        assert (votes == model.predict(inputs[rows])).mean() > 0.93


def test_pipeline_with_scalers_is_folded(digits):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import MinMaxScaler, StandardScaler

    inputs, labels = digits
    steps = (MinMaxScaler(), StandardScaler(), LogisticRegression(max_iter=300))
    model = make_pipeline(*steps).fit(inputs[:500], labels[:500])
    stack = sklearn_stack(model)
    np.testing.assert_allclose(
        stack.logits(inputs[500:600]), model.decision_function(inputs[500:600]), atol=1e-8
    )


def torch_models():
    import torch

    class Square(torch.nn.Module):
        def forward(self, x):
            return x * x

    torch.manual_seed(0)
    linear = torch.nn.Linear
    return {
        "square": torch.nn.Sequential(torch.nn.Flatten(), linear(4, 3), Square(), linear(3, 2)),
        "relu": torch.nn.Sequential(linear(4, 8), torch.nn.ReLU(), linear(8, 2)),
        "linear": torch.nn.Sequential(linear(4, 3), torch.nn.Dropout(), linear(3, 2)),
    }


@pytest.mark.parametrize("kind", ["square", "relu", "linear"])
def test_torch_network_is_converted(kind):
    torch = pytest.importorskip("torch")
    model = torch_models()[kind].eval()
    rows = np.random.default_rng(0).uniform(-1, 1, (300, 4))

    network = EncryptedNetwork.from_torch(model, rows, classes=("a", "b"), min_agreement=0.9)

    with torch.inference_mode():
        expected = model(torch.from_numpy(rows).float()).double().numpy()
    if kind == "relu":
        assert (network.logits(rows).argmax(1) == expected.argmax(1)).mean() > 0.9
        assert network.fidelity.activation_range is not None
    else:  # nothing is fitted: float32 against float64
        np.testing.assert_allclose(network.logits(rows), expected, atol=1e-5)


def test_torch_stacks_that_do_not_fit_are_refused():
    torch = pytest.importorskip("torch")
    nn = torch.nn
    refused = {
        "Conv2d": nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 2)),
        "Softmax": nn.Sequential(nn.Linear(4, 2), nn.Softmax(dim=1)),
        "3 linear layers": nn.Sequential(
            nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)
        ),
        "Linear": nn.Linear(4, 2),
        "BatchNorm1d": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)),
    }
    for word, model in refused.items():
        with pytest.raises(ModelError, match=word) as caught:
            torch_stack(model)
        assert caught.value.hint


def test_sklearn_models_that_do_not_fit_are_refused(digits):
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Normalizer

    inputs, labels = digits
    refused = {
        "RandomForest": RandomForestClassifier(5).fit(inputs, labels),
        "2 hidden layers": mlp(digits, "relu", hidden=(4, 4)),
        "not fitted": LogisticRegression(),
        "Normalizer": make_pipeline(Normalizer(), LogisticRegression()).fit(inputs, labels),
    }
    for word, model in refused.items():
        with pytest.raises(ModelError, match=word) as caught:
            EncryptedNetwork.from_sklearn(model, inputs[:100])
        assert caught.value.hint


def test_form_below_the_threshold_is_refused_and_reported(digits):
    inputs, labels = digits
    model = mlp(digits, "relu")
    with pytest.raises(ModelError, match="agrees with the model on"):
        EncryptedNetwork.from_sklearn(model, inputs[600:900], labels[600:900], min_agreement=1.01)


def test_activations_outside_of_the_fit_are_refused(digits):
    inputs, _ = digits
    rows = inputs[600:900].copy()
    rows[2::3] *= 20.0  # every third row is left out of the fit
    with pytest.raises(ModelError, match="outside the"):
        EncryptedNetwork.from_sklearn(mlp(digits, "relu"), rows)


def test_bad_calibration_rows_are_refused(digits):
    inputs, _ = digits
    model = mlp(digits, "relu")
    for rows in (inputs[:5], inputs[:100, :10], inputs[0], np.full((50, 64), np.nan)):
        with pytest.raises(ModelError, match="calibration inputs"):
            EncryptedNetwork.from_sklearn(model, rows)


def test_network_that_is_too_wide_is_refused():
    rng = np.random.default_rng(0)
    form = type("Fitted", (), {})()
    form.__class__.__name__ = "LogisticRegression"
    form.classes_, form.coef_, form.intercept_ = (
        np.arange(2),
        rng.normal(size=(2, 2000)),
        np.zeros(2),
    )
    with pytest.raises(ModelError, match="too wide"):
        EncryptedNetwork.from_sklearn(form, rng.normal(size=(30, 2000)))


# -- queries -----------------------------------------------------------------------------


def linear_network(weights, offset, classes, rows):
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression()
    model.classes_ = np.array(classes)
    model.coef_, model.intercept_ = np.asarray(weights, float).T, np.asarray(offset, float)
    return EncryptedNetwork.from_sklearn(model, rows)


def test_columns_follow_the_query_and_absent_classes_are_low():
    rows = np.random.default_rng(0).uniform(-1, 1, (30, 2))
    network = linear_network([[1, 2, 3], [0, 1, -1]], [0.5, 0, 0], ["a", "b", "c"], rows)

    form = network.aligned(("c", "x", "a"), temperature=2.0)

    raw = network.logits(rows)[:, [2, 0]] / 2.0
    centred = raw - raw.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(form(rows)[:, [0, 2]], centred, atol=1e-12)
    np.testing.assert_allclose(form(rows)[:, 1], MISSING_LOGIT)
    with pytest.raises(LabelSpaceError):
        network.aligned(("x", "y"))


def test_query_is_refused_before_anything_can_wrap():
    rows = np.random.default_rng(0).uniform(-1, 1, (30, 2))
    network = linear_network([[1, -1, 0], [0, 1, -1]], [0, 0, 0], ["a", "b", "c"], rows)
    form = network.aligned(("a", "b", "c"))
    network.check_query(form, LINEAR, input_bound=1.0, n_sites=10)
    with pytest.raises(ModelError, match="declares inputs"):
        network.check_query(form, LINEAR, input_bound=50.0, n_sites=3)
    with pytest.raises(CapacityError, match="can reach"):
        network.check_query(form, LINEAR, input_bound=1.0, n_sites=100_000)


def test_hidden_layer_is_refused_under_the_plan_for_linear_models(digits):
    network = EncryptedNetwork.from_sklearn(mlp(digits, "relu"), digits[0][600:900])
    with pytest.raises(ModelError, match="hidden layer") as caught:
        network.check_query(network.form, LINEAR, input_bound=1.0, n_sites=3)
    assert caught.value.hint == "ask with depth=2"


def test_measured_error_is_covered_by_more_than_the_least_margin(digits):
    pytest.importorskip("tenseal")
    inputs, _ = digits
    network = EncryptedNetwork.from_sklearn(mlp(digits, "relu"), inputs[600:900])
    form = network.aligned(network.classes)
    flooding = network.flooding(form, HIDDEN_LAYER, inputs[600:900], bits=10)
    assert flooding.margin_bits > 13.0
    scale = max(1.0, np.sqrt((form(inputs[600:900]) ** 2).mean()))
    assert flooding.std == pytest.approx(2.0**-10 * scale, rel=0.05)
    assert isinstance(form, QuadraticForm)
