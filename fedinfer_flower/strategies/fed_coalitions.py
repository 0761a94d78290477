"""`FedCoalitions`: audit queries to random coalitions, whose sums alone say who earned what."""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.serverapp import Grid

from fedinfer_flower.errors import InvalidValueError, ProtocolError, QueryError, ShapeError
from fedinfer_flower.incentives.base import CoalitionSums
from fedinfer_flower.planning.label_space import shared_classes
from fedinfer_flower.strategies.fed_ensemble import FedEnsemble
from fedinfer_flower.strategies.opening import job_for
from fedinfer_flower.strategies.result import InferenceResult
from fedinfer_flower.wire.directory import SiteCard

__all__ = ["CoalitionRounds", "FedCoalitions"]

log = logging.getLogger("fedinfer_flower.coordinator")


@dataclass(frozen=True, kw_only=True, eq=False)
class CoalitionRounds:
    """Combined answers of random coalitions, and who the columns are.

    Parameters
    ----------
    sums : CoalitionSums
    key_ids : tuple of str
        Site of each column of ``sums.members_tk``.
    results : tuple of InferenceResult
        One for each coalition.
    """

    sums: CoalitionSums
    key_ids: tuple[str, ...]
    results: tuple[InferenceResult, ...]


class FedCoalitions:
    """Ask each audit query of a random coalition: every site is in it by the toss of a coin.

    A site's Banzhaf value is the mean utility of the coalitions with it less that of those
    without (scheme ``banzhaf-coalitions``). Nobody has to see a single answer for that, so
    it runs under every protection that opens a sum.

    Parameters
    ----------
    rows_per_coalition : int
        Audit queries that go to one coalition together. Fewer mean more coalitions, and
        more messages.
    protection : str or Protection
    seed : int
        Of the coins. Sites must not be able to foresee them.
    **options
        As for `FedEnsemble`, but the rule, which is ``mean-probability``.

    Privacy
    -------
    The coordinator opens the sum over each coalition, of at least three sites. Each query
    goes to one coalition only: two sums over the same query would differ by few sites. Sites
    cannot tell audit queries from others by their content, but must be asked enough others
    in the same way.

    Examples
    --------
    >>> FedCoalitions(rows_per_coalition=4).ensemble.rule.name
    'mean-probability'
    """

    def __init__(
        self, *, rows_per_coalition: int = 8, seed: int | None = None, **options: Any
    ) -> None:
        if rows_per_coalition < 1:
            raise InvalidValueError("rows_per_coalition is at least 1")
        for refused in ("rule", "selector", "fraction_query", "evidence"):
            if refused in options:
                raise InvalidValueError(f"{refused} is not an option of FedCoalitions")
        self.rows_per_coalition, self.seed = rows_per_coalition, seed
        self.ensemble = FedEnsemble(rule="mean-probability", **options)

    def start(
        self, grid: Grid, queries: npt.NDArray[np.generic], labels: npt.NDArray[np.int64]
    ) -> CoalitionRounds:
        """Ask all audit queries.

        Parameters
        ----------
        queries : array of shape (n_queries, ...)
        labels : int array of shape (n_queries,)
            Index into the label space of the answer.

        Raises
        ------
        QueryError
            If no coalition answers. A coalition that misses an answer is left out whole:
            its sum is over other sites than were drawn.
        """
        if len(queries) != len(labels) or not len(queries):
            raise ShapeError("one label for each audit query, and at least one of them")
        ensemble = self.ensemble
        ensemble.configure_onboarding(grid, int(grid.run.run_id), n_queries=len(queries))
        cards = ensemble.cohort
        fixed = ensemble.classes
        profiles = {node_id: card.profile for node_id, card in cards.items()}
        members: list[npt.NDArray[np.bool_]] = []
        totals: list[npt.NDArray[np.float64]] = []
        kept: list[npt.NDArray[np.int64]] = []
        results: list[InferenceResult] = []
        coins = np.random.default_rng(secrets.randbits(128) if self.seed is None else self.seed)
        try:
            ensemble.classes = ensemble.classes or shared_classes(profiles)
            for start in range(0, len(queries), self.rows_per_coalition):
                rows = slice(start, start + self.rows_per_coalition)
                drawn = self._draw(coins, len(cards))
                try:
                    result, total = self._ask(grid, queries[rows], drawn, cards)
                except (QueryError, ProtocolError) as exc:
                    log.warning("a coalition is left out: %s", exc)
                    continue
                if result.degraded:
                    log.warning("a coalition is left out: a site of it did not answer")
                    continue
                results.append(result)
                totals.append(total)
                kept.append(np.asarray(labels[rows], dtype=np.int64))
                members.append(np.tile(drawn, (len(total), 1)))
        finally:
            ensemble.classes = fixed
        if not results:
            raise QueryError("no coalition answered whole", hint="see the log")
        return CoalitionRounds(
            sums=CoalitionSums(
                members_tk=np.concatenate(members),
                totals_tc=np.concatenate(totals),
                labels=np.concatenate(kept),
            ),
            key_ids=tuple(card.key_id for card in cards.values()),
            results=tuple(results),
        )

    def _draw(self, coins: np.random.Generator, n_sites: int) -> npt.NDArray[np.bool_]:
        least = max(3, self.ensemble.protection.min_cohort)
        if n_sites <= least:
            raise InvalidValueError(
                f"{n_sites} sites; coalitions of at least {least} need more than {least}",
                hint="a row sum ('audited-blend') needs no coalitions",
            )
        while True:
            # Conditioned on its size, a coalition still holds every site with equal chance.
            drawn = coins.random(n_sites) < 0.5
            if least <= drawn.sum() < n_sites:
                return drawn

    def _ask(
        self,
        grid: Grid,
        queries: npt.NDArray[np.generic],
        drawn: npt.NDArray[np.bool_],
        cards: dict[int, SiteCard],
    ) -> tuple[InferenceResult, npt.NDArray[np.float64]]:
        ensemble = self.ensemble
        job, querier = job_for(queries, ensemble)
        here = {n: card for (n, card), is_in in zip(cards.items(), drawn, strict=True) if is_in}
        result = ensemble.ask_cohort(grid, job, querier, cards=here, all_cards=here)
        assert querier is not None  # noqa: S101  an array is asked and opened here
        return result, querier.totals(result.combined)
