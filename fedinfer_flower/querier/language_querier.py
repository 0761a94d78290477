"""`LanguageQuerier`: seals questions to receivers' keys, and opens what they answer."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from fedinfer_flower.errors import (
    BindingError,
    ConfigError,
    FedInferError,
    InvalidValueError,
    UnknownNameError,
)
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.language_card import LanguageCard
from fedinfer_flower.wire.pins import Pins
from fedinfer_flower.wire.refine_answers import open_answers
from fedinfer_flower.wire.refine_asked import Asked, QuerierConsent, seal_asked
from fedinfer_flower.wire.refine_fields import (
    MAX_QUESTIONS,
    MAX_ROUNDS,
    MEDIA,
    decoding_options,
)
from fedinfer_flower.wire.refine_job import AskedBatch, RefineAnswer, RefinedPart, RefineJob

__all__ = ["LanguageQuerier", "OpenedAnswers"]

_TTL_S: Final = 3600.0
_LONGEST_TTL_S: Final = 366 * 86_400.0


@dataclass(frozen=True, kw_only=True)
class OpenedAnswers:
    """One receiver's answers, in the order of the questions.

    Parameters
    ----------
    texts : tuple of str or None
        None where the receiver did not answer.
    used : tuple of tuple of str
        For each question the sites whose help the answer rests on. Empty: its own answer.

    Privacy
    -------
    `used` says which institution knew something about a question; the coordinator of a
    sealed job does not see it.
    """

    texts: tuple[str | None, ...] = field(repr=False)
    used: tuple[tuple[str, ...], ...]


class LanguageQuerier:
    """Ask language models of a federation without the coordinator reading along.

    Parameters
    ----------
    cards : sequence of LanguageCard or bytes
        The sites' signed cards, as `FedRefine.collect` returns them.
    identity : Identity, optional
        The querier's keys; default fresh ones, which live as long as this object.
    pins : Pins, optional
        Key ids of the sites, compared out of band. Without them a coordinator can show
        cards of sites of its own making, and read what is sealed to those.

    Raises
    ------
    InvalidValueError
        If there is no card, or cards are of several runs.
    ProtocolError
        If a card is not signed by its own keys.
    UntrustedKeyError
        If a site's key is not the pinned one.

    Privacy
    -------
    The coordinator learns which receivers and sharers may take part, the number of
    questions, sizes and times; no question, rewritten question, note, cache or answer.
    Receivers read the questions and know each other's answers not at all. Sharers read the
    rewritten questions. A receiver and the coordinator together have the questions.

    Examples
    --------
    >>> site = Identity.generate()
    >>> layout = '{"model_digest": "' + "0" * 64 + '"}'
    >>> card = LanguageCard(run_id=7, name="north", layout=layout).signed(site)
    >>> job = LanguageQuerier([card]).ask(["why ?"], allow=())
    >>> job.n_questions, job.receivers == (site.key_id,), b"why" in job.to_bytes()
    (1, True, False)
    """

    def __init__(
        self,
        cards: Sequence[LanguageCard | bytes],
        *,
        identity: Identity | None = None,
        pins: Pins | None = None,
    ) -> None:
        self.identity = identity or Identity.generate()
        read = [c if isinstance(c, LanguageCard) else LanguageCard.from_bytes(c) for c in cards]
        if not read or len({card.run_id for card in read}) != 1:
            raise InvalidValueError(
                "a querier needs the language cards of one run",
                hint="LanguageQuerier(FedRefine(...).collect(grid))",
            )
        for card in read:
            card.require_signature()
            if pins is not None:
                pins.require_site(card.name, card.key_id)
        if len({card.key_id for card in read}) != len(read):
            raise BindingError("two language cards with the same key")
        counts = Counter(card.name for card in read)
        self._cards = {
            f"{card.name}#{card.key_id[:8]}" if counts[card.name] > 1 else card.name: card
            for card in read
        }
        self._jobs: dict[str, RefineJob] = {}

    def __repr__(self) -> str:
        return f"LanguageQuerier(sites={list(self._cards)!r}, key_id={self.key_id[:16]!r})"

    @property
    def key_id(self) -> str:
        """Fingerprint of the querier's keys: what a site pins, out of band."""
        return self.identity.key_id

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sites."""
        return tuple(self._cards)

    def ask(
        self,
        questions: Sequence[str],
        *,
        receiver: str | Sequence[str] = "all",
        sharers: Sequence[str] | None = None,
        allow: Sequence[str] = ("text",),
        rounds: int = 1,
        rephrase: str = "template",
        decoding: Mapping[str, Any] | None = None,
        batch_size: int = 32,
        ttl_s: float = _TTL_S,
    ) -> RefineJob:
        """Seal questions for the coordinator to carry.

        Parameters
        ----------
        questions : sequence of str
        receiver : str or sequence of str
            Names of the sites that answer; ``"all"`` for all that take part as receivers.
        sharers : sequence of str, optional
            Names of the sites that may read the rewritten questions and help; default all.
        allow : sequence of {"text", "cache", "full-cache"}
            Media in which they may help. A cache can be inverted, so the receiver that gets
            one can recover the rewritten question and much of the sharer's prompt; it must
            be named here. Empty: receivers answer alone.
        rounds : int
            Most rounds.
        rephrase : str
            How a receiver puts questions into other words.
        decoding : mapping, optional
            As for `FedRefine`.
        batch_size : int
        ttl_s : float
            Seconds after which no site answers any more.

        Raises
        ------
        ConfigError
            For a name that no card has, or a value out of its range.
        """
        asked = list(questions)
        if isinstance(questions, str) or not asked or not all(isinstance(q, str) for q in asked):
            raise InvalidValueError("questions are a list of texts that is not empty")
        for option, value, high in (
            ("batch_size", batch_size, MAX_QUESTIONS),
            ("rounds", rounds, MAX_ROUNDS),
        ):
            if type(value) is not int or not 1 <= value <= high:
                raise InvalidValueError(f"a job has {option} in [1, {high}]")
        if not isinstance(ttl_s, int | float) or not 0.0 < ttl_s <= _LONGEST_TTL_S:
            raise InvalidValueError(f"a job has ttl_s positive, at most {_LONGEST_TTL_S:g}")
        if not isinstance(allow, Collection) or isinstance(allow, str):
            raise InvalidValueError(f"allow is a list, of {', '.join(MEDIA)}")
        if not all(isinstance(medium, str) and medium in MEDIA for medium in allow):
            raise InvalidValueError(f"allow is a list, of {', '.join(MEDIA)}")
        if not isinstance(rephrase, str):
            raise InvalidValueError("rephrase is the name of a rephraser; 'none' for none")
        settings = decoding_options(decoding or {})
        willing = [name for name, card in self._cards.items() if card.answers]
        receivers = willing if receiver == "all" else self._named(receiver)
        helpers = self._named(list(self._cards) if sharers is None else sharers)
        if sharers is not None and allow and helpers == receivers and len(receivers) == 1:
            raise ConfigError(
                f"{receivers[0]!r} is the only receiver and the only sharer",
                hint="name another sharer, or ask it alone: allow=()",
            )
        media = {*allow, *(("cache",) if "full-cache" in allow else ())}
        job = RefineJob(
            job_id=secrets.token_hex(12),
            run_id=next(iter(self._cards.values())).run_id,
            querier=self.identity.public,
            sharers=tuple(self._cards[name].key_id for name in helpers) if allow else (),
            media=tuple(medium for medium in MEDIA if medium in media),
            rounds=rounds,
            rephrase=rephrase,
            expires_at=time.time() + ttl_s,
            batches=(),
        )
        parts = [
            self._sealed(
                job,
                self._cards[name],
                number,
                place,
                asked[start : start + batch_size],
                settings,
            )
            for number, start in enumerate(range(0, len(asked), batch_size))
            for place, name in enumerate(receivers)
        ]
        job = RefineJob(**{**job.__dict__, "batches": tuple(parts)})
        self._jobs[job.job_id] = job
        return job

    def open(
        self, answer: RefineAnswer | bytes, *, job: RefineJob | bytes | None = None
    ) -> dict[str, OpenedAnswers]:
        """Open the answers to a job of this querier.

        Parameters
        ----------
        answer : RefineAnswer or bytes
        job : RefineJob or bytes, optional
            Where another object with the same keys made it; default one that this object
            made.

        Returns
        -------
        answers : dict of str to OpenedAnswers
            By receiver.

        Raises
        ------
        ProtocolError
            If an answer is not by the receiver that it names, or to another job.
        """
        given = answer if isinstance(answer, RefineAnswer) else RefineAnswer.from_bytes(answer)
        asked = self._job(given, job)
        batches = {batch.query_id: batch for batch in asked.batches}
        names = {card.key_id: name for name, card in self._cards.items()}
        if any(key not in names for key in asked.receivers):
            raise BindingError("a job to sites whose cards are not here")
        opened: dict[str, OpenedAnswers] = {}
        for part in given.parts:
            batch = batches.get(part.query_id)
            if batch is None or batch.receiver != part.receiver or part.query_id in opened:
                raise BindingError("answers to a batch that the job does not have")
            opened[part.query_id] = self._opened(part, batch, asked, names)
        found: dict[str, list[OpenedAnswers]] = {names[key]: [] for key in asked.receivers}
        for batch in sorted(asked.batches, key=lambda b: b.number):
            nothing = OpenedAnswers(
                texts=(None,) * batch.n_questions, used=((),) * batch.n_questions
            )
            found[names[batch.receiver]].append(opened.get(batch.query_id, nothing))
        return {
            name: OpenedAnswers(
                texts=tuple(text for part in parts for text in part.texts),
                used=tuple(row for part in parts for row in part.used),
            )
            for name, parts in found.items()
        }

    # -- parts -------------------------------------------------------------------------

    def _named(self, names: str | Sequence[str]) -> list[str]:
        if not isinstance(names, Collection):
            raise InvalidValueError("sites are named by a text, or a list of texts")
        wanted = [names] if isinstance(names, str) else list(names)
        for name in wanted:
            if name not in self._cards:
                raise UnknownNameError(
                    f"no site is called {str(name)[:64]!r}", hint=f"known: {', '.join(self._cards)}"
                )
        if not wanted or len(set(wanted)) != len(wanted):
            raise InvalidValueError("name at least one site, and none twice")
        return wanted

    def _sealed(
        self,
        job: RefineJob,
        receiver: LanguageCard,
        number: int,
        place: int,
        questions: Sequence[str],
        decoding: Mapping[str, Any],
    ) -> AskedBatch:
        query_id = f"{job.job_id}-{number}-{place}"
        consent = QuerierConsent(
            run_id=job.run_id,
            query_id=query_id,
            batch=f"{job.job_id}-{number}",
            allow=job.media,
            receiver=receiver.key_id,
            sharers=tuple(key for key in job.sharers if key != receiver.key_id),
            max_rounds=job.rounds,
            expires_at=job.expires_at,
        ).signed(self.identity)
        asked = Asked(
            questions=tuple(questions),
            consent=consent,
            decoding=dict(decoding),
            rephrase=job.rephrase,
        )
        return AskedBatch(
            query_id=query_id,
            number=number,
            receiver=receiver.key_id,
            n_questions=len(questions),
            asked=seal_asked(asked, identity=self.identity, receiver=receiver.identity),
        )

    def _opened(
        self, part: RefinedPart, batch: AskedBatch, job: RefineJob, names: Mapping[str, str]
    ) -> OpenedAnswers:
        name = names[batch.receiver]
        if part.n_questions != batch.n_questions or part.round > job.rounds:
            raise BindingError("answers to other questions, or of a round beyond the last")
        try:
            answers = open_answers(
                part.answers,
                site=self._cards[name].identity,
                run_id=job.run_id,
                query_id=batch.query_id,
                round_number=part.round,
                rows=batch.n_questions,
                identity=self.identity,
            )
        except FedInferError as exc:
            raise exc.at_site(name) from None
        helpers = [names.get(key, f"key {key[:16]}") for key in answers.sharers]
        rows = np.zeros((batch.n_questions, 0)) if answers.used is None else answers.used
        return OpenedAnswers(
            texts=answers.texts,
            used=tuple(
                tuple(h for h, bit in zip(helpers, row, strict=True) if bit) for row in rows
            ),
        )

    def _job(self, answer: RefineAnswer, job: RefineJob | bytes | None) -> RefineJob:
        if isinstance(job, bytes):
            job = RefineJob.from_bytes(job)
        found = job if job is not None else self._jobs.get(answer.job_id)
        if found is None:
            raise ConfigError(
                "answers to a job that another object made", hint="open(answer, job=...)"
            )
        if found.querier != self.identity.public:
            raise BindingError("the job belongs to another querier")
        if (answer.job_id, answer.run_id) != (found.job_id, found.run_id):
            raise BindingError("the answers belong to another job or run")
        return found
