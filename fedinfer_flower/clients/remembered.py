"""Noisy answers: charged before they are drawn, drawn once, and given again to repeats."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedinfer_flower.clients.site_memory import SiteMemory
from fedinfer_flower.clients.site_model import SiteModel
from fedinfer_flower.ensemble.base import Array, Disclosure
from fedinfer_flower.errors import ProtectionRefusedError
from fedinfer_flower.privacy.answer_cache import AnswerCache
from fedinfer_flower.privacy.base import NoisySiteSide, Protection, ScorePlan, SiteSide
from fedinfer_flower.privacy.charge import Charge
from fedinfer_flower.privacy.row_digest import answer_context, row_digests
from fedinfer_flower.wire.messages import Question

__all__ = ["UNSIGNED", "Charged", "charged_payload"]

UNSIGNED = "unsigned"
"""Account of all queries that no querier signed: the coordinator asks them."""

Scored = Callable[[Question], Array]


@dataclass(frozen=True, kw_only=True)
class Charged:
    """What an answer cost.

    Parameters
    ----------
    querier : str
        The account that paid; empty without noise.
    to_querier, to_all : Charge, optional
        None without noise.
    n_fresh : int
        Rows that were drawn for this answer; the others had been drawn before.
    """

    querier: str = ""
    to_querier: Charge | None = None
    to_all: Charge | None = None
    n_fresh: int = 0


def charged_payload(
    side: SiteSide,
    asked: Question,
    plan: ScorePlan,
    *,
    protection: Protection,
    model: SiteModel,
    memory: SiteMemory,
    scored: Scored,
) -> tuple[bytes, Charged]:
    """Return the payload of a question and what it cost.

    Raises
    ------
    BudgetExceededError
        If the site's budget does not cover it; the model has not seen the query then.
    """
    querier = UNSIGNED if asked.querier is None else asked.querier.key_id
    if protection.charge(plan, 1) is None:
        return side.protect(scored(asked)), Charged()
    if not isinstance(side, NoisySiteSide):
        if memory.budget is not None:
            raise ProtectionRefusedError(
                f"protection {protection.name!r} does not let this site draw its noise apart,"
                " so the budget cannot count it"
            )
        return side.protect(scored(asked)), Charged()
    if memory.answers is None:
        cost = protection.charge(plan, asked.n_queries)
        charged = Charged(querier=querier, to_querier=cost, to_all=cost, n_fresh=asked.n_queries)
        return side.protect(scored(asked)), charged
    return _from_memory(
        side, asked, plan, querier, memory.answers, protection, model, memory, scored
    )


def _from_memory(
    side: NoisySiteSide,
    asked: Question,
    plan: ScorePlan,
    querier: str,
    answers: AnswerCache,
    protection: Protection,
    model: SiteModel,
    memory: SiteMemory,
    scored: Scored,
) -> tuple[bytes, Charged]:
    digests = _digests(asked, plan, model, memory, reveals=protection.reveals)
    needed = answers.plan(querier, digests)
    charged = Charged(
        querier=querier,
        to_querier=protection.charge(plan, needed.n_new_to_querier),
        to_all=protection.charge(plan, len(needed.fresh)),
        n_fresh=len(needed.fresh),
    )
    reservation = None
    if memory.budget is not None and charged.to_querier is not None and charged.to_all is not None:
        reservation = memory.budget.reserve(
            querier=querier,
            query_id=asked.query_id,
            charge_querier=charged.to_querier,
            charge_global=charged.to_all,
        )
    # The charge stays from here on, whatever happens: once the model has seen the rows, a
    # failure tells something about it, and the draws may have been stored.
    drawn = _drawn(side, asked, needed.fresh, scored)
    rows = answers.complete(needed, [row.tobytes() for row in drawn])
    if memory.budget is not None and reservation is not None:
        memory.budget.commit(reservation)
    entries = np.frombuffer(b"".join(rows), dtype="<i8").reshape(len(rows), -1)
    return side.finish(entries.astype(np.int64)), charged


def _drawn(
    side: NoisySiteSide, asked: Question, fresh: tuple[int, ...], scored: Scored
) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    if not fresh:
        return np.zeros((0, 0), dtype="<i8")
    rows = dataclasses.replace(asked, inputs=np.ascontiguousarray(asked.inputs[list(fresh)]))
    return side.draw(scored(rows)).astype("<i8")


def _digests(
    asked: Question,
    plan: ScorePlan,
    model: SiteModel,
    memory: SiteMemory,
    *,
    reveals: Disclosure,
) -> tuple[bytes, ...]:
    context = answer_context(
        rule=asked.rule,
        rule_options=asked.rule_options,
        protection=asked.protection,
        protection_options=asked.protection_options,
        classes=asked.classes,
        plan=plan,
        model=model.profile.commitment(),
        class_totals=None if asked.class_totals is None else asked.class_totals.tolist(),
        counts_kind=asked.counts_kind.value,
        # Noise that is shared out over a cohort belongs to it; a site's own does not.
        cohort=asked.roster.digest() if reveals is Disclosure.SUM else b"",
    )
    return row_digests(asked.inputs, context=context, key=memory.row_key())
