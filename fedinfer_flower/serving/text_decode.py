"""Texts that sites write together, candidate by candidate, told as they grow."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from flwr.serverapp import Grid

from fedinfer_flower.errors import QueryCancelledError, QueryError
from fedinfer_flower.querier.querier import Querier
from fedinfer_flower.query import Deadline
from fedinfer_flower.serving.config import ModelConfig
from fedinfer_flower.serving.text_job import TextAnswer, TextJob
from fedinfer_flower.serving.text_options import decode_terms, protection_of
from fedinfer_flower.strategies.decode_querier import DecodingQuerier
from fedinfer_flower.strategies.decode_result import DecodeResult
from fedinfer_flower.strategies.decode_steps import Ended
from fedinfer_flower.strategies.fed_decode import FedDecode
from fedinfer_flower.strategies.result import InferenceResult
from fedinfer_flower.wire.directory import Directory
from fedinfer_flower.wire.documents import CombinedAnswer
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.pins import Pins
from fedinfer_flower.wire.sealed_job import SealedJob

__all__ = ["decode_texts", "settled"]

_LENGTH: Final = (Ended.STEPS, Ended.BUDGET, Ended.FAILED)
_SHORTEST_S: Final = 0.5
_PATIENCE_S: Final = 10.0

TellTexts = Callable[[tuple[str, ...], int, int], None]
"""Called after each step with the texts so far, sites asked and sites that answered."""


def settled(text: str, stops: tuple[str, ...]) -> str:
    """Return what of a growing text stays whatever comes next.

    A stop text that has begun may be cut off again, and white space at the end too.

    Examples
    --------
    >>> settled("the Nile", (".",)), settled("the Nile En", (" END", "Enough"))
    ('the Nile', 'the Nile')
    """
    held = max(
        (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
    )
    return text[: len(text) - held].rstrip()


@dataclass(kw_only=True)
class _Steps:
    """The source of a decoding: seals each step, opens it, tells the texts."""

    querier: DecodingQuerier
    strategy: FedDecode
    end_s: float
    cancelled: Callable[[], bool]
    tell: TellTexts
    combined: list[CombinedAnswer] = field(default_factory=list)
    query_ids: list[str] = field(default_factory=list)

    def job(self, directory: Directory) -> SealedJob | None:
        if self.cancelled():
            raise QueryCancelledError("the query was called off")
        left_s = self.end_s - time.monotonic()
        if self.combined and left_s < _SHORTEST_S:
            self.querier.steps.end(Ended.FAILED)
        job = self.querier.job(directory)
        if job is not None:
            now = self.strategy.ensemble.deadline
            self.strategy.ensemble.deadline = Deadline(
                timeout_s=max(_SHORTEST_S, left_s), quorum=now.quorum, straggler_s=now.straggler_s
            )
            self.query_ids += [batch.query_id for batch in job.batches]
        return job

    def take(self, combined: CombinedAnswer) -> None:
        self.querier.take(combined)
        self.combined.append(combined)
        answered = min((batch.n_sites for batch in combined.batches), default=0)
        self.tell(self.querier.texts, combined.n_sites_asked, answered)


def decode_texts(
    grid: Grid,
    model: ModelConfig,
    job: TextJob,
    *,
    identity: Identity,
    pins: Pins | None,
    timeout_s: float,
    tell: TellTexts,
    cancelled: Callable[[], bool],
) -> tuple[TextAnswer, dict[str, Any]]:
    """Write a text for each question; return the answers and how they came about.

    Every step is sealed to the sites with the gateway's identity, so the SuperLink reads
    neither questions nor texts. What the gateway sees of the scores is what the protection
    reveals to a coordinator and a querier in one.

    Raises
    ------
    QueryError
        If the first step fails. Later, texts end as they are, and the facts say so.
    """
    start_s, own = time.monotonic(), model.strategy_options
    protection = protection_of(model)
    rule = "product-of-experts" if model.rule == "auto" else model.rule
    strategy = FedDecode(
        rule=rule,
        protection=protection,
        deadline=Deadline(timeout_s=timeout_s, quorum=model.quorum, straggler_s=model.straggler_s),
        min_available_nodes=model.min_sites,
        patience_s=min(_PATIENCE_S, 0.5 * timeout_s),
        **({"batch_size": own["batch_size"]} if "batch_size" in own else {}),
    )
    querier = DecodingQuerier(
        Querier(protection=protection, identity=identity, pins=pins),
        job.questions,
        terms=decode_terms(model, job.options),
        rule=rule,
        max_epsilon=own.get("max_epsilon"),
    )
    steps = _Steps(
        querier=querier,
        strategy=strategy,
        end_s=start_s + timeout_s,
        cancelled=cancelled,
        tell=tell,
    )
    results: tuple[InferenceResult, ...] = ()
    error_code = ""
    try:
        results = strategy.start(grid, steps).results
    except QueryCancelledError:
        raise
    except QueryError as exc:
        # The texts so far are worth keeping: they were paid for.
        if not steps.combined:
            raise
        error_code = exc.code
        querier.steps.end(Ended.FAILED)
    ended = querier.steps.ended
    answer = TextAnswer(
        texts=querier.texts,
        used=((),) * len(ended),
        finish=tuple("length" if why in _LENGTH else "stop" for why in ended),
    )
    facts = _facts(steps, results, seconds=time.monotonic() - start_s)
    facts |= {"rule": rule, "protection": protection.name, "ended": [why.value for why in ended]}
    if error_code or Ended.FAILED in ended:
        facts |= {"degraded": True} | ({"error_code": error_code} if error_code else {})
    return answer, facts


def _facts(
    steps: _Steps, results: tuple[InferenceResult, ...], *, seconds: float
) -> dict[str, Any]:
    combined = steps.combined
    asked = max((each.n_sites_asked for each in combined), default=0)
    answered = min((batch.n_sites for each in combined for batch in each.batches), default=0)
    facts: dict[str, Any] = {
        "sites_asked": asked,
        "sites_answered": answered,
        "rounds": len(combined),
        "degraded": answered < asked,
        "seconds": round(seconds, 4),
        "query_ids": steps.query_ids,
        "probabilities": [round(p, 4) for p in steps.querier.steps.probabilities],
    }
    if not results:
        return facts
    whole = DecodeResult.sealed(list(results))
    facts |= {"request_bytes": whole.request_bytes, "reply_bytes": whole.reply_bytes}
    if (spent := whole.epsilon_delta_text()) is not None:
        facts |= {"epsilon_per_query": spent[0], "delta_per_query": spent[1]}
    return facts
