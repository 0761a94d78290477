"""After a batch: a site helps to make good for others that dropped out."""

from __future__ import annotations

import hashlib
import json

from fedinfer_flower.clients.site_memory import SiteMemory
from fedinfer_flower.errors import BindingError, ProtectionRefusedError
from fedinfer_flower.privacy.base import Protection, make_protection
from fedinfer_flower.privacy.cohort import Cohort
from fedinfer_flower.privacy.secagg import SecAgg
from fedinfer_flower.wire.recovery import RecoveryCall

__all__ = ["answer_recovery", "recovery_context"]


def recovery_context(cohort: Cohort, protection: Protection, *, run_id: int) -> bytes:
    """Return what a recovery must agree with: run, batch, roster, querier, protection, options."""
    options = json.dumps(dict(protection.options()), sort_keys=True)
    text = f"{run_id}|{protection.name}|{options}".encode()
    return hashlib.sha256(cohort.context() + text).digest()


def answer_recovery(call: RecoveryCall, memory: SiteMemory, *, run_id: int) -> bytes:
    """Return this site's reply to a recovery request.

    Raises
    ------
    BindingError
        If the site did not answer this very batch under this very protection.
    ProtectionRefusedError
        If too few sites would be in the sum.
    DifferencingError
        If other sites were counted as dropped before.
    """
    protection = make_protection(call.protection, dict(call.protection_options))
    if not isinstance(protection, SecAgg):
        raise ProtectionRefusedError(f"there is nothing to recover under {protection.name!r}")
    cohort = Cohort(
        query_id=call.query_id,
        roster=call.roster,
        public_key=call.public_key,
        content=call.content,
    )
    if memory.answered(call.query_id) != recovery_context(cohort, protection, run_id=run_id):
        raise BindingError("the recovery does not belong to the batch that this site answered")
    return protection.recovery_reply(
        call.request,
        cohort=cohort,
        identity=memory.identity,
        admit=lambda dropped: memory.admit_dropped(call.query_id, dropped),
    )
