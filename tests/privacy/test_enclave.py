"""The enclave interface, driven by a software stand-in: it shows the contract, no hardware."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from fedinfer_flower.ensemble.base import RULES
from fedinfer_flower.errors import (
    BindingError,
    ConfigError,
    QuorumNotMetError,
    SignatureError,
    UntrustedKeyError,
)
from fedinfer_flower.privacy.base import KeyPair, ScorePlan
from fedinfer_flower.privacy.cohort import Cohort
from fedinfer_flower.privacy.enclave import RESULT_DOMAIN, EnclaveProtection, payload_info
from fedinfer_flower.wire.identity import Identity, PublicIdentity
from fedinfer_flower.wire.roster import Roster, Seat
from fedinfer_flower.wire.sealing import open_sealed

SHAPE = (4, 3)
GENUINE = b"measurement|"


class StandIn:
    """Plays verifier and enclave. Evidence: a measurement, then the identity."""

    def __init__(self) -> None:
        self.identity = Identity.generate()
        self.evidence = GENUINE + self.identity.public.to_bytes()

    def verify(self, evidence: bytes) -> PublicIdentity:
        if not evidence.startswith(GENUINE):
            raise UntrustedKeyError("not the pinned code")
        return PublicIdentity.from_bytes(evidence[len(GENUINE) :])

    def combine(self, sealed, *, rule, cohort) -> bytes:
        scores = np.stack(
            [
                np.frombuffer(
                    open_sealed(self.identity, data, info=payload_info(cohort, site)), "<f4"
                ).reshape(SHAPE)
                for site, data in sealed
            ]
        ).astype(float)
        combined = rule.combine(scores).astype("<f8").tobytes()
        statement = cohort.context() + len(sealed).to_bytes(4, "big") + combined
        return self.identity.sign(RESULT_DOMAIN, statement) + combined


@dataclass(frozen=True, kw_only=True)
class SoftwareEnclave(EnclaveProtection):
    name: ClassVar[str] = "software-enclave"
    hardware: ClassVar[StandIn]

    def verifier(self):
        return self.hardware

    def port(self):
        return self.hardware


@pytest.fixture
def setting():
    SoftwareEnclave.hardware = StandIn()
    protection, rule = SoftwareEnclave(), RULES.get("median")()
    sites = [Identity.generate() for _ in range(3)]
    keys = KeyPair(public_key=SoftwareEnclave.hardware.evidence)
    seats = tuple(Seat(identity=s.public, commitment="0" * 64) for s in sites)
    cohort = Cohort(query_id="q-0", roster=Roster(seats), public_key=keys.public_key)
    plan = ScorePlan.for_rule(rule, n_classes=3, n_sites_max=3)
    coordinator = protection.coordinator_side(
        plan, n_queries=4, rule=rule, public_key=keys.public_key, cohort=cohort
    )
    return protection, plan, rule, sites, keys, cohort, coordinator


def send(setting, scores, count=3):
    protection, plan, _, sites, keys, cohort, coordinator = setting
    for site, one in zip(sites[:count], scores, strict=False):
        side = protection.site_side(plan, public_key=keys.public_key, cohort=cohort, identity=site)
        coordinator.add(side.protect(one), sender=site.key_id)


def test_rule_that_needs_each_score_is_combined_inside(setting):
    protection, plan, rule, _, keys, cohort, coordinator = setting
    scores = np.random.default_rng(0).dirichlet(np.ones(3), (3, 4))
    send(setting, scores)

    side = protection.querier_side(plan, keys=keys, cohort=cohort)
    opened = side.open(coordinator.total(), n_queries=4, n_sites=3)

    # Scores travel as float32.
    np.testing.assert_allclose(opened, rule.combine(scores), rtol=0.0, atol=1e-6)


def test_site_that_does_not_know_the_code_seals_nothing(setting):
    protection, plan, _, sites, _, cohort, _ = setting
    with pytest.raises(UntrustedKeyError):
        protection.site_side(plan, public_key=b"other code", cohort=cohort, identity=sites[0])


def test_result_that_the_enclave_did_not_sign_is_refused(setting):
    protection, plan, _, _, keys, cohort, coordinator = setting
    send(setting, np.full((3, 4, 3), 1 / 3))
    forged = bytearray(coordinator.total())
    forged[-1] ^= 1
    side = protection.querier_side(plan, keys=keys, cohort=cohort)
    with pytest.raises(SignatureError):
        side.open(bytes(forged), n_queries=4, n_sites=3)


def test_two_sites_are_too_few_and_none_counts_twice(setting):
    *_, sites, _, _, coordinator = setting
    send(setting, np.full((3, 4, 3), 1 / 3), count=2)
    with pytest.raises(QuorumNotMetError):
        coordinator.total()
    with pytest.raises(BindingError):
        coordinator.add(b"x", sender=sites[0].key_id)


def test_without_a_cohort_nothing_is_built(setting):
    protection, plan, rule, _, keys, *_ = setting
    with pytest.raises(ConfigError):
        protection.coordinator_side(plan, n_queries=1, rule=rule, public_key=keys.public_key)
