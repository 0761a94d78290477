"""`fedinfer gateway`: its API keys, and whether its settings are sound."""

from __future__ import annotations

import json
import os
import re
import time
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fedinfer_flower.errors import InvalidValueError

if TYPE_CHECKING:
    from fedinfer_flower.serving.config import GatewayConfig
    from fedinfer_flower.serving.key_store import ApiKey, KeyStore

__all__ = ["gateway_app"]

_UNITS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}

gateway_app = typer.Typer(help="API keys and settings of a gateway.", no_args_is_help=True)
key_app = typer.Typer(help="API keys.", no_args_is_help=True)
gateway_app.add_typer(key_app, name="key")

Config = Annotated[Path, typer.Option(help="gateway.toml")]
Out = Annotated[Path | None, typer.Option(help="write the key here (mode 0600), print no secret")]
KeyId = Annotated[str, typer.Argument(help="id of the key: 8 hex digits")]


@gateway_app.command()
def check(
    path: Annotated[Path, typer.Argument(help="gateway.toml")],
    as_json: Annotated[bool, typer.Option("--json", help="print findings as JSON")] = False,
) -> None:
    """Check a gateway.toml, the files it names and its state folder; warn of what is weak.

    Ends with status 2 if the gateway would not start, or its certificate has ended.

    Example: fedinfer gateway check gateway.toml
    """
    from fedinfer_flower.serving.admission import check_models
    from fedinfer_flower.serving.config import GatewayConfig
    from fedinfer_flower.serving.server_app import state_folder
    from fedinfer_flower.serving.tls_server import Certificate
    from fedinfer_flower.supervision.certificates import require_valid

    config = GatewayConfig.read(path)
    check_models(config)
    soon = ""
    if config.certificate is not None and config.key is not None:
        _ = Certificate(config.certificate, config.key)
        # The gateway would start, and no client would talk to it.
        soon = require_valid(config.certificate)
    if config.state.exists():
        _ = state_folder(config.state)
    warnings = _warnings(config) + ([soon] if soon else [])
    if as_json:
        typer.echo(json.dumps({"models": sorted(config.models), "warnings": warnings}))
        return
    scheme = "http" if config.certificate is None else "https"
    typer.echo(f"{config.name} serves {', '.join(sorted(config.models))}")
    typer.echo(f"at {scheme}://{config.host}:{config.port}, state in {config.state}")
    for warning in warnings:
        typer.echo(f"warning: {warning}")


@key_app.command()
def create(
    name: Annotated[str, typer.Argument(help="who will have it")],
    config: Config,
    scope: Annotated[
        list[str] | None, typer.Option(help="query, sealed, chat, status, metrics; repeat")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="a model it may use; repeat; default all")
    ] = None,
    rows_per_minute: Annotated[int, typer.Option(min=0, help="0 for no limit")] = 0,
    rows_per_day: Annotated[int, typer.Option(min=0, help="of UTC days; 0 for no limit")] = 0,
    concurrent: Annotated[int, typer.Option(min=0, help="queries at a time; 0: no limit")] = 0,
    expires: Annotated[str, typer.Option(help="after so long: 90d, 12h; default never")] = "",
    out: Out = None,
) -> None:
    """Make an API key. Its secret is shown this once; the gateway keeps a hash.

    Example: fedinfer gateway key create lab --config gateway.toml --scope query
    --rows-per-day 10000 --expires 90d
    """
    read = _config(config)
    unknown = set(model or ()) - set(read.models)
    if unknown:
        raise InvalidValueError(
            "the gateway serves no such model", hint=f"known: {', '.join(sorted(read.models))}"
        )
    expires_at = time.time() + _seconds(expires) if expires else 0.0
    scopes = scope or ["query", "sealed"]
    with closing(_keys(read)) as keys:
        _require_room(out)
        text = keys.create(
            name,
            scopes=scopes,
            models=model or None,
            rows_per_minute=rows_per_minute,
            rows_per_day=rows_per_day,
            concurrent=concurrent,
            expires_at=expires_at,
        )
        _hand_over(text, out)
        _write_down(read, "key-created", text.split("_")[1], scopes=",".join(sorted(scopes)))


@key_app.command("list")
def list_keys(
    config: Config,
    as_json: Annotated[bool, typer.Option("--json", help="print as JSON")] = False,
) -> None:
    """List all keys, without secrets.

    Example: fedinfer gateway key list --config gateway.toml
    """
    now = time.time()
    with closing(_keys(_config(config))) as keys:
        lines = [_as_json(key, keys.rows.today(key.key_id), now) for key in keys.list()]
    if as_json:
        typer.echo(json.dumps(lines))
        return
    for line in lines:
        limits = "/".join(str(line[n]) for n in ("rows_per_minute", "rows_per_day", "concurrent"))
        typer.echo(
            f"{line['key_id']}  {line['state']:<8} {line['name']}"
            f"  {','.join(line['scopes'])}  models {','.join(line['models'] or ['all'])}"
            f"  limits {limits}  rows today {line['rows_today']}"
        )


@key_app.command()
def rotate(
    key_id: KeyId,
    config: Config,
    grace: Annotated[str, typer.Option(help="how long the old secret stays good: 1h, 7d")] = "1d",
    out: Out = None,
) -> None:
    """Give a key a new secret; the old one stays good for a while.

    Example: fedinfer gateway key rotate 0a1b2c3d --config gateway.toml --grace 7d
    """
    read = _config(config)
    with closing(_keys(read)) as keys:
        _require_room(out)
        _hand_over(keys.rotate(key_id, grace_s=_seconds(grace)), out)
        _write_down(read, "key-created", key_id, reason="rotated")


@key_app.command()
def revoke(key_id: KeyId, config: Config) -> None:
    """End a key; the running gateway knows within a second.

    Example: fedinfer gateway key revoke 0a1b2c3d --config gateway.toml
    """
    read = _config(config)
    with closing(_keys(read)) as keys:
        keys.revoke(key_id)
    _write_down(read, "key-revoked", key_id)
    typer.echo(f"{key_id} is revoked")


def _config(path: Path) -> GatewayConfig:
    from fedinfer_flower.serving.config import GatewayConfig

    return GatewayConfig.read(path)


def _keys(config: GatewayConfig) -> KeyStore:
    from fedinfer_flower.serving.key_store import KeyStore
    from fedinfer_flower.serving.server_app import KEYS_FILE, state_folder

    return KeyStore(state_folder(config.state) / KEYS_FILE)


def _write_down(config: GatewayConfig, event: str, key_id: str, **facts: str) -> None:
    from fedinfer_flower.observability.audit_log import AuditLog
    from fedinfer_flower.serving.server_app import AUDIT_FILE

    _ = AuditLog(config.state / AUDIT_FILE, role="gateway").append(event, querier=key_id, **facts)


def _require_room(out: Path | None) -> None:
    # Before the key is made: one that cannot be handed over would be lost.
    if out is not None and out.exists():
        raise InvalidValueError(f"{out.name} exists", hint="choose another file")


def _hand_over(text: str, out: Path | None) -> None:
    if out is None:
        typer.echo(text)
        return
    with os.fdopen(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(f"{text}\n")
    typer.echo(f"key {text.split('_')[1]} is in {out}")


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d{1,6})([smhd])", text)
    if found is None:
        raise InvalidValueError("a time is a number and s, m, h or d: 90d, 12h")
    return int(found[1]) * _UNITS[found[2]]


def _as_json(key: ApiKey, rows_today: int, now: float) -> dict[str, Any]:
    state = "revoked" if key.revoked_at else "good" if key.is_good(now) else "expired"
    line = asdict(key) | {
        "scopes": sorted(key.scopes),
        "models": None if key.models is None else sorted(key.models),
        "state": state,
        "rows_today": rows_today,
    }
    for name in ("created_at", "expires_at", "revoked_at", "earlier_until"):
        at = float(getattr(key, name))
        line[name] = datetime.fromtimestamp(at, tz=UTC).isoformat(timespec="seconds") if at else ""
    return line


def _warnings(config: GatewayConfig) -> list[str]:
    found = []
    if config.certificate is None:
        found.append("no certificate: only a proxy on this machine can make this safe")
    if config.public_metrics:
        found.append("metrics are public: anyone who connects learns volume and failures")
    if config.key is not None and os.name == "posix" and config.key.stat().st_mode & 0o077:
        found.append(f"others can read the private key {config.key.name}: chmod 600")
    for name, model in sorted(config.models.items()):
        if model.clear and model.kind == "classifier":
            found.append(
                f"{name}: the gateway can read queries in clear; clear = false for sealed ones only"
            )
        if model.protection == "plain":
            found.append(f"{name}: under 'plain' the gateway sees each site's scores")
        if model.quorum < model.min_sites and model.protection.startswith(("secagg", "he")):
            found.append(f"{name}: a quorum below min-sites opens sums of fewer sites")
        if model.straggler_s >= model.timeout_s:
            found.append(f"{name}: straggler-s is not below timeout-s, so it does nothing")
    return found
