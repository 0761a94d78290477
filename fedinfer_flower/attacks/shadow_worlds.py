"""Worlds in which an attacker knows who was a member, and what is seen of their sites.

Axes: W worlds, K sites, n records, C classes, R = W * K rows (world, target site), F features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.attacks.rounds import read_one, read_sum
from fedinfer_flower.attacks.shadow_models import train_mlps
from fedinfer_flower.ensemble.base import Array, Disclosure, EnsembleRule, make_rule
from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.privacy import noise
from fedinfer_flower.privacy.base import Protection, ScorePlan
from fedinfer_flower.privacy.gaussian_mechanism import GaussianMechanism

__all__ = [
    "MembershipEvidence",
    "ShadowWorlds",
    "View",
    "distributed_dp_view",
    "plain_view",
    "protected_view",
    "secure_sum_view",
]

View = Callable[[Array], Array]
"""From the sites' scores (K, B, C) to what is seen when each site is the target, (K, B, C)."""

_PROBABILITY_STEP: Final = 1e-4
"""Probabilities nearer to 0 or 1 are told apart by rounding, not by membership."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ShadowWorlds:
    """Worlds in which the attacker knows who was a member.

    Parameters
    ----------
    probabilities : float array of shape (W, K, n, C)
        Answers of each site's model to every record of the pool.
    members : bool array of shape (W, K, n)
        Whether the record was in that site's shard.
    labels : int array of shape (n,)
    """

    probabilities: npt.NDArray[np.floating]
    members: npt.NDArray[np.bool_]
    labels: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.probabilities.ndim != 4 or self.probabilities.shape[:3] != self.members.shape:
            raise InvalidValueError("probabilities have shape (W, K, n, C), members (W, K, n)")
        if self.labels.shape != self.members.shape[2:] or len(self.members) < 2:
            raise InvalidValueError("labels have shape (n,), and there are two worlds or more")

    @classmethod
    def train(
        cls,
        inputs: Array,
        labels: npt.NDArray[np.int64],
        *,
        n_classes: int,
        n_worlds: int = 64,
        n_sites: int = 10,
        n_members: int = 650,
        label_noise: float = 0.15,
        seed: int = 0,
    ) -> ShadowWorlds:
        """Draw members, split them over sites, train an overfit network at each.

        Parameters
        ----------
        inputs : float array of shape (n, d)
            The pool; features of the order of 1.
        labels : int array of shape (n,)
        n_classes, n_worlds, n_sites : int
        n_members : int
            Records of a world, over all sites.
        label_noise : float
            Share of records that get a random label, which only a member's model knows.
        seed : int

        Raises
        ------
        InvalidValueError
            If the pool is not larger than `n_members`, or a site would have no record.
        """
        size = n_members // n_sites
        if size < 1 or size * n_sites >= len(inputs):
            raise InvalidValueError("n_members lies between n_sites and the size of the pool")
        rng = np.random.default_rng(seed)
        flipped = rng.random(len(labels)) < label_noise
        known = np.where(flipped, rng.integers(0, n_classes, len(labels)), labels)
        drawn = [rng.permutation(len(inputs))[: size * n_sites] for _ in range(n_worlds)]
        rows = np.concatenate([d.reshape(n_sites, size) for d in drawn])
        nets = train_mlps(inputs[rows], known[rows], n_classes=n_classes, seed=seed)
        members = np.zeros((len(rows), len(inputs)), dtype=bool)
        np.put_along_axis(members, rows, True, axis=1)
        shape = (n_worlds, n_sites, len(inputs))
        return cls(
            probabilities=nets.probabilities(inputs).reshape(*shape, n_classes),
            members=members.reshape(shape),
            labels=known,
        )

    def as_votes(self) -> ShadowWorlds:
        """Return the same worlds in which sites say their best class only."""
        best = self.probabilities.argmax(axis=-1)
        votes = np.eye(self.probabilities.shape[-1], dtype=np.float32)[best]
        return ShadowWorlds(probabilities=votes, members=self.members, labels=self.labels)

    def seen_through(
        self,
        view: View,
        *,
        noiseless: View | None = None,
        logit: bool = True,
        epsilon_delta: tuple[float, float] | None = None,
    ) -> MembershipEvidence:
        """Return what an attacker sees of every world through a view.

        Parameters
        ----------
        view : callable
        noiseless : callable, optional
            The same without noise, for a view with noise: an attacker who trains shadow
            models itself has no reason to add any to them.
        logit : bool
            Look at ``log(p / (1 - p))`` of the label's score p, which is nearly normal.
            With noise on the scores look at all scores as they are instead.
        epsilon_delta : tuple of float, optional
            What the view promises for one row of one site's answer.
        """
        observed, shadow = [], []
        for scores in self.probabilities:
            observed.append(self._features(view(scores.astype(float)), logit=logit))
            if noiseless is not None:
                shadow.append(self._features(noiseless(scores.astype(float)), logit=logit))
        seen = np.concatenate(observed)
        n_worlds, n_sites, n = self.members.shape
        return MembershipEvidence(
            observed=seen,
            shadow=np.concatenate(shadow) if shadow else seen,
            members=self.members.reshape(n_worlds * n_sites, n),
            groups=np.repeat(np.arange(n_worlds), n_sites),
            epsilon_delta=epsilon_delta,
        )

    def _features(self, scores: Array, *, logit: bool) -> npt.NDArray[np.float32]:
        if not logit:
            return scores.astype(np.float32)
        of_label = np.take_along_axis(scores, self.labels[None, :, None], axis=2)
        p = np.clip(of_label, _PROBABILITY_STEP, 1.0 - _PROBABILITY_STEP)
        return np.log(p / (1.0 - p)).astype(np.float32)


def plain_view(scores: Array) -> Array:
    """See each site's own answer, as the coordinator does under `plain`.

    Examples
    --------
    >>> plain_view(np.ones((2, 1, 1))).shape
    (2, 1, 1)
    """
    return scores


def secure_sum_view(scores: Array) -> Array:
    """See the mean over the sites only, as the querier does under an exact secure sum.

    Examples
    --------
    >>> secure_sum_view(np.array([[[0.0]], [[1.0]]])).ravel().tolist()
    [0.5, 0.5]
    """
    return np.broadcast_to(scores.mean(axis=0), scores.shape)


def distributed_dp_view(plan: ScorePlan, *, epsilon: float, delta: float) -> View:
    """See the mean with the noise of one (epsilon, delta)-private answer in the sum.

    As under a secure sum to which the sites together add the noise that one of them alone
    would need.
    """
    std = GaussianMechanism.calibrated(plan, epsilon=epsilon, delta=delta).std
    step = GaussianMechanism.calibrated(plan, epsilon=epsilon, delta=delta).codec.step

    def view(scores: Array) -> Array:
        drawn = noise.gaussian_integers(scores.shape[1:], std) * step
        return np.broadcast_to(scores.mean(axis=0) + drawn / len(scores), scores.shape)

    return view


def protected_view(protection: Protection, rule: EnsembleRule | None = None) -> View:
    """See what the real protection shows: each site's answer, or the mean of the sum.

    Parameters
    ----------
    protection : Protection
    rule : EnsembleRule, optional
        What the scores are; mean probability by default.
    """
    rule = make_rule("mean-probability") if rule is None else rule

    def view(scores: Array) -> Array:
        n_classes = scores.shape[-1]
        if protection.reveals is Disclosure.SCORES:
            rows = scores.reshape(-1, n_classes)
            return read_one(protection, rule, rows, n_classes=n_classes).reshape(scores.shape)
        total = read_sum(protection, rule, scores, n_classes=n_classes)
        return np.broadcast_to(total / len(scores), scores.shape)

    return view


@dataclass(frozen=True, kw_only=True, eq=False)
class MembershipEvidence:
    """What is seen of R target sites, and who their members are.

    Parameters
    ----------
    observed : float array of shape (R, n, F)
        Features of what the attacker sees of each record.
    shadow : float array of shape (R, n, F)
        The same in the attacker's own worlds, without noise; the world of the target is
        left out.
    members : bool array of shape (R, n)
    groups : int array of shape (R,)
        World of each row.
    epsilon_delta : tuple of float, optional
        Promise for one row of one site's answer.
    """

    observed: npt.NDArray[np.floating]
    shadow: npt.NDArray[np.floating]
    members: npt.NDArray[np.bool_]
    groups: npt.NDArray[np.int64]
    epsilon_delta: tuple[float, float] | None = None
