"""The key by which a SuperNode knows its worker: a file that only their owner can read."""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

from fedinfer_flower.errors import DeploymentError

__all__ = ["read_or_make_key"]

_KEY_BYTES: Final = 32
_KEY_CHARS: Final = 43


def read_or_make_key(path: Path) -> str:
    """Return the key in a file; make it, at random, if there is no such file.

    Worker and SuperNode are given the same path: whoever starts first makes it.

    Raises
    ------
    DeploymentError
        If the file can be read by others, or holds no key.

    Privacy
    -------
    Without a key, any process on the machine can take a site's tasks, read them and answer in
    its name. With one, only a process that can read the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        if not path.exists():
            with os.fdopen(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
                file.write(secrets.token_urlsafe(_KEY_BYTES))
            with suppress(FileExistsError):
                os.link(new, path)  # whole or not at all, and never over another's
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise DeploymentError(
                "the worker's key file can be read by others than its owner",
                hint=f"chmod 600 {path.name}, and start both anew",
            )
        key = path.read_text(encoding="utf-8").strip()
    except OSError as exc:
        raise DeploymentError(
            f"the worker's key file cannot be read or made ({type(exc).__name__})",
            hint="--worker-key in a folder that belongs to the site's user",
        ) from None
    finally:
        new.unlink(missing_ok=True)
    if len(key) != _KEY_CHARS:
        raise DeploymentError("the worker's key file holds no key", hint="delete it")
    return key
