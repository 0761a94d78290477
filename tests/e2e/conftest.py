"""Real SuperLinks, SuperNodes and commands on loopback; each test ends what it started."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent

Process = subprocess.Popen[bytes]


def _environment(home: Path) -> dict[str, str]:
    return os.environ | {
        "FLWR_HOME": str(home),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONUNBUFFERED": "1",
    }


@contextmanager
def _running(*command: str, home: Path, cwd: Path | None = None) -> Iterator[Process]:
    with (home / f"{Path(command[0]).name}-{time.monotonic_ns()}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=_environment(home), cwd=cwd)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def _superlink(home: Path, *options: str) -> Iterator[int]:
    (port,) = _free_ports(1)
    command = [str(BIN / "flower-superlink"), "--insecure", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--disable-runtime-dependency-installation", *options]
    with _running(*command, home=home) as process:
        _wait_until_listening(port, process)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\n'
            f'address = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        yield port


@contextmanager
def _supernodes(superlink_port: int, *configs: str, home: Path) -> Iterator[None]:
    with ExitStack() as stack:
        started = []
        for port, config in zip(_free_ports(len(configs)), configs, strict=True):
            command = [str(BIN / "flower-supernode"), "--insecure"]
            command += ["--superlink", f"127.0.0.1:{superlink_port}", "--port", str(port)]
            command += ["--node-config", config]
            started.append((port, stack.enter_context(_running(*command, home=home))))
        for port, process in started:
            _wait_until_listening(port, process)
        yield
        for _, process in started:  # all at once: each takes a second or two to end
            process.terminate()


def _output_of(
    *command: str,
    cwd: Path,
    home: Path,
    timeout_s: float = 240.0,
    more: Mapping[str, str] | None = None,
) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env=_environment(home) | dict(more or {}),
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-3000:]
    return output


def _flwr_run(app: Path, home: Path, *options: str, timeout_s: float = 240.0) -> str:
    command = (str(BIN / "flwr"), "run", ".", "here", "--stream", *options)
    return _output_of(*command, cwd=app, home=home, timeout_s=timeout_s)


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def _wait_until_listening(port: int, process: Process) -> None:
    for _ in range(300):
        assert process.poll() is None, "the process ended before it listened"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError(f"nothing listens on {port}")


# Factories, because no test module can import another.


@pytest.fixture(scope="session")
def environment() -> Callable[..., dict[str, str]]:
    """``environment(home)``: variables of a process whose Flower settings are in `home`."""
    return _environment


@pytest.fixture(scope="session")
def running() -> Callable[..., AbstractContextManager[Process]]:
    """``with running(*command, home=, cwd=)``: a process that ends with the block.

    What it prints goes to a log in `home`, named after the command.
    """
    return _running


@pytest.fixture(scope="session")
def superlink() -> Callable[..., AbstractContextManager[int]]:
    """``with superlink(home, *options)``: a SuperLink; gives its port.

    Writes the connection 'here', for `flwr run`, to `home`.
    """
    return _superlink


@pytest.fixture(scope="session")
def supernodes() -> Callable[..., AbstractContextManager[None]]:
    """``with supernodes(superlink_port, *node_configs, home=)``: one SuperNode a config."""
    return _supernodes


@pytest.fixture(scope="session")
def output_of() -> Callable[..., str]:
    """``output_of(*command, cwd=, home=, timeout_s=, more=)``: run to a good end."""
    return _output_of


@pytest.fixture(scope="session")
def flwr_run() -> Callable[..., str]:
    """``flwr_run(app, home, *options, timeout_s=)``: an app on 'here', to its end."""
    return _flwr_run


@pytest.fixture(scope="session")
def free_ports() -> Callable[[int], list[int]]:
    """``free_ports(number)``: ports of loopback on which nothing listened a moment ago."""
    return _free_ports
