"""`FederatedClassifier`: a federation with the face of a scikit-learn classifier."""

from __future__ import annotations

import importlib
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import ConfigError, InvalidValueError, LabelSpaceError
from fedinfer_flower.planning.label_space import shared_classes
from fedinfer_flower.privacy.base import Protection
from fedinfer_flower.querier.gateway_client import Gateway
from fedinfer_flower.query import Prediction
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.pins import Pins

__all__ = ["FederatedClassifier"]

_PARAMETERS: Final = (
    *("gateway", "model", "seal", "protection", "pins", "identity"),
    *("max_rows", "timeout_s"),
)


class FederatedClassifier:
    """Let a federation stand where scikit-learn wants a classifier.

    It is trained already: `fit` checks that the labels are classes of the federation, and
    learns nothing. Every call of `predict` asks the sites, which charge for each row, in
    money and in privacy budget: a cross-validation with 5 folds asks every row once, a grid
    search many times.

    Parameters
    ----------
    gateway : Gateway
    model : str
        A name out of `Gateway.models`.
    seal, protection, pins, identity, timeout_s
        As for `Gateway.ask`.
    max_rows : int
        Most rows in one query; more are asked one query after the other.

    Privacy
    -------
    As for `Gateway.ask`. The labels given to `fit` and to scorers stay in this process.

    Examples
    --------
    >>> gateway = Gateway("https://gateway.example:8443", api_key="fik_0a1b2c3d_secret")
    >>> classifier = FederatedClassifier(gateway, model="triage")
    >>> sorted(classifier.get_params())[:3]
    ['gateway', 'identity', 'max_rows']
    """

    _estimator_type = "classifier"

    def __init__(
        self,
        gateway: Gateway | None = None,
        *,
        model: str = "",
        seal: bool = True,
        protection: str | Protection | None = None,
        pins: Pins | None = None,
        identity: Identity | None = None,
        max_rows: int = 1024,
        timeout_s: float | None = None,
    ) -> None:
        # As scikit-learn wants it: kept as given, checked when used.
        self.gateway = gateway
        self.model = model
        self.seal = seal
        self.protection = protection
        self.pins = pins
        self.identity = identity
        self.max_rows = max_rows
        self.timeout_s = timeout_s

    def __repr__(self) -> str:
        return f"FederatedClassifier({self.gateway!r}, model={self.model!r}, seal={self.seal!r})"

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike | None = None) -> Self:
        """Check that the labels are classes of the federation; nothing is learnt or sent.

        After it, `predict` returns labels of the type of `y`.

        Raises
        ------
        LabelSpaceError
            If a label is no class of the federation.
        """
        rows = _rows(X)
        self.n_features_in_ = int(rows.shape[1])
        if y is None:
            return self
        given = np.unique(np.asarray(y))
        names = self._names()
        unknown = [str(label) for label in given if str(label) not in names]
        if unknown:
            raise LabelSpaceError(
                f"{len(unknown)} of the labels are no classes of the federation",
                hint=f"its classes: {', '.join(names[:20])}",
            )
        as_numbers = given.dtype.kind in "iu" and all(name.isdecimal() for name in names)
        self._classes = np.sort(np.array([int(n) for n in names] if as_numbers else names))
        return self

    @property
    def classes_(self) -> npt.NDArray[Any]:
        """Classes in the order of the columns of `predict_proba`, sorted."""
        known: npt.NDArray[Any] | None = self.__dict__.get("_classes")
        if known is None:
            known = self._classes = np.sort(np.array(self._names()))
        return known

    def predict_proba(self, X: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Ask the federation for probabilities.

        Parameters
        ----------
        X : array of shape (n_queries, ...)

        Returns
        -------
        probabilities : float array of shape (n_queries, n_classes)

        Raises
        ------
        FedInferError
            As `Gateway.ask`.
        """
        parts = [self._columns(prediction) for prediction in self._asked(_rows(X))]
        return np.concatenate(parts)

    def predict(self, X: npt.ArrayLike) -> npt.NDArray[Any]:
        """Ask the federation for labels, as it decides them: ties by lot, not by order.

        Rows that it abstains from get the label that is most probable.
        """
        classes = self.classes_
        by_name = {str(label): label for label in classes}
        labels = []
        for prediction in self._asked(_rows(X)):
            self._columns(prediction)
            labels += [by_name[name] for name in prediction.names]
        return np.array(labels, dtype=classes.dtype)

    def score(
        self,
        X: npt.ArrayLike,
        y: npt.ArrayLike,
        sample_weight: npt.ArrayLike | None = None,
    ) -> float:
        """Return the share of rows answered rightly."""
        right = self.predict(X) == np.asarray(y)
        weights = None if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
        return float(np.average(right, weights=weights))

    def get_params(self, deep: bool = True) -> dict[str, Any]:  # noqa: ARG002
        """Return the parameters by name."""
        return {name: getattr(self, name) for name in _PARAMETERS}

    def set_params(self, **params: Any) -> Self:
        """Set parameters by name.

        Raises
        ------
        ValueError
            For a name that is no parameter, as scikit-learn has it.
        """
        for name, value in params.items():
            if name not in _PARAMETERS:
                raise ValueError(f"no parameter {name!r}; there are: {', '.join(_PARAMETERS)}")
            setattr(self, name, value)
        self.__dict__.pop("_classes", None)
        return self

    def __sklearn_clone__(self) -> FederatedClassifier:
        # The parameters themselves: a copy of an identity would be a second secret.
        return type(self)(**self.get_params())

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __sklearn_tags__(self) -> Any:
        utils = importlib.import_module("sklearn.utils")  # scikit-learn is who calls this
        return utils.Tags(
            estimator_type="classifier",
            target_tags=utils.TargetTags(required=False),
            classifier_tags=utils.ClassifierTags(),
            requires_fit=False,
        )

    def _names(self) -> tuple[str, ...]:
        gateway = self._connected()
        served = next((m for m in gateway.models() if m.name == self.model), None)
        listed = served.facts.get("classes") if served is not None else None
        if isinstance(listed, list) and listed and all(isinstance(c, str) for c in listed):
            return tuple(listed)
        cards = gateway.directory(self.model, pins=self.pins).cards
        return shared_classes(dict(enumerate(card.profile for card in cards)))

    def _connected(self) -> Gateway:
        if self.gateway is None or not self.model:
            raise ConfigError(
                "a FederatedClassifier needs a gateway and the name of a model",
                hint="FederatedClassifier(Gateway(url), model='...')",
            )
        return self.gateway

    def _asked(self, rows: npt.NDArray[Any]) -> list[Prediction]:
        gateway = self._connected()
        if self.max_rows < 1:
            raise InvalidValueError("max_rows is at least 1")
        return [
            gateway.ask(
                rows[start : start + self.max_rows],
                model=self.model,
                seal=self.seal,
                protection=self.protection,
                pins=self.pins,
                identity=self.identity,
                timeout_s=self.timeout_s,
            ).prediction
            for start in range(0, len(rows), self.max_rows)
        ]

    def _columns(self, prediction: Prediction) -> npt.NDArray[np.float64]:
        columns = {str(label): i for i, label in enumerate(self.classes_)}
        if not set(prediction.classes) <= columns.keys():
            raise LabelSpaceError(
                "the answer has a class that the federation did not have before",
                hint="a site joined or changed: make a new FederatedClassifier",
            )
        found = np.zeros((len(prediction), len(columns)))
        found[:, [columns[name] for name in prediction.classes]] = prediction.probabilities
        return found


def _rows(given: npt.ArrayLike) -> npt.NDArray[Any]:
    rows = np.asarray(given)
    if rows.ndim < 2 or rows.dtype.kind not in "biuf":
        raise InvalidValueError(
            f"rows of shape {rows.shape} and dtype {rows.dtype}; expected numbers of shape"
            " (n_queries, ...)",
            hint="reshape a single row to (1, n_features); a sparse matrix: .toarray()",
        )
    if len(rows) == 0:
        raise InvalidValueError("no rows to ask about")
    return rows
