"""Read a secret from one share of it.

Sharing hides a number only if each share alone is as likely under any number. Uniform
numbers of a finite ring do that; real numbers with Gaussian noise of moderate size, which
some systems use because networks work on reals, do not: every share leans towards the
secret, and a classifier finds out how.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedinfer_flower.attacks.base import ATTACKS, Attack, AttackResult, Position
from fedinfer_flower.attacks.federation import TargetFederation
from fedinfer_flower.attacks.measures import ERROR_RATE, binomial_threshold, clopper_pearson
from fedinfer_flower.attacks.regression import fit_ridge, one_hot
from fedinfer_flower.attacks.rounds import Round, label_of
from fedinfer_flower.ensemble.base import Array, Disclosure
from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.privacy import noise
from fedinfer_flower.privacy.base import Protection

__all__ = ["ObservedShares", "ShareLeakage", "gaussian_shares", "payload_features", "ring_shares"]


def ring_shares(values: npt.NDArray[np.integer], *, n_shares: int, bits: int = 32) -> Array:
    """Split integers into uniform shares modulo ``2**bits`` that add up to them.

    For attacks and tests: what a sound scheme looks like.

    Returns
    -------
    shares : uint64 array of shape (n_shares, *values.shape)

    Examples
    --------
    >>> shares = ring_shares(np.array([5, -1]), n_shares=3)
    >>> (shares.sum(axis=0) % 2**32).tolist()
    [5, 4294967295]
    """
    if n_shares < 2 or bits not in (32, 64):
        raise InvalidValueError("there are 2 shares or more, of 32 or 64 bits")
    mask = np.uint64(2**bits - 1)
    drawn = noise.random_words((n_shares - 1) * values.size) & mask
    shares = drawn.reshape(n_shares - 1, *values.shape)
    # Unsigned arithmetic wraps as the ring does.
    last = (values.astype(np.int64).view(np.uint64) - shares.sum(axis=0, dtype=np.uint64)) & mask
    return np.concatenate([shares, last[None]])


def gaussian_shares(values: Array, *, n_shares: int, std: float, seed: int) -> Array:
    """Split reals into shares with Gaussian noise that add up to them; unsafe.

    Each share is an n-th of the value and noise that cancels in the sum. For attacks and
    tests only: what leaks.

    Returns
    -------
    shares : float array of shape (n_shares, *values.shape)

    Examples
    --------
    >>> shares = gaussian_shares(np.array([5.0]), n_shares=3, std=1.0, seed=0)
    >>> float(shares.sum(axis=0).round(9)[0])
    5.0
    """
    if n_shares < 2 or std <= 0.0:
        raise InvalidValueError("there are 2 shares or more, with a positive spread")
    drawn = np.random.default_rng(seed).normal(0.0, std, (n_shares, *values.shape))
    return np.asarray(values / n_shares + drawn - drawn.mean(axis=0))


@dataclass(frozen=True, kw_only=True, eq=False)
class ObservedShares:
    """One share of each of many secrets, and a label of each secret.

    Parameters
    ----------
    shares : array of shape (n_secrets, m)
        Real or integer; integers of a ring also with their angle on the ring.
    labels : int array of shape (n_secrets,)
        What the attacker wants to know: first half known, second half to be told.
    ring_bits : int
        Size of the ring if shares are its elements; 0 if not.
    claimed : bool
        Whether the mode promises that a share tells nothing.
    """

    shares: npt.NDArray[np.generic]
    labels: npt.NDArray[np.int64]
    ring_bits: int = 0
    claimed: bool = True


def payload_features(payload: bytes, protection: Protection) -> Array:
    """Return a payload as numbers that a linear classifier can use.

    Clear 32-bit scores as such, anything else byte by byte.
    """
    if protection.name == "plain":
        return np.frombuffer(payload, "<f4").astype(float)
    return np.frombuffer(payload, np.uint8).astype(float) / 255.0


@ATTACKS.register("share-leakage")
@dataclass(frozen=True, kw_only=True)
class ShareLeakage(Attack[ObservedShares]):
    """Classify secrets by one share, or one masked or encrypted payload, of each.

    Parameters
    ----------
    n_secrets : int
        Payloads that `evidence` collects.

    Privacy
    -------
    Masked and encrypted payloads promise to tell nothing to who holds them alone. That a
    linear classifier finds nothing does not prove it: the proof is that shares are uniform.
    """

    n_secrets: int = 400

    sees = frozenset({Position.COORDINATOR})
    threat = "Who holds one share, or one masked answer, reads what it is to hide."
    stopped_by = frozenset({"he", "secagg", "secagg+dp", "he+dp"})

    def evidence(
        self,
        federation: TargetFederation,
        protection: Protection,
        *,
        seed: int = 0,  # noqa: ARG002
    ) -> dict[str, ObservedShares]:
        """Collect the payloads of one site, one row each; not of noise in the clear."""
        if protection.reveals is Disclosure.SCORES and protection.name != "plain":
            return {}
        n_sites, n_classes = len(federation.sites), federation.n_classes
        inputs = federation.inputs[: self.n_secrets]
        scores = federation.scores(inputs)[0]
        first = Round(
            protection, federation.rule, n_classes=n_classes, n_queries=1, n_sites=n_sites
        )
        rows = []
        for row in scores:
            batch = Round(
                protection,
                federation.rule,
                n_classes=n_classes,
                n_queries=1,
                n_sites=n_sites,
                keys=first.keys,
                identities=first.identities,
            )
            rows.append(payload_features(batch.payload(0, row[None]), protection))
        observed = ObservedShares(
            shares=np.stack(rows),
            labels=scores.argmax(axis=1),
            claimed=protection.name in self.stopped_by,
        )
        return {label_of(protection): observed}

    def run(self, evidence: ObservedShares, *, mode: str = "", seed: int = 0) -> AttackResult:
        """Train on half of the shares, count right labels on the other half."""
        labels = evidence.labels
        order = np.random.default_rng(seed).permutation(len(labels))
        known, asked = order[: len(order) // 2], order[len(order) // 2 :]
        features = _features(evidence)
        n_classes = int(labels.max()) + 1
        predict = fit_ridge(features[known], one_hot(labels[known], n_classes))
        hits = int((predict(features[asked]).argmax(axis=1) == labels[asked]).sum())
        baseline = float(np.bincount(labels[asked]).max() / len(asked))
        threshold = binomial_threshold(baseline, len(asked))
        return AttackResult(
            attack=self.name,
            mode=mode,
            statistic="accuracy of a classifier on one share",
            value=hits / len(asked),
            baseline=baseline,
            threshold=threshold,
            threshold_reason=f"always the commonest label, binomial bound at {ERROR_RATE:g}",
            claim_limit=threshold if evidence.claimed else None,
            interval=clopper_pearson(hits, len(asked)),
            detail={"shares": len(labels), "entries": evidence.shares.shape[1]},
        )


def _features(evidence: ObservedShares) -> Array:
    shares = evidence.shares.astype(float)
    if not evidence.ring_bits:
        return shares
    turn = shares / 2.0**evidence.ring_bits
    # Small negative numbers are near the top of the ring: neighbours on a circle only.
    return np.hstack([turn, np.cos(2.0 * np.pi * turn), np.sin(2.0 * np.pi * turn)])
