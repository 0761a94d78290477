"""`Deployment`: certificates, SuperLink, sites with policies, and a gateway, on loopback."""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import httpx

from fedinfer_flower.errors import DeploymentError
from fedinfer_flower.simulation.loopback.certificates import Authority, make_node_key
from fedinfer_flower.simulation.loopback.processes import (
    Processes,
    command_folder,
    command_path,
    free_ports,
)
from fedinfer_flower.wire.identity import Identity

__all__ = ["Deployment", "SiteSpec"]

_DIGITS: Final = "fedinfer_flower.simulation.loopback.models:digits_site"
_MODELS: Final = """
[models.digits]
rule = "mean-probability"
protection = "plain"
timeout-s = 20.0
"""


@dataclass(frozen=True, kw_only=True)
class SiteSpec:
    """One site.

    Parameters
    ----------
    name : str
    loader : str
        ``module:function`` of its model; empty for a site without a classifier.
    policy : str
        More tables of its policy, in TOML.
    answers : str
        More lines of the table ``[answers]``.
    """

    name: str
    loader: str = _DIGITS
    policy: str = ""
    answers: str = ""


class Deployment:
    """A federation of processes on one machine, as it would run on many.

    Parameters
    ----------
    folder : Path
        For everything: keys, policies, logs, state.
    sites : sequence of SiteSpec
    models : str
        Tables ``[models.NAME]`` of the gateway, in TOML.
    gateway : str
        More lines of the gateway's settings.
    secure : bool
        TLS on the SuperLink and at the gateway, and node authentication.
    stock : bool
        Sites run Flower's own SuperNode, not the warm one.
    durable : bool
        The SuperLink keeps its state in a file, and has it after a restart. In memory, which
        is Flower's default, it needs a third of the time for a query.

    Examples
    --------
    ::

        with Deployment(Path("run"), sites=[SiteSpec(name=f"site-{i}") for i in range(3)]) as d:
            key = d.api_key("my-app", scopes=("query",))
            ...  # ask d.gateway_url
    """

    def __init__(
        self,
        folder: Path,
        *,
        sites: Sequence[SiteSpec],
        models: str = _MODELS,
        gateway: str = "",
        secure: bool = True,
        stock: bool = False,
        durable: bool = True,
    ) -> None:
        self.folder = folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.sites, self.secure, self._stock = tuple(sites), secure, stock
        self._durable = durable
        self._models, self._gateway = models, gateway
        flwr_home = self.folder / "flwr"
        flwr_home.mkdir(exist_ok=True)
        self.processes = Processes(
            self.folder,
            {
                "FLWR_HOME": str(flwr_home),
                # Flower starts its own commands by name, also where no environment is active.
                "PATH": os.pathsep.join((command_folder(), os.environ.get("PATH", os.defpath))),
                "FLWR_TELEMETRY_ENABLED": "0",
                "FLWR_DISABLE_UPDATE_CHECK": "1",
                "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
                "OMP_NUM_THREADS": "1",
                "PYTHONUNBUFFERED": "1",
            },
        )
        self.superlink_port, self.gateway_port = free_ports(2)
        self.authority = Authority.make(self.folder) if secure else None
        self.app_identity = Identity.load_or_create(self.folder / "app.id")

    # -- what others need ------------------------------------------------------------------

    @property
    def superlink(self) -> str:
        """Address of the SuperLink."""
        return f"127.0.0.1:{self.superlink_port}"

    @property
    def gateway_url(self) -> str:
        """Where the gateway is."""
        return f"{'https' if self.secure else 'http'}://127.0.0.1:{self.gateway_port}"

    @property
    def ca(self) -> Path | None:
        """The certificate to trust; None without TLS."""
        return None if self.authority is None else self.authority.certificate

    @property
    def gateway_config(self) -> Path:
        """The gateway's settings."""
        return self.folder / "gateway.toml"

    def policy_file(self, name: str) -> Path:
        """Return the policy of a site."""
        return self.folder / f"{name}.toml"

    def api_key(self, name: str, *, scopes: Sequence[str] = ("query",)) -> str:
        """Make an API key and return its secret."""
        out = self.folder / f"{name}.key"
        command = ["gateway", "key", "create", name, "--config", str(self.gateway_config)]
        command += ["--out", str(out)]
        for scope in scopes:
            command += ["--scope", scope]
        self.fedinfer(*command)
        return out.read_text(encoding="utf-8").strip()

    def fedinfer(self, *arguments: str) -> str:
        """Run a ``fedinfer`` command to a good end and return what it printed."""
        return self._command("fedinfer", *arguments)

    # -- life ------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start everything and wait until the gateway is ready."""
        self.start_superlink()
        for site in self.sites:
            self.write_policy(site)
            self.start_site(site.name)
        self.start_gateway()
        self.wait_until_ready()

    def close(self) -> None:
        """End everything."""
        self.processes.close()

    def start_superlink(self) -> None:
        """Start the SuperLink, with its state in a file."""
        command = [command_path("flower-superlink"), "--host", "127.0.0.1"]
        command += ["--port", str(self.superlink_port)]
        command += ["--database", str(self.folder / "link.db")] if self._durable else []
        command += ["--disable-runtime-dependency-installation", *self._superlink_tls()]
        self.processes.start("superlink", command)
        self.processes.wait_for_port("superlink", self.superlink_port)
        trust = "insecure = true" if self.ca is None else f'root-certificates = "{self.ca}"'
        (self.folder / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{self.superlink}"\n'
            f"{trust}\n",
            encoding="utf-8",
        )

    def _superlink_tls(self) -> list[str]:
        if self.authority is None:
            return ["--insecure"]
        certificate, key = self.authority.issue(self.folder, "superlink")
        options = ["--ssl-ca-certfile", str(self.ca), "--ssl-certfile", str(certificate)]
        return [*options, "--ssl-keyfile", str(key), "--enable-supernode-auth"]

    def write_policy(self, site: SiteSpec) -> Path:
        """Write the policy of a site, which knows the gateway and one application."""
        gateway = Identity.load_or_create(self._state() / "gateway.id").key_id
        model = f'[model]\nloader = "{site.loader}"\n' if site.loader else ""
        path = self.policy_file(site.name)
        path.write_text(
            f'[site]\nname = "{site.name}"\nhome = "{site.name}-home"\n{model}'
            f'[answers]\nprotections = ["plain", "secagg"]\n{site.answers}\n'
            f'[queriers]\ngateway = "{gateway}"\napp = "{self.app_identity.key_id}"\n'
            f"{site.policy}\n",
            encoding="utf-8",
        )
        path.chmod(0o600)
        return path

    def start_site(self, name: str) -> None:
        """Start a site; under TLS its node key is registered first."""
        command = [command_path("fedinfer"), "site", "up", "--superlink", self.superlink]
        command += ["--policy", str(self.policy_file(name))]
        command += ["--stock", "--any-code"] if self._stock else []
        if self.ca is None:
            command += ["--insecure"]
        else:
            node_key = self.folder / f"{name}.node"
            if not node_key.exists():
                public = make_node_key(node_key)
                self.flwr("supernode", "register", str(public), "here", "--name", name)
            command += ["--root-certificates", str(self.ca), "--node-key", str(node_key)]
        self.processes.start(name, command)

    def start_gateway(self) -> None:
        """Write the gateway's settings and start ``fedinfer serve``."""
        lines = ['[gateway]\nhost = "127.0.0.1"', f"port = {self.gateway_port}"]
        lines += [f'state = "{self._state().name}"', self._gateway]
        if self.authority is not None:
            certificate, key = self.authority.issue(self.folder, "gateway")
            lines[2:2] = [f'certificate = "{certificate.name}"', f'key = "{key.name}"']
        text = "\n".join(lines) + "\n" + self._models
        self.gateway_config.write_text(text, encoding="utf-8")
        command = [command_path("fedinfer"), "serve", "--config", str(self.gateway_config)]
        command += ["--superlink", self.superlink]
        command += ["--insecure"] if self.ca is None else ["--root-certificates", str(self.ca)]
        self.processes.start("gateway", command)

    def wait_until_ready(self, *, timeout_s: float = 120.0, n_sites: int | None = None) -> None:
        """Wait until the gateway would answer, and so many sites have shown their cards.

        Raises
        ------
        DeploymentError
            Naming what it says it waits for.
        """
        wanted = len(self.sites) if n_sites is None else n_sites
        end, why = time.monotonic() + timeout_s, "nothing listens"
        while time.monotonic() < end:
            try:
                answer = httpx.get(f"{self.gateway_url}/ready", verify=self.trust(), timeout=5.0)
                said = json.loads(answer.content)
                why = str(said.get("why", answer.status_code))
                if answer.status_code == 200 and int(said.get("sites_online", wanted)) >= wanted:
                    return
            except (httpx.HTTPError, ValueError) as exc:
                why = type(exc).__name__
            if not self.processes.alive("gateway"):
                raise DeploymentError("the gateway ended", hint="see gateway.log")
            time.sleep(0.2)
        raise DeploymentError(f"the gateway is not ready after {timeout_s:g} s: {why}")

    def trust(self) -> ssl.SSLContext | bool:
        """Return what httpx takes as `verify`."""
        return True if self.ca is None else ssl.create_default_context(cafile=str(self.ca))

    def flwr(self, *arguments: str) -> str:
        """Run a ``flwr`` command to a good end and return what it printed."""
        return self._command("flwr", *arguments)

    def _state(self) -> Path:
        state = self.folder / "gateway-state"
        state.mkdir(exist_ok=True, mode=0o700)
        return state

    def _command(self, name: str, *arguments: str) -> str:
        done = subprocess.run(  # noqa: S603  commands of this deployment's own making
            [command_path(name), *arguments],
            env=self.processes.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if done.returncode:
            raise DeploymentError(
                f"{name} {arguments[0]} ended with status {done.returncode}",
                hint=(done.stdout + done.stderr)[-2000:],
            )
        return done.stdout
