"""A site's memory of the answers it drew: the same row gets the same draw, for ever.

Noise protects one answer. Asked a thousand times, a site that draws fresh noise each time
gives away its exact answer but for a thirtieth of the noise. So a drawn answer is kept and given
again, to everyone: a repeat tells nothing new and costs nothing.

Order at the site, so that no crash and no race releases a draw that was not charged::

    digests = row_digests(inputs, context=answer_context(...), key=key)
    plan = cache.plan(querier, digests)
    # reserve: len(plan.fresh) rows in total, plan.n_new_to_querier rows for this querier
    drawn = ...                             # answers with noise for the rows of plan.fresh
    rows = cache.complete(plan, drawn)      # stored before anything is sent
    # commit the reservation, then send `rows`

A reservation may be cancelled before `complete`, never after, and has to count as spent if
the process dies in between. If another process stored one of these rows between the two
steps, its draw is the answer and ours is thrown away unseen: charged twice, drawn once.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.privacy.row_digest import MemoryFile, require_digests

__all__ = ["AnswerCache", "AnswerPlan"]

_MAX_QUERIER_CHARS: Final = 256


@dataclass(frozen=True, kw_only=True)
class AnswerPlan:
    """What a batch needs: which rows to draw and what to charge.

    Parameters
    ----------
    querier : str
    digests : tuple of bytes
        Of all rows, repeats included.
    fresh : tuple of int
        Places of the rows that have to be drawn, each distinct row once, in order.
        Their number is what the site's total budget is charged with.
    n_new_to_querier : int
        Distinct rows whose draw this querier has not had, `fresh` ones included: what
        the querier's own budget is charged with.
    known : mapping of bytes to (int, bytes)
        Number of the draw and payload, for rows drawn before.
    """

    querier: str
    digests: tuple[bytes, ...] = field(repr=False)
    fresh: tuple[int, ...]
    n_new_to_querier: int
    known: Mapping[bytes, tuple[int, bytes]] = field(repr=False)


_CACHE_KIND: Final = 0x46494143  # "FIAC"
_CACHE_SCHEMA: Final = """
CREATE TABLE draws (
    number INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used again, not even after eviction
    digest BLOB NOT NULL UNIQUE,
    payload BLOB NOT NULL
);
CREATE TABLE seen (
    draw INTEGER NOT NULL REFERENCES draws (number) ON DELETE CASCADE,
    querier TEXT NOT NULL,
    PRIMARY KEY (draw, querier)
) WITHOUT ROWID;
"""


class AnswerCache:
    """Drawn answers of a site by row, and which querier has had which.

    Parameters
    ----------
    path : Path or None
        File of mode 0600, made at first use; None keeps answers in memory, for one process.
    max_rows : int
        Draws that are kept. Beyond, the oldest go: asked again, such a row is drawn anew and
        charged anew. That is sound, because the budget counts draws, not rows.
    key_id : bytes
        `row_digest.key_fingerprint` of the key of the digests.
    must_exist : bool
        Refuse to make the file, so that a deleted one is noticed.

    Raises
    ------
    ConfigError
        If the file is damaged, of another kind or key, readable by others, or missing under
        `must_exist`.
    InvalidValueError
        If `max_rows` is not positive.

    Privacy
    -------
    Against queriers who repeat a row, alone or together, over any time: all get one draw.
    Who has the file learns the drawn answers and who was given which, but not
    of which rows (see `row_digest`). Where the noise of a site is only a share of what
    protects the sum, the file holds answers with too little noise: guard it like the model,
    and use a `CohortGuard` as well, because a dropout makes old shares cancel too.

    Not covered: a row changed in its last bit is a new draw, and is charged. A querier can
    time replies, or watch its own charge, to find out that a row had been asked before. An
    older copy of the file that is put back forgets what came after it.

    Examples
    --------
    >>> cache = AnswerCache(None, max_rows=1000)
    >>> row = bytes(32)
    >>> plan = cache.plan("querier-a", [row, row])
    >>> plan.fresh, plan.n_new_to_querier
    ((0,), 1)
    >>> cache.complete(plan, [b"noisy"])
    [b'noisy', b'noisy']
    >>> again = cache.plan("querier-b", [row])
    >>> again.fresh, again.n_new_to_querier
    ((), 1)
    """

    def __init__(
        self,
        path: Path | None,
        *,
        max_rows: int,
        key_id: bytes = b"",
        must_exist: bool = False,
    ) -> None:
        if max_rows < 1:
            raise InvalidValueError(f"max_rows is at least 1, got {max_rows!r}")
        self.max_rows = max_rows
        self._file = MemoryFile(
            path, kind=_CACHE_KIND, schema=_CACHE_SCHEMA, key_id=key_id, must_exist=must_exist
        )

    def plan(self, querier: str, digests: Sequence[bytes]) -> AnswerPlan:
        """Find out which rows have to be drawn, and what a batch costs. Writes nothing.

        Parameters
        ----------
        querier : str
            Key id of the querier, up to 256 characters: whoever can change it at will has
            no budget of its own.
        digests : sequence of bytes
            Of the rows of the batch, by `row_digests` with `answer_context`.

        Raises
        ------
        InvalidValueError
            If the querier's name or a digest is malformed.
        """
        require_digests(digests)
        if not 0 < len(querier) <= _MAX_QUERIER_CHARS:
            raise InvalidValueError(f"a querier has 1 to {_MAX_QUERIER_CHARS} characters")
        first_places: dict[bytes, int] = {}
        for place, digest in enumerate(digests):
            first_places.setdefault(digest, place)
        with self._file.transaction(writes=False) as connection:
            known = {d: draw for d in first_places if (draw := _draw_of(connection, d))}
            had = sum(_has_had(connection, querier, number) for number, _ in known.values())
        return AnswerPlan(
            querier=querier,
            digests=tuple(digests),
            fresh=tuple(place for digest, place in first_places.items() if digest not in known),
            n_new_to_querier=len(first_places) - had,
            known=known,
        )

    def complete(self, plan: AnswerPlan, drawn: Sequence[bytes]) -> list[bytes]:
        """Store what was drawn and return the answer to every row; first stored wins.

        Parameters
        ----------
        plan : AnswerPlan
        drawn : sequence of bytes
            One payload for each place of `plan.fresh`, in order.

        Returns
        -------
        payloads : list of bytes
            One for each row of the batch. Send only what comes from here: another
            process's draw may have been earlier than the one passed in.

        Raises
        ------
        InvalidValueError
            If the number of payloads is not the planned one.
        """
        if len(drawn) != len(plan.fresh):
            raise InvalidValueError(
                f"{len(drawn)} answers were drawn where {len(plan.fresh)} were planned"
            )
        answers = {digest: payload for digest, (_, payload) in plan.known.items()}
        if plan.n_new_to_querier:
            fresh = [plan.digests[place] for place in plan.fresh]
            with self._file.transaction() as connection:
                answers |= _store(connection, plan, dict(zip(fresh, drawn, strict=True)))
                self._evict(connection)
        return [answers[digest] for digest in plan.digests]

    def get_or_draw(
        self,
        querier: str,
        digests: Sequence[bytes],
        draw: Callable[[list[int]], Sequence[bytes]],
    ) -> tuple[list[bytes], tuple[int, ...]]:
        """Plan and complete in one step, for use without a budget in between.

        Parameters
        ----------
        draw : callable
            From places of rows to payloads; called only if a row is missing.

        Returns
        -------
        payloads : list of bytes
        fresh : tuple of int
            Places that were drawn.

        Examples
        --------
        >>> cache = AnswerCache(None, max_rows=9)
        >>> cache.get_or_draw("a", [bytes(32)], lambda places: [b"1"] * len(places))
        ([b'1'], (0,))
        >>> cache.get_or_draw("b", [bytes(32)], lambda places: [b"2"] * len(places))
        ([b'1'], ())
        """
        plan = self.plan(querier, digests)
        drawn = draw(list(plan.fresh)) if plan.fresh else ()
        return self.complete(plan, drawn), plan.fresh

    def lookup(self, digests: Sequence[bytes]) -> dict[int, bytes]:
        """Return the payloads of rows drawn before, by their place in `digests`."""
        require_digests(digests)
        with self._file.transaction(writes=False) as connection:
            found = ((i, _draw_of(connection, d)) for i, d in enumerate(digests))
            return {place: draw[1] for place, draw in found if draw}

    def seen_by(self, querier: str, digests: Sequence[bytes]) -> frozenset[int]:
        """Return the places of rows whose present draw this querier has had."""
        require_digests(digests)
        with self._file.transaction(writes=False) as connection:
            draws = [_draw_of(connection, digest) for digest in digests]
            return frozenset(
                place
                for place, draw in enumerate(draws)
                if draw and _has_had(connection, querier, draw[0])
            )

    def __len__(self) -> int:
        with self._file.transaction(writes=False) as connection:
            return int(connection.execute("SELECT count(*) FROM draws").fetchone()[0])

    def _evict(self, connection: sqlite3.Connection) -> None:
        connection.execute(
            "DELETE FROM draws WHERE number <="
            " (SELECT number FROM draws ORDER BY number DESC LIMIT 1 OFFSET ?)",
            (self.max_rows,),
        )


def _draw_of(connection: sqlite3.Connection, digest: bytes) -> tuple[int, bytes] | None:
    found = connection.execute(
        "SELECT number, payload FROM draws WHERE digest = ?", (digest,)
    ).fetchone()
    return None if found is None else (int(found[0]), bytes(found[1]))


def _has_had(connection: sqlite3.Connection, querier: str, number: int) -> bool:
    found = connection.execute(
        "SELECT 1 FROM seen WHERE draw = ? AND querier = ?", (number, querier)
    ).fetchone()
    return found is not None


def _store(
    connection: sqlite3.Connection, plan: AnswerPlan, drawn: dict[bytes, bytes]
) -> dict[bytes, bytes]:
    """Insert draws that nobody else has stored, and note which the querier now has."""
    connection.executemany(
        "INSERT INTO draws (digest, payload) VALUES (?, ?) ON CONFLICT (digest) DO NOTHING",
        drawn.items(),
    )
    answers: dict[bytes, bytes] = {}
    given = []
    for digest in drawn:
        stored = _draw_of(connection, digest)
        assert stored is not None  # noqa: S101 - inserted above, in this transaction
        answers[digest] = stored[1]
        given.append((stored[0], plan.querier))
    for digest, (number, _) in plan.known.items():
        # Evicted since it was planned, and perhaps drawn anew by another process: that
        # newer draw is one which this querier was neither given nor charged for.
        now = _draw_of(connection, digest)
        if now is not None and now[0] == number:
            given.append((number, plan.querier))
    connection.executemany(
        "INSERT INTO seen (draw, querier) VALUES (?, ?) ON CONFLICT DO NOTHING", given
    )
    return answers
