"""Start a command that does not outlive the process that asked for it.

``python -m fedinfer_flower.supervision.launch PARENT_PID -- command ...``

On Linux the kernel is told to kill this process when its parent is gone
(``PR_SET_PDEATHSIG``), and the command then takes this process over: no process is left in
between. On other systems this process stays, passes signals on, and looks twice a second
whether its parent is still there.

Notes
-----
The kernel's promise is about the *thread* that started this process: a supervisor starts its
children from the thread that stays. Processes that the command starts itself are not covered;
those of Flower watch the process that started them.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Final

__all__ = ["main"]

_PR_SET_PDEATHSIG: Final = 1
_WATCH_S: Final = 0.5
_USAGE_STATUS: Final = 64
_ORPHAN_STATUS: Final = 113
_KERNEL_BINDS: Final = bool(sys.platform == "linux")


def main(arguments: Sequence[str]) -> int:
    """Run a command bound to its parent; see the module."""
    if len(arguments) < 3 or arguments[1] != "--" or not arguments[0].isdigit():
        sys.stderr.write("usage: launch PARENT_PID -- command ...\n")
        return _USAGE_STATUS
    parent, command = int(arguments[0]), list(arguments[2:])
    if _KERNEL_BINDS:
        _die_with_parent()
    # The parent may have gone before the kernel was told.
    if os.getppid() != parent:
        return _ORPHAN_STATUS
    if _KERNEL_BINDS:
        os.execvp(command[0], command)  # noqa: S606  a list, no shell
    return _watch(parent, command)  # pragma: no cover  other systems


def _die_with_parent() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        sys.stderr.write("the kernel does not bind this process to its parent\n")


def _watch(parent: int, command: list[str]) -> int:
    child = subprocess.Popen(command)  # noqa: S603  a list, no shell

    def pass_on(number: int, _frame: object) -> None:
        child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    while child.poll() is None:
        if os.getppid() != parent:
            child.kill()
            child.wait()
            return _ORPHAN_STATUS
        time.sleep(_WATCH_S)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
