"""A trusted execution environment as a protection: the interface, and what it has to promise.

No hardware is driven here. A distribution that drives some (SGX, SEV-SNP, TDX, Nitro)
subclasses `EnclaveProtection`, gives it a verifier and a port, and registers it as any other
protection. What follows is the contract that such a protection has to keep; nothing in this
package can check it.

1. **Identity.** `EnclaveVerifier.verify` accepts evidence only if the hardware vendor's chain
   signs it, it is fresh by the vendor's revocation data, and its measurement is one that *this
   party pinned*, by a list that the coordinator cannot write to.
2. **Binding.** The evidence commits to the `PublicIdentity` that `verify` returns, and its
   secret halves were made in the enclave and never leave it.
3. **Combination.** The attested code opens payloads that are sealed to that identity, runs the
   rule that the query names, over at least `min_cohort` distinct sites of the signed roster,
   once for each query id, and forgets every payload.
4. **Release.** It signs the combined scores with that identity and lets nothing else out: not
   to the operator, not in logs, not in timing that depends on scores.
5. **Rollback.** Query ids that were combined survive a restart, or the enclave makes a new
   identity when it starts.

Side channels of the hardware (caches, power, page faults) are outside of this contract; say
which of them the hardware resists where the protection is documented.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from fedinfer_flower.ensemble.base import Array, Disclosure, EnsembleRule
from fedinfer_flower.errors import BindingError, ConfigError
from fedinfer_flower.privacy.base import KeyPair, Protection, ScorePlan
from fedinfer_flower.privacy.checks import ROUNDING_SLACK, check_scores, read_total
from fedinfer_flower.privacy.cohort import Cohort
from fedinfer_flower.wire.identity import Identity, PublicIdentity
from fedinfer_flower.wire.sealing import seal_to

__all__ = ["RESULT_DOMAIN", "EnclavePort", "EnclaveProtection", "EnclaveVerifier", "payload_info"]

RESULT_DOMAIN = "enclave result"
_SIGNATURE_BYTES = 64
T = TypeVar("T")


class EnclaveVerifier(Protocol):
    """Decides, at a site or a querier, whether evidence is of the code that it pinned."""

    def verify(self, evidence: bytes) -> PublicIdentity:
        """Return the identity that the evidence commits to.

        Raises
        ------
        UntrustedKeyError
            If the evidence is not of pinned code on genuine hardware.
        """


class EnclavePort(Protocol):
    """The coordinator's way into the enclave."""

    def combine(
        self, sealed: Sequence[tuple[str, bytes]], *, rule: EnsembleRule, cohort: Cohort
    ) -> bytes:
        """Return a signature of 64 bytes, then combined scores as little-endian float64.

        Parameters
        ----------
        sealed : sequence of (key id of the site, sealed payload)
            Each payload is float32, little-endian, of shape (n_queries, width), sealed with
            `payload_info` of the batch and site.
        """


def payload_info(cohort: Cohort, site: str) -> bytes:
    """Return what a site's payload is sealed for: this batch, this cohort, this site."""
    return b"enclave|" + cohort.context() + site.encode()


@dataclass(frozen=True, kw_only=True)
class EnclaveProtection(Protection):
    """Seal scores to attested code, which combines them out of the coordinator's sight.

    Abstract. The session's public key is the enclave's evidence: `make_keys` of a subclass
    fetches it, and every site verifies it for itself before it seals anything.

    Privacy
    -------
    As good as the contract at the top of this module and the hardware below it. The
    coordinator sees sealed bytes; the querier sees the combined answer; the code in the
    enclave sees every answer.
    """

    reveals = Disclosure.SCORES  # to the attested code, which runs any rule
    needs_roster = True
    min_cohort = 3

    @abstractmethod
    def verifier(self) -> EnclaveVerifier:
        """Return this party's verifier, with its own pinned measurements."""

    @abstractmethod
    def port(self) -> EnclavePort:
        """Return the coordinator's port."""

    def payload_bytes(self, plan: ScorePlan, n_queries: int) -> int:
        """Return four bytes an entry, and the seal."""
        return 4 * n_queries * plan.width + 48

    def site_side(
        self,
        plan: ScorePlan,
        *,
        public_key: bytes,
        cohort: Cohort | None = None,
        identity: Identity | None = None,
    ) -> _EnclaveSite:
        """Verify the evidence, then build the site's side around the identity in it."""
        enclave = self.verifier().verify(public_key)
        return _EnclaveSite(plan, enclave, _given(cohort), _given(identity))

    def coordinator_side(
        self,
        plan: ScorePlan,
        *,
        n_queries: int,  # noqa: ARG002
        rule: EnsembleRule,
        public_key: bytes,  # noqa: ARG002
        cohort: Cohort | None = None,
    ) -> _EnclaveCoordinator:
        """Build the coordinator's side: it collects, and hands everything to the port."""
        return _EnclaveCoordinator(self, plan, rule, _given(cohort))

    def querier_side(
        self, plan: ScorePlan, *, keys: KeyPair, cohort: Cohort | None = None
    ) -> _EnclaveQuerier:
        """Verify the evidence, then build the querier's side around the identity in it."""
        enclave = self.verifier().verify(keys.public_key)
        return _EnclaveQuerier(self, plan, enclave, _given(cohort))


class _EnclaveSite:
    def __init__(
        self, plan: ScorePlan, enclave: PublicIdentity, cohort: Cohort, identity: Identity
    ) -> None:
        self._plan, self._enclave = plan, enclave
        self._info = payload_info(cohort, identity.key_id)

    def protect(self, scores: Array) -> bytes:
        check_scores(scores, self._plan)
        return seal_to(self._enclave, scores.astype("<f4").tobytes(), info=self._info)


class _EnclaveCoordinator:
    def __init__(
        self, protection: EnclaveProtection, plan: ScorePlan, rule: EnsembleRule, cohort: Cohort
    ) -> None:
        self._protection, self._plan = protection, plan
        self._rule, self._cohort = rule, cohort
        self._sealed: dict[str, bytes] = {}

    @property
    def n_sites(self) -> int:
        return len(self._sealed)

    def add(self, payload: bytes | memoryview, *, sender: str = "") -> None:
        self._plan.require_room(self.n_sites)
        self._cohort.roster.place_of(sender)
        if sender in self._sealed:
            raise BindingError("a second answer of one site")
        self._sealed[sender] = bytes(payload)

    def total(self) -> bytes:
        self._protection.require_cohort(self.n_sites, self._plan)
        return self._protection.port().combine(
            sorted(self._sealed.items()), rule=self._rule, cohort=self._cohort
        )


class _EnclaveQuerier:
    def __init__(
        self,
        protection: EnclaveProtection,
        plan: ScorePlan,
        enclave: PublicIdentity,
        cohort: Cohort,
    ) -> None:
        self._protection, self._plan = protection, plan
        self._enclave, self._cohort = enclave, cohort

    def open(self, total: bytes | memoryview, *, n_queries: int, n_sites: int) -> Array:
        self._protection.check_cohort(n_sites, self._plan)
        raw = bytes(total)
        signature, scores = raw[:_SIGNATURE_BYTES], raw[_SIGNATURE_BYTES:]
        statement = self._cohort.context() + n_sites.to_bytes(4, "big") + scores
        self._enclave.verify(RESULT_DOMAIN, statement, signature)
        limit = n_sites * self._plan.bound * (1.0 + 2.0 * ROUNDING_SLACK)
        return read_total(scores, self._plan, n_queries=n_queries, limit=limit)


def _given(value: T | None) -> T:
    if value is None:
        raise ConfigError("an enclave needs the cohort of the batch and the site's identity")
    return value
