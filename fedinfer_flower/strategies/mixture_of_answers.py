"""`MixtureOfAnswers`: whole answers of several sites, mixed into one."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from flwr.serverapp import Grid

from fedinfer_flower.errors import ConfigError, InvalidValueError, QueryError
from fedinfer_flower.query import Deadline
from fedinfer_flower.strategies.answer_mixing.base import (
    ANSWER_MIXINGS,
    AnswerMixing,
    Exchange,
    Mixed,
)
from fedinfer_flower.strategies.base import Progress
from fedinfer_flower.strategies.fed_refine import FedRefine
from fedinfer_flower.strategies.refine_options import plain_decoding
from fedinfer_flower.strategies.refine_result import RefineResult

__all__ = ["MixedAnswers", "MixtureOfAnswers", "MixtureResult"]

log = logging.getLogger("fedinfer_flower.coordinator")

_OWN: Final = ("receiver", "sharers", "medium", "allow", "rephrase", "rounds", "fusers", "gate")


@dataclass(frozen=True, kw_only=True)
class MixedAnswers:
    """What one way of mixing gave, and what it cost.

    Parameters
    ----------
    mixing : str
        Name.
    mixed : Mixed
    results : tuple of RefineResult
        One an exchange that came about.
    error_codes : tuple of str
        Of exchanges that did not.
    """

    mixing: str
    mixed: Mixed
    results: tuple[RefineResult, ...]
    error_codes: tuple[str, ...] = ()

    @property
    def answers(self) -> tuple[str | None, ...]:
        """One answer a question; None where nobody answered."""
        return self.mixed.answers

    @property
    def seconds(self) -> float:
        """Seconds of all exchanges, without introductions."""
        return sum(result.seconds for result in self.results)

    @property
    def wire_bytes(self) -> int:
        """Bytes of all requests and replies."""
        return sum(result.request_bytes + result.reply_bytes for result in self.results)

    @property
    def degraded(self) -> bool:
        """Whether a site or an exchange is missing."""
        return bool(self.error_codes) or any(result.degraded for result in self.results)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON: no question, no answer."""
        return {
            "mixing": self.mixing,
            "answered": [answer is not None for answer in self.answers],
            "shares": list(self.mixed.shares),
            "seconds": self.seconds,
            "wire_bytes": self.wire_bytes,
            "degraded": self.degraded,
            "error_codes": list(self.error_codes),
            "results": [result.to_dict() for result in self.results],
        }


@dataclass(frozen=True, kw_only=True)
class MixtureResult:
    """The mixed answers, beside the baseline's.

    Parameters
    ----------
    mixture : MixedAnswers
    baseline : MixedAnswers, optional
    """

    mixture: MixedAnswers = field(repr=False)
    baseline: MixedAnswers | None = field(default=None, repr=False)

    @property
    def answers(self) -> tuple[str | None, ...]:
        """The mixed answers, in the order of the questions; None where nobody answered."""
        return self.mixture.answers

    @property
    def by_site(self) -> dict[str, tuple[str | None, ...]]:
        """Each site's own answers, where the mixing asked for them."""
        return {
            name: answers
            for result in self.mixture.results
            for name, answers in result.answers.items()
        }

    def summary(self) -> str:
        """Return a tree of what happened: no question, no answer."""
        lines = [f"MixtureResult: {len(self.answers)} questions"]
        for label, each in (("mixture", self.mixture), ("baseline", self.baseline)):
            if each is not None:
                given = sum(answer is not None for answer in each.answers)
                failed = ", ".join(each.error_codes)
                lines.append(
                    f"├── {label}: {each.mixing}, {given} answered, {len(each.results)} exchanges,"
                    f" {each.seconds:.2f} s, {each.wire_bytes} bytes,"
                    f" degraded: {'yes' if each.degraded else 'no'} {failed}".rstrip()
                )
        lines.append("└── answers: read by the coordinator")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON: no question, no answer."""
        return {
            "mixture": self.mixture.to_dict(),
            "baseline": None if self.baseline is None else self.baseline.to_dict(),
        }


class MixtureOfAnswers:
    """Ask several sites for whole answers, and mix those into one.

    Nothing of the models is combined but what they write. One exchange with each site: the
    cheapest way to use several models, where answers are short enough to be compared, or one
    of the models is good at reading the others.

    Parameters
    ----------
    mixing : str or AnswerMixing
        ``"majority"``, or one with its options: ``Aggregator(site=...)``. Two that need none
        but a site's name can be named with `site`.
    site : str, optional
        For ``mixing="aggregator"`` or ``"self-consistency"``: whose model.
    sites : sequence of str, optional
        Names of the sites that take part; default all.
    baseline : AnswerMixing, optional
        Asked the same questions, and reported beside; usually `SelfConsistency` of the best
        single site, which is what a mixture has to beat.
    deadline : Deadline
        Of one exchange. Sites that are late have no vote; the quorum counts those that
        answer.
    decoding : mapping, optional
        As in `FedRefine`.
    **asking
        Further arguments of `FedRefine`: ``min_available_nodes``, ``batch_size`` and so on.

    Raises
    ------
    ConfigError
        For a combination that cannot work.

    Privacy
    -------
    The coordinator reads questions and answers. To keep them from it, ask with a
    `LanguageQuerier` and ``medium="own"``, and mix what it opens with ``Majority().mix``.
    Sites that answer read the question. With an aggregator, the others read a rewritten
    question and the aggregator reads their notes, as in `FedRefine` with text; the coordinator
    does not. A vote hides nobody: who mixes sees each site's answer, and answers show what a
    site knows. A site that lies has one vote under majority, and one quoted note with an
    aggregator, which one note can sway.

    Examples
    --------
    >>> print(MixtureOfAnswers(sites=["north", "south"]).summary())
    MixtureOfAnswers
    ├── mixing: majority, 1 exchanges
    ├── baseline: none
    ├── sites: north, south
    └── deadline: 60 s an exchange, quorum 1
    """

    def __init__(
        self,
        mixing: str | AnswerMixing = "majority",
        *,
        site: str = "",
        sites: Sequence[str] | None = None,
        baseline: AnswerMixing | None = None,
        deadline: Deadline | None = None,
        decoding: Any = None,
        **asking: Any,
    ) -> None:
        if isinstance(sites, str) or (sites is not None and len(set(sites)) != len(sites)):
            raise InvalidValueError("sites is a list of names, none twice")
        if taken := [name for name in _OWN if name in asking]:
            raise ConfigError(
                f"{taken[0]!r} is decided by the mixing",
                hint="name sites with sites=...; FedRefine has all the settings",
            )
        self.mixing = _made(mixing, site)
        self.baseline = baseline
        self.sites = None if sites is None else tuple(sites)
        self.deadline = deadline or Deadline()
        self._decoding = plain_decoding(decoding)
        self._asking = asking
        # Built here, so that what cannot work fails now.
        self._runs = self._built(self.mixing)
        self._baseline_runs = [] if baseline is None else self._built(baseline)

    # -- the verbs ---------------------------------------------------------------------

    def configure_query(self, mixing: AnswerMixing) -> list[FedRefine]:
        """Return the exchanges that a mixing needs, ready to start."""
        return list(self._runs if mixing is self.mixing else self._baseline_runs)

    def aggregate_query(
        self, mixing: AnswerMixing, results: Sequence[RefineResult], error_codes: Sequence[str] = ()
    ) -> MixedAnswers:
        """Mix the answers of the exchanges that came about."""
        return MixedAnswers(
            mixing=mixing.name,
            mixed=mixing.mix([result.answers for result in results]),
            results=tuple(results),
            error_codes=tuple(error_codes),
        )

    # -- driving -----------------------------------------------------------------------

    def start(
        self, grid: Grid, questions: Sequence[str], *, progress: Progress | None = None
    ) -> MixtureResult:
        """Ask all questions and return the mixed answers, and the baseline's.

        Parameters
        ----------
        grid : Grid
        questions : sequence of str
        progress : callable, optional
            Called with (exchanges done, exchanges) after every one.

        Raises
        ------
        ConfigError
            For names that no site has.
        NotEnoughNodesError, QuorumNotMetError
            If none of the mixture's exchanges came about.
        """
        log.info("%s", self.summary())
        total = len(self._runs) + len(self._baseline_runs)

        def tell(done: int) -> None:
            if progress is not None:
                progress(done, total)

        mixture = self._mixed(grid, questions, self.mixing, tell, before=0)
        baseline = None
        if self.baseline is not None:
            baseline = self._mixed(grid, questions, self.baseline, tell, before=len(self._runs))
        result = MixtureResult(mixture=mixture, baseline=baseline)
        log.info("%s", result.summary())
        return result

    def summary(self) -> str:
        """Return a tree of the strategy's settings."""
        baseline = "none" if self.baseline is None else self.baseline.name
        return "\n".join(
            [
                "MixtureOfAnswers",
                f"├── mixing: {self.mixing.name}, {len(self._runs)} exchanges",
                f"├── baseline: {baseline}",
                f"├── sites: {'all' if self.sites is None else ', '.join(self.sites)}",
                f"└── deadline: {self.deadline.timeout_s:g} s an exchange,"
                f" quorum {self.deadline.quorum}",
            ]
        )

    # -- parts -------------------------------------------------------------------------

    def _built(self, mixing: AnswerMixing) -> list[FedRefine]:
        return [self._run(exchange) for exchange in mixing.exchanges(self.sites)]

    def _run(self, exchange: Exchange) -> FedRefine:
        settings: Mapping[str, Any] = exchange.settings
        decoding = {**self._decoding, **settings.get("decoding", {})}
        # One receiver cannot meet a quorum of several answers.
        several = settings["receiver"] == "all" or not isinstance(settings["receiver"], str)
        quorum = self.deadline.quorum if several else 1
        return FedRefine(
            **{
                **self._asking,
                **settings,
                "decoding": decoding,
                "deadline": Deadline(timeout_s=self.deadline.timeout_s, quorum=quorum),
            }
        )

    def _mixed(
        self, grid: Grid, questions: Sequence[str], mixing: AnswerMixing, tell: Any, *, before: int
    ) -> MixedAnswers:
        results: list[RefineResult] = []
        failures: list[QueryError] = []
        for done, run in enumerate(self.configure_query(mixing), 1):
            try:
                results.append(run.start(grid, questions))
            except QueryError as exc:
                log.warning("%s", exc)
                failures.append(exc)
            tell(before + done)
        if not results:
            raise failures[0]
        return self.aggregate_query(mixing, results, [exc.code for exc in failures])


def _made(mixing: str | AnswerMixing, site: str) -> AnswerMixing:
    if isinstance(mixing, AnswerMixing):
        if site:
            raise ConfigError("a mixing with its options, and a site beside it")
        return mixing
    cls = ANSWER_MIXINGS.get(mixing)
    if not site:
        return cls()
    try:
        return cls(site=site)  # type: ignore[call-arg]
    except TypeError:
        raise ConfigError(f"mixing {mixing!r} takes no site") from None
