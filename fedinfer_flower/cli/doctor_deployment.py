"""What a deployment has open that it should not: files, settings, services."""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fedinfer_flower.cli.doctor import Finding
from fedinfer_flower.errors import FedInferError
from fedinfer_flower.supervision.certificates import SOON_DAYS, read_certificates

if TYPE_CHECKING:
    from fedinfer_flower.serving.config import GatewayConfig

__all__ = ["certificate_findings", "examine_deployment"]

_OTHERS: Final = 0o077
_OTHERS_WRITE: Final = 0o022
_MOST_FILES: Final = 2000
_DAY_S: Final = 86_400.0
_UNITS: Final = Path("/etc/systemd/system")
_KEY_OPTIONS: Final = ("--node-key", "--auth-supernode-private-key", "--ssl-keyfile")
_SERVERS: Final = ("flower-superlink", "flower-supernode", "fedinfer")


def examine_deployment(
    *,
    superlink: str = "",
    gateway: str = "",
    policy: Path | None = None,
    config: Path | None = None,
    units: Path = _UNITS,
    processes: Path = Path("/proc"),
) -> list[Finding]:
    """Look at what is named, at this machine's services and its Flower processes.

    Starts nothing and changes nothing. A SuperLink and a gateway get a few requests without
    any key; what they answer is what anybody gets who can reach them from here.

    Parameters
    ----------
    superlink : str
        ``HOST:PORT``: best the address that sites use.
    gateway : str
        URL.
    policy, config : Path, optional
        ``site.toml``, ``gateway.toml``.
    units, processes : Path
        Folders of systemd's units, and of ``/proc``.

    Returns
    -------
    list of Finding
        A gap has ``ok=False`` and a `mend`.

    Notes
    -----
    No finding is no proof of safety: what cannot be seen from here, such as a port that is
    open to another network, is not found.
    """
    from fedinfer_flower.cli.doctor_network import examine_gateway, examine_superlink

    findings: list[Finding] = []
    if superlink:
        findings += examine_superlink(superlink)
    if gateway:
        findings += examine_gateway(gateway)
    if policy is not None:
        findings += _policy(policy)
    if config is not None:
        findings += _config(config)
    findings += _units(units)
    findings += _processes(processes)
    return findings


def certificate_findings(path: Path, subject: str, *, is_server: bool) -> list[Finding]:
    """Return what is wrong with the certificates of a file; one good finding if nothing."""
    try:
        facts = read_certificates(path)
    except FedInferError as exc:
        return [Finding(subject=subject, status=exc.message, ok=False, mend=exc.hint or "fix it")]
    least = min(fact.days_left for fact in facts)
    ending = least < SOON_DAYS
    words = f"ends in {least:.0f} days" if least >= 0 else f"ended {-least:.0f} days ago"
    mend = "renew it: docs/how-to/rotate-keys.md" if ending else ""
    found = [Finding(subject=subject, status=words, ok=not ending, mend=mend)]
    if is_server and not facts[0].names:
        found.append(
            Finding(
                subject=subject,
                status="names nobody: no subjectAltName",
                ok=False,
                mend="make it anew, with subjectAltName=DNS:... or IP:...",
            )
        )
    return found


# -- a site ------------------------------------------------------------------------------


def _policy(path: Path) -> Iterator[Finding]:
    from fedinfer_flower.clients.policy import SitePolicy
    from fedinfer_flower.clients.policy_words import explain

    try:
        policy = SitePolicy.read(path)
    except FedInferError as exc:
        yield Finding(subject=path.name, status=exc.message, ok=False, mend=exc.hint or "fix it")
        return
    yield from _mode(path, "the policy", _OTHERS_WRITE, "chmod go-w")
    for words in explain(policy).warnings:
        yield Finding(
            subject=f"policy of {policy.site.name}",
            status=words,
            ok=False,
            mend=f"decide, then change {path.name}; fedinfer policy check says what follows",
        )
    home = policy.site.home.absolute()
    if home.is_dir():
        yield from _private_tree(home, f"home of {policy.site.name}")
    else:
        yield Finding(subject=f"home of {policy.site.name}", status="not made yet", ok=True)


# -- a gateway ---------------------------------------------------------------------------


def _config(path: Path) -> Iterator[Finding]:
    from fedinfer_flower.serving.config import GatewayConfig

    try:
        config = GatewayConfig.read(path)
    except FedInferError as exc:
        yield Finding(subject=path.name, status=exc.message, ok=False, mend=exc.hint or "fix it")
        return
    yield from _mode(path, "gateway settings", _OTHERS_WRITE, "chmod go-w")
    if config.certificate is not None:
        yield from certificate_findings(config.certificate, "gateway certificate", is_server=True)
    if config.key is not None:
        yield from _mode(config.key, "gateway TLS key", _OTHERS, "chmod 600")
    if config.public_metrics:
        yield Finding(
            subject=path.name,
            status="metrics are public",
            ok=False,
            mend="public-metrics = false, and a key with the scope metrics for the scraper",
        )
    if config.state.is_dir():
        yield from _private_tree(config.state, "gateway state")
        yield from _api_keys(config)


def _api_keys(config: GatewayConfig) -> Iterator[Finding]:
    from fedinfer_flower.serving.key_store import KeyStore
    from fedinfer_flower.serving.server_app import KEYS_FILE

    file = config.state / KEYS_FILE
    if not file.is_file():
        yield Finding(subject="API keys", status="none yet", ok=True)
        return
    now = time.time()
    try:
        store = KeyStore(file)
        keys = [key for key in store.list() if key.is_good(now)]
        store.close()
    except FedInferError as exc:
        yield Finding(subject="API keys", status=exc.message, ok=False, mend=exc.hint or "fix it")
        return
    for key in keys:
        if not key.expires_at:
            yield Finding(
                subject=f"API key {key.key_id}",
                status="never ends",
                ok=False,
                mend="make one with an end, hand it over, then: fedinfer gateway key revoke",
            )
        elif key.expires_at - now < SOON_DAYS * _DAY_S / 4:
            yield Finding(
                subject=f"API key {key.key_id}",
                status=f"ends in {(key.expires_at - now) / _DAY_S:.0f} days",
                ok=False,
                mend="fedinfer gateway key create: an end cannot be moved",
            )
    if keys and all(key.expires_at for key in keys):
        yield Finding(subject="API keys", status=f"{len(keys)}, each with an end", ok=True)


# -- this machine ------------------------------------------------------------------------


def _units(folder: Path) -> Iterator[Finding]:
    """Look for services that start a part in an unsafe way."""
    try:
        files = sorted(folder.glob("*.service"))[:_MOST_FILES]
    except OSError:
        return
    for file in files:
        try:
            text = file.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        # A line that ends in a backslash goes on in the next one.
        for line in re.sub(r"\\\n\s*", " ", text).splitlines():
            if line.startswith("ExecStart="):
                yield from _command(line.partition("=")[2].split(), f"service {file.name}")


def _processes(folder: Path) -> Iterator[Finding]:
    """Look at the command lines of Flower's processes on this machine."""
    try:
        entries = [entry for entry in folder.iterdir() if entry.name.isdigit()]
    except OSError:
        return
    for entry in sorted(entries, key=lambda e: int(e.name)):
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        # A script's own name comes after the interpreter's.
        begins = [n for n, word in enumerate(words[:2]) if Path(word).name in _SERVERS]
        if begins:
            yield from _command(words[begins[0] :], f"process {entry.name}")


def _command(words: list[str], subject: str) -> Iterator[Finding]:
    program = Path(words[0]).name if words else ""
    if program not in _SERVERS:
        return
    if "--insecure" in words:
        yield Finding(
            subject=subject,
            status=f"{program} runs with --insecure",
            ok=False,
            mend="certificates instead: docs/how-to/deploy.md; on loopback only, for a trial",
        )
    if program == "flower-superlink":
        if "--enable-supernode-auth" not in words:
            yield Finding(
                subject=subject,
                status="the SuperLink takes any SuperNode",
                ok=False,
                mend="--enable-supernode-auth, and flwr supernode register for each site",
            )
        host = words[words.index("--host") + 1] if "--host" in words[:-1] else "127.0.0.1"
        if host in ("0.0.0.0", "::"):  # noqa: S104  looked for, not bound
            yield Finding(
                subject=subject,
                status="control and runtime routes are bound to every address",
                ok=False,
                mend="--host 127.0.0.1, and a proxy that passes /v1/fleet/ alone: deploy/",
            )
    for option, value in pairwise(words):
        if option in _KEY_OPTIONS:
            yield from _mode(Path(value), f"{subject}, key", _OTHERS, "chmod 600")
    if "--any-code" in words:
        yield Finding(
            subject=subject,
            status="the site runs whatever code the SuperLink sends",
            ok=False,
            mend='[code] trusted-entities, or app = "own" without --stock',
        )


def _mode(path: Path, what: str, bits: int, command: str) -> Iterator[Finding]:
    if os.name != "posix" or not path.exists():
        return
    bad = path.stat().st_mode & bits
    words = "others can write it" if bits == _OTHERS_WRITE else "others can read it"
    yield Finding(
        subject=f"{what} {path.name}",
        status=words if bad else "its owner's alone",
        ok=not bad,
        mend=f"{command} {shlex.quote(str(path))}" if bad else "",
    )


def _private_tree(folder: Path, subject: str) -> Iterator[Finding]:
    """Look for anything in a folder of secrets that others can reach."""
    if os.name != "posix":
        return
    if folder.stat().st_mode & _OTHERS == 0:
        # Nobody else gets past the folder, whatever the modes inside are.
        yield Finding(subject=subject, status="its owner's alone", ok=True)
        return
    quoted = shlex.quote(str(folder))
    yield Finding(
        subject=subject,
        status="others can enter the folder",
        ok=False,
        mend=f"chmod 700 {quoted}",
    )
    for number, path in enumerate(sorted(folder.rglob("*"))):
        if number >= _MOST_FILES:
            return
        if path.is_file() and not path.is_symlink() and path.stat().st_mode & _OTHERS:
            yield Finding(
                subject=f"{subject}: {path.name}",
                status="others can read it",
                ok=False,
                mend=f"chmod 600 {shlex.quote(str(path))}; a secret that was read is made anew",
            )
