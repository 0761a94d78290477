"""`fedinfer serve`: keep a gateway running on a SuperLink."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fedinfer_flower.errors import ConfigError, DeploymentError, FedInferError, GatewayError

if TYPE_CHECKING:
    from fedinfer_flower.serving.config import GatewayConfig
    from fedinfer_flower.serving.flower_runs import FlowerRuns
    from fedinfer_flower.supervision.probes import HttpProbe
    from fedinfer_flower.supervision.run_folder import RunFolder
    from fedinfer_flower.supervision.service import Ended

__all__ = ["GatewayRuns", "serve"]

_log = logging.getLogger("fedinfer_flower.cli.serve")

_DOWN_S: Final = 15.0
_FIRST_S: Final = 180.0


def serve(
    superlink: Annotated[
        str, typer.Option(help="HOST:PORT of the control routes, or a name in Flower's config")
    ] = "",
    config: Annotated[
        Path | None, typer.Option(help="gateway.toml: a path on the SuperLink's machine")
    ] = None,
    root_certificates: Annotated[
        Path | None, typer.Option(help="PEM bundle for the SuperLink's TLS")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="plain HTTP to a SuperLink on this machine")
    ] = False,
    gateway: Annotated[
        str, typer.Option(help="URL of the gateway, where gateway.toml cannot be read from here")
    ] = "",
    once: Annotated[
        bool, typer.Option("--once", help="end when the run ends; no restarts")
    ] = False,
    write_app: Annotated[
        Path | None,
        typer.Option(help="only write the gateway's Flower app to a folder, for its hash"),
    ] = None,
) -> None:
    """Start the gateway as a run on a SuperLink, and start it again whenever it is gone.

    The run's process is started by the SuperLink, on the SuperLink's machine and as its user:
    --config, and every path in that file, is of that machine. On SIGTERM the gateway finishes
    what it has accepted, then the run is stopped.

    Example: fedinfer serve --config /etc/fedinfer/gateway.toml --superlink 127.0.0.1:8000
    --root-certificates /etc/fedinfer/ca.crt
    """
    from fedinfer_flower.observability.json_logs import configure_json_logs
    from fedinfer_flower.serving.fab import write_project

    if write_app is not None:
        typer.echo(write_project(write_app))
        return
    if config is None or not superlink:
        raise ConfigError("fedinfer serve needs --config and --superlink")
    configure_json_logs(level=logging.INFO)
    # Flower's database library tells of its own start.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    status = _serve(
        config.absolute(),
        superlink=superlink,
        root_certificates=root_certificates,
        insecure=insecure,
        url=gateway,
        once=once,
    )
    raise typer.Exit(status)


def _serve(
    config_path: Path,
    *,
    superlink: str,
    root_certificates: Path | None,
    insecure: bool,
    url: str,
    once: bool,
) -> int:
    from fedinfer_flower.cli.site_children import is_loopback
    from fedinfer_flower.serving.fab import write_project
    from fedinfer_flower.serving.flower_runs import Connection, FlowerRuns
    from fedinfer_flower.supervision.certificates import require_valid
    from fedinfer_flower.supervision.run_folder import RunFolder
    from fedinfer_flower.supervision.service import ServiceKeeper
    from fedinfer_flower.supervision.supervisor import StopFlag

    connection = Connection(
        superlink=superlink, root_certificates=root_certificates, insecure=insecure
    )
    if insecure and not is_loopback(superlink.rpartition(":")[0]):
        raise DeploymentError(
            "--insecure is for a SuperLink on this machine: whoever is on the way could start"
            " runs of its own",
            hint="--root-certificates ca.crt; or an encrypted tunnel to a loopback port",
        )
    if root_certificates is not None and (warning := require_valid(root_certificates)):
        _log.warning("%s", warning)
    config = _read_here(config_path)
    probe, ready = (_probe(config, url, path) for path in ("/health", "/ready"))
    folder = None if config is None else RunFolder(_state(config) / "serve")
    if folder is not None:
        folder.take()
    try:
        with tempfile.TemporaryDirectory(prefix="fedinfer-serve-") as name:
            runs = FlowerRuns(
                connection,
                project=write_project(Path(name)),
                home=Path(name) / "flower",
                run_config={"gateway-config": str(config_path)},
            )
            service = GatewayRuns(runs, config=config, folder=folder)
            keeper = ServiceKeeper(
                service,
                probe,
                ready=ready,
                drain_s=(20.0 if config is None else config.limits.drain_s) + 10.0,
                found=service.left_running(),
            )
            return keeper.run(StopFlag().on_signals(), once=once)
    finally:
        if folder is not None:
            folder.release()


@dataclass(frozen=True)
class GatewayRuns:
    """A gateway's runs on a SuperLink, as a `Service`.

    Parameters
    ----------
    runs : FlowerRuns
    config : GatewayConfig, optional
        Where it can be read on this machine; without it a run is stopped without draining.
    folder : RunFolder, optional
        Remembers the run, so that the next `fedinfer serve` finds what this one left behind.
    """

    runs: FlowerRuns
    config: GatewayConfig | None = None
    folder: RunFolder | None = None

    def start(self) -> str:
        """Start a run; its name is its id."""
        run_id = self.runs.start()
        self._remember(run_id)
        return str(run_id)

    def ended(self, name: str) -> Ended | None:
        """Look for the process, then ask the SuperLink, which learns of its end a minute later.

        A SuperLink that cannot be reached does not know.
        """
        from fedinfer_flower.serving.gateway_process import is_gone
        from fedinfer_flower.supervision.service import Ended

        if self.config is not None and is_gone(self.config.state, run_id=int(name)):
            return Ended("its process is gone")
        try:
            state = self.runs.state(int(name))
        except FedInferError as exc:
            _log.warning("%s", exc.message)
            return None
        if not state.ended:
            return None
        words = f"{state.status}{f': {state.words}' if state.words else ''}"
        return Ended(words, well=state.well)

    def drain(self, name: str) -> bool:
        """Tell the gateway's process, if it is one of this machine and user."""
        from fedinfer_flower.serving.gateway_process import tell_to_end

        if self.config is not None and tell_to_end(self.config.state, run_id=int(name)):
            return True
        _log.warning("the gateway's process cannot be told from here; its run is stopped as it is")
        return False

    def stop(self, name: str) -> None:
        """Stop the run, unless it has ended."""
        if not self.runs.state(int(name)).ended:
            self.runs.stop(int(name))
        self._remember(0)

    def left_running(self) -> str:
        """Return the run that an earlier process of this command left running, or nothing."""
        from fedinfer_flower.supervision.run_folder import RunFolder

        state = None if self.folder is None else RunFolder.read(self.folder.path)
        run_id = (state or {}).get("run_id", 0)
        if not isinstance(run_id, int) or not run_id:
            return ""
        try:
            alive = not self.runs.state(run_id).ended
        except GatewayError:
            return ""
        if alive:
            _log.info("run %d was left running; it is watched", run_id)
        return str(run_id) if alive else ""

    def _remember(self, run_id: int) -> None:
        if self.folder is not None:
            self.folder.write({"run_id": run_id})


def _read_here(path: Path) -> GatewayConfig | None:
    """Read the gateway's settings, if they are on this machine."""
    from fedinfer_flower.serving.config import GatewayConfig

    try:
        there = path.exists()
    except OSError:
        there = False
    return GatewayConfig.read(path) if there else None


def _state(config: GatewayConfig) -> Path:
    from fedinfer_flower.serving.server_app import state_folder

    return state_folder(config.state)


def _probe(config: GatewayConfig | None, url: str, path: str) -> HttpProbe:
    """Return what watches the gateway: by its URL, or by the address in its settings."""
    from fedinfer_flower.supervision.certificates import require_valid
    from fedinfer_flower.supervision.probes import HttpProbe

    options: dict[str, Any] = {"down_s": _DOWN_S, "first_s": _FIRST_S}
    if config is not None and config.certificate is not None:
        if (warning := require_valid(config.certificate)) and path == "/health":
            _log.warning("%s", warning)
        # It is this gateway that has to answer, whatever names its certificate is for.
        options["pinned"] = None if url else config.certificate
    if not url:
        if config is None:
            raise ConfigError(
                "gateway.toml cannot be read on this machine, so the gateway's address is not"
                " known here",
                hint="--gateway https://HOST:PORT; --config stays the path on the SuperLink's",
            )
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)  # noqa: S104
        host = f"[{host}]" if ":" in host else host
        scheme = "http" if config.certificate is None else "https"
        url = f"{scheme}://{host}:{config.port}"
    return HttpProbe(f"{url.rstrip('/')}{path}", **options)
