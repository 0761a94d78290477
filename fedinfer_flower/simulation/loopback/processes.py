"""Processes of a loopback deployment: started, told to end, or dealt with as accidents do."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedinfer_flower.errors import DeploymentError

__all__ = ["Processes", "command_folder", "command_path", "free_ports"]

_GRACE_S = 30.0


def command_folder() -> str:
    """Return the folder of the commands that are installed beside this interpreter."""
    return str(Path(sys.executable).parent)


def command_path(name: str) -> str:
    """Return the path of a command that is installed beside this interpreter."""
    return str(Path(command_folder()) / name)


def free_ports(number: int) -> list[int]:
    """Return ports of loopback on which nothing listened a moment ago."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


class Processes:
    """Named processes, each with a log file of its own.

    Parameters
    ----------
    folder : Path
        For the logs.
    environment : mapping of str to str
        On top of this process's own.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._folder = folder
        self.environment = os.environ | dict(environment)
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._commands: dict[str, Sequence[str]] = {}

    def start(self, name: str, command: Sequence[str]) -> int:
        """Start a process and return its pid."""
        self._commands[name] = tuple(command)
        with (self._folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(  # noqa: S603  commands of this deployment's own making
                list(command), stdout=log, stderr=log, env=self.environment, cwd=self._folder
            )
        self._running[name] = process
        return process.pid

    def start_again(self, name: str) -> int:
        """Start a process that has ended, with the command that it had."""
        return self.start(name, self._commands[name])

    def pid(self, name: str) -> int:
        """Return the pid of a process, running or not."""
        return self._running[name].pid

    def alive(self, name: str) -> bool:
        """Whether a process runs."""
        return self._running[name].poll() is None

    def log(self, name: str) -> str:
        """Return what a process wrote so far."""
        path = self._folder / f"{name}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def wait_for_port(self, name: str, port: int, *, timeout_s: float = 60.0) -> None:
        """Wait until a process listens.

        Raises
        ------
        DeploymentError
            If it ends before, or takes longer.
        """
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if not self.alive(name):
                raise DeploymentError(f"{name} ended before it listened", hint=f"see {name}.log")
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.05)
        raise DeploymentError(f"{name} did not listen within {timeout_s:g} s")

    def end(self, name: str, *, how: signal.Signals = signal.SIGTERM) -> None:
        """End a process and wait for it; a kill if it does not heed a request."""
        process = self._running[name]
        if process.poll() is None:
            process.send_signal(how)
            try:
                process.wait(timeout=_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def close(self) -> None:
        """End all processes, the last started first."""
        for process in self._running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
        for name in reversed(list(self._running)):
            self.end(name)
