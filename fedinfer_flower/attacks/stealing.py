"""Train a copy of a model, or of the whole ensemble, on its answers.

References
----------
.. [1] Tramer, Zhang, Juels, Reiter and Ristenpart, Stealing Machine Learning Models via
   Prediction APIs, USENIX Security 2016.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedinfer_flower.attacks.base import ATTACKS, Attack, AttackResult, Position
from fedinfer_flower.attacks.federation import TargetFederation
from fedinfer_flower.attacks.reading import STRONG_EPSILON
from fedinfer_flower.attacks.regression import fit_ridge, random_features
from fedinfer_flower.attacks.rounds import label_of, read_one, read_sum
from fedinfer_flower.ensemble.base import Array, Disclosure
from fedinfer_flower.errors import BudgetExceededError, FedInferError, InvalidValueError
from fedinfer_flower.privacy import gaussian_dp
from fedinfer_flower.privacy.base import Protection, ScorePlan

__all__ = ["AnswersForSale", "Stealing", "rows_within"]


@dataclass(frozen=True, kw_only=True, eq=False)
class AnswersForSale:
    """A model behind a way to ask.

    Parameters
    ----------
    ask : callable
        From inputs of shape (n, d) to what the attacker reads, shape (n, width). May raise
        a `FedInferError`, such as `BudgetExceededError`: nothing more comes then.
    inputs : float array of shape (n_queries, d)
        What the attacker asks, in this order.
    held_out : float array of shape (n_held_out, d)
        Rows on which the copy is compared with the original.
    truth : float array of shape (n_held_out, width)
        The original's clear scores of these.
    claimed : bool
        Whether the mode promises that no useful copy can be made.
    step : int
        Rows asked at a time.
    """

    ask: Callable[[Array], Array]
    inputs: Array
    held_out: Array
    truth: Array
    claimed: bool = False
    step: int = 100


def rows_within(protection: Protection, plan: ScorePlan, *, total_epsilon: float) -> int:
    """Return how many Gaussian answers cost at most `total_epsilon` together.

    Examples
    --------
    >>> from fedinfer_flower.ensemble.base import make_rule
    >>> from fedinfer_flower.privacy.dp import DP
    >>> plan = ScorePlan.for_rule(make_rule("mean-probability"), n_classes=10, n_sites_max=3)
    >>> rows_within(DP(epsilon=1.0), plan, total_epsilon=8.0)
    38
    """
    promise = protection.epsilon_delta(plan)
    if promise is None or promise[1] <= 0.0:
        raise InvalidValueError("only Gaussian noise composes like this")
    epsilon, delta = promise
    ratio = gaussian_dp.mu_for(total_epsilon, delta) / gaussian_dp.mu_for(epsilon, delta)
    return int(ratio**2 + 1e-9)


@ATTACKS.register("stealing")
@dataclass(frozen=True, kw_only=True)
class Stealing(Attack[AnswersForSale]):
    """Fit a copy to answers, and count on how many new queries it says the same.

    Parameters
    ----------
    n_queries : str
        Numbers of queries to try, rising, separated by commas; the last one decides.
    n_features : int
        Random features of the copy.

    Privacy
    -------
    Nothing stops a copy of what the answers are for: whoever may ask the ensemble without
    limit can copy the ensemble, also under encryption. Of one site's model: sums hide its
    part, `dp` with a budget bounds it.
    """

    n_queries: str = "30,100,300"
    n_features: int = 256

    sees = frozenset({Position.COORDINATOR, Position.QUERIER})
    threat = "Who may ask without limit trains a copy of the model on its answers."

    def __post_init__(self) -> None:
        if min(self.sizes(), default=0) < 2 or list(self.sizes()) != sorted(self.sizes()):
            raise InvalidValueError("n_queries are rising numbers of 2 or more, with commas")
        if self.n_features < 1:
            raise InvalidValueError("n_features is at least 1")

    def sizes(self) -> tuple[int, ...]:
        """Return the numbers of queries."""
        return tuple(int(part) for part in self.n_queries.split(","))

    def evidence(
        self, federation: TargetFederation, protection: Protection, *, seed: int = 0
    ) -> dict[str, AnswersForSale]:
        """Offer one site's model, or the sum where only sums are seen."""
        order = np.random.default_rng(seed).permutation(len(federation.inputs))
        n_asked = self.sizes()[-1]
        if len(order) < n_asked + 50:
            return {}
        inputs = federation.inputs[order[:n_asked]]
        held_out = federation.inputs[order[n_asked : n_asked + 500]]
        rule, n_classes = federation.rule, federation.n_classes
        is_one = protection.reveals is Disclosure.SCORES

        def ask(rows: Array) -> Array:
            scores = federation.scores(rows)
            if is_one:
                return read_one(protection, rule, scores[0], n_classes=n_classes)
            return read_sum(protection, rule, scores, n_classes=n_classes)

        truth = federation.scores(held_out)
        what = "one site" if is_one else f"sum of {len(truth)}"
        label = f"{label_of(protection)}, {what}"
        offer = AnswersForSale(
            ask=ask,
            inputs=inputs,
            held_out=held_out,
            truth=truth[0] if is_one else truth.sum(axis=0),
        )
        plan = ScorePlan.for_rule(rule, n_classes=n_classes, n_sites_max=len(truth))
        promise = protection.epsilon_delta(plan)
        if promise is None or not is_one or promise[1] <= 0.0:
            return {label: offer}
        limit = rows_within(protection, plan, total_epsilon=STRONG_EPSILON)
        within = AnswersForSale(
            ask=_limited(ask, limit),
            inputs=inputs,
            held_out=held_out,
            truth=truth[0],
            claimed=True,
            step=1,
        )
        return {label: offer, f"{label}, epsilon {STRONG_EPSILON:g} in total": within}

    def run(self, evidence: AnswersForSale, *, mode: str = "", seed: int = 0) -> AttackResult:
        """Ask, fit copies of growing size, compare on held-out rows."""
        answers, refused = self._collect(evidence)
        labels = evidence.truth.argmax(axis=1)
        baseline = float(np.bincount(labels).max() / len(labels))
        fidelity: dict[str, float] = {}
        value = baseline
        held_out = random_features(evidence.held_out, n_features=self.n_features, seed=seed)
        for size in self.sizes():
            used = min(size, len(answers))
            if used < 2:
                fidelity[f"fidelity at {size}"] = baseline
                continue
            asked = random_features(evidence.inputs[:used], n_features=self.n_features, seed=seed)
            copy = fit_ridge(asked, answers[:used])
            value = float((copy(held_out).argmax(axis=1) == labels).mean())
            fidelity[f"fidelity at {size}"] = value
        return AttackResult(
            attack=self.name,
            mode=mode,
            statistic=f"fidelity of a copy after {self.sizes()[-1]} queries",
            value=value,
            baseline=baseline,
            threshold=(1.0 + baseline) / 2.0,
            threshold_reason="half way from the commonest label to a perfect copy",
            claim_limit=(1.0 + baseline) / 2.0 if evidence.claimed else None,
            detail={"answered": len(answers), "refused": refused, **fidelity},
        )

    def _collect(self, evidence: AnswersForSale) -> tuple[Array, str]:
        answers: list[Array] = []
        for start in range(0, self.sizes()[-1], evidence.step):
            rows = evidence.inputs[start : start + evidence.step]
            if not len(rows):
                break
            try:
                answers.append(evidence.ask(rows))
            except FedInferError as exc:
                return _joined(answers, evidence), exc.code
        return _joined(answers, evidence), ""


def _joined(answers: list[Array], evidence: AnswersForSale) -> Array:
    return np.concatenate(answers) if answers else np.empty((0, evidence.truth.shape[1]))


def _limited(ask: Callable[[Array], Array], limit: int) -> Callable[[Array], Array]:
    """Answer `limit` rows and no more, as a site's budget does."""
    spent = 0

    def asked(rows: Array) -> Array:
        nonlocal spent
        if spent + len(rows) > limit:
            raise BudgetExceededError("the budget of this querier is used up")
        spent += len(rows)
        return ask(rows)

    return asked
