"""Ask the same again and again, and average the noise away.

Noise that is fresh in every answer is worth less with every repetition: K answers have the
noise of one divided by sqrt(K). A site that repeats its first answer to the same row, noise
and all, gives nothing more away.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from fedinfer_flower.attacks.base import ATTACKS, Attack, AttackResult, Position
from fedinfer_flower.attacks.federation import TargetFederation
from fedinfer_flower.attacks.reading import RECOVERED_SHARE, recovered_share
from fedinfer_flower.attacks.rounds import label_of, read_one, read_sum
from fedinfer_flower.ensemble.base import Array, Disclosure
from fedinfer_flower.errors import FedInferError, InvalidValueError
from fedinfer_flower.privacy.answer_cache import AnswerCache
from fedinfer_flower.privacy.base import Protection, ScorePlan

__all__ = ["Averaging", "RepeatedAnswers"]

_COPIES: Final = 100
"""Copies of the rows in one batch, where setting up a batch costs more than its rows."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RepeatedAnswers:
    """A way to ask the same rows again.

    Parameters
    ----------
    ask : callable
        Returns what the attacker reads, shape (n_queries, width). May raise a
        `FedInferError`: then the attacker goes on with what it has.
    truth : float array of shape (n_queries, width)
        The clear answer, for scoring.
    claimed : bool
        Whether the mode promises that repetition does not help.
    """

    ask: Callable[[], Array]
    truth: Array
    claimed: bool = False


@ATTACKS.register("averaging")
@dataclass(frozen=True, kw_only=True)
class Averaging(Attack[RepeatedAnswers]):
    """Average answers to the same rows.

    Parameters
    ----------
    repeats : int
        With noise of 5 standard deviations an entry (epsilon 1 under `dp`) a few thousand
        are enough.
    n_rows : int
        Rows that `evidence` asks about.

    Privacy
    -------
    `dp` promises epsilon for each answer, and repeated ones compose; it promises nothing
    against repetition itself. That is for a site's answer cache and its budget.

    Examples
    --------
    >>> truth, noise = np.eye(4), np.random.default_rng(0)
    >>> fresh = RepeatedAnswers(ask=lambda: truth + noise.normal(size=(4, 4)), truth=truth)
    >>> Averaging(repeats=400).run(fresh).verdict
    'succeeds'
    """

    repeats: int = 4000
    n_rows: int = 20

    sees = frozenset({Position.COORDINATOR, Position.QUERIER})
    threat = "Who may ask the same row often removes the noise from a site's answer to it."

    def __post_init__(self) -> None:
        if self.repeats < 1 or self.n_rows < 2:
            raise InvalidValueError("repeats is at least 1 and n_rows at least 2")

    def evidence(
        self,
        federation: TargetFederation,
        protection: Protection,
        *,
        seed: int = 0,  # noqa: ARG002
    ) -> dict[str, RepeatedAnswers]:
        """Ask one site, or the sum where only sums are seen, with fresh and with kept noise."""
        scores = federation.scores(federation.inputs[: self.n_rows])
        n_classes, rule = federation.n_classes, federation.rule
        plan = ScorePlan.for_rule(rule, n_classes=n_classes, n_sites_max=len(scores))
        is_noisy = protection.epsilon_delta(plan) is not None
        if protection.reveals is Disclosure.SCORES:
            truth = scores[0]

            def ask() -> Array:
                return read_one(protection, rule, truth, n_classes=n_classes)

        elif is_noisy:
            truth = scores.sum(axis=0)

            def many() -> Array:
                # The same rows many times in one batch: noise is drawn for each copy.
                copies = np.tile(scores, (1, _COPIES, 1))
                total = read_sum(protection, rule, copies, n_classes=n_classes)
                return total.reshape(_COPIES, *truth.shape)

            ask = _one_by_one(many)
        else:
            # A sum without noise is the same every time, and no single answer is in it.
            return {}
        label = label_of(protection)
        fresh = {label: RepeatedAnswers(ask=ask, truth=truth)}
        if not is_noisy:
            return fresh
        kept = RepeatedAnswers(
            ask=_cached(ask, federation.inputs[: self.n_rows]), truth=truth, claimed=True
        )
        return fresh | {f"{label}, answer cache": kept}

    def run(self, evidence: RepeatedAnswers, *, mode: str = "", seed: int = 0) -> AttackResult:  # noqa: ARG002
        """Ask, average, compare with the clear answer."""
        total, asked = np.zeros_like(evidence.truth, dtype=float), 0
        refused = ""
        for _ in range(self.repeats):
            try:
                total += evidence.ask()
            except FedInferError as exc:
                refused = exc.code
                break
            asked += 1
        value = recovered_share(total / asked, evidence.truth) if asked else 0.0
        return AttackResult(
            attack=self.name,
            mode=mode,
            statistic="share of the clear answer recovered",
            value=value,
            baseline=0.0,
            threshold=RECOVERED_SHARE,
            threshold_reason="half of the error of a guess is gone",
            claim_limit=RECOVERED_SHARE if evidence.claimed else None,
            detail={"repeats": asked, "rows": len(evidence.truth), "refused": refused},
        )


def _one_by_one(many: Callable[[], Array]) -> Callable[[], Array]:
    """Hand out the answers of a batch of copies one after the other."""
    waiting: list[Array] = []

    def ask() -> Array:
        if not waiting:
            waiting.extend(many())
        return waiting.pop()

    return ask


def _cached(ask: Callable[[], Array], inputs: Array) -> Callable[[], Array]:
    """Put a site's answer cache before `ask`."""
    cache = AnswerCache(None, max_rows=len(inputs))
    digests = [hashlib.sha256(row.tobytes()).digest() for row in inputs]

    def answered() -> Array:
        plan = cache.plan("attacker", digests)
        drawn = ask() if plan.fresh else np.empty((0, 0))
        rows = cache.complete(plan, [drawn[place].tobytes() for place in plan.fresh])
        return np.stack([np.frombuffer(row, dtype=np.float64) for row in rows])

    return answered
