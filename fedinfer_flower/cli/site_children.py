"""The processes of a site: command lines, and what is checked before any of them starts."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fedinfer_flower.errors import DeploymentError, InvalidValueError
from fedinfer_flower.supervision.certificates import require_valid
from fedinfer_flower.supervision.child import ChildSpec
from fedinfer_flower.supervision.probes import BeatProbe
from fedinfer_flower.supervision.run_folder import require_private_file

if TYPE_CHECKING:
    from fedinfer_flower.clients.policy import SitePolicy

__all__ = [
    "Link",
    "Programs",
    "RuntimeAddress",
    "is_loopback",
    "quiet_flower",
    "require_stock_allowed",
    "site_children",
]

_ADDRESS: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+):([0-9]{1,5})")
_UNQUOTABLE: Final = frozenset("'\"\n\r\0")
_STALE_S: Final = 30.0
_FIRST_BEAT_S: Final = 180.0
"""Loading a large model comes before the first task, not before the first heartbeat; a busy
machine still needs long to import it all."""
_WORKER_GRACE_S: Final = 60.0
_NODE_GRACE_S: Final = 15.0
_OTHER_FAB: Final = 76
"""Exit status of a worker that has to begin anew for another listed app."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """How a site reaches its SuperLink.

    Parameters
    ----------
    address : str
        ``HOST:PORT``.
    root_certificates : Path, optional
        PEM bundle; default the system's authorities.
    node_key : Path, optional
        The SuperNode's private key (OpenSSH, NIST curve), registered at the SuperLink.
    insecure : bool
        Plain HTTP; on loopback only.

    Raises
    ------
    DeploymentError, InvalidValueError
        If that would expose the site, or cannot work.
    """

    address: str
    root_certificates: Path | None = None
    node_key: Path | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        match = _ADDRESS.fullmatch(self.address)
        if match is None or not 0 < int(match[2]) < 65536:
            raise InvalidValueError(
                "--superlink is HOST:PORT, without http://", hint="--superlink fleet.example:443"
            )
        if self.insecure and self.root_certificates is not None:
            raise DeploymentError("--insecure and --root-certificates exclude each other")
        if self.insecure and not is_loopback(match[1]):
            raise DeploymentError(
                "--insecure is for a SuperLink on this machine: elsewhere anybody on the way"
                " could read and change what travels",
                hint="--root-certificates ca.crt; or an encrypted tunnel to a loopback port",
            )

    def check_files(self) -> str:
        """Require certificates that are valid, and a key that is private.

        Returns
        -------
        str
            A warning, or an empty text.
        """
        if self.node_key is not None:
            require_private_file(self.node_key, "the node key")
        if self.root_certificates is not None:
            return require_valid(self.root_certificates)
        return ""

    def arguments(self) -> list[str]:
        """Return the arguments of ``flower-supernode``; paths only, no secrets."""
        found = ["--superlink", self.address]
        if self.insecure:
            found += ["--insecure"]
        if self.root_certificates is not None:
            found += ["--root-certificates", str(self.root_certificates.absolute())]
        if self.node_key is not None:
            found += ["--auth-supernode-private-key", str(self.node_key.absolute())]
        return found


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, by its name alone: nothing is looked up.

    Examples
    --------
    >>> [is_loopback(host) for host in ("127.0.0.1", "[::1]", "localhost", "10.0.0.1", "x.org")]
    [True, True, True, False, False]
    """
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class RuntimeAddress:
    """The loopback port at which SuperNode and worker meet.

    Parameters
    ----------
    port : int
        A fixed one; 0 for a free one, which is left for another if somebody else has taken it
        by the time the SuperNode starts again.
    """

    def __init__(self, port: int = 0) -> None:
        if not 0 <= port < 65536:
            raise InvalidValueError("--port is between 1 and 65535")
        self.fixed = bool(port)
        self.port = port or _free_port()

    def __str__(self) -> str:
        return f"127.0.0.1:{self.port}"

    def renew(self) -> None:
        """Take another port if this one is taken."""
        if not self.fixed and not _is_free(self.port):
            self.port = _free_port()


@dataclass(frozen=True, kw_only=True)
class Programs:
    """What is run; tests put others in.

    Parameters
    ----------
    warm_node, worker, stock_node : sequence of str
        Command lines up to the arguments.
    """

    warm_node: Sequence[str] = field(
        default=(sys.executable, "-m", "fedinfer_flower.clients.warm_supernode")
    )
    worker: Sequence[str] = field(default=(sys.executable, "-m", "fedinfer_flower.clients.worker"))
    stock_node: Sequence[str] = field(
        default_factory=lambda: (str(Path(sys.executable).parent / "flower-supernode"),)
    )


def site_children(
    policy: SitePolicy,
    *,
    policy_path: Path,
    home: Path,
    link: Link,
    runtime: RuntimeAddress,
    stock: bool = False,
    programs: Programs | None = None,
) -> list[ChildSpec]:
    """Return what a site runs: a SuperNode and a worker, or a stock SuperNode alone.

    The worker comes last, and so ends first: it finishes its task while the SuperNode can
    still carry the answer.
    """
    run = programs or Programs()
    environment = quiet_flower() | {
        "FLWR_HOME": str(home / "flower"),
        "PYTHONUNBUFFERED": "1",
        # "python -m" would import what others may have put into the working folder.
        "PYTHONSAFEPATH": "1",
        # The stock SuperNode starts Flower's commands by name: systemd activates nothing.
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))),
    }
    common = [*link.arguments(), *_node_config(policy, policy_path, home)]
    if policy.code.trusted_entities is not None:
        common += ["--trusted-entities", str(policy.code.trusted_entities.absolute())]
    beats = {name: home / "run" / f"{name}.json" for name in ("supernode", "worker")}
    # Without it any user of this machine could take the site's tasks from the SuperNode.
    key = home / "run" / "worker.key"
    logs = home / "logs"

    def node() -> list[str]:
        at = ["--host", "127.0.0.1", "--port", str(runtime.port), *common]
        if stock:
            return [*run.stock_node, *at]
        own = ["--status", str(beats["supernode"]), "--worker-key", str(key)]
        return [*run.warm_node, *own, "--", *at, *_PROCESS]

    def worker() -> list[str]:
        at = ["--runtime-api-address", str(runtime), "--policy", str(policy_path)]
        return [*run.worker, *at, "--status", str(beats["worker"]), "--worker-key", str(key)]

    def probe(name: str) -> BeatProbe:
        return BeatProbe(beats[name], stale_s=_STALE_S, first_s=_FIRST_BEAT_S)

    children = [
        ChildSpec(
            name="supernode",
            command=node,
            before_start=runtime.renew,
            environment=environment,
            log=logs / "supernode.log",
            probe=None if stock else probe("supernode"),
            grace_s=_NODE_GRACE_S,
        )
    ]
    if not stock:
        children.append(
            ChildSpec(
                name="worker",
                command=worker,
                environment=environment,
                log=logs / "worker.log",
                probe=probe("worker"),
                grace_s=_WORKER_GRACE_S,
                at_once=frozenset({_OTHER_FAB}),
            )
        )
    return children


_PROCESS: Final = ("--isolation", "process")


def require_stock_allowed(policy: SitePolicy, *, any_code: bool, why: str) -> None:
    """Require that the policy can be kept by a stock SuperNode.

    A stock SuperNode runs the app that the SuperLink sends. It cannot keep
    ``[code] app = "own"``, nor check ``fab-hashes``; it can check signatures of apps.

    Raises
    ------
    DeploymentError
        If it cannot, and the operator has not said that any code will do.
    """
    if policy.code.app == "own":
        raise DeploymentError(
            f"{why}, and a stock SuperNode runs the code that the SuperLink sends:"
            ' [code] app = "own" cannot be kept',
            hint='[code] app = "fab" with trusted-entities; or install flwr>=1.41,<1.42',
        )
    if policy.code.trusted_entities is None and not any_code:
        raise DeploymentError(
            f"{why}, and a stock SuperNode cannot check [code] fab-hashes: whoever has the"
            " SuperLink could run code at this site",
            hint="[code] trusted-entities; or --any-code, if you trust the SuperLink that far",
        )


def quiet_flower() -> dict[str, str]:
    """Return variables that keep Flower from calling home, unless the operator set them.

    Loopback never goes through the proxy that the way to the SuperLink may need.
    """
    wanted = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    found = {name: os.environ.get(name, value) for name, value in wanted.items()}
    around = [os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or "", "127.0.0.1"]
    no_proxy = ",".join(filter(None, around))
    return found | {"NO_PROXY": no_proxy, "no_proxy": no_proxy}


def _node_config(policy: SitePolicy, policy_path: Path, home: Path) -> list[str]:
    values = {
        "name": policy.site.name,
        "fedinfer-policy": str(policy_path),
        "fedinfer-home": str(home),
    }
    for key, value in values.items():
        if _UNQUOTABLE & set(value):
            raise InvalidValueError(f"{key} has a quote or a line end, which Flower cannot carry")
    return ["--node-config", " ".join(f"{key}='{value}'" for key, value in values.items())]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As a server does it: what lingers of earlier connections is no hindrance.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
