"""Free riders without a model that hand back what the federation says itself."""

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

__all__ = ["EchoJoint", "EchoPrior"]


@CHEATS.register("echo-joint")
@dataclass(frozen=True, kw_only=True)
class EchoJoint(Cheat):
    """Answer what all honest sites together answer to the very query: the strongest echo.

    As accurate as the ensemble, and adds nothing to it. No scheme that scores one site's
    answers alone can tell it from a good model.

    Examples
    --------
    >>> honest, rng = np.array([[[0.9, 0.1]], [[0.5, 0.5]]]), np.random.default_rng(0)
    >>> EchoJoint()(honest, np.array([0]), rng).answers_anc
    array([[[0.7, 0.3]]])
    """

    knows = frozenset({Knowledge.JOINT_ANSWER})
    pays_because = (
        "it is as accurate as the ensemble, and a score of each site by itself cannot see that"
        " it adds nothing"
    )
    stopped_by = (
        "sealed, masked or encrypted answers: the joint answer exists only after the round; and"
        " audits that are asked once"
    )

    def forge(
        self,
        answers: Array,
        labels: IntArray,  # noqa: ARG002
        rng: np.random.Generator,  # noqa: ARG002
        sites: tuple[int, ...],  # noqa: ARG002
    ) -> Cheated:
        """Return one attacker's answers."""
        return Cheated(answers_anc=answers.mean(axis=0)[None])


@CHEATS.register("echo-prior")
@dataclass(frozen=True, kw_only=True)
class EchoPrior(Cheat):
    """Answer how often each class was the joint answer so far: what an echo can really know.

    The same answer to every row.

    Examples
    --------
    >>> honest, rng = np.array([[[0.9, 0.1], [0.5, 0.5]]]), np.random.default_rng(0)
    >>> EchoPrior()(honest, np.array([0, 1]), rng).answers_anc
    array([[[0.7, 0.3],
            [0.7, 0.3]]])
    """

    knows = frozenset({Knowledge.PAST_ANSWERS})
    pays_because = "the scheme pays for answering at all, or for leaning to the usual class"
    stopped_by = "schemes that pay agreement beyond chance: any fixed answer earns exactly 0"

    def forge(
        self,
        answers: Array,
        labels: IntArray,
        rng: np.random.Generator,  # noqa: ARG002
        sites: tuple[int, ...],  # noqa: ARG002
    ) -> Cheated:
        """Return one attacker's answers."""
        prior = answers.mean(axis=(0, 1))
        return Cheated(answers_anc=np.tile(prior, (1, len(labels), 1)))
