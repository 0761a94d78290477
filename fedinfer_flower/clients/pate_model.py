"""A local model whose answers protect each training record: sub-teachers vote, noisily.

The site splits its records into disjoint shards, trains one sub-teacher on each, and answers
a row with the noisy arg max of their votes. A record is in one shard only, so it can move one
vote; the votes and the noisy counts stay at the site, and only the label leaves.

This needs many sub-teachers: noise must be large against one vote and small against the gap
between the classes. A site with a few hundred records pays for it with most of its accuracy
or with most of its epsilon; training one model by DP-SGD may serve it better.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.clients.adapters.base import class_name
from fedinfer_flower.clients.local_model import LocalModel
from fedinfer_flower.ensemble.base import Array
from fedinfer_flower.errors import ModelAnswerError, ModelError
from fedinfer_flower.privacy.fixed_point import IntArray
from fedinfer_flower.privacy.gnmax import ABSTAIN, GNMax, vote_counts
from fedinfer_flower.privacy.gnmax_account import GNMaxAccount, SpendingReport
from fedinfer_flower.privacy.row_digest import KEY_BYTES, row_digests

__all__ = ["PateModel", "shard_of_records"]

log = logging.getLogger("fedinfer_flower.site")

_CONTEXT: Final = b"fedinfer/v1/pate-model"
_FALLBACK: Final = 0
"""Vote of a sub-teacher that fails on a row: fixed, so a failure too moves one vote at most."""


def shard_of_records(
    n_records: int, *, n_shards: int, groups: Sequence[object] | None = None
) -> IntArray:
    """Say which shard each record belongs to, without looking at inputs or labels.

    A split that looked at them, a stratified one for instance, could move many records when
    one changes, and then one record would have more than one vote.

    Parameters
    ----------
    n_records : int
    n_shards : int
    groups : sequence of n_records identifiers, optional
        Whose record it is, a patient for instance; all records of a group get into one shard,
        by the SHA-256 of the identifier. Without it, record i belongs to shard i mod n_shards.

    Returns
    -------
    shards : int64 array of shape (n_records,)

    Raises
    ------
    ModelError
        If there are fewer records than shards, or not one group for each record.

    Examples
    --------
    >>> shard_of_records(5, n_shards=2)
    array([0, 1, 0, 1, 0])
    """
    if not 2 <= n_shards <= n_records:
        raise ModelError(
            f"{n_records} records cannot be split into {n_shards} shards",
            hint="choose n_teachers from 2 to the number of records",
        )
    if groups is None:
        return np.arange(n_records, dtype=np.int64) % n_shards
    if len(groups) != n_records:
        raise ModelError(f"{len(groups)} groups for {n_records} records")
    digests = (hashlib.sha256(str(group).encode()).digest()[:8] for group in groups)
    return np.array([int.from_bytes(d, "big") % n_shards for d in digests], dtype=np.int64)


class PateModel:
    """Sub-teachers on disjoint shards behind one noisy vote, as a local model.

    Return `local_model()` from `load_model`; the object must live as long as it answers, since
    its memory and its budget are in it.

    Parameters
    ----------
    inputs : array of shape (n_records, ...)
        The site's training inputs: numbers, all finite.
    labels : sequence of n_records classes
    fit : callable
        From the inputs and the labels of one shard to a model with ``predict``. Labels are
        given, and predicted, as indices into `classes`. A shard of one class is not fitted:
        its sub-teacher always votes for it.
    classes : sequence
        All classes, known without looking at the records.
    n_teachers : int
        m; public. 100 and more is where the noise stops hurting.
    mechanism : GNMax
    epsilon_cap : float
        The most epsilon that all answers together may cost on any data.
    delta : float
        Below one over ten times the number of records.
    groups : sequence, optional
        As in `shard_of_records`; then the unit that is protected is a group, not a record.
    mu_squared_before : float
        ``report().mu_squared`` of the last model over the same records. A model forgets its
        spending with its process; without this number the cap starts anew.

    Raises
    ------
    ModelError
        If records, labels and shards do not fit together, or a sub-teacher cannot be used.
    InvalidValueError, BudgetExceededError
        As `GNMaxAccount`.

    Privacy
    -------
    Neighbours: one record (or group) is replaced, at the same place. Towards coordinator,
    querier and other sites, alone or colluding, all answers together are
    (epsilon_cap, delta)-private, whatever rows they choose. Not covered: the number of
    records and of sub-teachers, the fact that a row was asked, the query itself, several
    records of one person without `groups`, choices of `mechanism` or `fit` that were made by
    looking at the records, other facts that a `LocalModel` can be given (holdout, counts,
    reference inputs: `local_model` gives none), and the time an answer takes.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> inputs = rng.normal(size=(400, 2)); labels = (inputs[:, 0] > 0).astype(int)
    >>> class Sign:
    ...     def predict(self, rows):
    ...         return (rows[:, 0] > 0).astype(int)
    >>> model = PateModel(inputs, labels, fit=lambda x, y: Sign(), classes=[0, 1],
    ...                   n_teachers=100, mechanism=GNMax(sigma=8.0), epsilon_cap=2.0, delta=1e-5)
    >>> model(np.array([[3.0, 0.0], [-3.0, 0.0], [3.0, 0.0]]))
    array([[0., 1.],
           [1., 0.],
           [0., 1.]])
    >>> model.report().n_rows
    2
    """

    def __init__(
        self,
        inputs: npt.NDArray[Any],
        labels: Sequence[Any] | npt.NDArray[Any],
        *,
        fit: Callable[[npt.NDArray[Any], IntArray], Any],
        classes: Sequence[Any],
        n_teachers: int,
        mechanism: GNMax,
        epsilon_cap: float,
        delta: float,
        groups: Sequence[object] | None = None,
        mu_squared_before: float = 0.0,
    ) -> None:
        records = np.asarray(inputs)
        self.classes = tuple(class_name(value) for value in classes)
        self._account = GNMaxAccount(
            mechanism, epsilon_cap=epsilon_cap, delta=delta, mu_squared_before=mu_squared_before
        )
        if mechanism.check is not None and mechanism.check.threshold > n_teachers:
            raise ModelError(
                f"a threshold of {mechanism.check.threshold:g} votes is beyond the"
                f" {n_teachers} sub-teachers"
            )
        indices = _label_indices(labels, self.classes)
        if records.ndim < 2 or records.dtype.kind not in "biuf" or len(records) != len(indices):
            raise ModelError("inputs are numbers of shape (n_records, ...), one label a record")
        if not np.isfinite(records).all():
            raise ModelError("a training input is NaN or infinite")
        self._dtype, self._row_shape = records.dtype, records.shape[1:]
        shards = shard_of_records(len(records), n_shards=n_teachers, groups=groups)
        self._teachers = [
            _taught(records[shards == k], indices[shards == k], fit, len(self.classes))
            for k in range(n_teachers)
        ]
        self._key = os.urandom(KEY_BYTES)
        self._memory: dict[bytes, int] = {}
        self._lock = threading.Lock()

    def __call__(self, inputs: npt.NDArray[np.generic]) -> Array:
        """Return probabilities of shape (n_rows, n_classes): all on one class, or uniform.

        Uniform where the confidence check failed. Raises as `predict`.
        """
        labels = self.predict(inputs)
        one_hot = np.eye(len(self.classes))[np.maximum(labels, 0)]
        uniform = 1.0 / len(self.classes)
        return np.asarray(np.where((labels == ABSTAIN)[:, None], uniform, one_hot))

    def predict(self, inputs: npt.NDArray[np.generic]) -> IntArray:
        """Return a class index, or `ABSTAIN`, for each row.

        A row that was asked before gets the label that it got then, at no charge: new noise
        on the same votes could be averaged away. A row that differs in one bit is a new row.

        Parameters
        ----------
        inputs : array of shape (n_rows, ...)

        Raises
        ------
        ModelAnswerError
            If the inputs are not like those of the records, before any sub-teacher sees them.
        BudgetExceededError
            If the cap does not cover the new rows. Nothing is charged.
        """
        rows = self._checked(np.asarray(inputs))
        with self._lock:
            digests = row_digests(rows, context=_CONTEXT, key=self._key)
            places = {digest: place for place, digest in enumerate(digests)}
            new = {d: place for d, place in places.items() if d not in self._memory}
            if new:
                # Before the sub-teachers are put to work.
                self._account.require_room(len(new))
                counts = self._counts(rows[list(new.values())])
                drawn = self._account.release(counts)
                self._memory.update(zip(new, drawn.tolist(), strict=True))
            return np.array([self._memory[digest] for digest in digests], dtype=np.int64)

    def local_model(self) -> LocalModel:
        """Return what `load_model` should: this model, and public facts only.

        There is no holdout, no class count and no reference input in it. What a site derives
        from those would leave it without noise, and calibration would spend the budget.
        """
        mechanism = self._account.mechanism
        return LocalModel(
            model=self,
            classes=self.classes,
            outputs="probabilities",
            model_card={
                "privacy": "gnmax" if mechanism.check is None else "confident-gnmax",
                "sub-teachers": str(len(self._teachers)),
                "sigma-votes": f"{mechanism.sigma:g}",
                "epsilon-cap": f"{self._account.epsilon_cap:g}",
                "delta": f"{self._account.delta:g}",
            },
        )

    def report(self) -> SpendingReport:
        """Return what the answers have cost so far."""
        return self._account.report()

    def _checked(self, rows: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        # These checks are public. What passes them is answered, whatever sub-teachers do: an
        # error that depended on one of them would be an answer without noise.
        if rows.ndim < 2 or rows.shape[1:] != self._row_shape:
            raise ModelAnswerError(
                f"inputs have shape {rows.shape}, expected (n_rows, {str(self._row_shape)[1:-1]})"
            )
        if rows.dtype.kind not in "biuf" or not np.can_cast(rows.dtype, self._dtype, "same_kind"):
            raise ModelAnswerError(f"inputs of dtype {rows.dtype.name} do not fit the records")
        with np.errstate(over="ignore"):
            rows = rows.astype(self._dtype)
        if not np.isfinite(rows).all():
            raise ModelAnswerError("the inputs contain NaN or infinite values")
        return rows

    def _counts(self, rows: npt.NDArray[np.generic]) -> IntArray:
        n_classes = len(self.classes)
        votes = [_vote(teacher, rows, n_classes) for teacher in self._teachers]
        return vote_counts(np.stack(votes), n_classes=n_classes)


class _Constant:
    """Sub-teacher of a shard with one class."""

    def __init__(self, label: int) -> None:
        self._label = label

    def predict(self, rows: npt.NDArray[np.generic]) -> IntArray:
        return np.full(len(rows), self._label, dtype=np.int64)


def _taught(
    inputs: npt.NDArray[Any],
    labels: IntArray,
    fit: Callable[[npt.NDArray[Any], IntArray], Any],
    n_classes: int,
) -> Any:
    if len(labels) == 0:
        raise ModelError("a shard has no records", hint="choose fewer sub-teachers")
    if (labels == labels[0]).all():
        return _Constant(int(labels[0]))
    teacher = fit(inputs, labels)
    if _valid_vote(getattr(teacher, "predict", _nothing)(inputs), len(inputs), n_classes) is None:
        raise ModelError(
            "a sub-teacher does not predict indices into classes",
            hint="return a fitted model with predict from fit; labels are 0 to n_classes - 1",
        )
    return teacher


def _vote(teacher: Any, rows: npt.NDArray[np.generic], n_classes: int) -> IntArray:
    try:
        vote = _valid_vote(teacher.predict(rows), len(rows), n_classes)
    except Exception as exc:
        log.warning(
            "a sub-teacher failed (%s): its votes go to the first class", type(exc).__name__
        )
        vote = None
    return np.full(len(rows), _FALLBACK, dtype=np.int64) if vote is None else vote


def _valid_vote(predicted: object, n_rows: int, n_classes: int) -> IntArray | None:
    vote = np.asarray(predicted)
    if vote.shape != (n_rows,) or vote.dtype.kind not in "biu":
        return None
    vote = vote.astype(np.int64)
    return vote if ((vote >= 0) & (vote < n_classes)).all() else None


def _nothing(rows: npt.NDArray[Any]) -> None:  # noqa: ARG001
    return None


def _label_indices(labels: Sequence[Any] | npt.NDArray[Any], classes: tuple[str, ...]) -> IntArray:
    if len(classes) < 2 or len(set(classes)) != len(classes):
        raise ModelError("classes are two or more distinct names")
    place = {name: index for index, name in enumerate(classes)}
    indices = [place.get(class_name(label), -1) for label in labels]
    if -1 in indices:
        raise ModelError("a training label is not among classes")
    return np.array(indices, dtype=np.int64)
