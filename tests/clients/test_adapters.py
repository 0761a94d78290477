"""Local models of any kind behind one face, and label spaces that differ."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression

from fedinfer_flower.clients.adapters import adapt
from fedinfer_flower.clients.adapters.base import class_name
from fedinfer_flower.clients.label_space import align_logits
from fedinfer_flower.clients.local_model import LocalModel
from fedinfer_flower.ensemble.base import PROBABILITY_FLOOR, softmax
from fedinfer_flower.errors import LabelSpaceError, ModelError

torch = pytest.importorskip("torch")

RNG = np.random.default_rng(3)
ROWS = RNG.standard_normal((40, 3))
LABELS = np.where(ROWS[:, 0] > 0, 7, np.where(ROWS[:, 1] > 0, 3, 10))


# -- scikit-learn ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [LogisticRegression, RandomForestClassifier])
def test_sklearn_adapter_gives_log_probabilities_in_the_models_order(kind):
    estimator = kind(random_state=0).fit(ROWS, LABELS)

    adapter = adapt(estimator, classes=None, outputs="probabilities")

    assert adapter.classes == ("3", "7", "10")
    assert adapter.kind == kind.__name__
    expected = np.maximum(estimator.predict_proba(ROWS), PROBABILITY_FLOOR)
    np.testing.assert_allclose(np.exp(adapter.logits(ROWS)), expected, rtol=1e-12)


def test_sklearn_adapter_takes_names_for_its_columns():
    estimator = LogisticRegression().fit(ROWS, LABELS)
    assert adapt(estimator, classes=["x", "y", "z"], outputs="logits").classes == ("x", "y", "z")
    with pytest.raises(ModelError, match="3 classes, 2 are named"):
        adapt(estimator, classes=["x", "y"], outputs="logits")


def test_sklearn_estimator_that_is_not_fitted_is_refused():
    with pytest.raises(ModelError) as caught:
        adapt(LogisticRegression(), classes=None, outputs="probabilities")
    assert "fit the estimator" in caught.value.hint


def test_sklearn_model_may_be_returned_bare(make_site):
    estimator = LogisticRegression().fit(ROWS, LABELS)
    site = make_site(lambda context: estimator)
    scores = site.scores(inputs=ROWS, classes=("3", "7", "10"))
    # float32 on the way: half a unit in the last place of numbers up to 1.
    np.testing.assert_allclose(scores, estimator.predict_proba(ROWS), rtol=0.0, atol=1e-5)


# -- torch -------------------------------------------------------------------------------


class Net(torch.nn.Module):
    """Dropout, so that evaluation mode shows; notes what it was given."""

    def __init__(self, dtype) -> None:
        super().__init__()
        self.drop = torch.nn.Dropout(0.5)
        self.linear = torch.nn.Linear(3, 2, dtype=dtype)
        self.seen: list[tuple[object, bool]] = []

    def forward(self, batch):
        self.seen.append((batch.dtype, torch.is_inference_mode_enabled()))
        return self.linear(self.drop(batch))


@pytest.mark.parametrize("inputs", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_torch_adapter_runs_in_evaluation_mode_and_the_modules_dtype(dtype, inputs):
    torch.manual_seed(0)
    net = Net(dtype).train()
    adapter = adapt(net, classes=["a", "b"], outputs="probabilities")
    rows = ROWS.astype(inputs)
    rows.flags.writeable = False  # as the bytes of a message are

    first, second = adapter.logits(rows), adapter.logits(rows)

    assert not net.training
    assert net.seen == [(dtype, True)] * 2
    assert first.dtype == np.float64
    np.testing.assert_array_equal(first, second)  # no dropout
    weight, bias = (p.detach().double().numpy() for p in (net.linear.weight, net.linear.bias))
    expected = torch.tensor(rows).to(dtype).double().numpy() @ weight.T + bias
    # bfloat16 keeps 8 bits: half a percent of values up to about 5.
    atol = 0.05 if dtype is torch.bfloat16 else 1e-5
    np.testing.assert_allclose(first, expected, rtol=0.0, atol=atol)


def test_torch_adapter_keeps_whole_numbers_whole():
    net = torch.nn.Sequential(torch.nn.Embedding(5, 2), torch.nn.Flatten())
    out = adapt(net, classes=["a", "b"], outputs="logits").logits(np.array([[1], [4]]))
    np.testing.assert_allclose(out, net[0].weight.detach().numpy()[[1, 4]])


def test_torch_module_without_parameters_works():
    adapter = adapt(torch.nn.Softmax(dim=1), classes=["a", "b"], outputs="logits")
    assert adapter.logits(np.array([[0.0, 0.0]])).tolist() == [[0.5, 0.5]]


def test_torch_module_without_classes_is_refused():
    with pytest.raises(ModelError, match="does not name its classes"):
        adapt(Net(torch.float32), classes=None, outputs="logits")


# -- callables ---------------------------------------------------------------------------


def test_callable_of_probabilities_and_of_logits_agree():
    logits = np.array([[1.0, 2.0], [0.5, -3.0]])
    by_logits = adapt(lambda rows: logits, classes=["a", "b"], outputs="logits")
    by_probabilities = adapt(
        lambda rows: softmax(logits), classes=["a", "b"], outputs="probabilities"
    )
    np.testing.assert_array_equal(by_logits.logits(ROWS), logits)
    np.testing.assert_allclose(softmax(by_probabilities.logits(ROWS)), softmax(logits), rtol=1e-12)


def test_callable_that_says_zero_gives_finite_logits():
    adapter = adapt(lambda rows: [[0.0, 1.0]], classes=["a", "b"], outputs="probabilities")
    np.testing.assert_allclose(adapter.logits(ROWS), [[np.log(PROBABILITY_FLOOR), 0.0]])


@pytest.mark.parametrize(
    "model", [3, "text", None, [1], object()], ids=lambda model: type(model).__name__
)
def test_model_that_nothing_fits_is_refused(model):
    with pytest.raises(ModelError, match="no adapter fits"):
        adapt(model, classes=["a"], outputs="logits")


# -- label spaces ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [3, 3.0, "3", np.int64(3), np.int8(3), np.float32(3.0), np.str_("3")], ids=repr
)
def test_class_names_of_the_same_class_are_the_same(value):
    assert class_name(value) == "3"


def test_class_names_of_different_classes_differ():
    assert len({class_name(v) for v in (3, 3.5, "03", True, "3 ", -3)}) == 6


def test_aligned_logits_drop_and_add_classes_by_name():
    logits = np.log([[0.5, 0.3, 0.2]])

    aligned = align_logits(logits, ("c", "a", "z"), ("a", "b", "c"))

    # Of z nobody asked: the rest is normalised. Of b the model knows nothing.
    np.testing.assert_allclose(np.exp(aligned), [[0.375, PROBABILITY_FLOOR, 0.625]], rtol=1e-12)


def test_sites_with_other_orders_and_kinds_of_names_answer_alike(make_site):
    probabilities = {"1": 0.6, "2": 0.3, "3": 0.1}
    answers = []
    for names in (["1", "2", "3"], [3, 1, 2], [2.0, 3.0, 1.0], np.array([3, 2, 1])):
        columns = [probabilities[class_name(name)] for name in names]

        def load(context, names=names, columns=columns):
            return LocalModel(model=lambda rows: [columns] * len(rows), classes=list(names))

        answers.append(make_site(load).scores(classes=("1", "2", "3")))
    for answer in answers:
        np.testing.assert_array_equal(answer, answers[0])
    np.testing.assert_allclose(answers[0], [[0.6, 0.3, 0.1]] * 2, rtol=1e-6)


def test_site_that_shares_no_class_gives_label_space_error(make_site):
    site = make_site(lambda context: LocalModel(model=lambda rows: rows, classes=["x", "y"]))
    error = site.error(classes=("a", "b"))
    assert isinstance(error, LabelSpaceError)
    assert error.code == "FI309"


def test_site_that_knows_one_class_of_the_query_says_so_with_certainty(make_site):
    site = make_site(
        lambda context: LocalModel(model=lambda rows: [[0.2, 0.8]] * len(rows), classes=["x", "b"])
    )
    # The other class keeps the floor: 1e-6, renormalised.
    np.testing.assert_allclose(site.scores(), [[0.0, 1.0]] * 2, rtol=0.0, atol=2e-6)
