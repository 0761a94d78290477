"""Sites that would harm the ensemble, and be paid as if they did not."""

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
)

__all__ = ["LabelTargeted", "SignFlip"]


@CHEATS.register("label-targeted")
@dataclass(frozen=True, kw_only=True)
class LabelTargeted(Cheat):
    """Answer honestly, but for one class say the next.

    The class is the one that the site answers most often. Pay for the other classes goes on:
    a scheme can make sabotage of one class cost what that class is worth, not more.

    Examples
    --------
    >>> honest, rng = np.array([[[0.8, 0.2], [0.7, 0.3], [0.1, 0.9]]]), np.random.default_rng(0)
    >>> LabelTargeted()(honest, np.array([0, 0, 1]), rng).answers_anc[0]
    array([[0.2, 0.8],
           [0.3, 0.7],
           [0.1, 0.9]])
    """

    knows = frozenset({Knowledge.OWN_ANSWER})
    has_model = True
    pays_because = (
        "the scheme does not look at whether answers are right, or one class weighs little"
    )
    stopped_by = "labels make it cost what the class is worth; nothing here prevents it"

    def forge(
        self,
        answers: Array,
        labels: IntArray,  # noqa: ARG002
        rng: np.random.Generator,  # noqa: ARG002
        sites: tuple[int, ...],
    ) -> Cheated:
        """Return the attackers' answers."""
        n_classes = answers.shape[-1]
        forged = answers[list(sites)].copy()
        for one in forged:
            votes = one.argmax(axis=-1)
            target = int(np.bincount(votes, minlength=n_classes).argmax())
            other = (target + 1) % n_classes
            rows = votes == target
            swapped = one[rows]
            swapped[:, [target, other]] = swapped[:, [other, target]]
            one[rows] = swapped
        return Cheated(answers_anc=forged, replaces=sites)


@CHEATS.register("sign-flip")
@dataclass(frozen=True, kw_only=True)
class SignFlip(Cheat):
    """Turn one's answer upside down: the likeliest class gets the least probability.

    Examples
    --------
    >>> honest, rng = np.array([[[0.7, 0.2, 0.1]]]), np.random.default_rng(0)
    >>> SignFlip()(honest, np.array([0]), rng).answers_anc
    array([[[0.1, 0.2, 0.7]]])
    """

    knows = frozenset({Knowledge.OWN_ANSWER})
    has_model = True
    pays_because = "the scheme does not look at whether answers are right"
    stopped_by = "labels: it earns less than nothing, which payment rules cut at 0 or charge"

    def forge(
        self,
        answers: Array,
        labels: IntArray,  # noqa: ARG002
        rng: np.random.Generator,  # noqa: ARG002
        sites: tuple[int, ...],
    ) -> Cheated:
        """Return the attackers' answers."""
        honest = answers[list(sites)]
        order = np.argsort(honest, axis=-1, kind="stable")
        forged = np.empty_like(honest)
        # The class of ascending rank r gets the probability of descending rank r.
        np.put_along_axis(
            forged, order, np.take_along_axis(honest, order[..., ::-1], axis=-1), axis=-1
        )
        return Cheated(answers_anc=forged, replaces=sites)
