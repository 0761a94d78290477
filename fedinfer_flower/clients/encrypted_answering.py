"""The site's part of an encrypted query: consent, gate, evaluation, flooding.

Opt-in twice: the site names the protection among those it answers under, and pins the querier's
key. Without a pinned key a coordinator could ask queries of its own under a key of its own.
"""

from __future__ import annotations

import sys
import threading
import weakref
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from fedinfer_flower.clients.adapters.base import class_name
from fedinfer_flower.clients.answering import require_unanswered
from fedinfer_flower.clients.consent import Consent
from fedinfer_flower.clients.containment import contained
from fedinfer_flower.clients.policy_gate import OPEN, Passage
from fedinfer_flower.clients.site_call import SiteCall
from fedinfer_flower.clients.site_memory import SiteMemory
from fedinfer_flower.clients.site_model import SiteModel
from fedinfer_flower.encrypted_query.ckks_batch import PublicKeys
from fedinfer_flower.encrypted_query.documents import NAME, EncryptedQuestion, answer
from fedinfer_flower.encrypted_query.flooding import Flooding
from fedinfer_flower.encrypted_query.network import MIN_ROWS, EncryptedNetwork
from fedinfer_flower.encrypted_query.quadratic import QuadraticForm
from fedinfer_flower.ensemble.base import Array
from fedinfer_flower.errors import (
    BindingError,
    BudgetExceededError,
    InvalidValueError,
    ModelAnswerError,
    ModelError,
    ProtectionRefusedError,
    ShapeError,
    SizeLimitError,
)
from fedinfer_flower.wire.actions import ENCRYPTED
from fedinfer_flower.wire.envelope import DEFAULT_LIMITS, Envelope, WireLimits

__all__ = ["EncryptedPolicy", "RowLimit", "answer_encrypted", "answer_encrypted_call"]

_SEE_LOG: Final = "see the site's own log"
_ADMITTED: Final = NAME.encode()


class RowLimit:
    """Most rows that one querier key may ask, in this process's lifetime.

    Rows count whether an answer arrives or not. It is a brake on model stealing, not a proof
    against it: the count is lost with the process, and a querier with many keys has many
    limits, as far as the site pins them.

    Parameters
    ----------
    max_rows : int

    Examples
    --------
    >>> limit = RowLimit(100)
    >>> limit.charge("ab", 60)
    >>> limit.charge("ab", 60)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    fedinfer_flower.errors.BudgetExceededError: FI315 ...
    """

    def __init__(self, max_rows: int) -> None:
        if max_rows < 1:
            raise InvalidValueError(f"max_rows is at least 1, got {max_rows!r}")
        self._max_rows, self._lock = max_rows, threading.Lock()
        self._used: dict[str, int] = {}

    def charge(self, key_id: str, rows: int) -> None:
        """Count rows of a key before they are answered.

        Raises
        ------
        BudgetExceededError
            If they are too many; then none is counted.
        """
        with self._lock:
            used = self._used.get(key_id, 0) + rows
            if used > self._max_rows:
                raise BudgetExceededError(
                    f"this site answers {self._max_rows} encrypted rows of one key;"
                    f" {self._max_rows - used + rows} are left",
                    hint="ask fewer rows, or agree on more with the site",
                )
            self._used[key_id] = used


@dataclass(frozen=True, kw_only=True)
class EncryptedPolicy:
    """What a site decides about encrypted queries, beside its `Consent`.

    Parameters
    ----------
    min_sites : int
        Fewest sites whose sum may be opened; 1 lets the querier see this site's logits. A
        site has the coordinator's word for it, no proof.
    tolerance_bits : int
        Flooding noise is ``2**-tolerance_bits`` of the logits' scale, or of 1 if larger.
    min_agreement : float
        Refuse if the polynomial form agrees with the model on fewer calibration rows.
    share_fidelity : bool
        Tell the coordinator that agreement.
    row_limit : RowLimit, optional
    """

    min_sites: int = 3
    tolerance_bits: int = 10
    min_agreement: float = 0.95
    share_fidelity: bool = False
    row_limit: RowLimit | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.min_sites < 1 or not 0.0 <= self.min_agreement <= 1.0:
            raise InvalidValueError("min_sites is at least 1 and min_agreement in [0, 1]")

    def check(self, asked: EncryptedQuestion, consent: Consent) -> None:
        """Refuse what the site did not agree to, before anything is computed.

        Raises
        ------
        ProtectionRefusedError
        """
        if consent.protections is None or NAME not in consent.protections:
            raise consent.refusal(
                ProtectionRefusedError,
                "this site does not answer encrypted queries",
                "[answers] protections",
                hint=f"the site adds {NAME!r} to its protections if it wants to",
            )
        if consent.querier_key_ids is None or asked.key_id not in consent.querier_key_ids:
            raise consent.refusal(
                ProtectionRefusedError,
                "this site has not pinned the querier's key",
                "[queriers]",
                hint="give the site EncryptedQuerier.key_id out of band",
            )
        if asked.min_sites < self.min_sites:
            raise consent.refusal(
                ProtectionRefusedError,
                f"this site answers into sums of at least {self.min_sites} sites,"
                f" {asked.min_sites} are promised",
                "[answers] min-cohort",
            )


class _Prepared:
    """A site's network, and what was measured for it; made when first asked."""

    def __init__(self, model: SiteModel, min_agreement: float) -> None:
        self.network, self.rows = _converted(model, min_agreement)
        self._measured: dict[tuple[str, int, tuple[str, ...]], Flooding] = {}

    def flooding(
        self, form: QuadraticForm, asked: EncryptedQuestion, tolerance_bits: int
    ) -> Flooding:
        key = (asked.plan.name, tolerance_bits, asked.classes)
        if key not in self._measured:
            if len(self._measured) >= 8:  # label spaces are the coordinator's to choose
                self._measured.clear()
            self._measured[key] = self.network.flooding(
                form, asked.plan, self.rows, bits=tolerance_bits
            )
        return self._measured[key]


_prepared: weakref.WeakKeyDictionary[SiteModel, _Prepared] = weakref.WeakKeyDictionary()
# Evaluations hold the interpreter anyway; one at a time also bounds their memory.
_lock = threading.Lock()


def _converted(model: SiteModel, min_agreement: float) -> tuple[EncryptedNetwork, Array]:
    local, names = model.local, model.adapter.classes
    labels: list[str] | None = None
    if local.holdout is not None and (
        local.reference_inputs is None or len(local.holdout[0]) >= MIN_ROWS
    ):
        rows, labels = np.asarray(local.holdout[0]), [class_name(n) for n in local.holdout[1]]
    elif local.reference_inputs is not None:
        rows = np.asarray(local.reference_inputs)
    else:
        raise ModelError(
            "the site has no rows to fit and check a polynomial form on",
            hint="return LocalModel(model=..., holdout=(inputs, labels)) from load_model",
        )
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(local.model, torch.nn.Module):
        network = EncryptedNetwork.from_torch(
            local.model, rows, labels, classes=names, min_agreement=min_agreement
        )
    else:
        network = EncryptedNetwork.from_sklearn(
            local.model, rows, labels, classes=names, min_agreement=min_agreement
        )
    return network, np.asarray(rows, dtype=np.float64)


def answer_encrypted_call(call: SiteCall) -> Envelope:
    """Answer an encrypted query: `answer_encrypted` with what the site has."""
    return answer_encrypted(
        call.envelope,
        call.load(),
        call.consent,
        run_id=call.run_id,
        sender=call.sender,
        memory=call.memory,
        limits=call.limits,
        policy=call.encrypted,
        passage=call.passage,
    )


def answer_encrypted(
    envelope: Envelope,
    model: SiteModel,
    consent: Consent,
    *,
    run_id: int,
    sender: int,
    memory: SiteMemory | None = None,
    limits: WireLimits = DEFAULT_LIMITS,
    policy: EncryptedPolicy | None = None,
    passage: Passage | None = None,
) -> Envelope:
    """Evaluate the site's model on an encrypted batch; return the envelope of the answer.

    Order matters: form and sizes, then consent, then the query id is used up, then the
    model, then capacity, then the rows are charged; only then do ciphertexts reach the
    native library, through the gate.

    Parameters
    ----------
    envelope : Envelope
        Of `EncryptedQuestion`.
    model : SiteModel
    consent : Consent
    run_id, sender : int
    memory : SiteMemory, optional
        With it, a query id is answered once.
    limits : WireLimits
    policy : EncryptedPolicy, optional
    passage : Passage, optional
        Rules that count the query; default none.

    Raises
    ------
    FedInferError
        Typed, and safe to send; `ReplayError` if the query id was used before.

    Privacy
    -------
    The site learns the number of rows and features, the classes and the declared bound of
    the inputs; not the inputs, and not its own answer. The querier, alone, learns the sum
    of the sites' logits with noise. An honest-but-curious querier with a well-formed key
    learns of one reply nothing but its logits with that noise, up to `Flooding.distance`.
    """
    policy = policy or EncryptedPolicy()
    if envelope.run_id != run_id:
        raise BindingError("the query belongs to another run")
    asked = EncryptedQuestion.from_envelope(envelope)
    passage = passage or Passage(OPEN, ENCRYPTED)
    passage.note(protection=NAME)
    passage.require_rows(asked.n_queries)
    if asked.n_queries > limits.max_rows:
        raise SizeLimitError(f"{asked.n_queries} rows; the limit is {limits.max_rows}")
    policy.check(asked, consent)
    passage.note(querier=asked.key_id)
    if memory is not None:
        require_unanswered(asked.query_id, memory)
    passage.count(querier=asked.key_id, query_id=asked.query_id, n_rows=asked.n_queries)
    if memory is not None:
        memory.admit(asked.query_id, _ADMITTED)
    with (
        _lock,
        contained(
            ModelAnswerError,
            "the encrypted query could not be answered",
            hint=_SEE_LOG,
            pass_typed=True,
        ),
    ):
        logits, agreement = _evaluated(asked, model, policy)
    return answer(
        asked,
        run_id=run_id,
        sender=sender,
        logits=logits,
        commitment=model.profile.commitment(),
        agreement=agreement if policy.share_fidelity else None,
    )


def _evaluated(
    asked: EncryptedQuestion, model: SiteModel, policy: EncryptedPolicy
) -> tuple[bytes, float]:
    prepared = _prepared.get(model)
    if prepared is None or prepared.network.fidelity.agreement < policy.min_agreement:
        prepared = _prepared[model] = _Prepared(model, policy.min_agreement)
    network = prepared.network
    if asked.n_features != network.form.n_features:
        raise ShapeError(
            f"the query has {asked.n_features} features, the local model {network.form.n_features}"
        )
    form = network.aligned(asked.classes, temperature=model.profile.temperature)
    network.check_query(form, asked.plan, input_bound=asked.input_bound, n_sites=asked.n_sites)
    flooding = prepared.flooding(form, asked, policy.tolerance_bits)
    if policy.row_limit is not None:
        policy.row_limit.charge(asked.key_id, asked.n_queries)
    keys = PublicKeys(asked.plan, asked.public_key)
    noise = flooding.draw(
        asked.plan,
        n_classes=len(asked.classes),
        n_queries=asked.n_queries,
        n_sites=asked.n_sites,
    )
    return keys.evaluate(form, asked.inputs, noise=noise), network.fidelity.agreement
