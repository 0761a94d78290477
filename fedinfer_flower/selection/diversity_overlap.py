"""How often two sites err alike, and the document that carries it to a selector.

Axes: K sites, T audit queries.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.ensemble.base import Array
from fedinfer_flower.errors import InvalidValueError, ShapeError

__all__ = ["error_overlap", "overlap_from_json", "overlap_to_json"]

IntArray = npt.NDArray[np.int64]

_FORMAT: Final = "fedinfer-overlap/1"
_MAX_TEXT: Final = 16_000_000
_MAX_SITES: Final = 1000


def error_overlap(votes_kt: IntArray, consensus_t: IntArray) -> Array:
    """Return how often two sites vote alike where either leaves the consensus.

    ``rho_ij = P(y_i = y_j | y_i != y* or y_j != y*)``. Agreement where all are right says
    nothing of two sites; agreement in error says that the second adds nothing.

    Parameters
    ----------
    votes_kt : int array of shape (n_sites, n_audits)
    consensus_t : int array of shape (n_audits,)
        The joint answer, or the label of an audit.

    Returns
    -------
    overlap_kk : float array of shape (n_sites, n_sites)
        In [0, 1], symmetric, ones on the diagonal; 0.0 for two sites that never leave it.

    Raises
    ------
    ShapeError
        If the arrays do not fit.

    Privacy
    -------
    Needs single votes on audits: protections `plain` and `dp` only.

    References
    ----------
    .. [1] Kuncheva, Whitaker, Measures of diversity in classifier ensembles, Machine
       Learning 51, 2003, for measures of this kind.

    Examples
    --------
    >>> error_overlap(np.array([[0, 1, 1], [0, 1, 0], [0, 0, 0]]), np.array([0, 0, 0]))
    array([[1. , 0.5, 0. ],
           [0.5, 1. , 0. ],
           [0. , 0. , 1. ]])
    """
    if votes_kt.ndim != 2 or consensus_t.shape != votes_kt.shape[1:]:
        raise ShapeError("votes have shape (n_sites, n_audits), the consensus (n_audits,)")
    off_kt = votes_kt != consensus_t
    overlap = np.eye(len(votes_kt))
    for i in range(len(votes_kt)):
        either = off_kt[i] | off_kt[:i]
        alike = (votes_kt[i] == votes_kt[:i]) & either
        overlap[i, :i] = alike.sum(axis=1) / np.maximum(either.sum(axis=1), 1)
        overlap[:i, i] = overlap[i, :i]
    return overlap


def overlap_to_json(sites: Sequence[str], overlap_kk: Array) -> str:
    """Return the text that option ``overlap`` of selector "diversity" takes.

    Parameters
    ----------
    sites : sequence of str
        Key ids; names of sites without a key.
    overlap_kk : float array of shape (n_sites, n_sites)

    Raises
    ------
    InvalidValueError
        If it would not be read back.

    Examples
    --------
    >>> text = overlap_to_json(["a", "b"], np.array([[1.0, 0.5], [0.5, 1.0]]))
    >>> overlap_from_json(text)[0]
    ('a', 'b')
    """
    # Four digits are more than audits can tell, and keep the text short.
    rows = [[round(float(value), 4) for value in row] for row in overlap_kk]
    plain = {"format": _FORMAT, "sites": list(sites), "overlap": rows}
    text = json.dumps(plain, separators=(",", ":"))
    overlap_from_json(text)
    return text


def overlap_from_json(text: str) -> tuple[tuple[str, ...], Array]:
    """Return (sites, overlap_kk) from what `overlap_to_json` wrote.

    Raises
    ------
    InvalidValueError
        If it is anything else.
    """
    _require(len(text) <= _MAX_TEXT, "it is too long")
    try:
        plain = json.loads(text)
    except (ValueError, RecursionError):
        _require(False, "it is no JSON")
    keys = {"format", "sites", "overlap"}
    _require(isinstance(plain, dict) and set(plain) == keys, f"its keys are {sorted(keys)}")
    sites, rows = plain["sites"], plain["overlap"]
    _require(plain["format"] == _FORMAT, f"its format is {_FORMAT!r}")
    _require(isinstance(sites, list) and 0 < len(sites) <= _MAX_SITES, "sites is a list")
    _require(
        all(isinstance(site, str) and site for site in sites) and len(set(sites)) == len(sites),
        "sites are distinct texts",
    )
    _require(
        isinstance(rows, list)
        and len(rows) == len(sites)
        and all(isinstance(row, list) and len(row) == len(sites) for row in rows)
        and all(type(value) in (int, float) for row in rows for value in row),
        "overlap is a square of numbers, one row a site",
    )
    _require(all(0 <= value <= 1 for row in rows for value in row), "an overlap is in [0, 1]")
    overlap = np.array(rows, dtype=float)
    _require(
        bool((overlap == overlap.T).all() and (overlap.diagonal() == 1.0).all()),
        "an overlap is symmetric, with ones on its diagonal",
    )
    return tuple(sites), overlap


def _require(condition: bool, why: str) -> None:
    if not condition:
        raise InvalidValueError(
            f"the overlap of sites cannot be read: {why}",
            hint="pass the text that overlap_to_json() returned",
        )
