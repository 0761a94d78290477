"""What a site keeps between messages: its keys, the query ids it used, what it drew and spent.

A site with a home folder keeps them in files that survive restarts and are shared by all of
its processes. A site without one keeps keys and query ids in Flower's context, for one run.

========================  ==============================================================
file in the home          holds
========================  ==============================================================
``identity.json``         secret signing and agreement keys
``queries.sqlite``        query ids that were answered, and who was counted as dropped
``cohorts.sqlite``        which rows were summed with which cohort: against differencing
``answers.sqlite``        noisy answers that were drawn: against averaging
``budget.sqlite``         privacy spent, per querier and in all
========================  ==============================================================
"""

from __future__ import annotations

import functools
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Final, cast

from flwr.app import ConfigRecord, Context

from fedinfer_flower.errors import BindingError, ConfigError, DifferencingError, ReplayError
from fedinfer_flower.privacy.answer_cache import AnswerCache
from fedinfer_flower.privacy.cohort_guard import CohortGuard
from fedinfer_flower.privacy.row_digest import MemoryFile, key_fingerprint
from fedinfer_flower.privacy.site_budget import BudgetPolicy, SiteBudget
from fedinfer_flower.wire.identity import Identity

__all__ = ["ContextMemory", "HomeMemory", "SiteMemory", "home_memory"]

_RECORD: Final = "fedinfer"
_KIND: Final = 0x46495155  # "FIQU"
_SCHEMA: Final = """
CREATE TABLE answered (
    query_id TEXT PRIMARY KEY,
    context BLOB NOT NULL,
    dropped BLOB
) WITHOUT ROWID;
CREATE TABLE beside (
    file TEXT PRIMARY KEY
) WITHOUT ROWID;
"""
_MAX_CACHED_ROWS: Final = 1_000_000
_BUDGET: Final = "budget.sqlite"


class SiteMemory(ABC):
    """A site's memory; see the module.

    Attributes
    ----------
    identity : Identity
    answers : AnswerCache, optional
    budget : SiteBudget, optional
    guard : CohortGuard, optional
    """

    identity: Identity
    answers: AnswerCache | None = None
    budget: SiteBudget | None = None
    guard: CohortGuard | None = None

    @abstractmethod
    def admit(self, query_id: str, context: bytes) -> None:
        """Use up a query id.

        Parameters
        ----------
        context : bytes
            Digest of what a recovery of this query must be bound to.

        Raises
        ------
        ReplayError
            If it was used before.
        """

    @abstractmethod
    def answered(self, query_id: str) -> bytes:
        """Return the context of a query that was answered.

        Raises
        ------
        BindingError
            If there was none of that id.
        """

    @abstractmethod
    def admit_dropped(self, query_id: str, dropped: frozenset[str]) -> None:
        """Fix who counts as dropped in a query: one set, for ever.

        Raises
        ------
        DifferencingError
            If another set was fixed before.
        """

    def row_key(self) -> bytes:
        """Return the secret with which rows are digested."""
        secret = self.identity.signing.private_bytes_raw()
        return hashlib.sha256(b"fedinfer/v1/rows|" + secret).digest()


class ContextMemory(SiteMemory):
    """Keys and query ids in Flower's context: for simulation, and sites without a home.

    Parameters
    ----------
    context : Context
    """

    def __init__(self, context: Context) -> None:
        if _RECORD not in context.state:
            secret = Identity.generate().to_secret()
            context.state[_RECORD] = ConfigRecord({"identity": json.dumps(secret)})
        self._record = cast(ConfigRecord, context.state[_RECORD])
        self.identity = Identity.from_secret(json.loads(str(self._record["identity"])))

    def admit(self, query_id: str, context: bytes) -> None:
        """Use up a query id."""
        if f"q:{query_id}" in self._record:
            raise _replay()
        self._record[f"q:{query_id}"] = context

    def answered(self, query_id: str) -> bytes:
        """Return the context of a query that was answered."""
        if f"q:{query_id}" not in self._record:
            raise _never_answered()
        return cast(bytes, self._record[f"q:{query_id}"])

    def admit_dropped(self, query_id: str, dropped: frozenset[str]) -> None:
        """Fix who counts as dropped in a query."""
        wanted = _digest_of(dropped)
        if self._record.setdefault(f"d:{query_id}", wanted) != wanted:
            raise _other_dropouts()


class HomeMemory(SiteMemory):
    """Everything in files of one folder.

    Parameters
    ----------
    home : Path
        Made at first use, for its owner alone.
    policy : BudgetPolicy, optional
        Caps on the privacy that is spent; None for none.

    Raises
    ------
    ConfigError
        If a file is damaged, missing though it was there before, of another identity, or
        can be read by others. Nothing is ever started afresh in its place. Not noticed: a
        home that was deleted as a whole, or set back to an older copy.
    """

    def __init__(self, home: Path, policy: BudgetPolicy | None = None) -> None:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        if policy is None and (home / _BUDGET).exists():
            raise ConfigError(
                "this home has a privacy budget, and the site was started without one: its"
                " answers would not be counted",
                hint="InferenceMod(..., budget=BudgetPolicy(...)), or another home",
            )
        self.identity = Identity.load_or_create(home / "identity.json")
        key_id = key_fingerprint(self.row_key())
        # Made before the other files: where one of them is, this one has been. It lists them,
        # so that one which was deleted is not made anew, with nothing in it.
        self._queries = MemoryFile(
            home / "queries.sqlite",
            kind=_KIND,
            schema=_SCHEMA,
            key_id=key_id,
            must_exist=any((home / name).exists() for name in (_COHORTS, _ANSWERS, _BUDGET)),
        )
        with self._queries.transaction(writes=False) as db:
            known = {str(row[0]) for row in db.execute("SELECT file FROM beside")}
        self.guard = CohortGuard(home / _COHORTS, key_id=key_id, must_exist=_COHORTS in known)
        self.answers = AnswerCache(
            home / _ANSWERS,
            max_rows=_MAX_CACHED_ROWS,
            key_id=key_id,
            must_exist=_ANSWERS in known,
        )
        made = {_COHORTS, _ANSWERS}
        if policy is not None:
            self.budget = SiteBudget(home / _BUDGET, policy, must_exist=_BUDGET in known)
            made.add(_BUDGET)
        if not made <= known:
            with self._queries.transaction() as db:
                db.executemany("INSERT OR IGNORE INTO beside VALUES (?)", [(n,) for n in made])

    def admit(self, query_id: str, context: bytes) -> None:
        """Use up a query id."""
        with self._queries.transaction() as db:
            if _find(db.execute(_SELECT, (query_id,)).fetchall()) is not None:
                raise _replay()
            db.execute("INSERT INTO answered VALUES (?, ?, NULL)", (query_id, context))

    def answered(self, query_id: str) -> bytes:
        """Return the context of a query that was answered."""
        with self._queries.transaction(writes=False) as db:
            row = _find(db.execute(_SELECT, (query_id,)).fetchall())
        if row is None:
            raise _never_answered()
        return bytes(row[0])

    def admit_dropped(self, query_id: str, dropped: frozenset[str]) -> None:
        """Fix who counts as dropped in a query, and refuse what the guard would."""
        wanted = _digest_of(dropped)
        with self._queries.transaction() as db:
            row = _find(db.execute(_SELECT, (query_id,)).fetchall())
            if row is None:
                raise _never_answered()
            if row[1] is not None and row[1] != wanted:
                raise _other_dropouts()
            if row[1] is None:
                if dropped and self.guard is not None:
                    self.guard.admit_recovery(query_id, dropped)
                db.execute("UPDATE answered SET dropped = ? WHERE query_id = ?", (wanted, query_id))


@functools.lru_cache(maxsize=64)
def home_memory(home: Path, policy: BudgetPolicy | None) -> HomeMemory:
    """Return the memory in a folder, opened once in a process.

    Opening checks every file from end to end, which takes a third of a second for a
    million rows: too long for every query.
    """
    return HomeMemory(home, policy)


_COHORTS: Final = "cohorts.sqlite"
_ANSWERS: Final = "answers.sqlite"
_SELECT: Final = "SELECT context, dropped FROM answered WHERE query_id = ?"


def _find(rows: Sequence[tuple[bytes, bytes | None]]) -> tuple[bytes, bytes | None] | None:
    return rows[0] if rows else None


def _digest_of(dropped: frozenset[str]) -> bytes:
    return hashlib.sha256(json.dumps(sorted(dropped)).encode()).digest()


def _replay() -> ReplayError:
    return ReplayError(
        "this site has answered a query with this id", hint="ask again under a fresh query id"
    )


def _never_answered() -> BindingError:
    return BindingError("this site has not answered a query with this id")


def _other_dropouts() -> DifferencingError:
    return DifferencingError(
        "this site has counted other sites as dropped in this query",
        hint="the sum is lost; ask again under a fresh query id",
    )
