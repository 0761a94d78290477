"""From a settled epoch to the figures of the report: who got what, beside what was fair."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.cli.demo_rewards import PAYMENT, PaidOut
from fedinfer_flower.clients.site_model import prepare
from fedinfer_flower.incentives.base import AuditedAnswers, make_scheme
from fedinfer_flower.incentives.measures import (
    attacker_share,
    chance_adjusted_f,
    fairness_f,
    shares,
    spearman,
)
from fedinfer_flower.query import CountsKind
from fedinfer_flower.reporting.intervals import wilson_interval
from fedinfer_flower.simulation.data import Dataset
from fedinfer_flower.simulation.evaluation import SoloAnswers
from fedinfer_flower.simulation.rewards import FreeRider, settlement_scheme

__all__ = ["RIDER_KIND", "rewards_results"]

RIDER_KIND: Final = "free rider: no model, answers by lot"

_MAX_EXACT_SITES: Final = 12
"""Up to so many, Shapley values over every coalition; above, by sampled orders."""

Array = npt.NDArray[np.float64]

_LEARNS: Final = (
    (
        "sites that are asked",
        "the query, rows that are audits among them; not which ones. A site learns its pay from"
        " the ledger, and nothing of the others' answers.",
    ),
    (
        "coordinator alone",
        "masked answers and one share of each site's evidence: uniform numbers. After the reveal:"
        " which rows were audits and their labels, the sum over all sites on each audit row, and"
        " one weighted sum a site. It can solve an exact sum for who said what where answers are"
        " certain: this run adds no noise, a settlement does unless told otherwise.",
    ),
    (
        "querier alone",
        "the joint answer to every row, so the sum over all sites of each, and one weighted sum a"
        " site, from the ledger's amounts or the settlement; no site's own answer.",
    ),
    (
        "coordinator and querier together",
        "every site's answer to every row: they hold both shares of the evidence. Sites that agree"
        " to settle trust the two not to pool.",
    ),
    (
        "all sites but one, with the querier",
        "that one's answers, by subtraction from the sums.",
    ),
    (
        "readers of the ledger",
        "who paid and got how much for which job, and so each site's share of the positive"
        " scores; no inputs, no answers.",
    ),
)


def rewards_results(
    paid: PaidOut,
    book: Mapping[str, Any],
    solo: SoloAnswers,
    dataset: Dataset,
    *,
    rider: FreeRider | None,
) -> dict[str, Any]:
    """Return the rewards part of a report's figures.

    Parameters
    ----------
    paid : PaidOut
    book : mapping
        Of `DemoRewards.book`.
    solo : SoloAnswers
        What each site but the free rider says alone to the dataset's test rows.
    dataset : Dataset
    rider : FreeRider, optional
    """
    mix, truth = paid.mix, _truth(paid, dataset)
    names, kinds = list(solo.names), list(solo.kinds)
    n_sites, answers = len(names), [*solo.probabilities[:, _places(mix.inputs, dataset)]]
    if rider is not None:
        names.append(f"site-{n_sites}")
        kinds.append(RIDER_KIND)
        model = prepare(rider.local_model(), name=names[-1], share_counts=CountsKind.COUNTS)
        answers.append(np.exp(model.calibrated_logits(mix.inputs, dataset.classes)))
    p_knc = np.stack(answers)
    everything = AuditedAnswers(probabilities_ktc=p_knc, labels=truth)
    audited = AuditedAnswers(probabilities_ktc=p_knc[:, mix.rows], labels=mix.labels)
    order = [paid.names.index(name) for name in names]
    scores = np.array(list(_in_paid_order(paid)))[order]
    accuracy = (p_knc.argmax(axis=-1) == truth).mean(axis=1)
    rewards = _rewards(scores, everything)
    merit = rewards["shapley"]
    riders = () if rider is None else (n_sites,)
    hits = int((mix.without(paid.prediction.labels) == mix.without(truth)).sum())
    n_queries = len(truth) - len(mix.rows)
    low, high = wilson_interval(hits, n_queries)
    return {
        "scheme": paid.settlement.scheme,
        "payment": PAYMENT,
        "protection": "secagg",
        "rule": "mean-probability",
        "n_audits": paid.settlement.n_audits,
        "n_queries": n_queries,
        "joint": {"accuracy": hits / n_queries, "low": low, "high": high},
        "noise_scale": paid.settlement.noise_scale,
        "fee": paid.payout.fee,
        "refund": paid.payout.refund,
        "shapley": _shapley(len(names)),
        "clear_difference": float(
            np.abs(scores - settlement_scheme().contributions(audited)).max()
        ),
        "largest_score": float(np.abs(scores).max()),
        "sites": [
            {
                "name": name,
                "kind": kinds[k],
                "is_free_rider": k in riders,
                "accuracy": float(accuracy[k]),
                "score": float(scores[k]),
                "paid": paid.payout.paid[order[k]],
                "shares": {key: float(shares(values)[k]) for key, values in rewards.items()},
            }
            for k, name in enumerate(names)
        ],
        "splits": [
            {
                "key": key,
                "label": _LABELS[key],
                "f": fairness_f(accuracy, values),
                "f_above_chance": chance_adjusted_f(accuracy, values, len(dataset.classes)),
                "spearman": None if key == "shapley" else spearman(merit, values),
                "rider_share": attacker_share(values, riders) if riders else None,
            }
            for key, values in rewards.items()
        ],
        "who_learns": [{"party": party, "learns": learns} for party, learns in _LEARNS],
        "ledger": dict(book),
    }


_LABELS: Final = {
    "paid": "paid: settled from one sum a site",
    "shapley": "Shapley value by all labels",
    "equal": "equal split",
    "final-agreement": "FedSEI: final agreement, without labels",
    "entropy": "FedSEI: entropy, without labels",
}


def _rewards(settled: Array, everything: AuditedAnswers) -> dict[str, Array]:
    """Return one reward a site by each way to split."""
    unlabelled = AuditedAnswers(probabilities_ktc=everything.probabilities_ktc)
    shapley = make_scheme(_shapley(everything.n_sites))
    return {
        "paid": settled,
        "shapley": shapley.contributions(everything),
        "equal": make_scheme("equal").contributions(unlabelled),
        "final-agreement": make_scheme("final-agreement").contributions(unlabelled),
        "entropy": make_scheme("entropy").contributions(unlabelled),
    }


def _shapley(n_sites: int) -> str:
    return "shapley" if n_sites <= _MAX_EXACT_SITES else "shapley-sampled"


def _in_paid_order(paid: PaidOut) -> tuple[float, ...]:
    return tuple(paid.settlement.values[key_id] for key_id in sorted(paid.settlement.values))


def _places(inputs: npt.NDArray[np.generic], dataset: Dataset) -> npt.NDArray[np.int64]:
    """Return which test row each row that was asked is; equal rows get equal answers."""
    place = {row.tobytes(): n for n, row in enumerate(dataset.test_inputs)}
    return np.array([place[row.tobytes()] for row in inputs], dtype=np.int64)


def _truth(paid: PaidOut, dataset: Dataset) -> npt.NDArray[np.int64]:
    """Return the labels of all rows that were asked, in their order."""
    n_audits = len(paid.mix.rows)
    truth = np.empty(len(paid.mix.inputs), dtype=np.int64)
    real = np.ones(len(truth), dtype=bool)
    real[paid.mix.rows] = False
    truth[paid.mix.rows] = paid.mix.labels
    truth[real] = dataset.test_labels[n_audits:]
    return truth
