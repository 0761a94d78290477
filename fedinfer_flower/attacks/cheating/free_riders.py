"""Free riders without a model: they look at nothing of the query."""

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

__all__ = ["Constant", "RandomAnswer", "Uniform"]


@CHEATS.register("constant")
@dataclass(frozen=True, kw_only=True)
class Constant(Cheat):
    """Always answer, and be sure of, the class that is right most often.

    Where one class is most of all rows, this is right most of the time and indeed worth
    something to an ensemble that is not.

    Examples
    --------
    >>> honest, rng = np.full((1, 3, 2), 0.5), np.random.default_rng(0)
    >>> Constant()(honest, np.array([1, 1, 0]), rng).answers_anc[0, 2]
    array([0., 1.])
    """

    knows = frozenset({Knowledge.CLASS_FREQUENCIES})
    pays_because = "it is right about its one class, which accuracy and agreement count in full"
    stopped_by = "schemes that pay agreement beyond chance: any fixed answer earns exactly 0"

    def forge(
        self,
        answers: Array,
        labels: IntArray,
        rng: np.random.Generator,  # noqa: ARG002
        sites: tuple[int, ...],  # noqa: ARG002
    ) -> Cheated:
        """Return one attacker's answers."""
        n_classes = answers.shape[-1]
        usual = np.bincount(labels, minlength=n_classes).argmax()
        return Cheated(answers_anc=one_hot(np.full(len(labels), usual), n_classes)[None])


@CHEATS.register("uniform")
@dataclass(frozen=True, kw_only=True)
class Uniform(Cheat):
    """Give every class the same probability.

    Examples
    --------
    >>> honest, rng = np.full((1, 3, 2), 0.5), np.random.default_rng(0)
    >>> float(Uniform()(honest, np.array([1, 1, 0]), rng).answers_anc.max())
    0.5
    """

    pays_because = "the scheme pays for answering at all"
    stopped_by = "centred answers: a uniform one earns exactly 0 under every row sum"

    def forge(
        self,
        answers: Array,
        labels: IntArray,
        rng: np.random.Generator,  # noqa: ARG002
        sites: tuple[int, ...],  # noqa: ARG002
    ) -> Cheated:
        """Return one attacker's answers."""
        n_classes = answers.shape[-1]
        return Cheated(answers_anc=np.full((1, len(labels), n_classes), 1.0 / n_classes))


@CHEATS.register("random")
@dataclass(frozen=True, kw_only=True)
class RandomAnswer(Cheat):
    """Be sure of a class drawn by chance, anew for each row.

    Examples
    --------
    >>> honest, rng = np.full((1, 3, 2), 0.5), np.random.default_rng(0)
    >>> RandomAnswer()(honest, np.array([1, 1, 0]), rng).answers_anc.sum(axis=-1)
    array([[1., 1., 1.]])
    """

    pays_because = (
        "the scheme pays for answering, or for being sure; without labels it also bends the"
        " joint answer"
    )
    stopped_by = "labels: it earns 0 in expectation; what is left is chance, 1/sqrt(audits)"

    def forge(
        self,
        answers: Array,
        labels: IntArray,
        rng: np.random.Generator,
        sites: tuple[int, ...],  # noqa: ARG002
    ) -> Cheated:
        """Return one attacker's answers."""
        n_classes = answers.shape[-1]
        drawn = rng.integers(0, n_classes, len(labels))
        return Cheated(answers_anc=one_hot(drawn, n_classes)[None])
