"""Rebuild the input from what leaves a site: an embedding, or scores.

The attacker has inputs of the same kind with their embeddings, fits the way back, and
applies it to embeddings of strangers. Two questions: how near does the reconstruction come,
and does it point to the right record among the candidates?

References
----------
.. [1] Song and Raghunathan, Information Leakage in Embedding Models, CCS 2020.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedinfer_flower.attacks.base import ATTACKS, Attack, AttackResult, Position
from fedinfer_flower.attacks.federation import TargetFederation
from fedinfer_flower.attacks.measures import ERROR_RATE, binomial_threshold, clopper_pearson
from fedinfer_flower.attacks.reading import promises_noise
from fedinfer_flower.attacks.regression import fit_ridge, random_features
from fedinfer_flower.attacks.rounds import label_of, read_one
from fedinfer_flower.ensemble.base import Array, Disclosure
from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.privacy.base import Protection, ScorePlan

__all__ = ["Inversion", "ObservedEmbeddings"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ObservedEmbeddings:
    """Embeddings with their inputs: the attacker's own, and those to be inverted.

    Parameters
    ----------
    known_embeddings : float array of shape (n_known, m)
        Of the same model; without noise if the attacker can have them so.
    known_inputs : float array of shape (n_known, d)
    observed : float array of shape (n_observed, m)
        What the attacker sees; with noise if there is any.
    inputs : float array of shape (n_observed, d)
        The truth, and the candidates among which the attacker looks for it.
    noise_std : float
        Of an entry of `observed`, which is public: an attacker who knows it fits to inputs
        as noisy as those it has to invert.
    claimed : bool
        Whether the mode promises that records are not found again.
    """

    known_embeddings: Array
    known_inputs: Array
    observed: Array
    inputs: Array
    noise_std: float = 0.0
    claimed: bool = False

    def __post_init__(self) -> None:
        pairs = ((self.known_embeddings, self.known_inputs), (self.observed, self.inputs))
        if any(a.ndim != 2 or b.ndim != 2 or len(a) != len(b) for a, b in pairs):
            raise InvalidValueError("embeddings and inputs are matrices with a row a record")


@ATTACKS.register("inversion")
@dataclass(frozen=True, kw_only=True)
class Inversion(Attack[ObservedEmbeddings]):
    """Regress inputs on embeddings; find the record that is nearest to the reconstruction.

    Parameters
    ----------
    n_records : int
        Records that `evidence` inverts, and candidates.
    n_features : int
        Random features of the embeddings.

    Privacy
    -------
    Only noise with a promise for each row bounds this. Clipping does not; a low dimension
    helps as far as it goes.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> inputs, mix = rng.normal(size=(300, 4)), rng.normal(size=(4, 6))
    >>> seen = ObservedEmbeddings(known_embeddings=(inputs @ mix)[:200],
    ...     known_inputs=inputs[:200], observed=(inputs @ mix)[200:], inputs=inputs[200:])
    >>> Inversion().run(seen).value
    1.0
    """

    n_records: int = 200
    n_features: int = 256

    sees = frozenset({Position.COORDINATOR, Position.QUERIER})
    threat = "Who sees an embedding, or the answer to a sealed query, rebuilds the input."
    stopped_by = frozenset({"dp"})

    def evidence(
        self,
        federation: TargetFederation,
        protection: Protection,
        *,
        seed: int = 0,
    ) -> dict[str, ObservedEmbeddings]:
        """Take one site's scores for embeddings: a coordinator reads them, not the query."""
        if protection.reveals is not Disclosure.SCORES:
            return {}
        order = np.random.default_rng(seed).permutation(len(federation.inputs))
        asked, known = order[: self.n_records], order[self.n_records :]
        scores = federation.scores(federation.inputs)[0]
        rule, n_classes = federation.rule, federation.n_classes
        plan = ScorePlan.for_rule(rule, n_classes=n_classes, n_sites_max=1)
        seen = ObservedEmbeddings(
            known_embeddings=_spread(scores[known]),
            known_inputs=federation.inputs[known],
            observed=_spread(read_one(protection, rule, scores[asked], n_classes=n_classes)),
            inputs=federation.inputs[asked],
            claimed=protection.name in self.stopped_by and promises_noise(protection, plan),
        )
        return {f"{label_of(protection)}, one site": seen}

    def run(self, evidence: ObservedEmbeddings, *, mode: str = "", seed: int = 0) -> AttackResult:
        """Fit the way back, rebuild, look up."""
        known = evidence.known_embeddings
        spread = known.std(axis=0) + 1e-12
        if evidence.noise_std > 0.0:
            drawn = np.random.default_rng(seed).normal(0.0, evidence.noise_std, known.shape)
            known = known + drawn
        back = fit_ridge(
            random_features(known / spread, n_features=self.n_features, seed=seed),
            evidence.known_inputs,
        )
        rebuilt = back(
            random_features(evidence.observed / spread, n_features=self.n_features, seed=seed)
        )
        inputs = evidence.inputs
        mean = evidence.known_inputs.mean(axis=0)
        relative = float(((rebuilt - inputs) ** 2).mean() / ((inputs - mean) ** 2).mean())
        squared = (inputs**2).sum(axis=1) - 2.0 * rebuilt @ inputs.T
        hits = int((squared.argmin(axis=1) == np.arange(len(inputs))).sum())
        threshold = binomial_threshold(1.0 / len(inputs), len(inputs))
        return AttackResult(
            attack=self.name,
            mode=mode,
            statistic=f"records found again among {len(inputs)}",
            value=hits / len(inputs),
            baseline=1.0 / len(inputs),
            threshold=threshold,
            threshold_reason=f"one guess among all candidates, binomial bound at {ERROR_RATE:g}",
            claim_limit=threshold if evidence.claimed else None,
            interval=clopper_pearson(hits, len(inputs)),
            detail={"squared error over that of the mean": relative},
        )


def _spread(scores: Array) -> Array:
    """Take logarithms of probabilities: the digits after the first nines tell most."""
    if bool((scores < 0.0).any()) or float(scores.max(initial=0.0)) > 1.0 + 1e-6:
        return scores  # noise: the logarithm of it means nothing
    return np.asarray(np.log(np.maximum(scores, 1e-6)))
