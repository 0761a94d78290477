"""A PostgreSQL of one's own: a cluster in a temporary folder, reached by a Unix socket only."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

_PLACES = ("/usr/lib/postgresql", "/usr/pgsql", "/opt/homebrew/opt")
_SERVER_USER = "postgres"


def programs() -> Path | None:
    """Return the folder of initdb and pg_ctl, or None."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else []
    folders += [path for place in _PLACES for path in sorted(Path(place).glob("*/bin"))]
    return next((f for f in folders if (f / "initdb").exists() and (f / "pg_ctl").exists()), None)


def _runuser() -> str | None:
    # An administrator's program, which an ordinary path leaves out.
    return shutil.which("runuser", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def why_not() -> str:
    """Return why there can be no PostgreSQL here; empty if there can."""
    if find_spec("psycopg") is None:
        return "no driver: pip install 'fedinfer-flower[postgres]'"
    if programs() is None:
        return "no PostgreSQL server is installed"
    if os.getuid() == 0 and _runuser() is None:
        return "PostgreSQL does not run as root, and there is no runuser"
    return ""


@contextmanager
def cluster(*, durable: bool = False) -> Iterator[Path]:
    """Start a server; yield the folder of its socket; stop it and delete everything.

    Without fsync, unless it is to be durable: what tests kill is a client, never the machine.
    """
    where = programs()
    assert where is not None
    folder = Path(tempfile.mkdtemp(prefix="fi-pg-", dir="/tmp"))
    prefix: list[str] = []
    if os.getuid() == 0:
        shutil.chown(folder, _SERVER_USER)
        prefix = [str(_runuser()), "-u", _SERVER_USER, "--"]

    def run(program: str, *words: str) -> None:
        with (folder / "log").open("ab") as log:
            subprocess.run(
                [*prefix, str(where / program), *words],
                check=True,
                timeout=120,
                cwd=folder,
                stdout=log,
                stderr=log,
            )

    data = str(folder / "data")
    options = f"-c listen_addresses= -c unix_socket_directories={folder}"
    options += "" if durable else " -c fsync=off"
    try:
        run("initdb", "-D", data, "-U", _SERVER_USER, "-A", "trust", "-E", "UTF8", "--no-sync")
        run("pg_ctl", "-D", data, "-l", str(folder / "server.log"), "-o", options, "-w", "start")
        try:
            yield folder
        finally:
            run("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def new_schema(socket: Path, name: str) -> str:
    """Make an empty schema, which is quicker than a database; return the URL of a ledger there."""
    import psycopg

    with psycopg.connect(host=str(socket), user=_SERVER_USER, autocommit=True) as db:
        db.execute(f'CREATE SCHEMA "{name}"')
    where = f"host={socket}&options=-csearch_path%3D{name}"
    return f"postgresql://{_SERVER_USER}@/{_SERVER_USER}?{where}"
