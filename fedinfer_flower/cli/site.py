"""`fedinfer site`: run a site, and see what runs."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedinfer_flower.errors import AuditLogError, DeploymentError

if TYPE_CHECKING:
    from fedinfer_flower.cli.site_children import Programs
    from fedinfer_flower.clients.policy import SitePolicy

__all__ = ["run_site", "site_app"]

_log = logging.getLogger("fedinfer_flower.cli.site")

site_app = typer.Typer(help="Run a site, and see what runs.", no_args_is_help=True)

_Policy = Annotated[Path, typer.Option(help="the site's policy file, site.toml")]


@site_app.command()
def up(
    policy: _Policy,
    superlink: Annotated[str, typer.Option(help="HOST:PORT of the SuperLink's fleet routes")],
    root_certificates: Annotated[
        Path | None, typer.Option(help="PEM bundle for TLS; default: the system's authorities")
    ] = None,
    node_key: Annotated[
        Path | None, typer.Option(help="private key that is registered at the SuperLink")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="plain HTTP; loopback only")] = False,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="loopback port between the processes; 0: free")
    ] = 0,
    stock: Annotated[
        bool, typer.Option("--stock", help="Flower's own SuperNode: slow, a process a message")
    ] = False,
    any_code: Annotated[
        bool, typer.Option("--any-code", help="with --stock: run whatever the SuperLink sends")
    ] = False,
    once: Annotated[
        bool, typer.Option("--once", help="end with the first process that ends; no restarts")
    ] = False,
) -> None:
    """Run a site until SIGTERM: a SuperNode, a worker that keeps the model loaded, a watchdog.

    Processes that end, or whose heartbeat stops, are started again with growing waits. On
    SIGTERM the worker finishes its task first. Their output goes to logs/ in the site's home;
    what happens to them, as JSON lines, to standard error.

    Example: fedinfer site up --policy site.toml --superlink fleet.example:443
    --root-certificates ca.crt --node-key node.key
    """
    from fedinfer_flower.cli.site_children import Link
    from fedinfer_flower.observability.json_logs import configure_json_logs

    link = Link(
        address=superlink,
        root_certificates=root_certificates,
        node_key=node_key,
        insecure=insecure,
    )
    configure_json_logs(level=logging.INFO)
    # Flower's database library tells of its own start.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    status = run_site(
        policy.absolute(), link=link, port=port, stock=stock, any_code=any_code, once=once
    )
    raise typer.Exit(status)


def run_site(
    policy_path: Path,
    *,
    link: Any,
    port: int = 0,
    stock: bool = False,
    any_code: bool = False,
    once: bool = False,
    programs: Programs | None = None,
) -> int:
    """Check everything, then run a site until it is told to stop; return the exit status.

    Parameters
    ----------
    policy_path : Path
    link : Link
    port : int
        Loopback port of the SuperNode; 0 for a free one.
    stock, any_code, once : bool
        As for the command.
    programs : Programs, optional
        Others than Flower's and ours, for tests.

    Raises
    ------
    ConfigError
        If the policy, a key, a certificate or a folder is not as it has to be. Nothing has
        been started then.
    """
    from fedinfer_flower.cli.site_children import RuntimeAddress, site_children
    from fedinfer_flower.clients.policy import SitePolicy
    from fedinfer_flower.supervision.run_folder import RunFolder, private_folder
    from fedinfer_flower.supervision.supervisor import StopFlag, Supervisor

    _require_own_file(policy_path)
    policy = SitePolicy.read(policy_path)
    home = policy.open_home()
    if warning := link.check_files():
        _log.warning("%s", warning)
    stock = _choose_stock(policy, stock=stock, any_code=any_code)
    for name in ("logs", "flower"):
        private_folder(home / name)
    folder = RunFolder(home / "run")
    folder.take()
    try:
        children = site_children(
            policy,
            policy_path=policy_path,
            home=home,
            link=link,
            runtime=RuntimeAddress(port),
            stock=stock,
            programs=programs,
        )
        supervisor = Supervisor(children, folder=folder, settle_s=0.5)
        _note(policy, home, "started", stock=stock)
        try:
            return supervisor.run(StopFlag().on_signals(), once=once)
        finally:
            _note(policy, home, "stopped", stock=stock)
    finally:
        folder.release()


@site_app.command()
def status(
    policy: _Policy,
    as_json: Annotated[bool, typer.Option("--json", help="print it as JSON")] = False,
) -> None:
    """Say what runs at a site, since when, and why it was last started again.

    Exit status 1 if no supervisor runs, or one of its processes does not.

    Example: fedinfer site status --policy site.toml
    """
    from fedinfer_flower.clients.policy import SitePolicy

    read = SitePolicy.read(policy)
    facts = _status_of(read.site.home.absolute())
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        for line in _status_lines(read.site.name, facts):
            typer.echo(line)
    if not facts["well"]:
        raise typer.Exit(1)


def _status_of(home: Path) -> dict[str, Any]:
    from fedinfer_flower.supervision.run_folder import RunFolder

    state = RunFolder.read(home / "run") or {}
    runs = RunFolder.is_taken(home / "run")
    children = [dict(child) for child in state.get("children", ())] if runs else []
    for child in children:
        beat = _beat(home / "run" / f"{child['name']}.json")
        child |= {
            name: beat[name] for name in ("state", "tasks_done", "last_error") if name in beat
        }
        if isinstance(beat.get("beat_at"), int | float):
            child["beat_age_s"] = round(max(0.0, time.time() - beat["beat_at"]), 1)
    return {
        "runs": runs,
        "well": runs and bool(children) and all(child["pid"] for child in children),
        "pid": state.get("pid", 0) if runs else 0,
        "started_at": state.get("started_at", 0.0) if runs else 0.0,
        "children": children,
    }


def _status_lines(name: str, facts: dict[str, Any]) -> list[str]:
    if not facts["runs"]:
        return [f"{name}: no supervisor runs (fedinfer site up)"]
    lines = [f"{name}: supervisor {facts['pid']}"]
    for child in facts["children"]:
        words = [f"  {child['name']}:", f"process {child['pid']}" if child["pid"] else "down"]
        words += [f"for {child['running_s']:.0f} s,"] if child["pid"] else []
        words += [f"{child['state']},"] if child.get("state") else []
        words += [f"{child['tasks_done']} tasks,"] if "tasks_done" in child else []
        words += [f"restarts: {child['restarts']}"]
        words += [f"({child['last_end']})"] if child["last_end"] else []
        lines.append(" ".join(words))
    return lines


def _beat(path: Path) -> dict[str, Any]:
    try:
        status = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return status if isinstance(status, dict) else {}


def _choose_stock(policy: SitePolicy, *, stock: bool, any_code: bool) -> bool:
    """Return whether Flower's own SuperNode is run; say so, once."""
    from fedinfer_flower.cli.site_children import require_stock_allowed
    from fedinfer_flower.flower_internals import require_flower

    why = "--stock was asked for"
    if not stock:
        try:
            require_flower()
        except DeploymentError as exc:
            why = exc.message
        else:
            return False
    require_stock_allowed(policy, any_code=any_code, why=why)
    _log.warning("%s: the stock SuperNode runs, a process for each message", why)
    if policy.code.trusted_entities is None:
        _log.warning("this site runs whatever code the SuperLink sends (--any-code)")
    return True


def _require_own_file(path: Path) -> None:
    """Require a policy that nobody but this user, or root, can change or put another in place of.

    Raises
    ------
    DeploymentError
    """
    import os

    if os.name != "posix" or not path.exists():
        return
    found, folder = path.stat(), path.resolve().parent.stat()
    words = f"the policy {path.name!r}: they would decide what leaves this site"
    if found.st_mode & 0o022:
        raise DeploymentError(f"others may write to {words}", hint=f"chmod go-w {path.name}")
    if found.st_uid not in (0, os.geteuid()):
        raise DeploymentError(
            f"another user owns {words}", hint=f"chown it to root, or to this user: {path.name}"
        )
    # In a sticky folder, such as /tmp, others may add files, and not rename this one.
    if folder.st_mode & 0o002 and not folder.st_mode & 0o1000:
        raise DeploymentError(
            f"others may rename files in the folder of {words}", hint="chmod o-w the folder"
        )


def _note(policy: SitePolicy, home: Path, event: str, *, stock: bool) -> None:
    """Write to the audit log, where there is one. The worker refuses to answer without it."""
    if not policy.audit.enabled:
        return
    from fedinfer_flower.observability.audit_log import AuditLog

    try:
        AuditLog(home / policy.audit.log, role="site").append(
            event, action="site-up", rule_name="stock" if stock else "warm"
        )
    except AuditLogError as exc:
        # The end of a site must not hang on its log; its start must.
        if event == "started":
            raise
        _log.error("%s", exc.message)
