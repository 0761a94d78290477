"""Runs `TEXT` jobs: by `FedRefine`, by mixing whole answers, or by `FedDecode`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from fedinfer_flower.errors import (
    ConfigError,
    FedInferError,
    GatewayError,
    InvalidValueError,
    QueryCancelledError,
    QueryError,
    QuorumNotMetError,
)
from fedinfer_flower.serving.jobs import JobKind, Progress
from fedinfer_flower.serving.text_decode import decode_texts, settled
from fedinfer_flower.serving.text_exchange import Exchanged, exchange, merged_facts, willing
from fedinfer_flower.serving.text_job import TextAnswer, TextJob
from fedinfer_flower.serving.text_options import decoding_of, mixing_of, require_askable
from fedinfer_flower.serving.text_sites import KnownSites
from fedinfer_flower.strategies.refine_onboarding import LanguageSites
from fedinfer_flower.strategies.refine_options import names_of

if TYPE_CHECKING:
    from flwr.serverapp import Grid

    from fedinfer_flower.serving.config import ModelConfig
    from fedinfer_flower.serving.open_job import OpenJob
    from fedinfer_flower.serving.runners import Bench

__all__ = ["TextRunner", "text_runner"]

log = logging.getLogger("fedinfer_flower.gateway")

_MARGIN_S: Final = 0.25
"""Left for telling the end, before the job's deadline ends it from outside."""

_INTRODUCING: Final = 0.5
"""Part of a job's time that introductions may take."""

_THREADS: Final = 4


def text_runner(strategy: str) -> TextRunner:
    """Return what runs the text jobs of models with a strategy.

    Parameters
    ----------
    strategy : {"refine", "mixture", "decode"}

    Raises
    ------
    InvalidValueError
        For another.

    Examples
    --------
    >>> sorted(text_runner("refine").kinds)
    [<JobKind.TEXT: 'text'>]
    """
    if strategy not in _WAYS:
        raise InvalidValueError(f"text is made by one of {', '.join(_WAYS)}")
    return TextRunner(strategy)


@dataclass(kw_only=True)
class _Group:
    """Jobs that are asked together: one model, the same options."""

    jobs: list[OpenJob] = field(default_factory=list)
    bodies: list[TextJob] = field(default_factory=list)
    renewed: bool = False

    @property
    def job(self) -> TextJob:
        """All questions of the jobs, in their order."""
        questions = [text for body in self.bodies for text in body.questions]
        return TextJob(questions=questions, options=self.bodies[0].options)

    @property
    def left_s(self) -> float:
        left: float = min(job.left_s for job in self.jobs)
        return left - _MARGIN_S

    @property
    def parts(self) -> list[tuple[OpenJob, slice]]:
        found, start = [], 0
        for job, body in zip(self.jobs, self.bodies, strict=True):
            found.append((job, slice(start, start + len(body.questions))))
            start += len(body.questions)
        return found

    @property
    def cancelled(self) -> bool:
        return all(job.cancelled for job in self.jobs)

    def tell(self, done: int, total: int) -> None:
        """Tell every job its part of what is done; questions end in their order."""
        del total
        for job, part in self.parts:
            rows = part.stop - part.start
            job.tell(Progress(rows_done=min(max(done - part.start, 0), rows), rows=rows))

    def split(self) -> list[_Group]:
        return [
            _Group(jobs=[job], bodies=[body])
            for job, body in zip(self.jobs, self.bodies, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class _Asking:
    """A group while it is asked."""

    runner: TextRunner
    group: _Group
    model: ModelConfig
    bench: Bench
    grid: Grid

    def introduced(self) -> LanguageSites:
        """Return the sites with their language cards."""
        return self.runner.known(self.group.jobs[0].request.model).get(
            self.grid,
            self.bench.run_id,
            pins=self.bench.pins,
            timeout_s=_INTRODUCING * self.group.left_s,
            at_least=self.model.min_sites,
        )

    def ask(
        self, sites: LanguageSites, settings: Mapping[str, Any], *, timeout_s: float = 0.0
    ) -> Exchanged:
        """Run one exchange with all questions."""
        return exchange(
            self.grid,
            sites,
            self.group.job.questions,
            settings=settings,
            identity=self.bench.identity,
            timeout_s=max(_MARGIN_S, timeout_s or self.group.left_s),
            progress=self.group.tell,
        )


Way = Callable[[_Asking], tuple[TextAnswer, dict[str, Any]]]


class TextRunner:
    """Runs text jobs of models with one strategy; a `JobRunner` of the gateway.

    Parameters
    ----------
    strategy : str

    Privacy
    -------
    The gateway reads questions and answers. With ``"refine"`` and ``"mixture"`` everything
    else is sealed between gateway, receivers and sharers; with ``"decode"`` every step is
    sealed to the sites. Questions of jobs that are run together and have the same options travel in
    one message: a site sees that they came together, and no caller sees another's. If such a
    message fails, each caller's questions are asked again by themselves, so that one cannot
    spoil the other's.
    """

    kinds: frozenset[JobKind] = frozenset({JobKind.TEXT})

    def __init__(self, strategy: str) -> None:
        self.strategy = strategy
        self._sites: dict[str, KnownSites] = {}
        self._lock = threading.Lock()

    def run(self, jobs: Sequence[OpenJob], bench: Bench) -> None:
        """Run jobs to their ends; returns when all have one."""
        groups = self._grouped(jobs, bench)
        if len(groups) == 1:
            self._run(groups[0], bench)
        elif groups:
            with ThreadPoolExecutor(min(len(groups), _THREADS)) as pool:
                list(pool.map(lambda group: self._run(group, bench), groups))

    # -- parts -------------------------------------------------------------------------

    def _grouped(self, jobs: Sequence[OpenJob], bench: Bench) -> list[_Group]:
        groups: dict[tuple[str, str], _Group] = {}
        for job in jobs:
            try:
                if job.cancelled:
                    raise QueryCancelledError("the query was called off")
                body = TextJob.from_bytes(job.request.body)
                require_askable(bench.model(job.request.model), body)
            except FedInferError as exc:
                job.fail(exc)
                continue
            key = (job.request.model, repr(sorted(body.options.items())))
            group = groups.setdefault(key, _Group())
            group.jobs.append(job)
            group.bodies.append(body)
        return list(groups.values())

    def _run(self, group: _Group, bench: Bench) -> None:
        name = group.jobs[0].request.model
        known = self.known(name)
        collected = known.times_collected
        try:
            if group.left_s <= 0.0:
                raise QuorumNotMetError("no time was left to ask")
            model = bench.model(name)
            with bench.grid() as grid:
                asking = _Asking(runner=self, group=group, model=model, bench=bench, grid=grid)
                answer, facts = _WAYS[self.strategy](asking)
        except FedInferError as exc:
            known.forget()
            again = not isinstance(exc, QueryCancelledError | ConfigError) and group.left_s > 1.0
            remembered = self.strategy != "decode" and known.times_collected == collected
            if again and remembered and not group.renewed:
                # The cards may have been a site's of before it started anew.
                group.renewed = True
                self._run(group, bench)
                return
            if again and len(group.jobs) > 1:
                for alone in group.split():
                    self._run(alone, bench)
                return
            for job in group.jobs:
                job.fail(exc)
            return
        except Exception as exc:
            # Its text may quote what was asked.
            log.error("a text job failed: %s", type(exc).__name__)
            for job in group.jobs:
                job.fail(GatewayError(f"the gateway failed on the job: {type(exc).__name__}"))
            return
        facts = {"strategy": self.strategy, "sealed": True} | facts
        for job, part in group.parts:
            self._finish(job, answer.rows(part.start, part.stop), facts, part)

    def _finish(
        self, job: OpenJob, answer: TextAnswer, facts: Mapping[str, Any], part: slice
    ) -> None:
        if all(text is None for text in answer.texts):
            job.fail(QuorumNotMetError("no site answered", hint="ask again, with more time"))
            return
        own = {
            name: value[part] if name in _BY_QUESTION else value for name, value in facts.items()
        }
        job.finish(answer.to_bytes(), provenance=own)

    def known(self, name: str) -> KnownSites:
        """Return what is remembered of the sites of a model."""
        with self._lock:
            return self._sites.setdefault(name, KnownSites())


def _refine(asking: _Asking) -> tuple[TextAnswer, dict[str, Any]]:
    group, model = asking.group, asking.model
    own, job = model.strategy_options, group.job
    sites = asking.introduced()
    tried: list[str] = []
    for receiver in willing(sites, names_of(own.get("receiver"), "receiver")):
        settings = {k: own[k] for k in _REFINE if k in own}
        settings |= {
            "receiver": [receiver],
            "sharers": names_of(own.get("sharers"), "sharers"),
            "decoding": decoding_of(model, job.options),
        }
        try:
            came = asking.ask(sites, settings)
        except QueryError as exc:
            tried.append(exc.code)
            # The next receiver only where the failure came early enough to try.
            if group.cancelled or group.left_s <= 1.0:
                raise
            failed = exc
            continue
        opened = came.opened[receiver]
        facts = merged_facts([came]) | {"receiver": receiver, "tried_before": tried}
        return _answer(opened.texts, opened.used, job.stop), facts
    raise failed


def _mixture(asking: _Asking) -> tuple[TextAnswer, dict[str, Any]]:
    group, model = asking.group, asking.model
    own, job, mixing = model.strategy_options, group.job, mixing_of(model)
    sites = asking.introduced()
    exchanges = mixing.exchanges(names_of(own.get("sites"), "sites"))
    came: list[Exchanged] = []
    failures: list[QueryError] = []
    for n, each in enumerate(exchanges):
        settings = dict(each.settings)
        settings["receiver"] = names_of(settings["receiver"], "receiver")
        settings["decoding"] = {
            **decoding_of(model, job.options),
            **settings.get("decoding", {}),
        }
        if "batch_size" in own:
            settings["batch_size"] = own["batch_size"]
        try:
            share_s = group.left_s / (len(exchanges) - n)
            came.append(asking.ask(sites, settings, timeout_s=share_s))
        except QueryError as exc:
            failures.append(exc)
            if group.cancelled or group.left_s <= 0.0:
                break
    if not came:
        raise failures[0]
    mixed = mixing.mix([each.by_receiver for each in came])
    used = tuple(_who_answered(came, n) for n in range(len(job.questions)))
    facts = merged_facts(came) | {
        "mixing": mixing.name,
        "disagreement": [round(1.0 - share, 4) for share in mixed.shares],
    }
    if failures:
        facts |= {"degraded": True, "error_codes": [exc.code for exc in failures]}
    return _answer(mixed.answers, used, job.stop), facts


def _decode(asking: _Asking) -> tuple[TextAnswer, dict[str, Any]]:
    group, model = asking.group, asking.model
    stops = (*model.strategy_options.get("stop", ()), *group.job.stop)

    def tell(texts: tuple[str, ...], asked: int, answered: int) -> None:
        for job, part in group.parts:
            rows = part.stop - part.start
            # A stream shows one text: that of a chat.
            text = settled(texts[part.start], stops) if rows == 1 else ""
            job.tell(Progress(rows=rows, sites_asked=asked, sites_answered=answered, text=text))

    return decode_texts(
        asking.grid,
        model,
        group.job,
        identity=asking.bench.identity,
        pins=asking.bench.pins,
        timeout_s=group.left_s,
        tell=tell,
        cancelled=lambda: group.cancelled,
    )


def _who_answered(came: Sequence[Exchanged], question: int) -> tuple[str, ...]:
    return tuple(
        sorted(
            {
                name
                for each in came
                for name, texts in each.by_receiver.items()
                if texts[question] is not None
            }
        )
    )


def _answer(
    texts: Sequence[str | None], used: Sequence[tuple[str, ...]], stops: tuple[str, ...]
) -> TextAnswer:
    # A site does not tell whether its model came to an end by itself.
    return TextAnswer(
        texts=tuple(None if text is None else _cut(text, stops) for text in texts),
        used=tuple(used),
        finish=("stop",) * len(texts),
    )


def _cut(text: str, stops: tuple[str, ...]) -> str:
    cuts = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(cuts)] if cuts else text


_REFINE: Final = ("medium", "allow", "rephrase", "rounds", "batch_size")
_BY_QUESTION: Final = ("disagreement", "probabilities", "ended")
_WAYS: Final[Mapping[str, Way]] = {"refine": _refine, "mixture": _mixture, "decode": _decode}
