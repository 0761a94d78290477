"""What both roles work out for themselves from what is public in an epoch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from fedinfer_flower.errors import SettlementError
from fedinfer_flower.incentives.base import LinearScheme, PublicFacts
from fedinfer_flower.settlement.ckks_rows import SLOT_ERROR_STD
from fedinfer_flower.settlement.documents import SettlementRequest
from fedinfer_flower.settlement.forms import EvidenceForm
from fedinfer_flower.settlement.ring import ONE, Array, IntArray
from fedinfer_flower.settlement.row_sums import MIN_SITES, RowWeights, check_totals

__all__ = ["FLOOD", "Epoch", "require_scheme", "total_slack"]

FLOOD = 16.0
"""Under CKKS the querier adds noise of 16 times the decryption's error to what it gives
away: each number then says at most ``log2(1 + 1/256) / 2 = 0.003`` bits about the error,
and so about the key [1]_.

.. [1] Li, Micciancio, Schultz and Sorrell, Securing Approximate Homomorphic Encryption Using
   Differential Privacy, CRYPTO 2022.
"""

_ROW_SLACK = 1e-6
_DEVIATIONS = 8.0


def total_slack(form: EvidenceForm, n_sites: int) -> float:
    """Return how far an entry of honest totals may be off."""
    rounding = n_sites * (0.5 / ONE + _ROW_SLACK)
    if form is not EvidenceForm.CKKS:
        return rounding
    return rounding + _DEVIATIONS * (FLOOD + 1.0) * SLOT_ERROR_STD * float(np.sqrt(n_sites))


def require_scheme(request: SettlementRequest, scheme: LinearScheme) -> None:
    """Require that a request is for this scheme, with these options.

    Raises
    ------
    SettlementError
        If it is for another.
    """
    if (request.scheme, dict(request.scheme_options)) != (scheme.name, scheme.options()):
        raise SettlementError(
            f"the settlement is by another scheme or options than {scheme.name!r}",
            hint="agree on one scheme before the epoch; both roles name it",
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Epoch:
    """The audits of an epoch, their totals and weights: checked, and alike at both roles.

    Parameters
    ----------
    request : SettlementRequest
    audits_t3 : int array of shape (n_audits, 3)
        Number of the query in the request, row in it, label.
    totals_tc : int array of shape (n_audits, n_classes)
        On the grid of 2**-20.
    weights : RowWeights
    """

    request: SettlementRequest
    audits_t3: IntArray = field(repr=False)
    totals_tc: IntArray = field(repr=False)
    weights: RowWeights = field(repr=False)

    @classmethod
    def of(
        cls,
        request: SettlementRequest,
        *,
        audits_t3: IntArray,
        totals_tc: IntArray,
        scheme: LinearScheme,
    ) -> Epoch:
        """Check audits and totals, and work out the weights.

        Raises
        ------
        SettlementError
            If an audit names a query, row or class that does not exist or comes twice, if
            the totals are no sums of distributions, or if a guard of `RowWeights` holds.
        """
        if len(request.sites) < MIN_SITES:
            raise SettlementError(f"an epoch of fewer than {MIN_SITES} sites")
        require_scheme(request, scheme)
        query, row, label = audits_t3.T
        rows_of = np.array([n for _, n in request.queries], dtype=np.int64)
        if len(audits_t3) and not (query.min() >= 0 and query.max() < len(rows_of)):
            raise SettlementError("a reveal names a query that is not in this epoch")
        if not ((row >= 0) & (row < rows_of[query])).all():
            raise SettlementError("a reveal names a row that was not asked")
        if not ((label >= 0) & (label < request.n_classes)).all():
            raise SettlementError("a reveal has a label that is no class")
        if len(np.unique(audits_t3[:, :2], axis=0)) != len(audits_t3):
            raise SettlementError("a reveal names a row twice")
        if totals_tc.shape != (len(audits_t3), request.n_classes):
            raise SettlementError("a reveal has totals of another shape than its audits")
        totals, n_sites = totals_tc / ONE, len(request.sites)
        facts = PublicFacts(total_tc=totals, n_sites=n_sites, labels=label)
        if len(totals):
            check_totals(totals, n_sites, slack=total_slack(request.form, n_sites))
        weights = RowWeights.of(scheme, facts)
        return cls(request=request, audits_t3=audits_t3, totals_tc=totals_tc, weights=weights)

    def with_grid(self, grid_tc: IntArray) -> Epoch:
        """Return the same epoch with the weights on the other role's grid."""
        return replace(self, weights=self.weights.on_grid(grid_tc))

    def rows_in(self, query: int) -> tuple[IntArray, IntArray]:
        """Return, of one query, (places among the audits, rows in the query)."""
        places = np.flatnonzero(self.audits_t3[:, 0] == query)
        return places, self.audits_t3[places, 1]

    @property
    def spare_bits(self) -> float:
        """How many bits of a sure site's answers its row sum without noise leaves open.

        Who knows the totals knows that a sure answer is one of the classes that total 1 or
        more. `RowWeights.spare_bits` counts all classes, as if totals were secret.
        """
        slack = total_slack(self.request.form, len(self.request.sites))
        n_open = (self.totals_tc / ONE >= 1.0 - slack).sum(axis=1)
        open_bits = float(np.log2(np.maximum(n_open, 1)).sum())
        return open_bits - math.log2(2.0 * max(len(n_open), 1) * ONE)

    def expected_sum(self) -> float:
        """Return what all sites' contributions add up to, by the totals."""
        totals, n_sites = self.totals_tc / ONE, len(self.request.sites)
        centred = totals - n_sites / self.request.n_classes
        return float((centred * self.weights.weights_tc).sum())

    @property
    def cipher_error_std(self) -> float:
        """Standard deviation of a contribution's decryption error under CKKS."""
        norm = float(np.linalg.norm(self.weights.weights_tc))
        return SLOT_ERROR_STD * norm if self.request.form is EvidenceForm.CKKS else 0.0

    def require_plausible(self, values_k: Array, *, noise_std: float) -> None:
        """Require that contributions can be those of distributions with these totals.

        Raises
        ------
        SettlementError
            If they do not add up to what the totals say, or one is larger than any
            distributions earn. Then a role used other weights, or a document was altered, or
            a site's evidence is no distribution. Also if the querier claims noise that would
            hide everything.
        """
        if noise_std > self.weights.largest:
            raise SettlementError(
                "the querier's noise is larger than anything that a site can earn",
                hint="agree on noise_std before the epoch",
            )
        n_sites = len(values_k)
        std = float(np.hypot(noise_std, self.cipher_error_std))
        spread = _DEVIATIONS * std
        # The totals of CKKS carry errors and noise of their own.
        totals_std = FLOOD * self.cipher_error_std * np.sqrt(n_sites)
        slack = n_sites * self.weights.error + spread * np.sqrt(n_sites)
        slack += _DEVIATIONS * 1.1 * totals_std + 1e-9 * self.weights.peak
        if abs(float(values_k.sum()) - self.expected_sum()) > slack:
            raise SettlementError(
                "the row sums do not add up to what the totals say: a role used other weights,"
                " or a share or document was altered",
                hint="settle again from the same evidence only after both roles agree why",
            )
        limit = self.weights.largest * (1.0 + 4.0 * _ROW_SLACK) + self.weights.error + spread
        if np.abs(values_k).max() > limit:
            raise SettlementError(
                "a row sum larger than any distributions earn: a site's evidence is none",
                hint="leave this epoch unsettled",
                site=self.request.sites[int(np.abs(values_k).argmax())][:16],
            )
