"""The site's part of a calibration: its held-out rows, scored, counted and protected."""

from __future__ import annotations

import hashlib
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.clients.adapters.base import class_name
from fedinfer_flower.clients.answering import require_unanswered
from fedinfer_flower.clients.calibration import MIN_HOLDOUT
from fedinfer_flower.clients.containment import contained
from fedinfer_flower.clients.policy_gate import UNSIGNED
from fedinfer_flower.clients.recovering import recovery_context
from fedinfer_flower.clients.site_call import SiteCall
from fedinfer_flower.clients.site_memory import SiteMemory
from fedinfer_flower.clients.site_model import SiteModel
from fedinfer_flower.ensemble.base import Array, softmax
from fedinfer_flower.errors import (
    BindingError,
    LabelSpaceError,
    ModelAnswerError,
    ModelError,
    ProtectionRefusedError,
)
from fedinfer_flower.privacy.base import Protection, ScorePlan, key_id_of, make_protection
from fedinfer_flower.privacy.cohort import Cohort
from fedinfer_flower.uncertainty.federated_quantile import (
    HistogramSpec,
    require_protection,
    site_histogram,
)
from fedinfer_flower.uncertainty.nonconformity import label_scores
from fedinfer_flower.wire.calibrate import CalibrationCall, histogram, read_calibration
from fedinfer_flower.wire.envelope import Envelope
from fedinfer_flower.wire.messages import Question
from fedinfer_flower.wire.records import content_digest, pack

__all__ = ["answer_calibration"]

_WORK: Final = "calibration"
_SEE_LOG: Final = "see the site's own log"


def answer_calibration(call: SiteCall) -> Envelope:
    """Score the site's held-out rows with its own model and return their protected histogram.

    Order matters, as for a query: consent, then the site's own facts, then the query id is
    used up, then the protection.

    Raises
    ------
    FedInferError
        Typed, and safe to send.

    Privacy
    -------
    The histogram says how well the model does on its owner's held-out rows. Who sees it is
    the protection's matter: the coordinator under `plain`; under `secagg` and `he` the
    querier, and only summed over at least three sites. A site with a home folder joins
    exact sums with one set of other sites only, and gives a noisy histogram of the same
    rows once: repeated noise would average out. Without one it remembers query ids alone.
    """
    asked = read_calibration(call.envelope)
    call.require(_WORK)
    protection = make_protection(asked.protection, dict(asked.protection_options))
    require_protection(protection)
    spec = HistogramSpec(n_bins=asked.n_bins, max_rows=asked.max_rows, method=asked.method)
    plan = spec.plan(asked.n_sites)
    account = asked.key_id if asked.key_id in (call.consent.querier_key_ids or ()) else UNSIGNED
    call.passage.note(protection=protection.name, querier=account)
    _check_consent(call, asked, protection, plan)
    model, memory = call.load(), call.memory
    with contained(
        ModelAnswerError, "the held-out rows could not be scored", hint=_SEE_LOG, pass_typed=True
    ):
        if not set(model.profile.classes) <= set(asked.classes):
            raise LabelSpaceError(
                "a call for calibration without some of this site's classes: what it counts"
                " beside them would be labels",
                hint="leave out classes=..., for the union of all sites' classes",
            )
        inputs, labels = _held_out(model)
        place = asked.roster.place_of(memory.identity.key_id)
        if asked.roster.seats[place].commitment != model.profile.commitment():
            raise BindingError("the call was made for another model or profile than this site has")
        cohort = Cohort(
            query_id=asked.query_id,
            roster=asked.roster,
            public_key=asked.public_key,
            # What `pack` makes is canonical: the digest is that of the message that came.
            content=content_digest(pack(call.envelope)),
        )
        side = protection.site_side(
            plan, public_key=asked.public_key, cohort=cohort, identity=memory.identity
        )
        counts = site_histogram(_scores(model, inputs, labels, asked), spec)
        require_unanswered(asked.query_id, memory)
        call.passage.count(querier=account, query_id=asked.query_id, n_rows=0)
        _admit(call, asked, protection, plan, cohort, (inputs, labels))
        payload = side.protect(counts)
    return histogram(
        asked,
        run_id=call.run_id,
        sender=call.sender,
        payload=payload,
        commitment=model.profile.commitment(),
    )


def _check_consent(
    call: SiteCall, asked: CalibrationCall, protection: Protection, plan: ScorePlan
) -> None:
    if key_id_of(asked.public_key) != asked.key_id:
        raise BindingError("the public key is not the one that the key id names")
    if call.memory.budget is not None:
        # The budget counts answers to queries; a histogram's noise hides held-out rows.
        raise ProtectionRefusedError("a site with a privacy budget gives no histogram")
    question = Question(
        query_id=asked.query_id,
        inputs=np.empty((0, 1)),
        classes=asked.classes,
        n_sites=asked.n_sites,
        rule=_WORK,
        protection=asked.protection,
        protection_options=asked.protection_options,
        public_key=asked.public_key,
        key_id=asked.key_id,
        roster=asked.roster,
    )
    call.consent.check(
        question,
        protection,
        plan,
        sealed=False,
        budgeted=False,
        own_key_id=call.memory.identity.key_id,
    )


def _held_out(model: SiteModel) -> tuple[npt.NDArray[Any], list[str]]:
    if model.local.holdout is None or len(model.local.holdout[1]) < MIN_HOLDOUT:
        raise ModelError(
            f"this site has fewer than {MIN_HOLDOUT} held-out rows",
            hint="LocalModel(holdout=(inputs, labels)) at the site",
        )
    inputs, labels = model.local.holdout
    return np.asarray(inputs), [class_name(label) for label in labels]


def _scores(
    model: SiteModel, inputs: npt.NDArray[Any], labels: list[str], asked: CalibrationCall
) -> Array:
    place = {name: column for column, name in enumerate(asked.classes)}
    columns = np.array([place.get(name, -1) for name in labels], dtype=np.int64)
    probabilities = softmax(model.calibrated_logits(inputs, asked.classes))
    return label_scores(probabilities, columns, method=asked.method)


def _admit(
    call: SiteCall,
    asked: CalibrationCall,
    protection: Protection,
    plan: ScorePlan,
    cohort: Cohort,
    held_out: tuple[npt.NDArray[Any], list[str]],
) -> None:
    """Use up the query id, and refuse rows whose counts could be compared with other sums."""
    memory = call.memory
    noisy = protection.charge(plan, 1) is not None
    if memory.guard is not None and (noisy or protection.min_cohort > 1):
        memory.guard.admit(
            asked.query_id,
            (_digest(held_out, memory),),
            # No two calls share a query id: a noisy histogram of these rows is drawn once.
            asked.query_id.encode() if noisy else asked.roster.digest(),
            survivors_known=protection.needs_roster and not noisy,
        )
    memory.admit(asked.query_id, recovery_context(cohort, protection, run_id=call.run_id))


def _digest(held_out: tuple[npt.NDArray[Any], list[str]], memory: SiteMemory) -> bytes:
    """Name a held-out set under the site's own key."""
    keyed = hashlib.blake2b(digest_size=32, key=memory.row_key(), person=b"fi/held-out/v1")
    inputs, labels = held_out
    keyed.update(str((inputs.shape, inputs.dtype.str)).encode())
    keyed.update(np.ascontiguousarray(inputs).tobytes())
    keyed.update("\0".join(labels).encode())
    return keyed.digest()
