"""Where the coordinator is its own querier: arrays in, predictions out.

A protection without a key hides nothing from the coordinator that opening would reveal,
so an array of queries may be asked and opened here. A protection with a key may not,
unless the user says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import BindingError, InvalidValueError, KeyAtCoordinatorError
from fedinfer_flower.privacy.base import Protection, key_id_of
from fedinfer_flower.privacy.key_presence import secret_in_process
from fedinfer_flower.querier.querier import Querier
from fedinfer_flower.query import Prediction
from fedinfer_flower.wire.documents import CombinedAnswer, QueryJob
from fedinfer_flower.wire.sealed_job import SealedJob

if TYPE_CHECKING:
    from fedinfer_flower.strategies.fed_ensemble import FedEnsemble

__all__ = ["LocalQuerier", "job_for", "open_here", "secret_is_here"]

LocalQuerier = Querier
"""A querier in the coordinator's own process."""


def job_for(
    queries: npt.NDArray[np.generic] | QueryJob | SealedJob, strategy: FedEnsemble
) -> tuple[QueryJob | SealedJob, Querier | None]:
    """Return (job, querier that can open it here, or None).

    Raises
    ------
    KeyAtCoordinatorError
        If an array is asked under a protection with a key.
    BindingError
        If a job wants another protection than the strategy gives.
    """
    protection = strategy.protection
    if isinstance(queries, QueryJob | SealedJob):
        wanted = (queries.protection, dict(queries.protection_options))
        if wanted != (protection.name, dict(protection.options())):
            raise BindingError(
                f"the job asks for protection {wanted[0]!r}, the strategy gives"
                f" {protection.name!r} or other options of it",
                hint="build querier and strategy with the same protection and options",
            )
        return queries, None
    if isinstance(queries, Querier):
        raise KeyAtCoordinatorError(
            "start() was given a Querier: its secrets must not meet the coordinator",
            hint="pass what querier.ask(...) returns",
        )
    if protection.needs_key and not strategy.allow_coordinator_key:
        raise KeyAtCoordinatorError(
            f"protection {protection.name!r} needs a key, and queries given as an array would"
            " have it made in the coordinator's process, which could then read every answer",
            hint="make the job with a Querier in another process ('fedinfer querier ask'),"
            " use protection 'dp', or accept it: allow_coordinator_key=True",
        )
    if not isinstance(queries, np.ndarray):
        raise InvalidValueError(
            f"queries are a {type(queries).__name__}, expected an array or a QueryJob",
            hint="wrap rows with numpy.asarray(...)",
        )
    querier = Querier(protection=protection)
    job = querier.ask(queries, clear=True, batch_size=strategy.batch_size)
    return job, querier


def require_local(strategy: FedEnsemble) -> None:
    """Refuse a protection whose key would be made here, where that is not allowed.

    Raises
    ------
    KeyAtCoordinatorError
    """
    protection = strategy.protection
    if protection.needs_key and not strategy.allow_coordinator_key:
        raise KeyAtCoordinatorError(
            f"protection {protection.name!r} needs a key, and queries given as an array would"
            " have it made in the coordinator's process, which could then read every answer",
            hint="make the job with a Querier in another process ('fedinfer querier ask'),"
            " use protection 'dp', or accept it: allow_coordinator_key=True",
        )


def open_here(querier: Querier | None, combined: CombinedAnswer) -> Prediction | None:
    """Open a combined answer if this process asked for it."""
    return None if querier is None else querier.open(combined)


def secret_is_here(
    job: QueryJob | SealedJob, protection: Protection, querier: Querier | None, *, allowed: bool
) -> bool:
    """Return whether the secret key that opens a job's answers is in this process.

    Raises
    ------
    KeyAtCoordinatorError
        If it is, and was not allowed to be.
    """
    if not protection.needs_key:
        # An array under masks: the coordinator is the querier, and opens the sum.
        return querier is not None and protection.needs_roster
    if not job.key_id or key_id_of(job.public_key) != job.key_id:
        raise BindingError("the job's public key is not the one that its key id names")
    here = secret_in_process(job.key_id)
    if here and not allowed:
        raise KeyAtCoordinatorError(
            f"the secret key for {protection.name!r} is in the coordinator's process:"
            " it could read every site's answer",
            hint="make the job with a Querier in another process ('fedinfer querier ask'),"
            " use protection 'secagg' or 'dp', or accept it: allow_coordinator_key=True",
        )
    return here
