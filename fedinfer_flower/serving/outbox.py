"""`Outbox`: accepted jobs and their results, on disk until they are fetched or too old."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fedinfer_flower.errors import BindingError, ConfigError
from fedinfer_flower.serving.jobs import Job, JobKind, JobRequest, JobState

__all__ = ["Outbox", "Stored", "request_digest"]

_KIND: Final = 0x46494F42  # "FIOB"
_VERSION: Final = 1
_SCHEMA: Final = """
CREATE TABLE jobs (
    job_id TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    idempotency_key TEXT NOT NULL,
    digest BLOB NOT NULL,
    model TEXT NOT NULL,
    kind TEXT NOT NULL,
    n_rows INTEGER NOT NULL,
    timeout_s REAL NOT NULL,
    facts TEXT NOT NULL,
    body BLOB NOT NULL,
    run_id TEXT NOT NULL,
    state TEXT NOT NULL,
    accepted_at REAL NOT NULL,
    deadline_at REAL NOT NULL,
    ended_at REAL NOT NULL DEFAULT 0.0,
    answer BLOB NOT NULL DEFAULT x'',
    receipt BLOB NOT NULL DEFAULT x'',
    error TEXT NOT NULL DEFAULT '{}',
    provenance TEXT NOT NULL DEFAULT '{}',
    money TEXT NOT NULL DEFAULT ''
) WITHOUT ROWID;
CREATE UNIQUE INDEX one_job_a_key ON jobs (owner, idempotency_key) WHERE idempotency_key != '';
CREATE INDEX by_state ON jobs (state, ended_at);
CREATE INDEX unsettled ON jobs (job_id) WHERE money != '';
"""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A job as it lies in the outbox.

    Parameters
    ----------
    job : Job
    request : JobRequest
        With an empty body once the job has ended.
    run_id : int
        Flower's run in which it was accepted, or asked last.
    money : str
        JSON of what is still to be posted to the ledger; empty for nothing.
    """

    job: Job
    request: JobRequest = field(repr=False)
    run_id: int
    money: str = field(default="", repr=False)


def request_digest(request: JobRequest) -> bytes:
    """Return 32 bytes that two requests share only if they ask the same.

    The seconds that a job may take do not count.
    """
    head = json.dumps(
        [request.model, request.kind.value, request.n_rows, dict(request.facts)], sort_keys=True
    ).encode()
    start = hashlib.sha256(b"fedinfer/v1/job|" + len(head).to_bytes(8, "big") + head)
    start.update(request.body)
    return start.digest()


class Outbox:
    """Jobs in one SQLite file, for one process.

    What a method has written is on disk when it returns. Bodies are deleted when a job ends,
    results `result_ttl_s` later.

    Parameters
    ----------
    path : Path
        Made with mode 0600 in a folder that has to be there.
    result_ttl_s : float

    Raises
    ------
    ConfigError
        If the file cannot be used, is of another kind, or can be read by others.

    Privacy
    -------
    Holds questions and answers in clear, as far as the gateway can read them: the file is its
    owner's alone, and deleted values are overwritten in it. Copies of the disk made before,
    and the write-ahead log until it is next written over, may still hold them.
    """

    def __init__(self, path: Path, *, result_ttl_s: float = 900.0) -> None:
        self._path, self._ttl_s = path, result_ttl_s
        self._lock = threading.RLock()
        try:
            is_new = not path.exists()
            if is_new:
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            elif os.name == "posix" and path.stat().st_mode & 0o077:
                raise ConfigError(
                    f"the outbox {path.name!r} can be read by others",
                    hint=f"chmod 600 {path.name}",
                )
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            for pragma in ("journal_mode = WAL", "secure_delete = ON"):
                self._db.execute(f"PRAGMA {pragma}")
            self._db.row_factory = sqlite3.Row
            self._make_or_check()
        except (OSError, sqlite3.Error) as exc:
            raise self._unusable(type(exc).__name__) from None

    def _make_or_check(self) -> None:
        # A process that died right after making the file left it empty.
        with self._transaction() as db:
            kind = db.execute("PRAGMA application_id").fetchone()[0]
            n_tables = db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
            if kind == 0 and n_tables == 0:
                for statement in _SCHEMA.split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA application_id = {_KIND}")
                db.execute(f"PRAGMA user_version = {_VERSION}")
                return
            version = db.execute("PRAGMA user_version").fetchone()[0]
        if (kind, version) != (_KIND, _VERSION):
            raise self._unusable("of another kind or release")

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    # -- writing -----------------------------------------------------------------------

    def add(
        self, job: Job, request: JobRequest, *, run_id: int, money: str = ""
    ) -> tuple[Stored, bool]:
        """Add a job; return (it, True), or (the earlier job of its idempotency key, False).

        Raises
        ------
        BindingError
            If the idempotency key was used with another request.
        ConfigError
            If the file cannot be written.
        """
        digest = request_digest(request)
        with self._transaction() as db:
            if request.idempotency_key:
                found = db.execute(
                    "SELECT * FROM jobs WHERE owner = ? AND idempotency_key = ?",
                    (request.owner, request.idempotency_key),
                ).fetchone()
                if found is not None:
                    if found["digest"] != digest:
                        raise BindingError(
                            "this idempotency key was used with another request",
                            hint="a key is for one request and its repetitions",
                        )
                    return _stored(found), False
            db.execute(
                "INSERT INTO jobs (job_id, owner, idempotency_key, digest, model, kind, n_rows,"
                " timeout_s, facts, body, run_id, state, accepted_at, deadline_at, money)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    job.job_id,
                    job.owner,
                    request.idempotency_key,
                    digest,
                    job.model,
                    job.kind.value,
                    job.n_rows,
                    request.timeout_s,
                    json.dumps(dict(request.facts)),
                    request.body,
                    str(run_id),
                    job.state.value,
                    job.accepted_at,
                    job.deadline_at,
                    money,
                ),
            )
        return Stored(job=job, request=request, run_id=run_id, money=money), True

    def mark_asking(self, job_ids: Iterable[str], *, run_id: int) -> None:
        """Note that jobs are being asked, in this run.

        Survives the process at once, the machine a little later: were it lost, the jobs would
        only be asked again, and sites answer a query id once.
        """
        with self._transaction(synced=False) as db:
            db.executemany(
                "UPDATE jobs SET state = 'asking', run_id = ? WHERE job_id = ?"
                " AND state = 'accepted'",
                [(str(run_id), job_id) for job_id in job_ids],
            )

    def set_money(self, job_id: str, money: str) -> None:
        """Note what is still to be posted for a job; empty for nothing."""
        with self._transaction() as db:
            db.execute("UPDATE jobs SET money = ? WHERE job_id = ?", (money, job_id))

    def end(self, ended: Job, *, money: str = "") -> bool:
        """Write how a job ended; False, and nothing is changed, if it had ended before."""
        with self._transaction() as db:
            changed = db.execute(
                "UPDATE jobs SET state = ?, ended_at = ?, answer = ?, receipt = ?, error = ?,"
                " provenance = ?, money = ?, body = x'', facts = '{}'"
                " WHERE job_id = ? AND state IN ('accepted', 'asking')",
                (
                    ended.state.value,
                    ended.ended_at,
                    ended.answer,
                    ended.receipt,
                    json.dumps(dict(ended.error)),
                    json.dumps(dict(ended.provenance)),
                    money,
                    ended.job_id,
                ),
            ).rowcount
        return bool(changed)

    def forget(self, job_id: str) -> None:
        """Delete a job that was refused before anybody was told of it."""
        with self._transaction() as db:
            db.execute("DELETE FROM jobs WHERE job_id = ?", (job_id,))

    def expire(self, now: float) -> int:
        """Delete results that are too old and paid for; return how many."""
        with self._transaction() as db:
            return db.execute(
                "DELETE FROM jobs WHERE state IN ('done', 'failed', 'cancelled')"
                " AND ended_at < ? AND money = ''",
                (now - self._ttl_s,),
            ).rowcount

    # -- reading -----------------------------------------------------------------------

    def find(self, job_id: str) -> Stored | None:
        """Return a job."""
        with self._reading() as db:
            row = db.execute("SELECT * FROM jobs WHERE job_id = ?", (job_id,)).fetchone()
        return None if row is None else _stored(row)

    def find_key(self, request: JobRequest) -> Stored | None:
        """Return the job of a request's idempotency key.

        Raises
        ------
        BindingError
            If the key was used with another request.
        """
        if not request.idempotency_key:
            return None
        with self._reading() as db:
            row = db.execute(
                "SELECT * FROM jobs WHERE owner = ? AND idempotency_key = ?",
                (request.owner, request.idempotency_key),
            ).fetchone()
        if row is not None and row["digest"] != request_digest(request):
            raise BindingError(
                "this idempotency key was used with another request",
                hint="a key is for one request and its repetitions",
            )
        return None if row is None else _stored(row)

    def unfinished(self) -> tuple[Stored, ...]:
        """Return the jobs that have not ended, oldest first."""
        with self._reading() as db:
            rows = db.execute(
                "SELECT * FROM jobs WHERE state IN ('accepted', 'asking')"
                " ORDER BY accepted_at, job_id"
            ).fetchall()
        return tuple(_stored(row) for row in rows)

    def unsettled(self) -> tuple[Stored, ...]:
        """Return the jobs that ended and still have something to be posted to the ledger."""
        with self._reading() as db:
            rows = db.execute(
                "SELECT * FROM jobs WHERE money != ''"
                " AND state IN ('done', 'failed', 'cancelled') ORDER BY ended_at, job_id"
            ).fetchall()
        return tuple(_stored(row) for row in rows)

    # -- the file ----------------------------------------------------------------------

    @contextmanager
    def _transaction(self, *, synced: bool = True) -> Iterator[sqlite3.Connection]:
        try:
            with self._lock:
                self._db.execute(f"PRAGMA synchronous = {'FULL' if synced else 'NORMAL'}")
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield self._db
                    self._db.execute("COMMIT")
                except BaseException:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                    raise
        except sqlite3.Error as exc:
            raise self._unusable(type(exc).__name__) from None

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        try:
            with self._lock:
                yield self._db
        except sqlite3.Error as exc:
            raise self._unusable(type(exc).__name__) from None

    def _unusable(self, why: str) -> ConfigError:
        return ConfigError(
            f"the outbox {self._path.name!r} cannot be used ({why})",
            hint="check disk, owner and the state folder; one process at a time may have it",
        )


def _stored(row: sqlite3.Row) -> Stored:
    kind = JobKind(row["kind"])
    values: Mapping[str, Any] = dict(row)
    job = Job(
        job_id=values["job_id"],
        owner=values["owner"],
        model=values["model"],
        kind=kind,
        n_rows=values["n_rows"],
        state=JobState(values["state"]),
        accepted_at=values["accepted_at"],
        deadline_at=values["deadline_at"],
        ended_at=values["ended_at"],
        answer=bytes(values["answer"]),
        receipt=bytes(values["receipt"]),
        error=json.loads(values["error"]),
        provenance=json.loads(values["provenance"]),
    )
    request = JobRequest(
        owner=job.owner,
        model=job.model,
        kind=kind,
        body=bytes(values["body"]),
        facts=json.loads(values["facts"]),
        n_rows=job.n_rows,
        timeout_s=values["timeout_s"],
        idempotency_key=values["idempotency_key"],
    )
    return Stored(job=job, request=request, run_id=int(values["run_id"]), money=values["money"])
