"""Start, find and stop the gateway's run on a SuperLink, with Flower's own command."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fedinfer_flower.errors import DeploymentError, GatewayError, InvalidValueError

__all__ = ["Connection", "FlowerRuns", "RunState"]

_CALL_S: Final = 60.0
_HERE: Final = "gateway"
_OWN_WORDS: Final = re.compile(r"\b(FI\d{3}) [A-Za-z]+Error: ([ -~]{1,300})")
"""A typed error of this package at the start of a run's details; other texts are not repeated."""


@dataclass(frozen=True, kw_only=True)
class Connection:
    """How the control routes of a SuperLink are reached.

    Parameters
    ----------
    superlink : str
        ``HOST:PORT``, or the name of a connection in the user's own Flower configuration.
    root_certificates : Path, optional
        PEM bundle; with ``HOST:PORT``.
    insecure : bool
        Plain HTTP; with ``HOST:PORT``.
    """

    superlink: str
    root_certificates: Path | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        if self.insecure and self.root_certificates is not None:
            raise DeploymentError("--insecure and --root-certificates exclude each other")
        if self.is_name and (self.insecure or self.root_certificates is not None):
            raise DeploymentError(
                "--insecure and --root-certificates go with HOST:PORT",
                hint="a named connection has them in Flower's config.toml",
            )
        if not re.fullmatch(r"[A-Za-z0-9_.:\[\]-]+", self.superlink):
            raise InvalidValueError("--superlink is HOST:PORT, or the name of a connection")

    @property
    def is_name(self) -> bool:
        """Whether it names a connection of the user's."""
        return ":" not in self.superlink

    def write(self, home: Path) -> str:
        """Write Flower's configuration for it to a home; return the name to call it by."""
        if self.is_name:
            return self.superlink
        lines = [f"[superlink.{_HERE}]", f'address = "{self.superlink}"']
        if self.insecure:
            lines.append("insecure = true")
        if self.root_certificates is not None:
            # JSON's form of a text is also TOML's.
            lines.append(
                f"root-certificates = {json.dumps(str(self.root_certificates.absolute()))}"
            )
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        (home / "config.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return _HERE


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What a SuperLink says of a run.

    Parameters
    ----------
    status : str
        ``running``, ``finished:failed``, ...
    words : str
        Of a typed error of this package, if the run ended by one.
    """

    status: str
    words: str = ""

    @property
    def ended(self) -> bool:
        """Whether the run is over."""
        return self.status.startswith("finished")

    @property
    def well(self) -> bool:
        """Whether it came to a good end."""
        return self.status == "finished:completed"


class FlowerRuns:
    """Calls ``flwr run``, ``flwr list`` and ``flwr stop``, each in a process of its own.

    Parameters
    ----------
    connection : Connection
    project : Path
        Of the app.
    home : Path
        Folder for Flower's configuration; the user's own is used with a named connection.
    run_config : mapping of str to str
        Keys that are in the app's config already.

    Notes
    -----
    ``flwr run --stream`` ends with status 0 when the ServerApp has raised, so its end says
    nothing: the state is asked for.
    """

    def __init__(
        self, connection: Connection, *, project: Path, home: Path, run_config: Mapping[str, str]
    ) -> None:
        for value in run_config.values():
            if set("'\n\r\0") & set(value):
                raise InvalidValueError("a path with a quote cannot be carried by Flower")
        self.project = project
        self.run_config = dict(run_config)
        self._connection = connection
        self._home = home
        self._name = connection.write(home)

    def start(self) -> int:
        """Start a run; return its id.

        Raises
        ------
        GatewayError
            If the SuperLink cannot be reached, or refuses.
        """
        config = " ".join(f"{key}='{value}'" for key, value in self.run_config.items())
        answer = self._call("run", str(self.project), self._name, "--run-config", config)
        try:
            return int(answer["run-id"])
        except (KeyError, TypeError, ValueError):
            raise GatewayError("the SuperLink did not say which run it has started") from None

    def state(self, run_id: int) -> RunState:
        """Return the state of a run.

        Raises
        ------
        GatewayError
            If the SuperLink cannot be reached, or does not know the run.
        """
        answer = self._call("list", self._name, "--run-id", str(run_id))
        try:
            (run,) = answer["runs"]
            status, details = str(run["status"]), str(run.get("status-details", ""))
        except (KeyError, TypeError, ValueError):
            raise GatewayError("the SuperLink does not know the run") from None
        found = _OWN_WORDS.search(details)
        return RunState(status=status, words=f"{found[1]} {found[2]}" if found else "")

    def stop(self, run_id: int) -> None:
        """Stop a run: its messages go at once, its process notices within half a minute.

        Raises
        ------
        GatewayError
            If it cannot be stopped; also if it has ended.
        """
        self._call("stop", str(run_id), self._name)

    def _call(self, *arguments: str) -> dict[str, Any]:
        program = Path(sys.executable).parent / "flwr"
        command = str(program) if program.exists() else shutil.which("flwr")
        if command is None:
            raise DeploymentError("the command flwr is not installed", hint="pip install flwr")
        environment = dict(os.environ) | {
            name: os.environ.get(name, value)
            for name, value in (
                ("FLWR_TELEMETRY_ENABLED", "0"),
                ("FLWR_DISABLE_UPDATE_CHECK", "1"),
            )
        }
        if not self._connection.is_name:
            environment["FLWR_HOME"] = str(self._home)
        try:
            done = subprocess.run(  # noqa: S603  a list, no shell
                [command, *arguments, "--format", "json"],
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_CALL_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise GatewayError(f"the SuperLink did not answer flwr {arguments[0]} in time") from (
                None
            )
        answer = _last_json(done.stdout)
        if done.returncode != 0 or answer.get("success") is not True:
            raise GatewayError(
                f"flwr {arguments[0]} failed: {_reason(answer)}",
                hint="is the SuperLink up, and are its address and certificates right?",
            )
        return answer


def _last_json(text: str) -> dict[str, Any]:
    """Return the JSON object that a command prints, whatever it printed before."""
    begin = text.find("{")
    while begin >= 0:
        try:
            value = json.loads(text[begin:])
        except (ValueError, RecursionError):
            begin = text.find("{", begin + 1)
            continue
        return value if isinstance(value, dict) else {}
    return {}


def _reason(answer: Mapping[str, Any]) -> str:
    lines = str(answer.get("error-message", "")).splitlines()
    # What it printed on its way comes first.
    words = [line.strip() for line in lines if line.strip() and "Using SuperLink" not in line]
    return words[-1][:200] if words else "it cannot be reached, or gave no reason"
