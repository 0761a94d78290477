"""`FederatedClassifier` where scikit-learn wants a classifier."""

from __future__ import annotations

import numpy as np
import pytest

from fedinfer_flower.errors import ConfigError, InvalidValueError, LabelSpaceError
from fedinfer_flower.querier.federated_classifier import FederatedClassifier
from fedinfer_flower.querier.gateway_client import Gateway

from .conftest import CLASSES, LABELS, ROWS

sklearn = pytest.importorskip("sklearn")


@pytest.fixture
def classifier(site):
    with Gateway(site.url, api_key=site.key, timeout_s=20.0) as gateway:
        yield FederatedClassifier(gateway, model="triage", seal=False)


def test_predicts_probabilities_in_the_order_of_its_classes(classifier):
    found = classifier.predict_proba(ROWS)
    assert found.shape == (len(ROWS), len(CLASSES))
    assert found.sum(axis=1) == pytest.approx(1.0)
    assert classifier.classes_.tolist() == sorted(CLASSES)
    assert found.argmax(axis=1).tolist() == LABELS.tolist()
    assert classifier.predict(ROWS).tolist() == [CLASSES[i] for i in LABELS]


def test_sealed_predictions_are_the_same(classifier, site):
    clear = classifier.predict_proba(ROWS)
    sealed = classifier.set_params(seal=True).predict_proba(ROWS)
    # secagg adds whole numbers on a grid: 1e-3 is far coarser than that.
    assert sealed == pytest.approx(clear, abs=1e-3)


def test_many_rows_are_asked_in_several_queries(classifier, site):
    classifier.set_params(max_rows=4)
    assert len(classifier.predict(ROWS)) == len(ROWS)
    assert site.board.submitted == 2


def test_fit_learns_nothing_and_takes_the_type_of_the_labels(classifier, site):
    assert classifier.fit(ROWS, LABELS) is classifier
    assert site.board.submitted == 0
    assert classifier.predict(ROWS).tolist() == LABELS.tolist()
    assert classifier.score(ROWS, LABELS) == 1.0


def test_fit_refuses_labels_that_are_no_classes(classifier):
    with pytest.raises(LabelSpaceError):
        classifier.fit(ROWS, LABELS + 7)


@pytest.mark.parametrize(
    "rows",
    [np.zeros(4), np.zeros((0, 4)), np.array([["a"]]), np.array([[object()]])],
    ids=["one row", "none", "text", "objects"],
)
def test_rows_that_are_no_numbers_are_refused(classifier, rows):
    with pytest.raises(InvalidValueError):
        classifier.predict(rows)


def test_classifier_without_a_gateway_says_so_when_it_is_used():
    with pytest.raises(ConfigError):
        FederatedClassifier().predict(ROWS)


def test_works_in_a_pipeline_and_in_cross_validation(classifier):
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer

    steps = make_pipeline(FunctionTransformer(), classifier)
    assert steps.fit(ROWS, LABELS).score(ROWS, LABELS) == 1.0
    rows, labels = np.concatenate([ROWS] * 2), np.concatenate([LABELS] * 2)
    assert cross_val_score(steps, rows, labels, cv=2).tolist() == [1.0, 1.0]


def test_clone_shares_the_gateway_and_copies_the_parameters(classifier):
    copied = sklearn.base.clone(classifier)
    assert copied is not classifier
    assert copied.get_params() == classifier.get_params()
    assert sklearn.base.is_classifier(copied)
    assert sklearn.utils.get_tags(copied).requires_fit is False
    sklearn.utils.validation.check_is_fitted(copied)


@pytest.mark.parametrize(
    "check",
    [
        "check_parameters_default_constructible",
        "check_get_params_invariance",
        "check_set_params",
        "check_no_attributes_set_in_init",
        "check_estimator_cloneable",
        "check_estimator_repr",
        "check_valid_tag_types",
    ],
)
def test_scikit_learns_own_checks_that_need_no_training_pass(check):
    from sklearn.utils import estimator_checks

    getattr(estimator_checks, check)("FederatedClassifier", FederatedClassifier())


def test_unknown_parameter_is_refused():
    with pytest.raises(ValueError, match="no parameter"):
        FederatedClassifier().set_params(models="triage")
