"""The other direction: sites run the front, the querier runs the tail on their mean.

Rule ``mean-logit`` adds up vectors over "classes". Taken for dimensions of an embedding,
the same sum is that of the sites' embeddings, and every protection that adds scores adds
embeddings. The rule keeps differences within a row only, and cuts what lies more than 16
below a row's largest entry; so embeddings are centred, and clipped such that no two of
their entries are further apart.

Axes: B queries, D dimensions of an embedding.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import InvalidValueError, ShapeError
from fedinfer_flower.split.front import clip_rows, run_layers

if TYPE_CHECKING:
    from fedinfer_flower.querier import Querier
    from fedinfer_flower.split.front import Front
    from fedinfer_flower.wire.documents import CombinedAnswer

__all__ = ["MAX_CLIP_NORM", "EmbeddingTail", "SiteFront", "dimension_names"]

_RULE_CLIP: Final = 16.0
"""Default of the rule ``mean-logit``."""

MAX_CLIP_NORM: Final = 0.99 * _RULE_CLIP / math.sqrt(2.0)
"""Entries of a vector of L2 norm c are at most sqrt(2) c apart."""


def dimension_names(n_dimensions: int) -> tuple[str, ...]:
    """Return the "classes" of an embedding, in order.

    Examples
    --------
    >>> dimension_names(2)
    ('dimension-0000', 'dimension-0001')
    """
    return tuple(f"dimension-{number:04d}" for number in range(n_dimensions))


def _centred(rows_bd: npt.NDArray[np.float64], clip_norm: float) -> npt.NDArray[np.float64]:
    return clip_rows(rows_bd - rows_bd.mean(axis=1, keepdims=True), clip_norm)


def _checked_norm(clip_norm: float) -> float:
    if not 0.0 < clip_norm <= MAX_CLIP_NORM:
        raise InvalidValueError(
            f"clip_norm of an embedding that sites send is in (0, {MAX_CLIP_NORM:.2f}], got"
            f" {clip_norm!r}",
            hint="a longer embedding would be cut by the rule 'mean-logit' without notice",
        )
    return float(clip_norm)


class SiteFront:
    """A site's front, as a model for `LocalModel`: centred, clipped embeddings.

    ``LocalModel(model=front, classes=front.classes, outputs="logits")``, without
    `holdout`: a temperature would scale the embedding.

    Parameters
    ----------
    front : torch.nn.Module or callable
        From inputs to embeddings of shape (n_queries, n_dimensions). May differ from
        site to site, but all were trained with the same tail.
    n_dimensions : int
    clip_norm : float
        The same for all, at most `MAX_CLIP_NORM`.

    Privacy
    -------
    An embedding says more about a site's model than class scores do: n_dimensions numbers
    instead of one a class. Who sees which is as under the protection in use. There is no
    noise in it.

    Examples
    --------
    >>> SiteFront(lambda rows: rows, n_dimensions=2, clip_norm=1.0)(np.array([[1.0, 0.0]]))
    array([[ 0.5, -0.5]])
    """

    def __init__(self, front: Front, *, n_dimensions: int, clip_norm: float) -> None:
        self._front = front
        self.classes = dimension_names(n_dimensions)
        self.clip_norm = _checked_norm(clip_norm)

    def __call__(self, inputs: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Return embeddings of shape (n_queries, n_dimensions)."""
        rows_bd = run_layers(self._front, inputs)
        if rows_bd.shape[1:] != (len(self.classes),):
            raise ShapeError(
                f"the front made embeddings of shape {rows_bd.shape[1:]}, expected"
                f" {(len(self.classes),)}"
            )
        return _centred(rows_bd, self.clip_norm)


class EmbeddingTail:
    """Run the tail of a network on the mean of the sites' embeddings (querier).

    The strategy has ``rule="mean-logit"`` with its default `clip`. The labels that
    `Querier.open` finds are numbers of dimensions and mean nothing.

    Parameters
    ----------
    tail : torch.nn.Module or callable
        From embeddings of shape (n_queries, n_dimensions), centred and clipped, to
        outputs.
    n_dimensions : int

    Privacy
    -------
    The querier sees the sum of the embeddings of its own queries. Sites and coordinator
    see neither the tail nor its output.

    Examples
    --------
    >>> tail = EmbeddingTail(lambda rows: 2.0 * rows, n_dimensions=2)
    >>> tail.answer(np.array([[3.0, -3.0]]), 3)
    array([[ 2., -2.]])
    """

    def __init__(self, tail: Front, *, n_dimensions: int) -> None:
        self._tail = tail
        self.classes = dimension_names(n_dimensions)

    def answer(
        self, totals_bd: npt.NDArray[np.float64], n_sites: int | npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float64]:
        """Return the tail's output for sums over `n_sites` sites, which may differ by row.

        Raises
        ------
        ShapeError
            If the sums are not of shape (n_queries, n_dimensions).
        InvalidValueError
            If a row has no site.
        """
        if totals_bd.ndim != 2 or totals_bd.shape[1] != len(self.classes):
            raise ShapeError(f"expected (n_queries, {len(self.classes)}), got {totals_bd.shape}")
        counts = np.broadcast_to(np.asarray(n_sites), (len(totals_bd),))
        if not bool((counts >= 1).all()):
            raise InvalidValueError("each row is the sum over at least one site")
        return run_layers(self._tail, totals_bd / counts[:, None])

    def open(self, querier: Querier, combined: CombinedAnswer) -> npt.NDArray[np.float64]:
        """Open a combined answer to a job of this querier, and run the tail on it.

        Raises
        ------
        InvalidValueError
            If it is not a sum over these dimensions by ``mean-logit`` with its default `clip`.
        ProtocolError
            If it does not open.
        """
        clip = dict(combined.rule_options).get("clip", _RULE_CLIP)
        if (combined.rule, clip) != ("mean-logit", _RULE_CLIP) or (
            tuple(combined.classes) != self.classes
        ):
            raise InvalidValueError(
                "the answer is not a sum of embeddings",
                hint="FedEnsemble(rule='mean-logit') and querier.ask(..., classes=tail.classes)",
            )
        totals = querier.totals(combined)
        counts = np.repeat(
            [batch.n_sites for batch in combined.batches],
            [batch.n_queries for batch in combined.batches],
        )
        return self.answer(totals, counts)
