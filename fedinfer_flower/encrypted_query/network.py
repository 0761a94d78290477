"""`EncryptedNetwork`: the polynomial form of a site's model, with its measured fidelity.

A form that differs from its model is a different model. How far it differs is measured before
it answers anything, on rows that no fit has seen, and a form that is too far off is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.encrypted_query.ckks_batch import PublicKeys, SecretKeys
from fedinfer_flower.encrypted_query.flooding import Flooding
from fedinfer_flower.encrypted_query.layers import Stack, sklearn_stack, square, torch_stack
from fedinfer_flower.encrypted_query.plans import HIDDEN_LAYER, LINEAR, Plan
from fedinfer_flower.encrypted_query.polynomial import UnitPolynomials, fit_units
from fedinfer_flower.encrypted_query.quadratic import QuadraticForm
from fedinfer_flower.ensemble.base import Array
from fedinfer_flower.errors import CapacityError, LabelSpaceError, ModelError

__all__ = ["MISSING_LOGIT", "EncryptedNetwork", "Fidelity"]

MAX_FEATURES: Final = 1024
MAX_HIDDEN: Final = 256
MAX_CLASSES: Final = 256
MAX_PRODUCTS: Final = 1 << 16
"""Products of a ciphertext with a weight; each takes about 0.3 ms."""

MIN_ROWS: Final = 24
MAX_OUTSIDE: Final = 0.01
"""Largest share of unseen activations outside the fitted range."""

INPUT_SLACK: Final = 1.5
"""A query may declare inputs this many times as large as the largest calibration input."""
MAX_HIDDEN_VALUE: Final = 2.0**26
"""Squares of more would come near the modulus at their level."""

MISSING_LOGIT: Final = -8.0
"""Centred logit of a class that the site does not know: low, and the same at every site."""


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """How well a polynomial form stands for its model, in clear.

    Parameters
    ----------
    n_rows : int
        Calibration rows behind the figures; where a fit was made, rows that it did not see.
    agreement : float
        Share of rows on which both name the same class.
    accuracy_clear, accuracy_polynomial : float, optional
        With labels only.
    max_logit_error : float
        Largest difference of centred logits.
    logit_rms : float
        Root mean square of the form's centred logits: their scale.
    input_bound : float
        Largest absolute calibration input.
    activation_range : (float, float), optional
        Lowest and highest value before the activation, over units and rows.
    outside_share : float
        Share of activations, on rows that the fit did not see, outside the fitted range.
    """

    n_rows: int
    agreement: float
    accuracy_clear: float | None
    accuracy_polynomial: float | None
    max_logit_error: float
    logit_rms: float
    input_bound: float
    activation_range: tuple[float, float] | None
    outside_share: float

    def summary(self) -> str:
        """Return the report as a tree."""
        lines = [
            f"Fidelity on {self.n_rows} rows",
            f"├── agreement with the model: {self.agreement:.4f}",
            f"├── largest logit error: {self.max_logit_error:.3g} (scale {self.logit_rms:.3g})",
            f"├── inputs up to {self.input_bound:.3g}",
        ]
        if self.accuracy_clear is not None and self.accuracy_polynomial is not None:
            lines.append(
                f"├── accuracy: model {self.accuracy_clear:.4f},"
                f" polynomial {self.accuracy_polynomial:.4f}"
            )
        low, high = self.activation_range or (0.0, 0.0)
        span = "none" if self.activation_range is None else f"[{low:.3g}, {high:.3g}]"
        lines.append(f"└── activations: {span}, {self.outside_share:.2%} outside the fit")
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True, eq=False)
class EncryptedNetwork:
    """A model that can be evaluated on ciphertexts.

    Parameters
    ----------
    form : QuadraticForm
        Gives the model's logits, up to the fit.
    classes : tuple of str
        Class of each column.
    fidelity : Fidelity
    kind : str
        Type of the model.

    Privacy
    -------
    Weights and calibration rows stay at the site. The logits of ``(F + 1)(F + 2) / 2``
    well-chosen queries determine a quadratic form of F inputs: whoever may ask that often can
    rebuild the form, whatever the encryption.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.linear_model import LogisticRegression
    >>> inputs, labels = load_iris(return_X_y=True)
    >>> model = LogisticRegression(max_iter=1000).fit(inputs, labels)
    >>> network = EncryptedNetwork.from_sklearn(model, inputs, labels)
    >>> network.fidelity.agreement, network.plan.name
    (1.0, 'linear')
    """

    form: QuadraticForm
    classes: tuple[str, ...]
    fidelity: Fidelity
    kind: str = field(default="")

    @classmethod
    def from_sklearn(
        cls,
        model: Any,
        calibration_inputs: npt.ArrayLike,
        labels: Sequence[object] | npt.NDArray[Any] | None = None,
        *,
        classes: Sequence[object] | None = None,
        min_agreement: float = 0.95,
    ) -> EncryptedNetwork:
        """Convert a fitted scikit-learn classifier.

        Parameters
        ----------
        model : estimator
            See `layers.sklearn_stack`.
        calibration_inputs : float array of shape (n_rows, n_features)
            Best rows that the model was not trained on.
        labels : sequence, optional
            Their classes; adds accuracies to the report.
        classes : sequence, optional
            Names of the columns; default ``model.classes_``.
        min_agreement : float
            Refuse a form that agrees with the model on a smaller share of rows.

        Raises
        ------
        ModelError
            With the reason and an alternative.
        """
        stack = sklearn_stack(model)
        names = model.classes_ if classes is None else classes
        return cls._of(stack, calibration_inputs, labels, names, min_agreement)

    @classmethod
    def from_torch(
        cls,
        model: Any,
        calibration_inputs: npt.ArrayLike,
        labels: Sequence[object] | npt.NDArray[Any] | None = None,
        *,
        classes: Sequence[object],
        min_agreement: float = 0.95,
    ) -> EncryptedNetwork:
        """Convert a ``torch.nn.Sequential``; otherwise as `from_sklearn`."""
        stack = torch_stack(model)
        return cls._of(stack, calibration_inputs, labels, classes, min_agreement)

    @classmethod
    def _of(
        cls,
        stack: Stack,
        calibration_inputs: npt.ArrayLike,
        labels: Sequence[object] | npt.NDArray[Any] | None,
        classes: Sequence[object],
        min_agreement: float,
    ) -> EncryptedNetwork:
        names = tuple(str(name) for name in classes)
        rows = _checked_rows(calibration_inputs, stack, len(names))
        _check_size(stack)
        unseen = np.ones(len(rows), dtype=bool)
        fit: UnitPolynomials | None = None
        if stack.activation is not None and stack.activation is not square:
            unseen = np.arange(len(rows)) % 3 == 2
            fit = fit_units(stack.activation, stack.first(rows[~unseen]))
        form = _form(stack, fit).pruned()
        right = None if labels is None else np.array([str(label) for label in labels])[unseen]
        fidelity = _fidelity(stack, fit, form, rows[unseen], right, np.array(names))
        if fidelity.outside_share > MAX_OUTSIDE:
            raise ModelError(
                f"{fidelity.outside_share:.1%} of the activations of unseen rows lie outside the"
                " range in which the polynomial was fitted",
                hint="give more calibration rows, and scale the inputs (StandardScaler)",
            )
        if fidelity.agreement < min_agreement:
            raise ModelError(
                f"the polynomial form agrees with the model on {fidelity.agreement:.3f} of"
                f" {fidelity.n_rows} rows, {min_agreement:g} are asked for",
                hint="train with a square activation, give more calibration rows, or lower"
                " min_agreement knowingly",
            )
        return cls(form=form, classes=names, fidelity=fidelity, kind=stack.kind)

    @property
    def plan(self) -> Plan:
        """The smallest parameters that hold the network."""
        return HIDDEN_LAYER if self.form.n_hidden else LINEAR

    def logits(self, inputs: npt.ArrayLike) -> Array:
        """Return the polynomial form's logits in clear, shape (n_queries, n_classes)."""
        return self.form(np.asarray(inputs, dtype=np.float64))

    def aligned(self, classes: tuple[str, ...], *, temperature: float = 1.0) -> QuadraticForm:
        """Return the form of centred, calibrated logits over a query's classes.

        A class that the site does not know gets `MISSING_LOGIT`. Local classes outside the
        query are dropped.

        Raises
        ------
        LabelSpaceError
            If no class is shared.
        """
        place = {name: column for column, name in enumerate(classes)}
        shared = [(i, place[name]) for i, name in enumerate(self.classes) if name in place]
        if not shared:
            raise LabelSpaceError(
                "the local model knows none of the query's classes",
                hint="compare the class names of the query with those in the site's profile",
            )
        here, there = np.array(shared, dtype=np.int64).T
        matrix = np.zeros((len(self.classes), len(classes)))
        matrix[np.ix_(here, there)] = (np.eye(len(shared)) - 1.0 / len(shared)) / temperature
        constants = np.full(len(classes), MISSING_LOGIT)
        constants[there] = 0.0
        return self.form.with_columns(matrix, constants)

    def check_query(
        self, form: QuadraticForm, plan: Plan, *, input_bound: float, n_sites: int
    ) -> None:
        """Refuse what would wrap around, or lie outside of what was calibrated.

        Raises
        ------
        ModelError
            If the plan is too small for the network, or the declared inputs too large.
        CapacityError
            If logits of such inputs, summed over the sites, could wrap around.
        """
        if form.n_hidden and not plan.relinearises:
            raise ModelError(
                f"this site's {self.kind} has a hidden layer, the query is for linear models",
                hint="ask with depth=2",
            )
        known = INPUT_SLACK * self.fidelity.input_bound
        if input_bound > known:
            raise ModelError(
                f"the query declares inputs up to {input_bound:.3g}, this site's polynomial form"
                f" holds up to {known:.3g}",
                hint="scale or clip the inputs before they are encrypted",
            )
        bound = max(form.logit_bound(input_bound), -MISSING_LOGIT)
        if n_sites * bound > plan.capacity or form.hidden_bound(input_bound) > MAX_HIDDEN_VALUE:
            raise CapacityError(
                f"logits of this site can reach {bound:.3g}; a sum of {n_sites} sites holds"
                f" {plan.capacity / n_sites:.3g} of each",
                hint="scale the inputs to about 1, regularise the model, or ask fewer sites",
            )

    def flooding(self, form: QuadraticForm, plan: Plan, rows: Array, *, bits: int) -> Flooding:
        """Measure the evaluation's error under fresh keys, and size the noise that covers it.

        The measured error is doubled: it is a sample, of calibration rows.
        """
        keys = SecretKeys(plan)
        batch = np.resize(rows, (plan.slots, rows.shape[1]))
        nothing = np.zeros((form.n_classes, plan.slots), dtype=np.complex128)
        reply = PublicKeys(plan, keys.public_key).evaluate(form, keys.encrypt(batch), noise=nothing)
        error = keys.decrypt(reply, n_classes=form.n_classes).real - form(batch).T
        rms = float(np.sqrt((error**2).mean(axis=1).max()))
        scale = float(np.sqrt((form(batch) ** 2).mean()))
        return Flooding.of_scale(scale, error_rms=2.0 * rms, tolerance_bits=bits)


def _checked_rows(calibration_inputs: npt.ArrayLike, stack: Stack, n_classes: int) -> Array:
    rows = np.asarray(calibration_inputs, dtype=np.float64)
    n_features = len(stack.first.weights)
    if rows.ndim != 2 or rows.shape[1] != n_features or len(rows) < MIN_ROWS:
        raise ModelError(
            f"calibration inputs have shape {rows.shape}, at least ({MIN_ROWS}, {n_features}) is"
            " needed",
            hint="give LocalModel(holdout=...) or reference_inputs of that many rows",
        )
    if not np.isfinite(rows).all():
        raise ModelError("calibration inputs have NaN or infinite values")
    width = len((stack.second or stack.first).bias)
    if width != n_classes:
        raise ModelError(f"{width} outputs for {n_classes} classes")
    return rows


def _check_size(stack: Stack) -> None:
    n_features, first_width = stack.first.weights.shape
    n_classes = len((stack.second or stack.first).bias)
    n_hidden = first_width if stack.second is not None else 0
    n_products = n_features * first_width + n_hidden * n_classes
    if (
        n_features > MAX_FEATURES
        or n_hidden > MAX_HIDDEN
        or n_classes > MAX_CLASSES
        or n_products > MAX_PRODUCTS
    ):
        raise ModelError(
            f"a network of {n_features} features, {n_hidden} hidden units and {n_classes} classes"
            f" is too wide: at most {MAX_FEATURES}, {MAX_HIDDEN}, {MAX_CLASSES}, and"
            f" {MAX_PRODUCTS} weights",
            hint="encrypt an embedding that the querier makes itself, with a small model on it",
        )


def _form(stack: Stack, fit: UnitPolynomials | None) -> QuadraticForm:
    if stack.second is None:
        return QuadraticForm.linear(stack.first.weights, stack.first.bias)
    first, second = stack.first, stack.second
    if fit is None:  # the square activation itself
        linear, offset = np.zeros((len(first.weights), len(second.bias))), second.bias
        squares = second.weights
    else:
        # The polynomial's linear part needs no squaring: it goes from the inputs straight
        # to the logits, as one matrix.
        sloped = fit.slope[:, None] * second.weights
        linear = first.weights @ sloped
        offset = second.bias + fit.constant @ second.weights + first.bias @ sloped
        squares = fit.curvature[:, None] * second.weights
    return QuadraticForm(
        hidden_weights=first.weights,
        hidden_bias=first.bias,
        square_weights=squares,
        linear_weights=linear,
        offset=offset,
    )


def _fidelity(
    stack: Stack,
    fit: UnitPolynomials | None,
    form: QuadraticForm,
    rows: Array,
    labels: npt.NDArray[np.str_] | None,
    names: npt.NDArray[np.str_],
) -> Fidelity:
    clear, polynomial = stack.logits(rows), form(rows)
    votes, ours = clear.argmax(axis=1), polynomial.argmax(axis=1)
    centred = polynomial - polynomial.mean(axis=1, keepdims=True)
    error = centred - (clear - clear.mean(axis=1, keepdims=True))
    hidden = stack.first(rows) if stack.second is not None else None
    return Fidelity(
        n_rows=len(rows),
        agreement=float((votes == ours).mean()),
        accuracy_clear=None if labels is None else float((names[votes] == labels).mean()),
        accuracy_polynomial=None if labels is None else float((names[ours] == labels).mean()),
        max_logit_error=float(np.abs(error).max()),
        logit_rms=float(np.sqrt((centred**2).mean())),
        input_bound=float(np.abs(rows).max()),
        activation_range=None if hidden is None else (float(hidden.min()), float(hidden.max())),
        outside_share=0.0 if fit is None or hidden is None else fit.outside(hidden),
    )
