"""What a site with a language model remembers: its keys, and the requests that it worked on."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Final, Protocol

from fedinfer_flower.errors import ReplayError
from fedinfer_flower.privacy.row_digest import MemoryFile, key_fingerprint
from fedinfer_flower.wire.identity import Identity

__all__ = ["LanguageMemory", "RequestMemory", "language_memory", "request_name"]

_KIND: Final = 0x46494C51  # "FILQ"
_SCHEMA: Final = "CREATE TABLE worked_on (request TEXT PRIMARY KEY) WITHOUT ROWID;"
_DOMAIN: Final = b"fedinfer/v1/language|"


class RequestMemory(Protocol):
    """Keys, and which requests were worked on."""

    identity: Identity

    def admit(self, query_id: str, context: bytes) -> None:
        """Use up the name of a request."""
        ...


class LanguageMemory:
    """A memory in the site's home folder, beside that of `InferenceMod` and with its keys.

    Parameters
    ----------
    home : Path
        Made at first use, for its owner alone.

    Raises
    ------
    ConfigError
        If a file is damaged, of another identity, or can be read by others.

    Examples
    --------
    >>> import tempfile
    >>> memory = LanguageMemory(Path(tempfile.mkdtemp()))
    >>> memory.admit("a", b"")
    >>> memory.admit("a", b"")
    Traceback (most recent call last):
        ...
    fedinfer_flower.errors.ReplayError: FI313 ...
    """

    def __init__(self, home: Path) -> None:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.identity = Identity.load_or_create(home / "identity.json")
        secret = self.identity.signing.private_bytes_raw()
        key = hashlib.sha256(_DOMAIN + secret).digest()
        self._file = MemoryFile(
            home / "language.sqlite",
            kind=_KIND,
            schema=_SCHEMA,
            key_id=key_fingerprint(key),
            must_exist=False,
        )

    def admit(self, query_id: str, context: bytes) -> None:  # noqa: ARG002
        """Use up the name of a request.

        Raises
        ------
        ReplayError
            If it was used before.
        """
        with self._file.transaction() as db:
            known = "SELECT 1 FROM worked_on WHERE request = ?"
            if db.execute(known, (query_id,)).fetchall():
                raise ReplayError(
                    "this site has worked on this request", hint="ask again under a fresh query id"
                )
            db.execute("INSERT INTO worked_on VALUES (?)", (query_id,))


def request_name(*, query_id: str, round_number: int, verb: str, receiver: str) -> str:
    """Return the name under which one request is remembered, once for all time."""
    whole = f"{query_id}|{round_number}|{verb}|{receiver}"
    return "language-" + hashlib.sha256(whole.encode()).hexdigest()


@functools.lru_cache(maxsize=64)
def language_memory(home: Path) -> LanguageMemory:
    """Return the memory in a folder, opened once in a process."""
    return LanguageMemory(home)
