"""Answers of trained sites to held-out rows, some of which are audits: for settlement.

Axes: K sites, N held-out rows, T audits among them, C classes.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import InvalidValueError, MissingExtraError
from fedinfer_flower.incentives.base import AuditedAnswers
from fedinfer_flower.simulation.data import Dataset, load_dataset
from fedinfer_flower.simulation.partition import partition_rows

__all__ = ["AuditedFederation", "audited_federation"]

FLOOR: Final = 1e-6
"""Least probability of a class: one that a site has never seen is unlikely, not impossible."""

_MIN_ROWS: Final = 4
"""Fewest training rows of a site; at alpha 0.1 small data leave no more to some."""

Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class AuditedFederation:
    """What sites answered to rows that nobody trained on.

    Parameters
    ----------
    dataset : str
    alpha : float
        Concentration of the Dirichlet partition; small is skewed.
    seed : int
    probabilities_knc : float array of shape (n_sites, n_rows, n_classes)
    labels_n : int array of shape (n_rows,)
    audits_t : int array of shape (n_audits,)
        Rows that are audits, ascending.

    Privacy
    -------
    For simulation: nobody in a federation holds all of this.
    """

    dataset: str
    alpha: float
    seed: int
    probabilities_knc: Array = field(repr=False)
    labels_n: IntArray = field(repr=False)
    audits_t: IntArray = field(repr=False)

    @property
    def held_out(self) -> AuditedAnswers:
        """All rows with their labels: what merit is measured on."""
        return AuditedAnswers(probabilities_ktc=self.probabilities_knc, labels=self.labels_n)

    @property
    def audited(self) -> AuditedAnswers:
        """The audits alone: what a querier can settle on."""
        return self._rows(self.audits_t)

    @property
    def unaudited(self) -> AuditedAnswers:
        """All rows but the audits: merit on rows that no settlement saw."""
        return self._rows(np.setdiff1d(np.arange(len(self.labels_n)), self.audits_t))

    def _rows(self, rows: IntArray) -> AuditedAnswers:
        return AuditedAnswers(
            probabilities_ktc=self.probabilities_knc[:, rows], labels=self.labels_n[rows]
        )


def audited_federation(
    dataset: str = "digits",
    *,
    n_sites: int = 5,
    alpha: float = 0.5,
    n_audits: int = 200,
    seed: int = 0,
) -> AuditedFederation:
    """Train one logistic regression a site, and let each answer the held-out rows.

    Each site standardises features by its own rows. A site whose rows are all of one class
    always answers that class.

    Parameters
    ----------
    dataset : str
        See `fedinfer_flower.simulation.data.DATASETS`.
    n_sites : int
    alpha : float
    n_audits : int
        Drawn from the held-out rows without replacement; at most all of them are taken.
    seed : int
        Of the split into training and held-out rows, the partition and the draw of audits.

    Raises
    ------
    InvalidValueError
        If the dataset is unknown, the partition cannot be made, or there are no audits.
    MissingExtraError
        If scikit-learn or flwr-datasets is not installed.

    Examples
    --------
    >>> federation = audited_federation("wine", n_sites=3, alpha=1.0, n_audits=20)
    >>> federation.audited.n_queries, federation.held_out.n_classes
    (20, 3)
    """
    if n_audits < 1:
        raise InvalidValueError(f"n_audits is at least 1, got {n_audits}")
    data = load_dataset(dataset, seed=seed)
    parts = partition_rows(
        data.train_labels, n_sites=n_sites, alpha=alpha, min_size=_MIN_ROWS, seed=seed
    )
    answers = np.stack([_answers_of_site(data, rows) for rows in parts])
    rng = np.random.default_rng(seed)
    n_rows = len(data.test_labels)
    audits = np.sort(rng.permutation(n_rows)[:n_audits])
    return AuditedFederation(
        dataset=dataset,
        alpha=alpha,
        seed=seed,
        probabilities_knc=answers,
        labels_n=data.test_labels,
        audits_t=audits,
    )


def _answers_of_site(data: Dataset, rows: IntArray) -> Array:
    """Return a site's probabilities for the held-out rows, shape (n_rows, n_classes)."""
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as exc:  # pragma: no cover - load_dataset needs it too
        raise MissingExtraError(
            "sites are trained with scikit-learn",
            hint="pip install 'fedinfer-flower[simulation]'",
        ) from exc
    labels = data.train_labels[rows]
    present = np.unique(labels)
    answers = np.full((len(data.test_labels), len(data.classes)), FLOOR)
    if len(present) == 1:
        answers[:, present[0]] = 1.0
    else:
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=400))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a site's own trouble to converge is realistic
            model.fit(data.train_inputs[rows], labels)
        answers[:, present] = np.maximum(model.predict_proba(data.test_inputs), FLOOR)
    return np.asarray(answers / answers.sum(axis=1, keepdims=True))
