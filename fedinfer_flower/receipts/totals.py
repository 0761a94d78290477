"""What a job cost one site: charges of its batches added up, then turned into epsilon."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from fedinfer_flower.errors import EnvelopeError
from fedinfer_flower.privacy.accountant import Accountant
from fedinfer_flower.privacy.charge import Charge
from fedinfer_flower.receipts.checks import MAX_ROWS, is_site_name, optional_number, read_charge
from fedinfer_flower.receipts.statement import SiteStatement
from fedinfer_flower.wire import fields as read
from fedinfer_flower.wire.envelope import Json

__all__ = ["SiteTotal", "composed", "site_total"]

_MAX_BATCHES: Final = 100_000


@dataclass(frozen=True, kw_only=True)
class SiteTotal:
    """What one site's answers to a job cost it together.

    Parameters
    ----------
    site : str
    n_batches, n_rows, n_fresh_rows : int
        Batches and rows that the site states; rows that were charged.
    charge : Charge
        Sum of the charges of the batches.
    epsilon, delta : float, optional
        Of all batches together; None without differential privacy.

    Privacy
    -------
    Towards everyone who sees this job's answers, pooled. What the site answered in other
    jobs comes on top.
    """

    site: str
    n_batches: int
    n_rows: int
    n_fresh_rows: int
    charge: Charge
    epsilon: float | None = None
    delta: float | None = None

    def to_dict(self) -> dict[str, Json]:
        """Return plain values for JSON."""
        return {
            "site": self.site,
            "n_batches": self.n_batches,
            "n_rows": self.n_rows,
            "n_fresh_rows": self.n_fresh_rows,
            "charge": self.charge.to_dict(),
            "epsilon": self.epsilon,
            "delta": self.delta,
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Json]) -> SiteTotal:
        """Read what `to_dict` wrote.

        Raises
        ------
        EnvelopeError
            If it is something else.
        """
        read.exactly(plain, *cls.__dataclass_fields__)
        total = cls(
            site=read.text(plain, "site", max_chars=128),
            n_batches=read.whole(plain, "n_batches", low=1, high=_MAX_BATCHES),
            n_rows=read.whole(plain, "n_rows", low=1, high=_MAX_BATCHES * MAX_ROWS),
            n_fresh_rows=read.whole(plain, "n_fresh_rows", low=0, high=_MAX_BATCHES * MAX_ROWS),
            charge=read_charge(plain, "charge"),
            epsilon=optional_number(plain, "epsilon"),
            delta=optional_number(plain, "delta"),
        )
        if (total.epsilon is None) != (total.delta is None):
            raise EnvelopeError("a total has an epsilon and a delta, or neither")
        if not is_site_name(total.site):
            raise EnvelopeError("a total without a site")
        return total


def site_total(statements: Iterable[SiteStatement]) -> SiteTotal:
    """Add up the statements of one site.

    Epsilons do not add up: the charges do, and the total is worked out from their sum, at
    the largest delta that a statement names. Exact where all noise is Gaussian.

    Parameters
    ----------
    statements : iterable of SiteStatement
        At least one, all of the same site.

    Raises
    ------
    MissingExtraError
        For Gaussian noise without the extra ``dp``.
    """
    batches = list(statements)
    charge = sum((s.charge for s in batches), Charge())
    deltas = [s.delta for s in batches if s.delta is not None]
    epsilon, delta = composed(charge, max(deltas)) if deltas else (None, None)
    return SiteTotal(
        site=batches[0].site,
        n_batches=len(batches),
        n_rows=sum(s.n_rows for s in batches),
        n_fresh_rows=sum(s.n_fresh_rows for s in batches),
        charge=charge,
        epsilon=epsilon,
        delta=delta,
    )


def composed(charge: Charge, delta: float) -> tuple[float, float]:
    """Return (epsilon, delta) of a sum of charges, each chosen after seeing earlier answers.

    Examples
    --------
    >>> composed(Charge.pure(2.0, 3), 0.0)
    (6.0, 0.0)
    >>> round(composed(Charge.gaussian(0.1, 100), 1e-5)[0], 4)
    4.3772
    """
    if charge.is_free:
        return 0.0, delta
    if charge.is_pure and delta == 0.0:
        return charge.pure_epsilon, 0.0
    composition = "concentrated" if charge.rho > 0.0 else "gaussian"
    return Accountant(composition=composition).epsilon_delta(charge, delta)
