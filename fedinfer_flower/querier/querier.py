"""`Querier`: makes keys, encodes queries, opens sums, decides."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt

from fedinfer_flower.ensemble.base import EnsembleRule, make_rule
from fedinfer_flower.errors import BindingError, ConfigError, InvalidValueError, ShapeError
from fedinfer_flower.privacy.base import KeyPair, Protection, make_protection
from fedinfer_flower.privacy.key_presence import note_secret
from fedinfer_flower.querier.asked import AskedJob, SealedTerms
from fedinfer_flower.querier.opening import OpenedBatch, open_batch
from fedinfer_flower.querier.sealing_job import content_of, sealed_job
from fedinfer_flower.query import Prediction
from fedinfer_flower.wire.directory import Directory
from fedinfer_flower.wire.documents import CombinedAnswer, CombinedBatch, QueryJob
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.pins import Pins
from fedinfer_flower.wire.sealed_job import SealedJob

__all__ = ["Querier"]


class Querier:
    """Ask questions and open the joint answer. Lives outside the coordinator's process.

    Keys are fresh for every object. What `ask` returns is public; what opens the answer
    never leaves this object, except through `save_secret`.

    Parameters
    ----------
    protection : str or Protection
        How the sites are to protect their answers; the same as the strategy's.
    keys : KeyPair, optional
        Keys of an earlier session; default fresh ones.
    identity : Identity, optional
        Who the querier is to the sites; default a fresh one. Sites that pin their
        queriers answer only a known one: keep it with `Identity.load_or_create`.
    pins : Pins, optional
        Key ids of the sites; with them, a site whose key was swapped is refused.
    tie_seed : int
        Decides ties between classes by lot.

    Privacy
    -------
    The querier learns the combined scores of every query; under `plain` and `dp` with
    sealed queries, each site's. Under `he`, a querier that pools what it has with what
    the coordinator has can open each site's own answer.

    Examples
    --------
    >>> querier = Querier(protection="plain")
    >>> job = querier.ask(np.zeros((3, 4)), clear=True)
    >>> len(job.inputs), job.key_id
    (3, '')
    """

    def __init__(
        self,
        *,
        protection: str | Protection = "he",
        keys: KeyPair | None = None,
        identity: Identity | None = None,
        pins: Pins | None = None,
        tie_seed: int = 0,
    ) -> None:
        self.protection = (
            make_protection(protection, {}) if isinstance(protection, str) else protection
        )
        self.identity = Identity.generate() if identity is None else identity
        self._keys = self.protection.make_keys() if keys is None else keys
        self._pins = pins
        self._tie_seed = tie_seed
        self._asked: dict[str, AskedJob] = {}
        if self._keys.secret_key:
            note_secret(self._keys.key_id)

    def __repr__(self) -> str:
        return f"Querier(protection={self.protection.name!r}, key_id={self.key_id[:16]!r})"

    @property
    def key_id(self) -> str:
        """Fingerprint of this session's public key, for the protection; may be empty.

        What a site pins under `he` in clear. Under seal it pins the identity that signs:
        ``querier.identity.key_id``.
        """
        return self._keys.key_id

    @overload
    def ask(
        self,
        inputs: npt.ArrayLike,
        *,
        directory: Directory,
        batch_size: int = ...,
        classes: Sequence[str] | None = ...,
        rule: str | EnsembleRule = ...,
        ttl_s: float = ...,
        weighed: Directory | None = ...,
        evidence: bool | str = ...,
        evidence_key: bytes = ...,
    ) -> SealedJob: ...

    @overload
    def ask(
        self,
        inputs: npt.ArrayLike,
        *,
        clear: Literal[True],
        batch_size: int = ...,
        classes: Sequence[str] | None = ...,
    ) -> QueryJob: ...

    def ask(
        self,
        inputs: npt.ArrayLike,
        *,
        directory: Directory | None = None,
        clear: bool = False,
        batch_size: int = 1024,
        classes: Sequence[str] | None = None,
        rule: str | EnsembleRule = "auto",
        ttl_s: float = 3600.0,
        weighed: Directory | None = None,
        evidence: bool | str = False,
        evidence_key: bytes = b"",
    ) -> QueryJob | SealedJob:
        """Encode queries for the coordinator, sealed to the sites of a directory.

        Parameters
        ----------
        inputs : array of shape (n_queries, ...)
        directory : Directory
            The sites, from the coordinator; see `FedEnsemble.directory`.
        clear : bool
            Instead of a directory: let the coordinator read the queries.
        batch_size : int
            Queries in one message.
        classes : sequence of str, optional
            Label space of the answer; default the union of the sites' classes.
        rule : str or EnsembleRule
            Ensemble rule of a sealed job; ``"auto"`` picks by the sites' profiles. In
            clear the coordinator picks.
        ttl_s : float
            Seconds for which sites answer a sealed job.
        weighed : Directory, optional
            Sites over which class weights are normalised, where more than those asked.
        evidence : bool or str
            Sealed: let every site add a second copy of its answer, for a settlement, in
            shares; ``"ckks"`` for that form, under `he`.
        evidence_key : bytes
            Public settlement key, where the protection's copies need one.

        Raises
        ------
        ConfigError
            Without a directory, unless `clear` is set.
        InvalidValueError
            If the inputs cannot travel.
        UntrustedKeyError
            If a site's key is not the pinned one.
        """
        if (directory is None) == (not clear):
            raise ConfigError(
                "queries are sealed to the sites of a directory, or asked in clear: one of both",
                hint="ask(inputs, directory=Directory.from_bytes(...)); with clear=True the"
                " coordinator reads the queries",
            )
        if clear and (rule != "auto" or evidence):
            raise ConfigError(
                "in clear the coordinator picks the rule and what it collects, not the querier",
                hint="FedEnsemble(rule=..., evidence=...), or ask under seal",
            )
        job = QueryJob(
            job_id=secrets.token_hex(16),
            inputs=np.asarray(inputs),
            batch_size=batch_size,
            protection=self.protection.name,
            protection_options=self.protection.options(),
            public_key=self._keys.public_key,
            key_id=self.key_id,
            classes=None if classes is None else tuple(str(c) for c in classes),
        )
        batches = tuple((q, len(rows)) for q, rows in job.batches())
        if directory is None:
            self._asked[job.job_id] = AskedJob(batches=batches)
            return job
        if self._pins is not None:
            # Who is only weighed bends the weights of all the others.
            for shown in (directory, weighed or directory):
                shown.require_pinned(self._pins)
        sealed = sealed_job(
            job,
            directory=directory,
            identity=self.identity,
            protection=self.protection,
            keys=self._keys,
            rule=rule,
            classes=job.classes,
            ttl_s=ttl_s,
            weighed=weighed,
            evidence=evidence,
            evidence_key=evidence_key,
        )
        terms = SealedTerms(
            run_id=sealed.run_id,
            rule=sealed.rule,
            rule_options=sealed.rule_options,
            classes=sealed.classes,
            roster=sealed.roster,
            relay=sealed.relay,
            contents=tuple(content_of(batch, run_id=sealed.run_id) for batch in sealed.batches),
        )
        self._asked[job.job_id] = AskedJob(batches=batches, sealed=terms)
        return sealed

    def open(self, combined: CombinedAnswer) -> Prediction:
        """Open a combined answer to a job of this querier, and decide.

        Raises
        ------
        BindingError
            If the answer belongs to another querier, key, job or protection.
        ProtocolError
            If it does not open to scores that the sites in it could have sent.
        """
        rule = self._check(combined)
        parts = []
        for number, batch in enumerate(combined.batches):
            scores, n_sites = self._open_batch(batch, combined, rule)
            seed = self._tie_seed + number
            parts.append(rule.decide(scores, n_sites, combined.classes, tie_seed=seed))
        return _joined(parts)

    def totals(self, combined: CombinedAnswer) -> npt.NDArray[np.float64]:
        """Return the combined scores themselves, shape (n_queries, score_width)."""
        rule = self._check(combined)
        return np.concatenate([self._open_batch(b, combined, rule)[0] for b in combined.batches])

    def save_secret(self, path: str | Path) -> None:
        """Write the querier's whole state to a file that only its owner may read."""
        from fedinfer_flower.querier.secret_file import write_secret

        write_secret(
            Path(path),
            protection=self.protection,
            keys=self._keys,
            identity=self.identity,
            asked=self._asked,
            tie_seed=self._tie_seed,
        )

    @classmethod
    def load_secret(cls, path: str | Path, *, pins: Pins | None = None) -> Querier:
        """Return the querier whose state `save_secret` wrote; pins are not part of it."""
        from fedinfer_flower.querier.secret_file import read_secret

        state = read_secret(Path(path))
        querier = cls(
            protection=state.protection,
            keys=state.keys,
            identity=state.identity,
            pins=pins,
            tie_seed=state.tie_seed,
        )
        querier._asked = dict(state.asked)
        return querier

    def _open_batch(
        self, batch: CombinedBatch, combined: CombinedAnswer, rule: EnsembleRule
    ) -> OpenedBatch:
        return open_batch(
            batch,
            combined,
            rule=rule,
            protection=self.protection,
            keys=self._keys,
            identity=self.identity,
        )

    def _check(self, combined: CombinedAnswer) -> EnsembleRule:
        asked = self._asked.get(combined.job_id)
        if asked is None:
            raise BindingError("the combined answer belongs to a job of another querier")
        if combined.key_id != self.key_id:
            raise BindingError("the combined answer is made under another key")
        own: tuple[str, Mapping[str, Any]] = (self.protection.name, self.protection.options())
        if (combined.protection, dict(combined.protection_options)) != (own[0], dict(own[1])):
            raise BindingError("the combined answer is protected otherwise than was asked")
        if tuple((b.query_id, b.n_queries) for b in combined.batches) != asked.batches:
            raise BindingError("the combined answer does not cover the job's queries")
        if not combined.classes or len(set(combined.classes)) != len(combined.classes):
            raise ShapeError("the combined answer has no classes, or one twice")
        if asked.sealed is not None:
            asked.sealed.require(combined)
        elif combined.relayed:
            raise BindingError("a relayed answer to a job that was not sealed")
        least = self.protection.least_sites(combined.n_sites_asked)
        for batch in combined.batches:
            if not least <= batch.n_sites <= combined.n_sites_asked:
                raise BindingError(
                    f"a batch claims {batch.n_sites} sites of {combined.n_sites_asked},"
                    f" {least} are needed"
                )
        return make_rule(combined.rule, dict(combined.rule_options))


def _joined(parts: list[Prediction]) -> Prediction:
    if not parts:
        raise InvalidValueError("a combined answer without batches")
    return Prediction(
        classes=parts[0].classes,
        labels=np.concatenate([p.labels for p in parts]),
        probabilities=np.concatenate([p.probabilities for p in parts]),
        margin=np.concatenate([p.margin for p in parts]),
        abstained=np.concatenate([p.abstained for p in parts]),
    )
