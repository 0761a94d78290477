"""The folder in which a supervisor says what it runs; one supervisor a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from fedinfer_flower.errors import DeploymentError

__all__ = ["RunFolder", "private_folder", "require_private_file"]

_STATE: Final = "supervisor.json"
_LOCK: Final = "lock"
_OTHERS: Final = 0o077
_OTHERS_WRITE: Final = 0o022


def private_folder(path: Path) -> Path:
    """Return a folder, made for its owner alone if it is not there.

    Raises
    ------
    DeploymentError
        If it cannot be made, or others may write to it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        mode = path.stat().st_mode
    except OSError as exc:
        raise DeploymentError(
            f"the folder {path.name!r} cannot be made or read ({type(exc).__name__})",
            hint="check its owner, and the disk",
        ) from None
    if os.name == "posix" and mode & _OTHERS_WRITE:
        raise DeploymentError(
            f"others may write to the folder {path.name!r}",
            hint=f"chmod 700 {path.name}; what they may have put there is not to be trusted",
        )
    return path


def require_private_file(path: Path, what: str) -> None:
    """Require a file that nobody but its owner can read.

    Parameters
    ----------
    path : Path
    what : str
        What it is, for the error: ``the node key``.

    Raises
    ------
    DeploymentError
        If it is not there, no file, or others may read it.
    """
    try:
        mode = path.stat().st_mode
        is_file = path.is_file()
    except OSError as exc:
        raise DeploymentError(f"{what} {path.name!r} cannot be read ({type(exc).__name__})") from (
            None
        )
    if not is_file:
        raise DeploymentError(f"{what} {path.name!r} is no file")
    if os.name == "posix" and mode & _OTHERS:
        raise DeploymentError(
            f"{what} {path.name!r} can be read by others",
            hint=f"chmod 600 {path.name}; if others did read it, make another",
        )


class RunFolder:
    """Holds the lock and the state file of one supervisor.

    Parameters
    ----------
    path : Path
        Made for its owner alone.

    Examples
    --------
    >>> import tempfile
    >>> folder = RunFolder(Path(tempfile.mkdtemp()) / "run")
    >>> folder.write({"pid": 7})
    >>> RunFolder.read(folder.path)["pid"]
    7
    """

    def __init__(self, path: Path) -> None:
        self.path = private_folder(path)
        self._lock: int | None = None

    def take(self) -> None:
        """Take the folder for this process, until it ends.

        Raises
        ------
        DeploymentError
            If another process has it.
        """
        import fcntl

        handle = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise DeploymentError(
                "this is supervised by another process already",
                hint="fedinfer site status shows it; one supervisor a home",
            ) from None
        self._lock = handle

    def release(self) -> None:
        """Give the folder back."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def write(self, state: Mapping[str, Any]) -> None:
        """Replace the state file; a disk that is full keeps the one before."""
        draft = self.path / f".{_STATE}.{os.getpid()}"
        try:
            handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(state, file)
            draft.replace(self.path / _STATE)
        except OSError:
            draft.unlink(missing_ok=True)

    @staticmethod
    def read(path: Path) -> dict[str, Any] | None:
        """Return what a supervisor last wrote to a folder; None if nothing that can be read."""
        try:
            state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return state if isinstance(state, dict) else None

    @staticmethod
    def is_taken(path: Path) -> bool:
        """Whether a supervisor runs on the folder now."""
        import fcntl

        try:
            handle = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(handle)
        return False
