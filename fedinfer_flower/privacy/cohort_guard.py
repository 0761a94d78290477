"""A site's memory of the cohorts that its rows were summed with: against differencing.

A secure sum shows the querier nothing but the sum. Two sums of the same row, over a cohort and
over the same cohort without site i, differ by the exact answer of site i. So a site joins a
sum for a row only if every earlier sum of that row had the same terms in it, as far as a site
can tell. Four rules, checked and recorded in one transaction:

a. A row belongs to the cohort it was first summed with.
b. After a row was asked twice, no dropout is made good for in either query: the sum over all
   may have been opened already. One query has one set of dropped sites, for ever.
c. After a dropout was made good for, the rows of that query are never summed again: that sum
   lacked a site, and nobody knows who would be in the next one.
d. A query id is used once.

**What the rules need.** For (b) and (c) sites must notice when a sum lacks one of them. They do
under pairwise masks: such a sum opens only with all sites of the roster in it, or after the
others gave up their masks with the missing ones. They do not under plain homomorphic encryption:
whoever adds the ciphertexts leaves one out, by accident or on purpose, and tells nobody. There a
row can be asked once only (``survivors_known=False``, the default).

**Whom this stops.** A querier, over any time and under any number of names, with an honest
coordinator: one who repeats rows, picks cohorts, waits for or causes dropouts.

**Whom it does not stop.**

- A querier who changes a row in its last bit. To the guard that is another row, to the model it
  is not. Against someone who sets out to do it, only noise in the sum helps.
- Coordinator and querier who lie together. From a *single* query they can open the sum over all
  sites, and, by claiming that a site that answered has dropped out, the sum without it. No site
  can tell that lie from the truth. What helps is a second mask of each site's own, which opens
  only for survivors that enough sites have confirmed (`secagg` with ``self_mask``); the guard
  then sees to it that a site confirms one set of survivors a query.
- Sites being told different rosters. Each site compares only what it was told itself. Under
  pairwise masks such sums do not open; without them they do.
- Cohorts that are too small, or whose other members pool their answers with the querier.
- Whatever was asked before the guard was there, or came after an older copy of its file.

It has a price. A refusal tells that exactly this row has been asked before. Any querier whom the
site admits can use up rows for all others. A query that failed has used up its rows, or their
one recovery, as much as one that did not.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from fedinfer_flower.errors import (
    BindingError,
    DifferencingError,
    InvalidValueError,
    ReplayError,
)
from fedinfer_flower.privacy.row_digest import MemoryFile, require_digests

__all__ = ["CohortGuard"]

_MAX_QUERY_ID_CHARS: Final = 64
_MAX_ROSTER_DIGEST_BYTES: Final = 64

_KIND: Final = 0x46494347  # "FICG"

# One entry a row is enough, however often it is asked: all its queries have the roster of
# the first one (a), and `repeated` is set on each of them as soon as there are two. Then
# none of them is ever recovered (b), so only a row's only query can be (c).
# A recovery with nobody dropped says that the sum is over all, as rules a and b presume.
_SCHEMA: Final = """
CREATE TABLE queries (
    number INTEGER PRIMARY KEY,
    query_id TEXT NOT NULL UNIQUE,
    roster BLOB NOT NULL,
    survivors_known INTEGER NOT NULL,
    repeated INTEGER NOT NULL,
    dropped BLOB
);
CREATE TABLE rows (
    digest BLOB PRIMARY KEY,
    first_query INTEGER NOT NULL REFERENCES queries (number)
) WITHOUT ROWID;
"""


class CohortGuard:
    """Refuse to join a sum that, compared with an earlier one, would single out a site.

    Use wherever answers are summed without noise of their own: under exact sums with
    digests of the row alone (`row_digest.EXACT_SUM_CONTEXT`); and where noise is shared out
    over the sites and remembered, with digests that have the cohort in their context
    (`row_digest.answer_context`), so that another cohort gets other noise and only the
    rules on dropouts and repeats bite. Prefer noise in the sum where queriers are not
    trusted to keep to the protocol.

    Parameters
    ----------
    path : Path or None
        File of mode 0600, made at first use; None keeps it in memory, for one process.
    key_id : bytes
        `row_digest.key_fingerprint` of the key of the digests.
    must_exist : bool
        Refuse to make the file, so that a deleted one is noticed.

    Raises
    ------
    ConfigError
        If the file is damaged, of another kind or key, readable by others, or missing under
        `must_exist`.

    Privacy
    -------
    Stops a querier who repeats rows while the coordinator is honest. Stops neither slightly
    changed rows nor coordinator and querier who both lie: the module says why. Who has
    the file learns query ids, how many new rows each had, and rosters as digests.

    Notes
    -----
    Never forgets a row: forgetting would let it be asked of another cohort. The file grows
    by about 50 bytes for each distinct row, and 150 for each query.

    Examples
    --------
    >>> guard = CohortGuard(None)
    >>> row = bytes(32)
    >>> guard.admit("q-1", [row], b"roster of a, b, c", survivors_known=True)
    >>> guard.admit("q-2", [row], b"roster of a, b, c", survivors_known=True)
    >>> guard.admit("q-3", [row], b"roster of a, b", survivors_known=True)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    fedinfer_flower.errors.DifferencingError: FI316 ...
    """

    def __init__(self, path: Path | None, *, key_id: bytes = b"", must_exist: bool = False) -> None:
        self._file = MemoryFile(
            path, kind=_KIND, schema=_SCHEMA, key_id=key_id, must_exist=must_exist
        )

    def admit(
        self,
        query_id: str,
        digests: Sequence[bytes],
        roster_digest: bytes,
        *,
        survivors_known: bool = False,
    ) -> None:
        """Record that this site joins the sum of these rows, or refuse and record nothing.

        Call before the answer is worked out, and send nothing if it raises.

        Parameters
        ----------
        query_id : str
            1 to 64 characters.
        digests : sequence of bytes
            Of the rows, by `row_digests`; at least one.
        roster_digest : bytes
            Of the authenticated list of all sites in the sum, this one included, and of
            nothing that changes from job to job. Where a site is not told the list, any
            constant: without it `survivors_known` is False, and a row is admitted once.
        survivors_known : bool
            True only if the sum opens with every site of the roster in it, or after
            `admit_recovery` at the others: pairwise masks. Otherwise each row is admitted
            once.

        Raises
        ------
        ReplayError
            If the query id was used before.
        DifferencingError
            If a row was summed before in a way that this sum could be compared with.
        InvalidValueError
            If an argument is malformed.
        """
        require_digests(digests)
        if not digests or not 0 < len(query_id) <= _MAX_QUERY_ID_CHARS:
            raise InvalidValueError(
                f"a query has rows, and an id of 1 to {_MAX_QUERY_ID_CHARS} characters"
            )
        if not 0 < len(roster_digest) <= _MAX_ROSTER_DIGEST_BYTES:
            raise InvalidValueError(
                f"a digest of a roster has 1 to {_MAX_ROSTER_DIGEST_BYTES} bytes"
            )
        rows = list(dict.fromkeys(digests))
        with self._file.transaction() as connection:
            if _query(connection, query_id) is not None:
                raise ReplayError(
                    "this query id was admitted to a sum before",
                    hint="ask under a fresh query id",
                )
            earlier = _earlier_queries(connection, rows)
            for first in earlier:
                _require_same_terms(connection, first, roster_digest, survivors_known)
            number = connection.execute(
                "INSERT INTO queries (query_id, roster, survivors_known, repeated)"
                " VALUES (?, ?, ?, ?)",
                (query_id, roster_digest, survivors_known, bool(earlier)),
            ).lastrowid
            connection.executemany(
                "UPDATE queries SET repeated = 1 WHERE number = ?", [(n,) for n in earlier]
            )
            connection.executemany(
                "INSERT INTO rows (digest, first_query) VALUES (?, ?) ON CONFLICT DO NOTHING",
                [(digest, number) for digest in rows],
            )

    def admit_recovery(self, query_id: str, dropped: frozenset[str]) -> None:
        """Record that this site treats exactly these sites as dropped, or refuse.

        Call before a mask is revealed or a set of survivors confirmed. The same set again
        is admitted again, so that a lost reply can be asked for once more.

        Parameters
        ----------
        query_id : str
        dropped : frozenset of str
            Sites that are missing from the sum; may be empty where survivors are confirmed
            in every query. The caller has checked that they are in the roster, that this
            site is not among them, and that enough others are left.

        Raises
        ------
        BindingError
            If no such query was admitted, or its sums are not recovered through sites.
        DifferencingError
            If the query was recovered with another set, smaller or larger; or somebody
            dropped and one of the rows is in another sum too.

        Examples
        --------
        >>> guard = CohortGuard(None)
        >>> guard.admit("q-1", [bytes(32)], b"roster", survivors_known=True)
        >>> guard.admit_recovery("q-1", frozenset({"site-b"}))
        >>> guard.admit_recovery("q-1", frozenset({"site-b"}))
        >>> guard.admit_recovery("q-1", frozenset({"site-b", "site-c"}))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        fedinfer_flower.errors.DifferencingError: FI316 ...
        """
        wanted = _digest_of(dropped)
        with self._file.transaction() as connection:
            query = _query(connection, query_id)
            if query is None or not query["survivors_known"]:
                raise BindingError(
                    "a recovery of a query that this site has not answered under pairwise masks"
                )
            if query["dropped"] is not None:
                if query["dropped"] != wanted:
                    raise DifferencingError(
                        "this query was recovered with another set of dropped sites",
                        hint="the sum is lost; new rows can be asked of the sites that are left",
                    )
                return
            if query["repeated"] and dropped:
                raise DifferencingError(
                    "rows of this query are in another sum too, which may have been opened"
                    " with the dropped sites in it",
                    hint="wait for the dropped sites and ask all of the cohort again",
                )
            connection.execute(
                "UPDATE queries SET dropped = ? WHERE number = ?", (wanted, query["number"])
            )


def _digest_of(dropped: frozenset[str]) -> bytes:
    return hashlib.sha256(json.dumps(sorted(dropped)).encode()).digest()


def _query(connection: sqlite3.Connection, query_id: str) -> sqlite3.Row | None:
    cursor = connection.cursor()
    cursor.row_factory = sqlite3.Row
    cursor.execute("SELECT * FROM queries WHERE query_id = ?", (query_id,))
    found: sqlite3.Row | None = cursor.fetchone()
    return found


def _earlier_queries(connection: sqlite3.Connection, rows: Sequence[bytes]) -> set[int]:
    found = (
        connection.execute("SELECT first_query FROM rows WHERE digest = ?", (digest,)).fetchone()
        for digest in rows
    )
    return {int(entry[0]) for entry in found if entry is not None}


def _require_same_terms(
    connection: sqlite3.Connection, first: int, roster_digest: bytes, survivors_known: bool
) -> None:
    roster, was_known, dropped = connection.execute(
        "SELECT roster, survivors_known, dropped FROM queries WHERE number = ?", (first,)
    ).fetchone()
    if roster != roster_digest:
        raise DifferencingError(
            "rows of this query were summed over another cohort before",
            hint="ask the cohort that was asked first, or use a protection with noise",
        )
    if dropped not in (None, _digest_of(frozenset())):
        raise DifferencingError(
            "rows of this query were summed before, without a site that had dropped out",
            hint="these rows cannot be summed again; use a protection with noise",
        )
    if not (was_known and survivors_known):
        raise DifferencingError(
            "rows of this query were summed before, and sites cannot tell who is in such a sum",
            hint="keep the first answer; or use protection 'secagg', or one with noise",
        )
