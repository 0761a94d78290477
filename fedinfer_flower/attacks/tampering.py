"""Alter, swap or replay payloads on their way, so that the opened sum is wrong.

None of the protections that hide scores protects them from change: masks and ciphertexts
can be added to by anyone, and range checks at the querier catch wild values only. What stops
this is a signature of the site over batch and payload.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedinfer_flower.attacks.base import ATTACKS, Attack, AttackResult, Position
from fedinfer_flower.attacks.federation import TargetFederation
from fedinfer_flower.attacks.hostile_payloads import (
    HostilePayload,
    Outcomes,
    damaged,
    isolated_survey,
    survey,
    survey_protection,
)
from fedinfer_flower.attacks.rounds import Round, label_of
from fedinfer_flower.ensemble.base import Array
from fedinfer_flower.privacy.base import Protection
from fedinfer_flower.wire.identity import Identity

__all__ = ["Tampering", "TamperingRun", "collect_outcomes", "signed_outcomes"]

_DOMAIN = "attack bench"


@dataclass(frozen=True, kw_only=True)
class TamperingRun:
    """A way to carry the attack out.

    Parameters
    ----------
    collect : callable
        Delivers hostile payloads and counts their ends; see `hostile_payloads.survey`.
    claimed : bool
        Whether the mode promises that none of them does what the attack wants.
    """

    collect: Callable[[], Outcomes]
    claimed: bool = False


def collect_outcomes(
    federation: TargetFederation, protection: Protection, *, n_random: int, seed: int
) -> Outcomes:
    """Attack one batch of a federation; in a process of its own under encryption."""
    run = isolated_survey if "he" in protection.name.split("+") else survey_protection
    return run(
        protection,
        federation.rule,
        federation.scores(federation.inputs[:3]),
        n_classes=federation.n_classes,
        n_random=n_random,
        seed=seed,
    )


def signed_outcomes(
    federation: TargetFederation, protection: Protection, *, n_random: int, seed: int
) -> Outcomes:
    """Attack payloads that the site has signed together with the batch's id.

    The attacker is not the site: it can repeat signed payloads of the site, and sign with a
    key of its own.
    """
    scores = federation.scores(federation.inputs[:3])
    n_sites, n_queries = scores.shape[:2]
    options = {"n_classes": federation.n_classes, "n_queries": n_queries, "n_sites": n_sites}
    batch = Round(protection, federation.rule, **options)
    me, you = Identity.generate(), Identity.generate()

    def signed(author: Identity, batch_id: bytes, payload: bytes) -> bytes:
        return author.sign(_DOMAIN, batch_id + payload) + payload

    def deliver(envelope: bytes) -> Array:
        signature, payload = envelope[:64], envelope[64:]
        me.public.verify(_DOMAIN, b"this batch" + payload, signature)
        side = batch.coordinator()
        side.add(payload, sender=batch.sender(0))
        for site in range(1, n_sites):
            side.add(sent[site], sender=batch.sender(site))
        return batch.open(batch.total(side), n_sites=n_sites)

    sent = [batch.payload(site, own) for site, own in enumerate(scores)]
    honest = signed(me, b"this batch", sent[0])
    payloads = damaged(honest, n_random=n_random, seed=seed)
    payloads += [
        HostilePayload(kind="another site's", payload=signed(you, b"this batch", sent[1])),
        HostilePayload(kind="another batch's", payload=signed(me, b"earlier batch", sent[1])),
    ]
    return survey(
        payloads,
        deliver,
        honest=scores.sum(axis=0),
        tolerance=n_sites * 2.0**-9,
    )


@ATTACKS.register("tampering")
@dataclass(frozen=True, kw_only=True)
class Tampering(Attack[TamperingRun]):
    """Count altered payloads that end in a wrong sum without anyone noticing.

    Parameters
    ----------
    n_random : int
        Random damages of each kind.

    Privacy
    -------
    No protection promises integrity against who carries the payloads. A signature over
    batch and payload does, not against the site itself: within its rule's bounds it may
    send what it likes.
    """

    n_random: int = 40

    sees = frozenset({Position.COORDINATOR, Position.SITE})
    threat = "Who carries payloads changes the answer, and nobody notices."

    def evidence(
        self, federation: TargetFederation, protection: Protection, *, seed: int = 0
    ) -> dict[str, TamperingRun]:
        """Attack a batch as it is and, in clear, one with signed payloads."""
        batch = Round(
            protection,
            federation.rule,
            n_classes=federation.n_classes,
            n_queries=1,
            n_sites=len(federation.sites),
        )
        if protection.epsilon_delta(batch.plan) is not None:
            return {}  # with noise in it no single sum is wrong
        label, n_random = label_of(protection), self.n_random
        bare = TamperingRun(
            collect=lambda: collect_outcomes(federation, protection, n_random=n_random, seed=seed)
        )
        if protection.name != "plain":
            return {label: bare}
        signed = TamperingRun(
            collect=lambda: signed_outcomes(federation, protection, n_random=n_random, seed=seed),
            claimed=True,
        )
        return {label: bare, f"{label}, signed with the batch": signed}

    def run(self, evidence: TamperingRun, *, mode: str = "", seed: int = 0) -> AttackResult:  # noqa: ARG002
        """Deliver, and count wrong sums."""
        outcomes = evidence.collect()
        wrong = int(np.sum(list(outcomes.wrong.values())))
        return AttackResult(
            attack=self.name,
            mode=mode,
            statistic="altered payloads that end in a wrong sum",
            value=float(wrong),
            baseline=0.0,
            threshold=0.0,
            threshold_reason="one is enough",
            claim_limit=0.0 if evidence.claimed else None,
            detail=outcomes.counts(),
        )
