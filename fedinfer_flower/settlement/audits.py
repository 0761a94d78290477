"""Audit queries: rows with labels that the querier knows, hidden among the others."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import InvalidValueError, ShapeError

__all__ = ["AuditMix", "AuditRow", "mix_audits"]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, order=True)
class AuditRow:
    """Where one audit was asked, and its right answer.

    Parameters
    ----------
    query_id : str
        Of the batch.
    row : int
        Within it.
    label : int
        Class index.
    """

    query_id: str
    row: int
    label: int


@dataclass(frozen=True, kw_only=True, eq=False)
class AuditMix:
    """Inputs with audits among them. Stays with the querier.

    Parameters
    ----------
    inputs : array of shape (n_rows, ...)
        To be asked.
    rows : int array of shape (n_audits,)
        Places of the audits, ascending.
    labels : int array of shape (n_audits,)
        Right classes, in the order of `rows`.
    """

    inputs: npt.NDArray[np.generic] = field(repr=False)
    rows: IntArray = field(repr=False)
    labels: IntArray = field(repr=False)

    def without(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the rows of the real queries, in their order.

        Raises
        ------
        ShapeError
            If it does not have one row an input.
        """
        if len(array) != len(self.inputs):
            raise ShapeError(f"{len(array)} rows for {len(self.inputs)} inputs")
        return np.delete(np.asarray(array), self.rows, axis=0)

    def located(self, job_id: str, batch_size: int) -> tuple[AuditRow, ...]:
        """Return the audits by query id and row, for a job of that id and batch size.

        Examples
        --------
        >>> mix = mix_audits(np.zeros((3, 1)), np.ones((1, 1)), np.array([1]), seed=0)
        >>> mix.located("job", 2) == (AuditRow(query_id=f"job-{mix.rows[0] // 2}",
        ...                                    row=int(mix.rows[0]) % 2, label=1),)
        True
        """
        if batch_size < 1:
            raise InvalidValueError("batch_size is at least 1")
        return tuple(
            AuditRow(query_id=f"{job_id}-{row // batch_size}", row=row % batch_size, label=label)
            for row, label in zip(self.rows.tolist(), self.labels.tolist(), strict=True)
        )


def mix_audits(
    inputs: npt.NDArray[np.generic],
    audit_inputs: npt.NDArray[np.generic],
    audit_labels: npt.NDArray[np.integer[Any]],
    *,
    seed: int | None = None,
) -> AuditMix:
    """Mix audit queries among others at secret random places.

    Real queries keep their order; audits come in random order.

    Parameters
    ----------
    inputs : array of shape (n_queries, ...)
    audit_inputs : array of shape (n_audits, ...)
        Of the same dtype and row shape: else they would stand out.
    audit_labels : int array of shape (n_audits,)
    seed : int, optional
        For simulations only: whoever knows it knows the places. Default the operating
        system's generator.

    Raises
    ------
    InvalidValueError
        If shapes or dtypes differ, or labels do not fit.

    Privacy
    -------
    Sites cannot tell an audit by place, shape or dtype. They can by its content, if it
    looks unlike the queries, and by its coming again: draw audits from the same population,
    and use each once.

    Examples
    --------
    >>> mix = mix_audits(np.zeros((5, 2)), np.ones((2, 2)), np.array([0, 1]))
    >>> mix.inputs.shape, float(mix.without(mix.inputs).sum())
    ((7, 2), 0.0)
    """
    inputs, audit_inputs = np.asarray(inputs), np.asarray(audit_inputs)
    labels = np.asarray(audit_labels)
    if labels.shape != (len(audit_inputs),) or labels.dtype.kind not in "iu":
        raise InvalidValueError("audit_labels are one class index for each audit input")
    if labels.size and int(labels.min()) < 0:
        raise InvalidValueError("audit_labels are class indices, not negative")
    if inputs.dtype != audit_inputs.dtype or inputs.shape[1:] != audit_inputs.shape[1:]:
        raise InvalidValueError(
            "audit inputs have another dtype or row shape than the queries",
            hint="audits must not stand out: prepare both in the same way",
        )
    n_rows, n_audits = len(inputs) + len(audit_inputs), len(audit_inputs)
    if seed is None:
        system = secrets.SystemRandom()
        places = sorted(system.sample(range(n_rows), n_audits))
        order = system.sample(range(n_audits), n_audits)
    else:
        rng = np.random.default_rng(seed)
        places = sorted(rng.choice(n_rows, size=n_audits, replace=False).tolist())
        order = rng.permutation(n_audits).tolist()
    rows = np.array(places, dtype=np.int64)
    mixed = np.empty((n_rows, *inputs.shape[1:]), dtype=inputs.dtype)
    is_audit = np.zeros(n_rows, dtype=bool)
    is_audit[rows] = True
    mixed[~is_audit] = inputs
    mixed[is_audit] = audit_inputs[order]
    return AuditMix(inputs=mixed, rows=rows, labels=labels[order].astype(np.int64))
