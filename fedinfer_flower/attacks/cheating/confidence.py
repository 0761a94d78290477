"""Being sure of everything."""

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

__all__ = ["OverConfident"]


@CHEATS.register("over-confident")
@dataclass(frozen=True, kw_only=True)
class OverConfident(Cheat):
    """Give one's own likeliest class all probability.

    Linear schemes pay a right answer in proportion to its probability: sharpening pays a
    site that is right more often than it is sure.

    Examples
    --------
    >>> honest, rng = np.array([[[0.6, 0.4]]]), np.random.default_rng(0)
    >>> OverConfident()(honest, np.array([0]), rng).answers_anc
    array([[[1., 0.]]])
    """

    knows = frozenset({Knowledge.OWN_ANSWER})
    has_model = True
    pays_because = (
        "a right answer is paid in proportion to its probability, or being sure is paid as such"
    )
    stopped_by = "strictly proper scores (`proper-score`), for a site that is well calibrated"

    def forge(
        self,
        answers: Array,
        labels: IntArray,  # noqa: ARG002
        rng: np.random.Generator,  # noqa: ARG002
        sites: tuple[int, ...],
    ) -> Cheated:
        """Return the sharpened answers."""
        votes = answers[list(sites)].argmax(axis=-1)
        return Cheated(answers_anc=one_hot(votes, answers.shape[-1]), replaces=sites)
