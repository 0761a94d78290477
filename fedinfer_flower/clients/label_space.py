"""Label spaces differ between sites: align by class name, absent classes explicit."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedinfer_flower.ensemble.base import PROBABILITY_FLOOR, Array, log_softmax
from fedinfer_flower.errors import LabelSpaceError

__all__ = ["align_logits", "column_map"]


def column_map(
    local: tuple[str, ...], classes: tuple[str, ...]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return (columns of the local model, columns of the query) of the shared classes.

    Raises
    ------
    LabelSpaceError
        If the local model knows none of the query's classes.
    """
    place = {name: column for column, name in enumerate(classes)}
    pairs = [(here, place[name]) for here, name in enumerate(local) if name in place]
    if not pairs:
        raise LabelSpaceError(
            "the local model knows none of the query's classes",
            hint="compare the class names of the query with those in the site's profile",
        )
    here, there = np.array(pairs, dtype=np.int64).T
    return here, there


def align_logits(logits: Array, local: tuple[str, ...], classes: tuple[str, ...]) -> Array:
    """Return log-probabilities over the query's classes.

    Local classes outside the query are dropped and the rest normalised. A class that the
    model does not know gets `PROBABILITY_FLOOR`: small, finite, and the same for all.

    Parameters
    ----------
    logits : float array of shape (n_queries, n_local_classes)
    local, classes : tuple of str
        Names of the local model's classes and of the query's.

    Returns
    -------
    log_probabilities : float array of shape (n_queries, n_classes)

    Examples
    --------
    >>> np.exp(align_logits(np.log([[0.5, 0.5]]), ("b", "a"), ("a", "b", "c"))).round(3)
    array([[0.5, 0.5, 0. ]])
    """
    here, there = column_map(local, classes)
    aligned = np.full((len(logits), len(classes)), np.log(PROBABILITY_FLOOR))
    aligned[:, there] = log_softmax(logits[:, here])
    return aligned
