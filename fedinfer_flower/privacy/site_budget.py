"""A site's privacy budget: one file that counts what every answer gives away.

An answer passes through three states: *reserved* before its noise is drawn, then
*committed* right before it leaves, or *cancelled* if it never will. What is reserved is
spent from the moment that `SiteBudget.reserve` returns; a crash can lose budget that way,
never win any.
"""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedinfer_flower.errors import (
    BudgetExceededError,
    InvalidValueError,
    ReplayError,
)
from fedinfer_flower.privacy.accountant import Accountant
from fedinfer_flower.privacy.base import optional_module
from fedinfer_flower.privacy.budget_file import (
    NOTHING,
    BudgetFile,
    Units,
    add_to_account,
    close_reservation,
    damaged,
    is_used,
    parsed_units,
    sum_of,
    to_charge,
    to_units,
    total_of,
)
from fedinfer_flower.privacy.charge import Charge

__all__ = ["BudgetLine", "BudgetPolicy", "Reservation", "SiteBudget"]

_GLOBAL: Final = ""
_MAX_EPSILON: Final = 1000.0
_MAX_DELTA: Final = 1e-3
_MAX_NAME: Final = 256

_CAP_SLACK: Final = 1e-9
"""A cap is kept to nine digits: one query of epsilon 1 fits a cap of 1 despite rounding."""


@dataclass(frozen=True, kw_only=True)
class BudgetPolicy:
    """What a site's operator is willing to give away; set at the site, never by a message.

    Parameters
    ----------
    epsilon_per_querier : float
        Cap on what any one querier learns.
    epsilon_global : float
        Cap on what all queriers learn who pool their answers; at least as large.
    delta : float
        In (0, 1e-3], for each cap in total. Below one over ten times the number of the
        site's records.
    composition : str
        ``"gaussian"`` (Gaussian noise and randomised response) or ``"concentrated"`` (also
        mechanisms known by their rho only); see `Accountant`.

    Raises
    ------
    InvalidValueError
        If a value is out of range, or the global cap below that of one querier.

    Examples
    --------
    >>> BudgetPolicy(epsilon_per_querier=4.0, epsilon_global=8.0).delta
    1e-05
    """

    epsilon_per_querier: float
    epsilon_global: float
    delta: float = 1e-5
    composition: str = "gaussian"

    def __post_init__(self) -> None:
        for name, most in (
            ("epsilon_per_querier", _MAX_EPSILON),
            ("epsilon_global", _MAX_EPSILON),
            ("delta", _MAX_DELTA),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InvalidValueError(f"{name} is a number")
            if not 0.0 < value <= most:
                raise InvalidValueError(f"{name} is in (0, {most:g}], got {value!r}")
        if self.epsilon_global < self.epsilon_per_querier:
            raise InvalidValueError(
                "epsilon_global is below epsilon_per_querier, which could never be used up",
                hint="raise the global cap, or lower that of one querier",
            )
        if self.composition not in ("gaussian", "concentrated"):
            raise InvalidValueError(
                "a budget composes as 'gaussian' or 'concentrated'",
                hint="other bounds do not hold for queries chosen after seeing answers",
            )


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """An answer that is paid for and has not left; for `commit` or `cancel`, once."""

    querier: str
    query_id: str


@dataclass(frozen=True, kw_only=True)
class BudgetLine:
    """What one querier, or all of them together, have spent.

    Parameters
    ----------
    querier : str or None
        None for all together.
    cap, spent, remaining : float
        Epsilon. `remaining` is not what the next query may cost: epsilons do not add up.
    delta : float
        At which `spent` holds; 0.0 where it holds without.
    n_rows, n_queries, n_open : int
        Rows and queries that count as spent; queries among them that neither left nor
        were cancelled: being answered now, or lost in a crash.
    """

    querier: str | None
    cap: float
    spent: float
    remaining: float
    delta: float
    n_rows: int
    n_queries: int
    n_open: int


class SiteBudget:
    """The budget file of one site, shared by all its threads and processes.

    Parameters
    ----------
    path : Path
        On a local disk. Made at first use, for its owner alone.
    policy : BudgetPolicy
        Applies to everything that the file ever counted: a lower cap or another delta
        takes effect at once, and so does a higher cap.
    must_exist : bool
        Refuse to start without the file, so that a deleted one is noticed.

    Raises
    ------
    ConfigError
        If the file is no budget, is damaged, can be read by others, or is missing under
        `must_exist`. Never replaced by a fresh one.
    MissingExtraError
        Without the extra ``dp``, unless the policy composes as ``"concentrated"``.

    Privacy
    -------
    Whatever order queries come in, each chosen after seeing the answers to others, the
    answers to one querier are (epsilon_per_querier, delta)-private and those to everyone
    together (epsilon_global, delta)-private, for replacing the site's whole answers, towards
    those whom the protection's noise is for: under `he+dp` queriers without the
    coordinator, under `secagg+dp` nobody who holds a late or a lied-about answer. This
    presumes that queriers are told apart reliably (a party with two names has two caps of
    one querier), that each charge is right, and that the file is neither deleted nor set
    back to an older copy. Not counted: that a site answered or refused, which shows how
    much is left, and anything that leaves without a reservation.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> policy = BudgetPolicy(epsilon_per_querier=1.0, epsilon_global=2.0)
    >>> budget = SiteBudget(Path(folder.name) / "budget.db", policy)
    >>> cost = Charge.pure(0.5, 1)
    >>> reservation = budget.reserve(
    ...     querier="ab12", query_id="q1", charge_querier=cost, charge_global=cost
    ... )
    >>> budget.commit(reservation)
    >>> budget.spent("ab12")
    (0.5, 0.0)
    >>> folder.cleanup()
    """

    def __init__(self, path: Path, policy: BudgetPolicy, *, must_exist: bool = False) -> None:
        text = json.dumps(dataclasses.asdict(policy))
        if not (must_exist or path.exists()):
            BudgetFile.create(path, policy=text)
        self._attach(path, policy)
        if self._stored_policy() != text:
            with self._file.transaction(write=True) as db:
                db.execute("UPDATE file SET policy = ?", (text,))

    @classmethod
    def inspect(cls, path: Path, policy: BudgetPolicy | None = None) -> SiteBudget:
        """Open a budget only to read it; under the policy last used there unless given one."""
        budget = cls.__new__(cls)
        budget._attach(path, policy)
        return budget

    def _attach(self, path: Path, policy: BudgetPolicy | None) -> None:
        self._file = BudgetFile(path)
        self.policy = policy or _policy(path, self._stored_policy())
        self._accountant = Accountant(composition=self.policy.composition)
        if self.policy.composition == "gaussian":
            # Missed now and not in the middle of a query; loaded before any lock is held.
            optional_module("scipy.special", extra="dp")

    def _stored_policy(self) -> str:
        with self._file.transaction() as db:
            return str(db.execute("SELECT policy FROM file").fetchone()[0])

    def reserve(
        self, *, querier: str, query_id: str, charge_querier: Charge, charge_global: Charge
    ) -> Reservation:
        """Pay for an answer before its noise is drawn.

        Parameters
        ----------
        querier : str
            Key id of who asks, not empty.
        query_id : str
            Not empty. Used up from now on, whatever becomes of the answer.
        charge_querier, charge_global : Charge
            Cost towards this querier, and towards all together. They differ for rows
            whose noisy answer another querier already has: showing it again tells all
            together nothing new.

        Returns
        -------
        reservation : Reservation
            On disk when this returns, even if the power fails.

        Raises
        ------
        BudgetExceededError
            If a cap would be passed; nothing is spent, and the query id stays unused.
        ReplayError
            If this querier used the query id before, in whatever state it ended.
        ConfigError
            If the file cannot be written; the answer must not leave.
        """
        _require_name("querier", querier)
        _require_name("query_id", query_id)
        costs = ((querier, charge_querier), (_GLOBAL, charge_global))
        for _, charge in costs:
            self._accountant.require_supported(charge)
        with self._file.transaction(write=True) as db:
            if is_used(db, querier, query_id):
                raise ReplayError(
                    "this querier used this query id at this site before",
                    hint="ask again under a fresh query id",
                )
            for account, _ in costs:
                # For the global cap too, as if nobody else had asked any of these rows:
                # whether it is refused would tell.
                self._require_room(db, account, charge_querier)
            for account, charge in costs:
                add_to_account(db, account, to_units(charge), n_queries=1)
            texts = [json.dumps(to_units(charge)) for _, charge in costs]
            db.execute(
                "INSERT INTO reservations VALUES (?, ?, 'open', ?, ?)", (querier, query_id, *texts)
            )
        return Reservation(querier=querier, query_id=query_id)

    def commit(self, reservation: Reservation) -> None:
        """Record that the answer leaves now; call it before the answer does.

        Raises
        ------
        ReplayError
            If it was committed or cancelled before: the answer must not leave (again).
        """
        with self._file.transaction(write=True) as db:
            close_reservation(db, (reservation.querier, reservation.query_id), "committed")

    def cancel(self, reservation: Reservation) -> None:
        """Give back the charge of an answer that nobody will ever see; its id stays used.

        Only before the noise was drawn, or if what was drawn is destroyed at the site: a
        cancelled answer that leaves is one that nobody paid for. Asking again needs a
        fresh query id, so that nothing replayed is ever answered.

        Raises
        ------
        ReplayError
            If it was committed or cancelled before.
        """
        with self._file.transaction(write=True) as db:
            charges = close_reservation(
                db, (reservation.querier, reservation.query_id), "cancelled"
            )
            for account, text in zip((reservation.querier, _GLOBAL), charges, strict=True):
                back = {name: -units for name, units in parsed_units(text).items()}
                add_to_account(db, account, back, n_queries=-1)

    def spent(self, querier: str | None) -> tuple[float, float]:
        """Return (epsilon, delta) of all answers to one querier, or (None) to all together."""
        return self._accountant.epsilon_delta(self.total(querier), self.policy.delta)

    def total(self, querier: str | None) -> Charge:
        """Return the sums behind `spent`, of what is reserved or committed."""
        with self._file.transaction() as db:
            return to_charge(total_of(db, _GLOBAL if querier is None else querier))

    def answered_before(self, querier: str, query_id: str) -> bool:
        """Return whether a query id is used up: answered, cancelled, in work or crashed."""
        with self._file.transaction() as db:
            return is_used(db, querier, query_id)

    def status(self) -> tuple[BudgetLine, ...]:
        """Return one line for all together, then one a querier in order of name."""
        with self._file.transaction() as db:
            rows = db.execute(
                "SELECT querier, total, queries, (SELECT count(*) FROM reservations AS r WHERE"
                " r.state = 'open' AND (accounts.querier = '' OR r.querier = accounts.querier))"
                " FROM accounts ORDER BY querier"
            ).fetchall()
            rows = rows or [(_GLOBAL, json.dumps(NOTHING), 0, 0)]
            return tuple(self._line(*row) for row in rows)

    def verify(self) -> None:
        """Check the whole file: its pages, and that every total is the sum of its answers.

        Raises
        ------
        ConfigError
            If not.
        """
        sums: dict[str, Units] = {}
        with self._file.transaction() as db:
            sound = db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
            for querier, mine, everyones in db.execute(
                "SELECT querier, charge_querier, charge_global FROM reservations"
                " WHERE state != 'cancelled'"
            ):
                for account, text in ((querier, mine), (_GLOBAL, everyones)):
                    sums[account] = sum_of(sums.get(account, NOTHING), parsed_units(text))
            for (account,) in db.execute("SELECT querier FROM accounts").fetchall():
                sound &= total_of(db, account) == sums.pop(account, NOTHING)
        if sums or not sound:
            raise damaged(self._file.path)

    def _require_room(self, db: sqlite3.Connection, account: str, charge: Charge) -> None:
        if charge.is_free:
            return
        cap = self.policy.epsilon_per_querier if account else self.policy.epsilon_global
        before, delta = total_of(db, account), self.policy.delta
        after = to_charge(sum_of(before, to_units(charge)))
        if self._accountant.fits(after, cap * (1.0 + _CAP_SLACK), delta):
            return
        if account == _GLOBAL:
            # Neither what others have spent nor which rows they asked is this querier's affair.
            raise BudgetExceededError(
                "the site's privacy budget for all queriers together does not cover this query",
                hint="only the site's operator can raise its caps",
            )
        now, then = (self._accountant.epsilon(t, delta) for t in (to_charge(before), after))
        raise BudgetExceededError(
            f"the site's privacy budget for one querier is epsilon {cap:g} (delta {delta:g});"
            f" {now:.4g} is spent and {then:.4g} would be after this query of"
            f" {charge.n_rows} rows",
            hint="ask fewer rows, or with more noise (a smaller epsilon); only the site's"
            " operator can raise its caps",
        )

    def _line(self, account: str, total: str, n_queries: int, n_open: int) -> BudgetLine:
        is_global = account == _GLOBAL
        cap = self.policy.epsilon_global if is_global else self.policy.epsilon_per_querier
        charge = to_charge(parsed_units(total))
        spent, delta = self._accountant.epsilon_delta(charge, self.policy.delta)
        return BudgetLine(
            querier=None if is_global else account,
            cap=cap,
            spent=spent,
            remaining=max(cap - spent, 0.0),
            delta=delta,
            n_rows=charge.n_rows,
            n_queries=n_queries,
            n_open=n_open,
        )


def _policy(path: Path, text: str) -> BudgetPolicy:
    try:
        return BudgetPolicy(**json.loads(text))
    except (TypeError, ValueError):
        raise damaged(path) from None


def _require_name(what: str, name: str) -> None:
    if not (isinstance(name, str) and 0 < len(name) <= _MAX_NAME and name.isprintable()):
        raise InvalidValueError(f"{what} is printable text of 1 to {_MAX_NAME} characters")
