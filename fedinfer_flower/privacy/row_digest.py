"""Names for query rows under a key of the site, and the kind of file they are remembered in.

A site that must give the same row the same answer, or refuse a row that it has summed with
others, has to recognise rows without keeping them. It keeps a keyed digest of each.

**What the key hides.** Whoever has the file but not the key cannot test a guess ("was this
patient asked about?"): without the key a digest is as good as a random number. The file does
show how many rows there were and in which order, and which queries shared rows. Whoever has
the key, the site itself included, can test guesses.

**What counts as the same row.** Same kind (truth values, whole numbers, floats), same shape,
same numbers. The width of the dtype, byte order, memory layout and the sign of a zero do not
count: an attacker would otherwise have a row asked anew at no change to the model's answer.
Kinds do count: models read an index or a byte image differently from a measured value.

**What it cannot do.** A row changed in its last bit is another row, and the model's answer to
it hardly differs. No exact comparison can help, and a coarser one has edges that can be crossed
just the same. Under noise near-duplicates are therefore charged as new rows, and the budget is
what stops them. Nothing in this package stops them for exact sums.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sqlite3
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.ensemble.options import Scalar
from fedinfer_flower.errors import ConfigError, InvalidValueError, ShapeError
from fedinfer_flower.privacy.base import ScorePlan

__all__ = [
    "DIGEST_BYTES",
    "EXACT_SUM_CONTEXT",
    "KEY_BYTES",
    "MemoryFile",
    "answer_context",
    "key_fingerprint",
    "require_digests",
    "row_digests",
]

DIGEST_BYTES: Final = 32
KEY_BYTES: Final = 32

EXACT_SUM_CONTEXT: Final = b"fedinfer/v1/exact-sum"
"""Context of rows for `CohortGuard` where sums carry no noise: the row and nothing else.

With rule, options or protection in it, a querier could ask one cohort under one rule and the
other under the next, and would still learn most of the difference.
"""

_ROW_DOMAIN: Final = b"fi/row-digest/v1"  # BLAKE2b personalisation: 16 bytes at most
_KEY_DOMAIN: Final = b"fi/row-key-id/v1"

_INT64_MAX: Final = 2**63 - 1

_FILE_VERSION: Final = 1
_LOCK_TIMEOUT_S: Final = 30.0


def row_digests(
    inputs: npt.NDArray[np.generic], *, context: bytes, key: bytes
) -> tuple[bytes, ...]:
    """Return the digest of each row of a batch: keyed BLAKE2b-256 of context and row.

    Parameters
    ----------
    inputs : array of shape (n_queries, ...)
        Truth values, whole numbers, or floats of at most 64 bits.
    context : bytes
        What else makes two answers the same: `answer_context` for drawn answers,
        `EXACT_SUM_CONTEXT` for exact sums. Two contexts never share a digest.
    key : bytes
        32 secret bytes of the site, the same for as long as its files are kept.

    Returns
    -------
    digests : tuple of bytes
        One of 32 bytes for each row, in order; equal exactly for equal rows.

    Raises
    ------
    ShapeError
        If the array has no rows axis, or is of another kind.
    InvalidValueError
        If the key does not have 32 bytes.

    Privacy
    -------
    Stays at the site. For what the digests hide and what not, see the module.

    References
    ----------
    .. [1] RFC 7693, The BLAKE2 Cryptographic Hash, section 2.9 (keyed hashing).

    Examples
    --------
    >>> rows = np.array([[0.5, 1.0], [0.5, 2.0], [0.5, 1.0]], dtype=np.float32)
    >>> first, second, third = row_digests(rows, context=b"", key=bytes(32))
    >>> first == third, first == second
    (True, False)
    >>> row_digests(rows.astype(float)[:1], context=b"", key=bytes(32)) == (first,)
    True
    """
    if inputs.ndim < 1:
        raise ShapeError("inputs have shape (n_queries, ...), not ()")
    if inputs.dtype.kind not in "biuf" or inputs.dtype.itemsize > 8:
        raise ShapeError(f"rows of dtype {inputs.dtype.name} have no digest")
    start = _keyed(key, _ROW_DOMAIN)
    # Lengths come first, so no two (context, shape, row) spell the same bytes.
    start.update(len(context).to_bytes(8, "big") + context)
    shape = inputs.shape[1:]
    start.update(b"".join(size.to_bytes(8, "big") for size in (len(shape), *shape)))
    digests = []
    for row in inputs:
        one = start.copy()
        one.update(_canonical(np.asarray(row)))
        digests.append(one.digest())
    return tuple(digests)


def answer_context(
    *,
    rule: str,
    rule_options: Mapping[str, Scalar],
    protection: str,
    protection_options: Mapping[str, Scalar],
    classes: Sequence[str],
    plan: ScorePlan,
    model: str,
    class_totals: Sequence[float] | None = None,
    counts_kind: str = "",
    cohort: bytes = b"",
) -> bytes:
    """Return what a drawn answer depends on besides the row, as unambiguous bytes.

    Parameters
    ----------
    rule, protection : str
    rule_options, protection_options : mapping of str to JSON scalar
        All of them, defaults included.
    classes : sequence of str
        In the order of the query.
    plan : ScorePlan
    model : str
        Digest of everything at the site that answers depend on: weights, preprocessing,
        profile. If a new model keeps the digest of the old one, the old one's answers go on.
    class_totals : sequence of float, optional
    counts_kind : str
        As in the query, where the rule reads them.
    cohort : bytes
        Digest of the roster. **Required where the noise of several sites adds up**, left out
        where a site's noise suffices by itself. If a site gave its old share of noise to
        another cohort, so would the rest, and all of it would cancel in the difference of
        two sums but the share of the site that is missing in one of them.

    Examples
    --------
    >>> plan = ScorePlan(width=2, bound=1.0, sensitivity_l2=1.0, n_sites_max=3, n_classes=2)
    >>> facts = dict(rule="mean-probability", rule_options={}, protection="dp",
    ...              protection_options={"epsilon": 1.0}, classes=("a", "b"), plan=plan)
    >>> answer_context(**facts, model="1") == answer_context(**facts, model="2")
    False
    """
    facts: dict[str, Any] = {
        "rule": rule,
        "rule-options": dict(rule_options),
        "protection": protection,
        "protection-options": dict(protection_options),
        "classes": list(classes),
        "plan": {**dataclasses.asdict(plan), "discloses": plan.discloses.name},
        "model": model,
        "class-totals": None if class_totals is None else [float(x) for x in class_totals],
        "counts-kind": counts_kind,
        "cohort": cohort.hex(),
    }
    canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return b"fedinfer/v1/answer|" + canonical.encode()


def key_fingerprint(key: bytes) -> bytes:
    """Return 16 bytes that tell one key from another and nothing else about it.

    Kept in a site's memory files: under another key every row would look new, and the
    memory would be lost without anybody noticing.

    Examples
    --------
    >>> key_fingerprint(bytes(32)) == key_fingerprint(bytes(31) + b"1")
    False
    """
    return _keyed(key, _KEY_DOMAIN).digest()[:16]


def require_digests(digests: Sequence[bytes]) -> None:
    """Require digests as `row_digests` makes them.

    Raises
    ------
    InvalidValueError
        If one is something else.

    Examples
    --------
    >>> require_digests([bytes(32)])
    """
    if any(not isinstance(d, bytes) or len(d) != DIGEST_BYTES for d in digests):
        raise InvalidValueError(f"a row digest is {DIGEST_BYTES} bytes")


def _keyed(key: bytes, domain: bytes) -> hashlib.blake2b:
    if len(key) != KEY_BYTES:
        raise InvalidValueError(f"the key of row digests has {KEY_BYTES} bytes")
    return hashlib.blake2b(digest_size=DIGEST_BYTES, key=key, person=domain)


def _canonical(row: npt.NDArray[np.generic]) -> bytes:
    # Every number in the widest type of its kind, which holds all narrower ones exactly.
    kind = row.dtype.kind
    if kind == "b":
        return b"b" + row.astype("|u1").tobytes()
    if kind == "f":
        with np.errstate(invalid="ignore"):  # signalling NaN
            wide = row.astype(np.float64)
        # One NaN, whatever its payload; adding 0.0 turns -0.0 into 0.0.
        same = np.where(np.isnan(wide), np.nan, wide + 0.0)
        return b"f" + same.astype("<f8").tobytes()
    if kind == "u" and row.size and int(row.max()) > _INT64_MAX:
        return b"u" + row.astype("<u8").tobytes()
    return b"i" + row.astype("<i8").tobytes()


class MemoryFile:
    """An SQLite file in which a site remembers what it must not forget.

    Each transaction is atomic against threads and processes, and is on disk when it ends.
    A file that is damaged, of another kind, of another key or readable by others is an
    error: starting afresh in its place would be forgetting. Damage is found in the structure
    of the file; SQLite has no checksums, so a bit that flips within one row is not noticed.

    Parameters
    ----------
    path : Path or None
        Created with mode 0600 if it does not exist. None keeps everything in memory, for
        one process.
    kind : int
        SQLite application id, one for each kind of file.
    schema : str
        SQL that makes the tables.
    key_id : bytes
        `key_fingerprint` of the key that the digests are made with.
    must_exist : bool
        Refuse to make the file, so that a deleted one is noticed.

    Raises
    ------
    ConfigError
        If the file cannot be used.
    """

    def __init__(
        self, path: Path | None, *, kind: int, schema: str, key_id: bytes, must_exist: bool
    ) -> None:
        self._path = None if path is None else path.absolute()
        self._lock = threading.Lock()
        self._memory: sqlite3.Connection | None = None
        if self._path is None:
            self._memory = sqlite3.connect(
                ":memory:", isolation_level=None, check_same_thread=False
            )
            weakref.finalize(self, self._memory.close)
            self._memory.execute("PRAGMA foreign_keys = ON")
            _make_tables(self._memory, kind, schema, key_id)
            return
        try:
            if not (must_exist or self._path.exists()):
                with _created_once(self._path) as connection:
                    _make_tables(connection, kind, schema, key_id)
            self._check(self._path, kind, key_id)
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(f"cannot be opened ({type(error).__name__})") from None

    @contextmanager
    def transaction(self, *, writes: bool = True) -> Iterator[sqlite3.Connection]:
        """Run a block in one transaction; an error inside undoes all of it.

        Parameters
        ----------
        writes : bool
            Takes the write lock at once, so that what the block reads is still true when
            it writes.

        Raises
        ------
        ConfigError
            If the file cannot be read or written.
        """
        try:
            with self._connection() as connection:
                connection.execute("BEGIN IMMEDIATE" if writes else "BEGIN")
                try:
                    yield connection
                    connection.execute("COMMIT")
                except BaseException:
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
                    raise
        except sqlite3.Error as error:
            raise self._unusable(f"fails ({type(error).__name__})") from None

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        if self._memory is not None:
            with self._lock:
                yield self._memory
            return
        assert self._path is not None  # noqa: S101 - for the type checker
        # A connection of its own for each transaction: connections survive neither a fork
        # nor a change of thread. mode=rw never creates a file that has gone.
        opened = sqlite3.connect(
            f"{self._path.as_uri()}?mode=rw",
            uri=True,
            timeout=_LOCK_TIMEOUT_S,
            isolation_level=None,
        )
        with closing(opened) as connection:
            connection.execute("PRAGMA foreign_keys = ON")
            # EXTRA also syncs the directory: a commit that a power failure undoes would be
            # an answer that was sent and forgotten.
            connection.execute("PRAGMA synchronous = EXTRA")
            yield connection

    def _check(self, path: Path, kind: int, key_id: bytes) -> None:
        if os.name == "posix" and path.stat().st_mode & 0o077:
            raise ConfigError(
                f"the memory file {path.name!r} can be read by others",
                hint=f"chmod 600 {path.name}",
            )
        with self.transaction(writes=False) as connection:
            found = [
                connection.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("application_id", "user_version", "quick_check")
            ]
            if found[0] != kind:
                raise self._unusable("is of another kind")
            if found[1] != _FILE_VERSION:
                raise self._unusable("was written by another release")
            if found[2] != "ok":
                raise self._unusable("is damaged")
            if connection.execute("SELECT id FROM digest_key").fetchall() != [(key_id,)]:
                raise self._unusable("belongs to another key of row digests")

    def _unusable(self, why: str) -> ConfigError:
        name = "in memory" if self._path is None else repr(self._path.name)
        return ConfigError(
            f"the site's memory file {name} {why}; nothing was answered",
            hint="check disk, owner and configured paths, or restore the newest copy; a site that"
            " starts with an empty file forgets what it has answered",
        )


def _make_tables(connection: sqlite3.Connection, kind: int, schema: str, key_id: bytes) -> None:
    connection.executescript(
        f"PRAGMA application_id = {kind}; PRAGMA user_version = {_FILE_VERSION};"
        f"CREATE TABLE digest_key (id BLOB NOT NULL); {schema}"
    )
    connection.execute("INSERT INTO digest_key VALUES (?)", (key_id,))


@contextmanager
def _created_once(path: Path) -> Iterator[sqlite3.Connection]:
    # Made whole under another name and linked into place: nobody opens half a file, and an
    # empty file at this path is always an error. Of two processes the first wins.
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        with closing(sqlite3.connect(draft, isolation_level=None)) as connection:
            yield connection
        with suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink()
