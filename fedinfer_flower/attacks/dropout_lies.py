"""Say that a site dropped out when it did not, and open what it sent.

A masked sum survives dropouts because survivors hand over the masks that they share with
the sites that are gone. A coordinator that has a site's masked answer, and tells the others
that the site is gone, collects the masks of that answer. What is left on it is the mask that
the site shares with the querier, and its self-mask if it has one.

References
----------
.. [1] Bonawitz et al., CCS 2017, section 4 and figure 4 (why there are two masks).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedinfer_flower.attacks.base import ATTACKS, Attack, AttackResult, Position
from fedinfer_flower.attacks.federation import TargetFederation
from fedinfer_flower.attacks.reading import RECOVERED_SHARE, recovered_share
from fedinfer_flower.attacks.rounds import Round, label_of
from fedinfer_flower.ensemble.base import Array
from fedinfer_flower.errors import FedInferError, InvalidValueError
from fedinfer_flower.privacy.base import Protection
from fedinfer_flower.privacy.cohort import Cohort
from fedinfer_flower.privacy.masked_answer import MaskedAnswer
from fedinfer_flower.privacy.masks import SEED_BYTES, leaf, mask, pair_key
from fedinfer_flower.privacy.recovery_messages import Phase, RecoveryRequest, read_records

__all__ = ["DropoutLies", "MaskedBatch"]


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskedBatch:
    """A batch under a masking protection, with all sites in this process.

    Parameters
    ----------
    batch : Round
        Of a protection with a roster.
    scores : float array of shape (n_sites, n_queries, width)
        What the sites mask; site 0 is the victim, its scores are the truth for scoring.
    with_querier : bool
        Whether the querier lends its secret key.
    claimed : bool
        Whether the mode promises that the lie gives nothing away.
    """

    batch: Round
    scores: Array
    with_querier: bool
    claimed: bool


@ATTACKS.register("dropout-lies")
@dataclass(frozen=True, kw_only=True)
class DropoutLies(Attack[MaskedBatch]):
    """Declare an answering site as dropped out, and unmask its answer.

    Parameters
    ----------
    n_rows : int
        Rows that `evidence` asks about.

    Privacy
    -------
    Against the coordinator alone the querier's mask stays. Against coordinator and querier
    acting together it takes self-masks.
    """

    n_rows: int = 20

    sees = frozenset({Position.COORDINATOR, Position.POOL})
    threat = "Who lies about dropouts gets the masks of a site that answered."
    stopped_by = frozenset({"secagg", "secagg+dp"})

    def evidence(
        self,
        federation: TargetFederation,
        protection: Protection,
        *,
        seed: int = 0,  # noqa: ARG002
    ) -> dict[str, MaskedBatch]:
        """Mask one batch, for the coordinator alone and for it with the querier."""
        n_sites = len(federation.sites)
        if not protection.needs_roster or protection.least_sites(n_sites) > n_sites - 1:
            return {}
        scores = federation.scores(federation.inputs[: self.n_rows])
        has_self_mask = bool(protection.options().get("self_mask", False))
        found = {}
        for with_querier in (False, True):
            batch = Round(
                protection,
                federation.rule,
                n_classes=federation.n_classes,
                n_queries=len(scores[0]),
                n_sites=n_sites,
            )
            who = "coordinator and querier" if with_querier else "coordinator alone"
            found[f"{label_of(protection)}, {who}"] = MaskedBatch(
                batch=batch,
                scores=scores,
                with_querier=with_querier,
                claimed=has_self_mask or not with_querier,
            )
        return found

    def run(self, evidence: MaskedBatch, *, mode: str = "", seed: int = 0) -> AttackResult:  # noqa: ARG002
        """Lie, collect seeds, unmask, and compare with the victim's clear answer."""
        refused, value = "", 0.0
        try:
            value = recovered_share(_unmasked(evidence), evidence.scores[0])
        except FedInferError as exc:
            refused = exc.code
        return AttackResult(
            attack=self.name,
            mode=mode,
            statistic="share of the victim's answer recovered",
            value=value,
            baseline=0.0,
            threshold=RECOVERED_SHARE,
            threshold_reason="half of the error of a guess is gone",
            claim_limit=RECOVERED_SHARE if evidence.claimed else None,
            detail={"rows": evidence.scores.shape[1], "refused": refused},
        )


def _unmasked(evidence: MaskedBatch) -> Array:
    """Return the attacker's reading of the victim's answer."""
    batch = evidence.batch
    if batch.cohort is None:
        raise InvalidValueError("the batch has no roster, so nobody can be said to drop out")
    seeds, victim = _seeds_of_victim(batch, batch.cohort, evidence.scores)
    count = evidence.scores[0].size
    protection: Any = batch.protection
    has_self_mask = bool(protection.options().get("self_mask", False))
    answer = MaskedAnswer.from_bytes(
        batch.payload(0, evidence.scores[0]),
        context=batch.cohort.context(),
        count=count,
        n_shares=len(seeds) if has_self_mask else 0,
    )
    entries = answer.entries.copy()
    for other, seed in seeds.items():
        stream = mask(seed, count)
        entries = entries - stream if victim < other else entries + stream
    if evidence.with_querier:
        secret = X25519PrivateKey.from_private_bytes(batch.keys.secret_key)
        site = batch.identities[0].public.agreement_key
        shared = pair_key(secret, site, batch.cohort.session())
        entries = entries - mask(leaf(shared, "querier", batch.cohort.batch_id), count)
    decoded = protection.codec(batch.plan).decode(entries)
    return np.asarray(decoded, dtype=float).reshape(evidence.scores[0].shape)


def _seeds_of_victim(batch: Round, cohort: Cohort, scores: Array) -> tuple[dict[int, bytes], int]:
    """Run the protocol without the victim; return the seeds that it shares, by place."""
    side: Any = batch.coordinator()
    for site in range(1, batch.n_sites):
        side.add(batch.payload(site, scores[site]), sender=batch.sender(site))
    protection: Any = batch.protection
    by_key = {identity.key_id: identity for identity in batch.identities}
    seeds: dict[int, bytes] = {}
    victim = cohort.roster.place_of(batch.sender(0))
    while asked := dict(side.recovery_requests()):
        for key_id, request in asked.items():
            reply = protection.recovery_reply(
                request,
                cohort=cohort,
                identity=by_key[key_id],
                admit=lambda dropped: None,  # noqa: ARG005
            )
            side.add_recovery(reply, sender=key_id)
            if RecoveryRequest.from_bytes(request, cohort).phase is Phase.REVEAL:
                own, _ = read_records(reply, SEED_BYTES, batch.n_sites)
                seeds[cohort.roster.place_of(key_id)] = own[victim]
    return seeds, victim
