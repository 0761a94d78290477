"""From rows and a directory to a sealed job: everything is fixed before it leaves."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Sequence

from fedinfer_flower.ensemble.base import Disclosure, EnsembleRule, make_rule
from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.planning.label_space import shared_classes
from fedinfer_flower.planning.question import choose_rule, question_template, with_batch
from fedinfer_flower.privacy.base import KeyPair, Protection
from fedinfer_flower.privacy.legality import require_legal
from fedinfer_flower.settlement.forms import wanted_form
from fedinfer_flower.wire.directory import Directory
from fedinfer_flower.wire.documents import QueryJob
from fedinfer_flower.wire.envelope import encode
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.sealed_job import MAX_SEALED_BATCHES, SealedBatch, SealedJob
from fedinfer_flower.wire.sealed_query import seal_question, sealed_query_envelope

__all__ = ["content_of", "sealed_job"]


def sealed_job(
    job: QueryJob,
    *,
    directory: Directory,
    identity: Identity,
    protection: Protection,
    keys: KeyPair,
    rule: str | EnsembleRule,
    classes: Sequence[str] | None,
    ttl_s: float,
    weighed: Directory | None = None,
    evidence: bool | str = False,
    evidence_key: bytes = b"",
) -> SealedJob:
    """Seal a job to every site of a directory.

    Class weights are normalised over the sites of `weighed`, where more than those asked.
    With `evidence` every site adds a second copy of its answer, for a settlement, in
    shares; ``"ckks"`` asks for that form.

    Under a protection that shows the coordinator each site's scores, the sites seal them
    to the querier instead, and the coordinator passes them on.

    Raises
    ------
    ConfigError
        If the rule cannot work under the protection, or with what the sites share.
    """
    if not (math.isfinite(ttl_s) and ttl_s > 0.0):
        raise InvalidValueError("ttl_s is a positive number of seconds")
    n_batches = sum(1 for _ in job.batches())
    if n_batches > MAX_SEALED_BATCHES:
        raise InvalidValueError(
            f"{n_batches} batches; a sealed job has at most {MAX_SEALED_BATCHES}",
            hint="raise batch_size",
        )
    if len(directory.cards) < protection.min_cohort:
        raise InvalidValueError(
            f"the directory has {len(directory.cards)} sites; {protection.name!r} combines at"
            f" least {protection.min_cohort}"
        )
    profiles = dict(enumerate(card.profile for card in directory.cards))
    asked_for = make_rule(rule) if isinstance(rule, str) and rule != "auto" else rule
    chosen, reason = choose_rule(
        None if isinstance(asked_for, str) else asked_for,
        protection,
        profiles,
        classes=None if classes is None else tuple(classes),
    )
    require_legal(chosen, protection)
    # What is bound to a roster is combined elsewhere: by masks, or in an enclave.
    relay = protection.reveals is Disclosure.SCORES and not protection.needs_roster
    template = question_template(
        inputs=job.inputs,
        rule=chosen,
        protection=protection,
        profiles=profiles,
        classes=tuple(classes) if classes is not None else shared_classes(profiles),
        public_key=keys.public_key,
        key_id=keys.key_id,
        roster=directory.roster,
        weighed=None
        if weighed is None
        else dict(enumerate(card.profile for card in weighed.cards)),
        evidence=wanted_form(protection, evidence, sealed=True),
        evidence_key=evidence_key,
    )
    template = dataclasses.replace(
        template, querier=identity.public, expires_at=time.time() + ttl_s, relay=relay
    )
    batches = tuple(
        SealedBatch(
            query_id=query_id,
            n_queries=len(inputs),
            sealed=seal_question(
                with_batch(template, query_id, inputs),
                identity=identity,
                run_id=directory.run_id,
            ),
        )
        for query_id, inputs in job.batches()
    )
    return SealedJob(
        job_id=job.job_id,
        run_id=directory.run_id,
        rule=chosen.name,
        rule_options=chosen.options(),
        rule_reason=reason,
        protection=protection.name,
        protection_options=protection.options(),
        classes=template.classes,
        roster=directory.roster,
        querier=identity.public,
        public_key=keys.public_key,
        key_id=keys.key_id,
        expires_at=template.expires_at,
        relay=relay,
        batches=batches,
    )


def content_of(batch: SealedBatch, *, run_id: int) -> bytes:
    """Return the digest of the message in which a coordinator passes a batch on.

    Masks are bound to it: a coordinator that passes on anything else gets a sum that the
    querier cannot open.
    """
    envelope = sealed_query_envelope(batch.sealed, query_id=batch.query_id, run_id=run_id)
    return hashlib.sha256(encode(envelope)).digest()
