"""Sites that answer together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedinfer_flower.attacks.cheating.base import (
    CHEATS,
    Array,
    Cheat,
    Cheated,
    IntArray,
    Knowledge,
    one_hot,
)
from fedinfer_flower.ensemble.options import option

__all__ = ["ColludingBloc", "ColludingPair"]


@CHEATS.register("colluding-pair")
@dataclass(frozen=True, kw_only=True)
class ColludingPair(Cheat):
    """Two sites both answer the mean of their answers.

    Each is better informed than alone, and the ensemble is what it was: pay moves within
    the pair, and any rise of the pair's pay is at others' cost.

    Examples
    --------
    >>> honest, rng = np.array([[[0.9, 0.1]], [[0.5, 0.5]]]), np.random.default_rng(0)
    >>> ColludingPair()(honest, np.array([0]), rng).answers_anc[:, 0]
    array([[0.7, 0.3],
           [0.7, 0.3]])
    """

    knows = frozenset({Knowledge.OWN_ANSWER, Knowledge.ACCOMPLICE})
    has_model = True
    pays_because = "the mean of two answers is better than either, and both are paid for it"
    stopped_by = "one pay for sites that err alike (quotient)"

    @property
    def party_size(self) -> int:
        """Two."""
        return 2

    def forge(
        self,
        answers: Array,
        labels: IntArray,  # noqa: ARG002
        rng: np.random.Generator,  # noqa: ARG002
        sites: tuple[int, ...],
    ) -> Cheated:
        """Return both attackers' answers."""
        shared = answers[list(sites)].mean(axis=0)
        return Cheated(answers_anc=np.stack([shared, shared]), replaces=sites)


@CHEATS.register("colluding-bloc")
@dataclass(frozen=True, kw_only=True)
class ColludingBloc(Cheat):
    """Sites agree on a class for each row by chance, and are all sure of it.

    Without labels, a bloc that outweighs the others *is* the joint answer.

    Parameters
    ----------
    size : int
        Sites in the bloc.

    Examples
    --------
    >>> honest, rng = np.full((3, 4, 2), 0.5), np.random.default_rng(0)
    >>> bloc = ColludingBloc(size=2)(honest, np.zeros(4, dtype=int), rng).answers_anc
    >>> bool((bloc[0] == bloc[1]).all())
    True
    """

    size: int = option(3, low=2, high=64)

    knows = frozenset({Knowledge.ACCOMPLICE})
    has_model = True
    pays_because = "the bloc makes, or bends, the joint answer that it is measured against"
    stopped_by = "labels: what a bloc agrees on is worth nothing where the truth is known"

    @property
    def party_size(self) -> int:
        """Sites in the bloc."""
        return self.size

    def forge(
        self,
        answers: Array,
        labels: IntArray,
        rng: np.random.Generator,
        sites: tuple[int, ...],
    ) -> Cheated:
        """Return the bloc's answers."""
        agreed = one_hot(rng.integers(0, answers.shape[-1], len(labels)), answers.shape[-1])
        return Cheated(answers_anc=np.repeat(agreed[None], len(sites), axis=0), replaces=sites)
