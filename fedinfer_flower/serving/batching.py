"""Which rows are asked together: lanes of like jobs, fair between their owners. No threads."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Final

__all__ = ["Lane", "Part", "Piece", "Queue"]

_BUSY_WINDOWS: Final = 10.0
"""While a batch is under way, the first of the next waits so many windows for others."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows of one job that are asked in one batch.

    Parameters
    ----------
    job_id, owner : str
    start, stop : int
        Of the job's rows.
    """

    job_id: str
    owner: str
    start: int
    stop: int

    @property
    def n_rows(self) -> int:
        """Rows in this part."""
        return self.stop - self.start


@dataclass(kw_only=True)
class Piece:
    """What of a job has not been asked yet.

    Parameters
    ----------
    job_id, owner : str
    since : float
        When it was put in the queue, on any one clock.
    start, stop : int
    alone : bool
        Never in one batch with another job.
    """

    job_id: str
    owner: str
    since: float
    start: int
    stop: int
    alone: bool = False


@dataclass(kw_only=True)
class Lane:
    """Jobs whose rows may go in one message.

    Parameters
    ----------
    key : hashable
    window_s : float
        How long the first waits for others.
    max_rows : int
    together : bool
        Whether jobs are put together at all.
    """

    key: Hashable
    window_s: float
    max_rows: int
    together: bool = True
    owners: OrderedDict[str, deque[Piece]] = field(default_factory=OrderedDict)
    n_rows: int = 0

    def add(self, piece: Piece) -> None:
        """Put a piece at the end of its owner's line."""
        self.owners.setdefault(piece.owner, deque()).append(piece)
        self.n_rows += piece.stop - piece.start

    def remove(self, job_id: str, owner: str) -> None:
        """Take out what waits of a job."""
        waiting = self.owners[owner]
        kept = deque(piece for piece in waiting if piece.job_id != job_id)
        self.n_rows -= sum(p.stop - p.start for p in waiting) - sum(p.stop - p.start for p in kept)
        self.owners[owner] = kept
        if not kept:
            del self.owners[owner]

    def ready_at(self, *, busy: bool = False) -> float:
        """Return when a batch may leave: at once if it is full, else after the window.

        Parameters
        ----------
        busy : bool
            Whether another batch is under way. Then it pays to wait longer: a batch costs the
            same with one row and with many, and all of them go through one SuperLink.
        """
        first = min(
            (pieces[0].since for pieces in self.owners.values() if pieces), default=math.inf
        )
        window_s = self.window_s * (_BUSY_WINDOWS if busy else 1.0)
        full = not self.together or self.n_rows >= self.max_rows
        return -math.inf if full and first < math.inf else first + window_s

    def take(self) -> list[Part]:
        """Take a batch out: owners in turn, an equal share of its rows each.

        What an owner does not need goes to the others. The owner that was served goes to the
        end of the line.
        """
        waiting = [o for o, pieces in self.owners.items() if pieces]
        if not waiting:
            return []
        first = self.owners[waiting[0]][0]
        if first.alone or not self.together:
            parts = [self._cut(first, self.max_rows)]
        else:
            parts = self._shared([o for o in waiting if not self.owners[o][0].alone])
        for owner in {part.owner: None for part in parts}:
            if self.owners[owner]:
                self.owners.move_to_end(owner)
            else:
                del self.owners[owner]
        return parts

    def _shared(self, owners: list[str]) -> list[Part]:
        left, parts = self.max_rows, []
        while left > 0 and owners:
            share = max(left // len(owners), 1)
            for owner in list(owners):
                part_rows = min(share, left)
                while part_rows > 0 and self.owners[owner] and not self.owners[owner][0].alone:
                    part = self._cut(self.owners[owner][0], part_rows)
                    parts.append(part)
                    part_rows -= part.n_rows
                    left -= part.n_rows
                if not self.owners[owner] or self.owners[owner][0].alone:
                    owners.remove(owner)
                if left <= 0:
                    break
        return _joined(parts)

    def _cut(self, piece: Piece, most: int) -> Part:
        stop = min(piece.stop, piece.start + most)
        part = Part(job_id=piece.job_id, owner=piece.owner, start=piece.start, stop=stop)
        piece.start = stop
        self.n_rows -= part.n_rows
        if piece.start >= piece.stop:
            self.owners[piece.owner].popleft()
        return part


def _joined(parts: list[Part]) -> list[Part]:
    """Put parts of one job that follow each other together."""
    last: dict[str, int] = {}
    joined: list[Part] = []
    for part in parts:
        place = last.get(part.job_id)
        if place is not None and joined[place].stop == part.start:
            before = joined[place]
            joined[place] = Part(
                job_id=part.job_id, owner=part.owner, start=before.start, stop=part.stop
            )
        else:
            last[part.job_id] = len(joined)
            joined.append(part)
    return joined


class Queue:
    """Lanes, and how many batches of each group of lanes are under way.

    Of the batches that a group may have under way at a time, the last is kept for owners
    that have none: a caller with ten thousand rows does not hold up one with a single row
    for longer than a batch takes.

    Parameters
    ----------
    in_flight : int
        Most batches of a group at a time.

    Examples
    --------
    >>> queue = Queue(in_flight=4)
    >>> lane = queue.lane("m", "float32 (4,)", window_s=0.0, max_rows=8)
    >>> queue.add(lane, Piece(job_id="big", owner="a", since=0.0, start=0, stop=100))
    >>> queue.add(lane, Piece(job_id="one", owner="b", since=0.0, start=0, stop=1))
    >>> [(p.job_id, p.n_rows) for p in queue.next_batch(now=0.0)[1]]
    [('big', 7), ('one', 1)]
    """

    def __init__(self, *, in_flight: int) -> None:
        self._in_flight = max(in_flight, 1)
        self._lanes: OrderedDict[tuple[str, Hashable], Lane] = OrderedDict()
        self._under_way: dict[str, list[frozenset[str]]] = {}
        self._where: dict[str, tuple[tuple[str, Hashable], str]] = {}

    def lane(
        self, group: str, key: Hashable, *, window_s: float, max_rows: int, together: bool = True
    ) -> tuple[str, Hashable]:
        """Return the handle of a lane, which is made at need."""
        handle = (group, key)
        if handle not in self._lanes:
            self._lanes[handle] = Lane(
                key=key, window_s=window_s, max_rows=max_rows, together=together
            )
        return handle

    def add(self, handle: tuple[str, Hashable], piece: Piece) -> None:
        """Put a job at the end of its owner's line."""
        self._lanes[handle].add(piece)
        self._where[piece.job_id] = (handle, piece.owner)

    def remove(self, job_id: str) -> bool:
        """Take out what waits of a job; return whether there was anything."""
        handle, owner = self._where.pop(job_id, (None, ""))
        lane = None if handle is None else self._lanes.get(handle)
        if handle is None or lane is None or owner not in lane.owners:
            return False
        before = lane.n_rows
        lane.remove(job_id, owner)
        if not lane.owners:
            del self._lanes[handle]
        return lane.n_rows < before

    def next_batch(
        self, *, now: float, blocked: frozenset[str] = frozenset()
    ) -> tuple[tuple[str, Hashable], list[Part]] | None:
        """Take out the batch that may leave now, if there is one.

        Parameters
        ----------
        now : float
        blocked : frozenset of str
            Groups that cannot be asked at present.
        """
        for handle in list(self._lanes):
            lane, group = self._lanes[handle], handle[0]
            if group in blocked or not self._may_leave(group, lane):
                continue
            if lane.ready_at(busy=self._is_busy(group)) > now:
                continue
            parts = lane.take()
            self._lanes.move_to_end(handle)
            if not lane.owners:
                del self._lanes[handle]
            owners = frozenset(part.owner for part in parts)
            self._under_way.setdefault(group, []).append(owners)
            return handle, parts
        return None

    def ended(self, handle: tuple[str, Hashable], parts: list[Part]) -> None:
        """Note that a batch is no longer under way."""
        self._under_way[handle[0]].remove(frozenset(part.owner for part in parts))

    def next_at(self, *, blocked: frozenset[str] = frozenset()) -> float:
        """Return when the next batch may leave; infinity if that takes another event."""
        return min(
            (
                lane.ready_at(busy=self._is_busy(group))
                for (group, _), lane in self._lanes.items()
                if group not in blocked and self._may_leave(group, lane)
            ),
            default=math.inf,
        )

    def _is_busy(self, group: str) -> bool:
        return bool(self._under_way.get(group))

    def _may_leave(self, group: str, lane: Lane) -> bool:
        under_way = self._under_way.get(group, [])
        free = self._in_flight - len(under_way)
        if free > 1 or self._in_flight == 1 or not under_way:
            return free > 0
        busy = frozenset().union(*under_way)
        # The last place: for a batch with somebody in it who has none under way.
        return free == 1 and any(pieces and o not in busy for o, pieces in lane.owners.items())
