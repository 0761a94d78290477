"""One receiver's way through one round: rewrite, collect help, answer; or answer alone.

The steps of each receiver run by themselves: nobody waits for another receiver's helpers.
Whatever fails, the last thing that is tried is the receiver's own answer.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from fedinfer_flower.errors import (
    BindingError,
    FedInferError,
    ProtocolError,
    ReplayError,
    SiteFailedError,
    SizeLimitError,
)
from fedinfer_flower.query import SiteStatus
from fedinfer_flower.strategies.refine_mailbox import Ask, Letter
from fedinfer_flower.strategies.refine_messages import RoundMessages, Step, StepKey
from fedinfer_flower.strategies.refine_parts import Collected
from fedinfer_flower.strategies.refine_result import PlannedMedium, SharerOutcome
from fedinfer_flower.wire.envelope import Envelope
from fedinfer_flower.wire.refine_answers import AnswerReply, Answers, open_answers
from fedinfer_flower.wire.refine_documents import (
    RelayedAsk,
    RephraseReply,
    ShareOffer,
    read_share_reply,
)

__all__ = ["ReceiverRound"]

log = logging.getLogger("fedinfer_flower.coordinator")


class ReceiverRound:
    """The steps of one receiver in one round.

    Parameters
    ----------
    messages : RoundMessages
        With the batch, the receiver, its sharers and the terms. Without a seat the receiver
        answers alone.
    plans : mapping of key id to PlannedMedium
    collected : Collected

    Attributes
    ----------
    body : bytes
        The answers as they came; empty if none did.
    answers : Answers or None
        Read, unless they are sealed.
    error : FedInferError or None
        What kept the receiver from answering.
    refine_s : float
        Seconds that the answer took.
    """

    def __init__(
        self,
        messages: RoundMessages,
        *,
        plans: Mapping[str, PlannedMedium],
        collected: Collected,
    ) -> None:
        self.site, self.batch, self.terms = messages.site, messages.batch, messages.terms
        self.plans = dict(plans)
        self.answers: Answers | None = None
        self.body = b""
        self.error: FedInferError | None = None
        self.refine_s = 0.0
        self._messages, self._collected = messages, collected
        self._outcomes: dict[str, SharerOutcome] = {}
        self._asks: dict[str, RelayedAsk] = {}
        self._spent_s: dict[str, float] = {}
        self._handle = ""
        self._stage: Step | None = Step.REPHRASE
        self._awaited: set[Step] = set()
        self._own_asked = False
        self._first_error: FedInferError | None = None

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self._stage is None

    @property
    def outcomes(self) -> tuple[SharerOutcome, ...]:
        """How everybody fared; the receiver itself only where it failed."""
        return tuple(self._outcomes.values())

    @property
    def used(self) -> tuple[dict[str, str], ...]:
        """For each question the names of those who helped, with the medium."""
        rows: tuple[dict[str, str], ...] = tuple({} for _ in range(self.batch.n_questions))
        if self.answers is None or self.answers.used is None:
            return rows
        for column, key_id in enumerate(self.answers.sharers):
            if key_id not in self._asks:
                continue
            name, medium = self._messages.sharers[key_id].name, self._asks[key_id].medium
            for row, bits in zip(rows, self.answers.used, strict=True):
                if bits[column]:
                    row[name] = medium
        return rows

    # -- driving -----------------------------------------------------------------------

    def start(self, now_s: float) -> list[Ask[StepKey]]:
        """Return the first messages."""
        if not self._messages.seats:
            return self._alone(now_s)
        return [self._messages.rephrase(now_s)]

    def take(self, letter: Letter[StepKey], now_s: float) -> list[Ask[StepKey]]:
        """Read a reply and return what follows from it; a late one is ignored."""
        step, sharer = letter.key.step, letter.key.sharer
        if step in (Step.SHARE, Step.FETCH):
            if self._stage is not Step.SHARE or sharer in self._outcomes:
                return []
            self._spent_s[sharer] = self._spent_s.get(sharer, 0.0) + letter.seconds
            try:
                self._shared(letter, sharer)
            except FedInferError as exc:
                self._fail(sharer, exc)
            return self._when_all_came(now_s)
        if self._stage is None or (step is Step.REPHRASE and self._stage is not step):
            return []
        self._awaited.discard(step)
        try:
            envelope = _opened(letter)
            if step is Step.REPHRASE:
                return self._rephrased(envelope, now_s)
            self._answered(envelope, letter.seconds)
        except FedInferError as exc:
            log.warning("%s", exc.at_site(self.site.name))
            return self._without_help(SiteStatus.FAILED, exc, now_s)
        return []

    def tick(self, now_s: float) -> list[Ask[StepKey]]:
        """Return what is due because time has passed."""
        times = self.terms.schedule
        if self._stage is None:
            return []
        late = SiteFailedError(f"no answer within {times.end_s - times.start_s:.3g} s")
        if now_s >= times.end_s:
            self._end(late)
            return []
        if self._stage is Step.REPHRASE and now_s >= times.rephrase_by_s:
            return self._without_help(SiteStatus.LATE, late, now_s)
        if self._stage is Step.SHARE and now_s >= times.share_by_s:
            for key_id in self._asks.keys() - self._outcomes.keys():
                self._record(key_id, SiteStatus.LATE, seconds=now_s - times.start_s)
            return self._refine(now_s)
        if self._stage is Step.REFINE and now_s >= times.refine_by_s and not self._own_asked:
            return self._without_help(SiteStatus.LATE, late, now_s)
        return []

    # -- steps -------------------------------------------------------------------------

    def _rephrased(self, envelope: Envelope, now_s: float) -> list[Ask[StepKey]]:
        reply = RephraseReply.read(
            envelope,
            run_id=self.terms.run_id,
            sender=self.site.node_id,
            query_id=self.batch.query_id,
        )
        seats = self._messages.seats
        asks = {ask.sharer: ask for ask in reply.asks}
        if (asks.keys() | reply.refused.keys()) - seats.keys():
            raise BindingError("the receiver names a sharer that it was not given")
        if any(ask.medium == "cache" != seats[k].medium for k, ask in asks.items()):
            raise BindingError("the receiver asks for a cache where text was planned")
        self._handle, self._asks, self._stage = reply.handle, asks, Step.SHARE
        self._collected.own_evidence = reply.evidence
        for key_id in seats.keys() - asks.keys():
            code = reply.refused.get(key_id, BindingError.code)
            self._record(key_id, SiteStatus.FAILED, code=code)
        for key_id, code in reply.changed.items():
            if key_id in asks:
                plan = self.plans[key_id]
                reason = f"{plan.reason}; the receiver asked for text instead: {code}"
                self.plans[key_id] = replace(plan, medium="text", reason=reason)
        if not asks:
            return self._refine(now_s)
        return [self._messages.share(ask, now_s) for ask in asks.values()]

    def _shared(self, letter: Letter[StepKey], sharer: str) -> None:
        site = self._messages.sharers[sharer]
        reply = read_share_reply(
            _opened(letter),
            run_id=self.terms.run_id,
            sender=site.node_id,
            query_id=self.batch.query_id,
        )
        if isinstance(reply, ShareOffer):
            if letter.key.step is Step.FETCH:
                raise ProtocolError("a sharer that offers again what it offered before")
            if reply.body_bytes > self.terms.max_body_bytes:
                raise SizeLimitError(
                    f"a body of {reply.body_bytes} bytes is offered; the limit is"
                    f" {self.terms.max_body_bytes}"
                )
            self._collected.offer(sharer, reply)
            return
        self._collected.take(sharer, self._asks[sharer].medium, reply.body)
        medium = self._asks[sharer].medium
        self.terms.observe(self.site, site, medium, len(reply.body), letter.seconds)
        self._record(sharer, SiteStatus.ANSWERED, size=len(reply.body))

    def _when_all_came(self, now_s: float) -> list[Ask[StepKey]]:
        waiting = self._asks.keys() - self._outcomes.keys()
        try:
            to_fetch, to_skip = self._collected.chosen_offers(waiting)
        except FedInferError as exc:
            return self._without_help(SiteStatus.FAILED, exc, now_s)
        for sharer in to_skip:
            self._record(sharer, SiteStatus.ANSWERED)
        out = [
            self._messages.fetch(self._asks[sharer], offer.handle, now_s)
            for sharer, offer in to_fetch.items()
        ]
        return out + (self._refine(now_s) if self._asks.keys() <= self._outcomes.keys() else [])

    def _refine(self, now_s: float) -> list[Ask[StepKey]]:
        try:
            parts = self._collected.parts()
        except FedInferError as exc:
            return self._without_help(SiteStatus.FAILED, exc, now_s)
        self._stage = Step.REFINE
        self._awaited.add(Step.REFINE)
        return [self._messages.refine(self._handle, parts, now_s)]

    def _alone(self, now_s: float) -> list[Ask[StepKey]]:
        self._stage, self._own_asked = Step.REFINE, True
        self._awaited.add(Step.OWN)
        return [self._messages.alone(now_s)]

    def _answered(self, envelope: Envelope, seconds: float) -> None:
        reply = AnswerReply.read(
            envelope,
            run_id=self.terms.run_id,
            sender=self.site.node_id,
            query_id=self.batch.query_id,
        )
        if reply.sealed != self.terms.sealed or not reply.body:
            raise BindingError("answers that are sealed otherwise than the questions")
        if not reply.sealed:
            self.answers = open_answers(
                reply.body,
                site=self.site.card.identity,
                run_id=self.terms.run_id,
                query_id=self.batch.query_id,
                round_number=self.terms.number,
                rows=self.batch.n_questions,
            )
        for key_id, code in reply.dropped.items():
            if key_id in self._asks:
                self._record(key_id, SiteStatus.FAILED, code=code)
        self.body, self.refine_s, self._stage = reply.body, seconds, None

    # -- failing -----------------------------------------------------------------------

    def _without_help(
        self, status: SiteStatus, exc: FedInferError, now_s: float
    ) -> list[Ask[StepKey]]:
        """Ask for the own answer, unless it was asked for, or an earlier round answered."""
        own = SharerOutcome(
            query_id=self.batch.query_id,
            round=self.terms.number,
            receiver=self.site.name,
            sharer=self.site.name,
            medium="own",
            status=status,
            error_code="" if status is SiteStatus.LATE else exc.code,
        )
        self._outcomes.setdefault(self.site.key_id, own)
        self._first_error = self._first_error or exc
        if not self._own_asked and self.terms.number == 1:
            return self._alone(now_s)
        if not self._awaited:
            self._end(exc)
        return []

    def _end(self, exc: FedInferError) -> None:
        # A site works on a request once: that it says so of the second says nothing new.
        first = self._first_error if isinstance(exc, ReplayError) else None
        self.error, self._stage = first or exc, None

    def _fail(self, sharer: str, exc: FedInferError) -> None:
        self._collected.drop(sharer)
        log.warning("%s", exc.at_site(self._messages.sharers[sharer].name))
        self._record(sharer, SiteStatus.FAILED, code=exc.code)

    def _record(
        self, key_id: str, status: SiteStatus, *, code: str = "", size: int = 0, seconds: float = 0
    ) -> None:
        before = self._outcomes.get(key_id)
        self._outcomes[key_id] = SharerOutcome(
            query_id=self.batch.query_id,
            round=self.terms.number,
            receiver=self.site.name,
            sharer=self._messages.sharers[key_id].name,
            medium=self.plans[key_id].medium,
            status=status,
            payload_bytes=size if before is None else before.payload_bytes,
            seconds=seconds or self._spent_s.get(key_id, 0.0),
            error_code=code,
        )


def _opened(letter: Letter[StepKey]) -> Envelope:
    if letter.envelope is None:
        raise letter.error or SiteFailedError("a node answered nothing")
    return letter.envelope
