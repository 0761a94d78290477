"""One message at a site, with what its handler may use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flwr.app import Context

from fedinfer_flower.clients.consent import Consent
from fedinfer_flower.clients.policy_gate import Passage
from fedinfer_flower.clients.site_memory import SiteMemory
from fedinfer_flower.clients.site_model import SiteModel
from fedinfer_flower.wire.envelope import Envelope, WireLimits

if TYPE_CHECKING:
    from fedinfer_flower.clients.encrypted_answering import EncryptedPolicy

__all__ = ["SiteCall"]


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteCall:
    """One message at a site.

    Parameters
    ----------
    action : str
        Of `wire.actions`.
    envelope : Envelope
    context : Context
        Flower's.
    consent : Consent
    memory : SiteMemory
        Keys, and what the site remembers.
    load : callable
        Returns the site's model, which stays resident.
    limits : WireLimits
    passage : Passage
        What is known of the message, and the rules that count it.
    encrypted : EncryptedPolicy, optional
    """

    action: str
    envelope: Envelope
    context: Context
    consent: Consent
    memory: SiteMemory
    load: Callable[[], SiteModel]
    limits: WireLimits
    passage: Passage
    encrypted: EncryptedPolicy | None = None

    @property
    def run_id(self) -> int:
        """Flower's run."""
        return self.context.run_id

    @property
    def sender(self) -> int:
        """Node id of the site."""
        return self.context.node_id

    def require(self, work: str) -> None:
        """Refuse work that the site's owner has not agreed to.

        Raises
        ------
        ProtectionRefusedError
            Naming the work, of `consent.FURTHER_WORK`.
        """
        self.consent.require(work)
