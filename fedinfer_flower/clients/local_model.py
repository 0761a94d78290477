"""What `load_model` returns: a model, and what its site knows about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["LocalModel"]


@dataclass(frozen=True, kw_only=True)
class LocalModel:
    """A site's model with the facts that make its answers count for more.

    Everything but `model` is optional, and stays at the site unless its own row says
    otherwise. A fitted scikit-learn estimator may be returned bare.

    Parameters
    ----------
    model : object
        Estimator with ``predict_proba``, ``torch.nn.Module``, or callable.
    classes : sequence, optional
        Class of each output column. scikit-learn estimators know theirs.
    outputs : {"probabilities", "logits"}
        What a callable returns.
    class_counts : mapping of class to int, or sequence in the order of the classes, optional
        Training examples of each class. What leaves the site is decided by the
        `share_counts` option of `InferenceMod`.
    holdout : (array, sequence), optional
        Inputs and labels that the model was not trained on: for temperature
        calibration and the local confusion matrix. Never leaves the site.
    reference_inputs : array of shape (n_examples, ...), optional
        Training inputs, to tell familiar queries from strange ones. Never leaves the
        site.
    augment : callable, optional
        From inputs to a sequence of augmented copies, for the ``tta-*`` rules.
    model_card : mapping of str to str
        Shown to the coordinator.
    price_per_query : float
        Shown to the coordinator.
    digest : str
        Names this very model: queries, receipts and remembered answers are bound to it.
        Default a digest of the weights, for torch modules and scikit-learn estimators.
        Shown to the coordinator.
    record_privacy : (float, float), optional
        Epsilon and delta of the training, for replacing one training record; see
        `training.train_privately`. Shown to the coordinator; a claim of the site.

    Examples
    --------
    >>> LocalModel(model=lambda x: x, classes=["cat", "dog"]).outputs
    'probabilities'
    """

    model: Any
    classes: Sequence[Any] | None = None
    outputs: str = "probabilities"
    class_counts: Mapping[Any, float] | Sequence[float] | None = None
    holdout: tuple[npt.NDArray[Any], Sequence[Any]] | None = field(default=None, repr=False)
    reference_inputs: npt.NDArray[Any] | None = field(default=None, repr=False)
    augment: Callable[[npt.NDArray[np.generic]], Sequence[npt.NDArray[Any]]] | None = None
    model_card: Mapping[str, str] = field(default_factory=dict)
    price_per_query: float = 0.0
    digest: str = ""
    record_privacy: tuple[float, float] | None = None
