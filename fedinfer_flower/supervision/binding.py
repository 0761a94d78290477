"""Command lines that end with the process that started them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Final

__all__ = ["bound_command"]

# Not imported: Python warns when it runs a module that is loaded already.
_LAUNCHER: Final = "fedinfer_flower.supervision.launch"


def bound_command(command: Sequence[str], *, parent: int | None = None) -> list[str]:
    """Return the command line that runs `command` for as long as `parent` lives.

    Parameters
    ----------
    command : sequence of str
    parent : int, optional
        Process id; default this process.

    Examples
    --------
    >>> bound_command(["sleep", "9"], parent=42)[1:]
    ['-m', 'fedinfer_flower.supervision.launch', '42', '--', 'sleep', '9']
    """
    owner = os.getpid() if parent is None else parent
    return [sys.executable, "-m", _LAUNCHER, str(owner), "--", *command]
