"""What `FedDecode.start` returns: texts, why they ended, and what they cost."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from fedinfer_flower.errors import MissingExtraError
from fedinfer_flower.query import SiteStatus
from fedinfer_flower.strategies.decode_budget import total_epsilon_delta
from fedinfer_flower.strategies.decode_steps import DecodeSteps, Ended
from fedinfer_flower.strategies.result import InferenceResult

__all__ = ["DecodeResult"]


@dataclass(frozen=True, kw_only=True)
class DecodeResult:
    """Texts that the sites wrote together.

    Parameters
    ----------
    results : tuple of InferenceResult
        One a step: reports, receipts, combined answers.
    n_candidates : tuple of int
        Candidates of each step.
    texts : tuple of str, optional
        In the order of the questions. None where a querier elsewhere opens the answers.
    probabilities : tuple of float
        For each text the product of the joint probabilities of its candidates.
    ended : tuple of Ended
        Why each text ended.
    lengths : tuple of int
        Steps of each text.
    error_code : str
        Of what ended the texts that say `Ended.FAILED`.
    """

    results: tuple[InferenceResult, ...]
    n_candidates: tuple[int, ...]
    texts: tuple[str, ...] | None = field(default=None, repr=False)
    probabilities: tuple[float, ...] = field(default=(), repr=False)
    ended: tuple[Ended, ...] = ()
    lengths: tuple[int, ...] = ()
    error_code: str = ""

    @classmethod
    def of_steps(
        cls, steps: DecodeSteps, results: list[InferenceResult], *, error_code: str = ""
    ) -> DecodeResult:
        """Return the result of texts that were opened here."""
        return cls(
            results=tuple(results),
            n_candidates=_n_candidates(results),
            texts=steps.texts,
            probabilities=steps.probabilities,
            ended=steps.ended,
            lengths=steps.lengths,
            error_code=error_code,
        )

    @classmethod
    def sealed(cls, results: list[InferenceResult]) -> DecodeResult:
        """Return the result of texts that a querier elsewhere opens."""
        return cls(results=tuple(results), n_candidates=_n_candidates(results))

    @property
    def n_steps(self) -> int:
        """Steps asked."""
        return len(self.results)

    @property
    def n_rows(self) -> int:
        """Rows that each site answered, over all steps."""
        return sum(result.n_queries for result in self.results)

    @property
    def seconds(self) -> float:
        """Seconds of all steps, without onboarding."""
        return sum(result.seconds for result in self.results)

    @property
    def request_bytes(self) -> int:
        """Payload bytes sent to one site over all steps."""
        return sum(r.request_bytes for result in self.results for r in result.reports)

    @property
    def reply_bytes(self) -> int:
        """Payload bytes of all sites' replies over all steps."""
        return sum(r.reply_bytes for result in self.results for r in result.reports)

    @property
    def degraded(self) -> bool:
        """Whether a step misses a site that was asked, or the texts ended early by a failure."""
        return bool(self.error_code) or any(result.degraded for result in self.results)

    def epsilon_delta_total(self) -> tuple[float, float] | None:
        """Return the (epsilon, delta) that one site spent on all texts; None without noise."""
        return total_epsilon_delta(
            [result.combined for result in self.results],
            [result.n_queries for result in self.results],
        )

    def epsilon_delta_text(self) -> tuple[float, float] | None:
        """Return the (epsilon, delta) that one site spent on the longest text.

        The steps of one text compose like any rows: each shows a noisy answer about the same
        question. Other texts are about other questions and come on top; see
        `epsilon_delta_total`.
        """
        return total_epsilon_delta(
            [result.combined for result in self.results], [1] * len(self.results)
        )

    def summary(self) -> str:
        """Return a tree of what happened, for a log or a terminal: no question, no text."""
        failed = [
            s
            for result in self.results
            for report in result.reports
            for s in report.sites
            if s.status is not SiteStatus.ANSWERED
        ]
        first = self.results[0].reports[0]
        n_texts = self.results[0].n_queries
        lines = [
            f"DecodeResult: {n_texts} texts in {self.n_steps} steps, {self.n_rows} rows,"
            f" {self.seconds:.2f} s",
            f"├── rule: {first.rule}; protection: {first.protection}",
            f"├── candidates: {min(self.n_candidates)} to {max(self.n_candidates)} a step",
            f"├── bytes: {self.request_bytes} of requests a site, {self.reply_bytes} of replies",
            f"├── degraded: {'yes' if self.degraded else 'no'} {self.error_code}".rstrip(),
        ]
        if first.key_at_coordinator and first.protection.startswith("secagg"):
            lines.append("├── the coordinator asked for itself: it opens sums, no single answer")
        elif first.key_at_coordinator:
            lines.append(
                "├── WARNING: the coordinator held the secret key:"
                f" {first.protection!r} protects nothing from the server"
            )
        text, total = self._epsilons()
        if text is not None and total is not None:
            lines.append(
                f"├── epsilon of a site: {text[0]:.3g} for the longest text,"
                f" {total[0]:.3g} for all (delta {total[1]:g})"
            )
        lines += [f"├── {s.status.value}: {s.name}: {s.error_code}" for s in failed[:10]]
        if self.texts is None:
            lines.append("└── texts: sealed for the querier")
        else:
            counts = Counter(reason.value for reason in self.ended)
            lines.append("└── ended: " + ", ".join(f"{n} {why}" for why, n in counts.items()))
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON: no question, no text, no score."""
        text, total = self._epsilons()
        return {
            "steps": self.n_steps,
            "rows": self.n_rows,
            "seconds": self.seconds,
            "request_bytes": self.request_bytes,
            "reply_bytes": self.reply_bytes,
            "degraded": self.degraded,
            "error_code": self.error_code,
            "candidates": list(self.n_candidates),
            "ended": [reason.value for reason in self.ended],
            "lengths": list(self.lengths),
            "epsilon_text": None if text is None else text[0],
            "epsilon_total": None if total is None else total[0],
            "delta": None if total is None else total[1],
            "results": [result.to_dict() for result in self.results],
        }

    def _epsilons(self) -> tuple[tuple[float, float] | None, tuple[float, float] | None]:
        try:
            return self.epsilon_delta_text(), self.epsilon_delta_total()
        except MissingExtraError:  # the run is done; only the sum of its epsilon is not
            return None, None


def _n_candidates(results: list[InferenceResult]) -> tuple[int, ...]:
    return tuple(len(result.combined.classes) for result in results)
