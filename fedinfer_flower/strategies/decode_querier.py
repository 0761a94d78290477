"""`DecodingQuerier`: writes texts with a federation whose coordinator reads none of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from fedinfer_flower.ensemble.base import make_rule
from fedinfer_flower.errors import BindingError, InvalidValueError
from fedinfer_flower.privacy.base import Protection
from fedinfer_flower.privacy.legality import require_legal
from fedinfer_flower.query import Prediction
from fedinfer_flower.strategies.decode_budget import DecodeBudget
from fedinfer_flower.strategies.decode_steps import DecodeSteps, DecodeTerms, Ended
from fedinfer_flower.wire.directory import Directory
from fedinfer_flower.wire.documents import CombinedAnswer
from fedinfer_flower.wire.sealed_job import SealedJob

__all__ = ["DecodingQuerier", "JobSource", "StepQuerier"]


class StepQuerier(Protocol):
    """What a `Querier` does at each step. The class itself stays out of this package."""

    protection: Protection

    @property
    def ask(self) -> Any:
        """Seal rows to the sites of a directory; see `Querier.ask`."""

    def open(self, combined: CombinedAnswer) -> Prediction:
        """Open a combined answer, and decide."""


class JobSource(Protocol):
    """Where a coordinator gets the sealed jobs of each step, and leaves the answers."""

    def job(self, directory: Directory) -> SealedJob | None:
        """Return the job of the next step, sealed to the sites; None when all texts ended."""

    def take(self, combined: CombinedAnswer) -> None:
        """Take the combined answer to the last job."""


class DecodingQuerier:
    """Seal each step's questions and texts to the sites; open, decide, go on.

    Lives in another process than the coordinator, which gets a `JobSource` that passes bytes
    on, or runs `FedEnsemble` on each job.

    Parameters
    ----------
    querier : StepQuerier
        A `Querier`.
    questions : sequence of str
    terms : DecodeTerms
    rule : str
        Name of an ensemble rule, with its default options.
    max_epsilon : float, optional
        Most epsilon that one site spends on all texts, under a protection with noise.

    Raises
    ------
    IncompatibleProtection
        If the rule cannot work under the querier's protection.
    ConfigError
        For a cap without noise.

    Privacy
    -------
    The querier sees each step's combined scores, as with any job of its `Querier`, and picks.
    The coordinator learns the number of questions, of steps, and how many texts are still
    open at each; and the candidates of each step, which a function of the texts may make
    telling. Sites read the questions and the texts so far.
    """

    def __init__(
        self,
        querier: StepQuerier,
        questions: Sequence[str],
        *,
        terms: DecodeTerms | None = None,
        rule: str = "product-of-experts",
        max_epsilon: float | None = None,
    ) -> None:
        if rule == "auto":
            raise InvalidValueError(
                "texts are decoded by a named rule, the same at every step",
                hint="rule='product-of-experts', or 'mean-probability'",
            )
        self.rule = make_rule(rule, {})
        require_legal(self.rule, querier.protection)
        self.querier = querier
        self.steps = DecodeSteps(questions, terms or DecodeTerms())
        self.budget = DecodeBudget(protection=querier.protection, max_epsilon=max_epsilon)
        self._asked = ""

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts so far, in the order of the questions."""
        return self.steps.texts

    def job(self, directory: Directory) -> SealedJob | None:
        """Return the job of the next step; None when all texts ended.

        Raises
        ------
        LabelSpaceError
            If the sites cannot write the candidates.
        """
        if not self.steps.open:
            return None
        profiles = [card.profile for card in directory.cards]
        classes = self.steps.terms.candidates_at(
            self.steps.n_steps, self.steps.open_texts, profiles
        )
        if not self.budget.admits_step(
            self.rule,
            len(self.steps.open),
            n_candidates=len(classes),
            n_sites=len(directory.cards),
        ):
            self.steps.end(Ended.BUDGET)
            return None
        job: SealedJob = self.querier.ask(
            self.steps.rows(), directory=directory, classes=classes, rule=self.rule.name
        )
        self._asked = job.job_id
        return job

    def take(self, combined: CombinedAnswer) -> None:
        """Open the answer to the last job and add what it says to the texts.

        Raises
        ------
        ProtocolError
            If it is the answer to another job, or does not open.
        """
        if not self._asked or combined.job_id != self._asked:
            raise BindingError("an answer to another step than the last that was asked")
        self.steps.take(self.querier.open(combined))
        self._asked = ""
