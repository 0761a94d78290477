"""What is here, what would fail, and how to mend it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import socket
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

__all__ = ["Finding", "examine"]

_EXTRAS: Final = {
    "simulation": ("ray", "flwr_datasets", "sklearn"),
    "torch": ("torch",),
    "llm": ("torch", "transformers", "safetensors"),
    "he": ("tenseal",),
    "dp": ("scipy",),
    "dp-training": ("opacus", "torch"),
    "report": ("matplotlib", "jinja2"),
    "mpc": ("spu", "jax"),
}
_OPTIONAL: Final = frozenset({"mpc"})
"""Not part of "all", because it needs an environment of its own."""

_PORTS: Final = {8000: "flower-superlink", 9094: "flower-supernode", 39091: "flwr run (local)"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the examination.

    Parameters
    ----------
    subject, status : str
    ok : bool
    mend : str
        What to do; empty if nothing.
    """

    subject: str
    status: str
    ok: bool
    mend: str = ""


def examine() -> list[Finding]:
    """Look at versions, extras, cores, memory, disk and ports; start nothing."""
    return [*_versions(), *_extras(), *_machine(), *_ports()]


def _versions() -> list[Finding]:
    python_ok = sys.version_info >= (3, 11)
    findings = [
        Finding(
            subject="Python",
            status=platform.python_version(),
            ok=python_ok,
            mend="" if python_ok else "install Python 3.11 or later",
        )
    ]
    try:
        flwr = version("flwr")
    except PackageNotFoundError:
        return [*findings, Finding(subject="flwr", status="missing", ok=False, mend="install flwr")]
    right = flwr.split(".")[:2] == ["1", "41"]
    mend = "" if right else "pip install 'flwr>=1.41,<1.42': messages and errors differ elsewhere"
    return [*findings, Finding(subject="flwr", status=flwr, ok=right, mend=mend)]


def _extras() -> list[Finding]:
    findings = []
    for extra, modules in _EXTRAS.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        install = f"pip install 'fedinfer-flower[{extra}]'"
        if extra in _OPTIONAL:
            install += ", in an environment of its own"
        findings.append(
            Finding(
                subject=f"extra {extra}",
                status="missing: " + ", ".join(missing) if missing else "installed",
                ok=not missing or extra in _OPTIONAL,
                mend=install if missing else "",
            )
        )
    return findings


def _machine() -> list[Finding]:
    cores = os.cpu_count() or 1
    free_gb = shutil.disk_usage(tempfile.gettempdir()).free / 1e9
    shared = Path("/dev/shm")  # noqa: S108  looked at, never written
    findings = [
        Finding(
            subject="cores",
            status=str(cores),
            ok=cores >= 2,
            mend="" if cores >= 2 else "the demo runs with one core, several times slower",
        ),
        Finding(
            subject="free disk for temporary files",
            status=f"{free_gb:.1f} GB",
            ok=free_gb > 1.0,
            mend="" if free_gb > 1.0 else "free 1 GB, or set TMPDIR to a larger disk",
        ),
    ]
    if shared.exists():
        shared_gb = shutil.disk_usage(shared).total / 1e9
        findings.append(
            Finding(
                subject="shared memory",
                status=f"{shared_gb:.1f} GB",
                ok=shared_gb > 0.25,
                mend="" if shared_gb > 0.25 else "give the container a larger --shm-size for Ray",
            )
        )
    return findings


def _ports() -> list[Finding]:
    findings = []
    for port, user in _PORTS.items():
        with socket.socket() as probe:
            probe.settimeout(0.5)
            taken = probe.connect_ex(("127.0.0.1", port)) == 0
        findings.append(
            Finding(
                subject=f"port {port} ({user})",
                status="in use" if taken else "free",
                # In use may be Flower itself at work: worth knowing, no failure.
                ok=True,
                mend=f"if that is not {user}, give it another --port" if taken else "",
            )
        )
    return findings
