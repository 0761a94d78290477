"""`FedDecode`: language models of several sites write a text together, candidate by candidate."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.serverapp import Grid

from fedinfer_flower.ensemble.base import EnsembleRule
from fedinfer_flower.errors import (
    ConfigError,
    InvalidValueError,
    KeyAtCoordinatorError,
    NotEnoughNodesError,
    QueryError,
)
from fedinfer_flower.privacy.base import Protection
from fedinfer_flower.query import Deadline, SiteProfile, SiteStatus
from fedinfer_flower.strategies.base import Progress
from fedinfer_flower.strategies.decode_budget import DecodeBudget
from fedinfer_flower.strategies.decode_querier import JobSource
from fedinfer_flower.strategies.decode_result import DecodeResult
from fedinfer_flower.strategies.decode_steps import Candidates, DecodeSteps, DecodeTerms, Ended
from fedinfer_flower.strategies.fed_ensemble import FedEnsemble
from fedinfer_flower.strategies.onboarding import Onboarding
from fedinfer_flower.strategies.result import InferenceResult

__all__ = ["FedDecode"]

log = logging.getLogger("fedinfer_flower.coordinator")


class FedDecode:
    """Write texts with the language models of all sites, by token-level ensembling.

    Vocabularies differ, so the sites agree on *candidates*: texts that may come next. Each
    site's `CandidateModel` scores them with its own tokens. A step is one ordinary query:
    rows of question and text so far in, combined scores out, the best candidate appended.
    So every rule, protection, budget, seal and receipt of `FedEnsemble` applies to every
    step. A text of T candidates costs T rounds with all sites: use it for short answers,
    labels and choices, not for essays.

    Parameters
    ----------
    rule : str or EnsembleRule
        ``"product-of-experts"`` adds log-probabilities, ``"mean-probability"`` adds
        probabilities. ``"auto"`` is refused: the rule is the same at every step.
    protection : str or Protection
        What the coordinator is allowed to see, at every step.
    candidates : sequence of str, or callable, optional
        As in `DecodeTerms`; default what all sites offer.
    max_steps, stop, joiner, abstain_below, abstentions
        As in `DecodeTerms`.
    max_epsilon : float, optional
        Under a protection with noise: most epsilon that one site spends on all texts of a
        job. A step that would exceed it is not asked, and the open texts end as they are.
    deadline : Deadline
        Seconds and quorum of one step.
    **asking
        Further arguments of `FedEnsemble`: ``min_available_nodes``, ``batch_size``,
        ``allow_coordinator_key`` and so on.

    Raises
    ------
    IncompatibleProtection
        When built, if the rule cannot work under the protection.
    ConfigError
        For a combination that cannot work.

    Privacy
    -------
    What each party learns of each step is what `FedEnsemble` says of one query under the same
    protection, and steps add up: T steps show T answers about one question. The text so far
    is shown to all sites, and how many steps it takes to all parties. Questions given as
    texts are read by the coordinator, which opens the sums; a `DecodingQuerier` elsewhere
    seals them. Under `dp` and `secagg+dp` neighbours differ in one site's whole answer to a
    row; `DecodeResult.epsilon_delta_text` composes the rows of the longest text. Picking a
    candidate from noisy scores costs nothing more.

    References
    ----------
    .. [1] Flemings, Razaviyayn and Annavaram, Differentially Private Next-Token Prediction of
       Large Language Models (PMixED), NAACL 2024: the same aim by sampling from a mixture
       with a public model, for one party that is trusted with all distributions.

    Examples
    --------
    >>> print(FedDecode(protection="secagg", max_steps=8).summary().splitlines()[2])
    ├── texts: at most 8 candidates, of what all sites offer
    """

    def __init__(
        self,
        *,
        rule: str | EnsembleRule = "product-of-experts",
        protection: str | Protection = "plain",
        candidates: Candidates | None = None,
        max_steps: int = 1,
        stop: Sequence[str] = (),
        joiner: str = " ",
        abstain_below: float = 0.0,
        abstentions: Sequence[str] = (),
        max_epsilon: float | None = None,
        deadline: Deadline | None = None,
        **asking: Any,
    ) -> None:
        if rule == "auto" or "classes" in asking:
            raise ConfigError(
                "a text is decoded by one named rule over candidates",
                hint="rule='product-of-experts' or 'mean-probability'; candidates=[...]",
            )
        if isinstance(stop, str):
            raise InvalidValueError("stop is a tuple of texts", hint="write ('.',), not '.'")
        self.terms = DecodeTerms(
            candidates=candidates,
            max_steps=max_steps,
            stop=tuple(stop),
            joiner=joiner,
            abstain_below=abstain_below,
            abstentions=abstentions,
        )
        self.ensemble = _SameSites(rule=rule, protection=protection, deadline=deadline, **asking)
        self.max_epsilon = max_epsilon
        self._new_budget()

    # -- the verbs ---------------------------------------------------------------------

    def configure_onboarding(self, grid: Grid, run_id: int) -> Onboarding:
        """Wait for nodes and collect what they can write."""
        return self.ensemble.configure_onboarding(grid, run_id)

    def configure_query(self, steps: DecodeSteps) -> npt.NDArray[np.uint8]:
        """Return the rows of the next step, and tell the ensemble its candidates.

        Raises
        ------
        LabelSpaceError
            If the sites cannot write the candidates.
        """
        self.ensemble.classes = self.terms.candidates_at(
            steps.n_steps, steps.open_texts, self.ensemble.profiles
        )
        return steps.rows()

    def aggregate_query(self, steps: DecodeSteps, result: InferenceResult) -> None:
        """Add what one step's answer says to the texts."""
        if result.prediction is None:
            raise ConfigError("the answer was not opened here: ask with a DecodingQuerier")
        steps.take(result.prediction)

    # -- driving -----------------------------------------------------------------------

    def start(
        self,
        grid: Grid,
        questions: Sequence[str] | JobSource,
        *,
        progress: Progress | None = None,
    ) -> DecodeResult:
        """Write a text for each question.

        Parameters
        ----------
        grid : Grid
        questions : sequence of str, or JobSource
            Texts are asked and opened here, for protections without a secret key or with
            ``allow_coordinator_key``. A source seals each step elsewhere, by its own terms:
            those of this object do not count then.
        progress : callable, optional
            Called with (texts that ended, texts) after every step; not for a source.

        Raises
        ------
        KeyAtCoordinatorError
            If the secret key would be, or is, in this process.
        NotEnoughNodesError, QuorumNotMetError
            If too few sites are there or answer at the first step. Later, the open texts end
            as `Ended.FAILED`. A site that was late or failed is not asked again.
        """
        log.info("%s", self.summary())
        try:
            if not isinstance(questions, Sequence):
                result = DecodeResult.sealed(self._relay(grid, questions))
            else:
                result = self._decode(grid, DecodeSteps(questions, self.terms), progress)
        finally:
            self.ensemble.forget()
        log.info("%s", result.summary())
        return result

    def summary(self) -> str:
        """Return a tree of the strategy's settings."""
        terms, given = self.terms, self.terms.candidates
        offered = "a function's choice" if callable(given) else "what all sites offer"
        of = f"{len(given)}" if isinstance(given, tuple) else offered
        lines = ["FedDecode", *self.ensemble.summary().splitlines()[1:2]]
        lines.append(f"├── texts: at most {terms.max_steps} candidates, of {of}")
        if self.max_epsilon is not None:
            lines.append(f"├── budget: epsilon {self.max_epsilon:g} of one site for all texts")
        return "\n".join([*lines, *self.ensemble.summary().splitlines()[2:]])

    # -- parts -------------------------------------------------------------------------

    def _decode(self, grid: Grid, steps: DecodeSteps, progress: Progress | None) -> DecodeResult:
        self._require_no_key()
        budget, results, error_code = self._new_budget(), list[InferenceResult](), ""
        run_id, n = int(grid.run.run_id), len(steps.questions)
        while steps.open:
            try:
                self.configure_onboarding(grid, run_id)
                rows = self.configure_query(steps)
                if not self._paid(budget, len(rows), first=not results):
                    steps.end(Ended.BUDGET)
                    break
                results.append(self.ensemble.start(grid, rows))
            except QueryError as exc:
                if not results:
                    raise
                # The texts so far are worth keeping: they were paid for.
                log.warning("%s", exc)
                error_code = exc.code
                steps.end(Ended.FAILED)
                break
            self.aggregate_query(steps, results[-1])
            if progress is not None:
                progress(n - len(steps.open), n)
        return DecodeResult.of_steps(steps, results, error_code=error_code)

    def _relay(self, grid: Grid, source: JobSource) -> list[InferenceResult]:
        results: list[InferenceResult] = []
        while (job := source.job(self.ensemble.directory(grid))) is not None:
            results.append(self.ensemble.start(grid, job))
            source.take(results[-1].combined)
        if not results:
            raise ConfigError(
                "the source had nothing to ask",
                hint="its texts have ended, or its budget does not pay for a step",
            )
        return results

    def _require_no_key(self) -> None:
        if self.ensemble.protection.needs_key and not self.ensemble.allow_coordinator_key:
            raise KeyAtCoordinatorError(
                f"protection {self.ensemble.protection.name!r} needs a key, and texts given here"
                " would have it made in the coordinator's process, at every step",
                hint="give a DecodingQuerier of another process, use protection 'secagg' or"
                " 'dp', or accept it: allow_coordinator_key=True",
            )

    def _paid(self, budget: DecodeBudget, n_rows: int, *, first: bool) -> bool:
        rule, classes = self.ensemble.rule, self.ensemble.classes or ()
        assert rule is not None  # noqa: S101  "auto" was refused
        n_sites = len(self.ensemble.profiles)
        paid = budget.admits_step(rule, n_rows, n_candidates=len(classes), n_sites=n_sites)
        if first and not paid:
            raise InvalidValueError(
                f"max_epsilon={self.max_epsilon:g} does not pay for one step of {n_rows} texts",
                hint="ask fewer questions, take a smaller epsilon a row, or raise max_epsilon",
            )
        return paid

    def _new_budget(self) -> DecodeBudget:
        return DecodeBudget(protection=self.ensemble.protection, max_epsilon=self.max_epsilon)


class _SameSites(FedEnsemble):
    """An ensemble that onboards its sites once a job, and asks none again that was missing."""

    _kept: Onboarding | None = None

    @property
    def profiles(self) -> list[SiteProfile]:
        """Profiles of the sites that are asked."""
        return [card.profile for card in self._cards.values()]

    def forget(self) -> None:
        """Onboard anew for the next job."""
        self._kept = None

    def configure_onboarding(
        self, grid: Grid, run_id: int, *, n_queries: int = 1, request_bytes: int = 0
    ) -> Onboarding:
        """Onboard, unless it is done for this job."""
        if self._kept is None or self._run_id != run_id:
            self._kept = super().configure_onboarding(
                grid, run_id, n_queries=n_queries, request_bytes=request_bytes
            )
        needed = max(self.min_query_nodes, self.protection.min_cohort, self.deadline.quorum)
        if len(self._cards) < needed:
            raise NotEnoughNodesError(
                f"{len(self._cards)} sites are left, {needed} are needed for a step",
                hint="sites that were late or failed are not asked again for the same texts",
            )
        self._onboarded = self._kept
        return self._kept

    def start(
        self, grid: Grid, queries: Any, *, progress: Progress | None = None
    ) -> InferenceResult:
        """Ask one step; a site that was missing would cost every further step its deadline."""
        result = super().start(grid, queries, progress=progress)
        gone = {
            site.site_id
            for report in result.reports
            for site in report.sites
            if site.status is not SiteStatus.ANSWERED
        }
        self._cards = {n: card for n, card in self._cards.items() if n not in gone}
        return result
