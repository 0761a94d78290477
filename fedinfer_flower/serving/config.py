"""The gateway's settings: one TOML file, typed, nothing ignored."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from fedinfer_flower.errors import ConfigError, InvalidValueError, UnknownConfigKeyError
from fedinfer_flower.wire.pins import Pins, read_pins

__all__ = ["BatchingConfig", "GatewayConfig", "LimitsConfig", "ModelConfig"]

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_KINDS: Final = ("classifier", "language")
_MAX_PORT: Final = 65_535


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """How much the gateway takes on.

    Parameters
    ----------
    body_bytes : int
        Largest request body.
    header_timeout_s, body_timeout_s : float
        How long a client may take to send headers, and a body.
    connections : int
        Most connections at a time.
    queued_rows : int
        Most rows that are accepted and not answered; more are refused.
    queued_bytes : int
        Most bytes of their bodies, which are in memory for so long.
    result_ttl_s : float
        How long results are kept for their owners.
    drain_s : float
        How long the gateway goes on with accepted queries after it was told to end.
    """

    body_bytes: int = 8 << 20
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    connections: int = 256
    queued_rows: int = 100_000
    queued_bytes: int = 512 << 20
    result_ttl_s: float = 900.0
    drain_s: float = 20.0

    def __post_init__(self) -> None:
        least = (
            self.body_bytes,
            self.header_timeout_s,
            self.body_timeout_s,
            self.connections,
            self.queued_rows,
            self.queued_bytes,
        )
        if min(least) <= 0:
            raise InvalidValueError(
                "body-bytes, header-timeout-s, body-timeout-s, connections, queued-rows and"
                " queued-bytes of [limits] are positive",
                hint="nobody could ask anything",
            )


@dataclass(frozen=True, kw_only=True)
class BatchingConfig:
    """How queries in clear are put together.

    Parameters
    ----------
    window_s : float
        How long the first query of a batch waits for others; 0.0 for not at all.
    max_rows : int
        Most rows in one message.
    in_flight : int
        Most messages that a site is sent before it has answered.
    """

    window_s: float = 0.01
    max_rows: int = 1024
    in_flight: int = 4

    def __post_init__(self) -> None:
        if self.max_rows < 1 or self.in_flight < 1:
            raise InvalidValueError("max-rows and in-flight of [batching] are at least 1")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One thing that the gateway serves: whom to ask, and how to put the answers together.

    Parameters
    ----------
    kind : {"classifier", "language"}
    rule, protection : str
        As for `FedEnsemble`.
    protection_options : mapping
    strategy : {"ensemble", "refine", "mixture", "decode"}
        How answers are made; a classifier has ``"ensemble"``.
    strategy_options : mapping
        Options of the strategy of a language model.
    clear : bool
        Whether the gateway takes queries that it can read. It asks for them with its own
        identity, which sites can pin.
    sealed : bool
        Whether it carries queries that it cannot read.
    timeout_s : float
        Default, and most, that a query takes.
    quorum : int
    min_sites : int
        Sites that have to be online.
    straggler_s : float
        How long to wait for the other sites once the quorum has answered; 0.0: to the deadline.
    price : float
        Credits a row that a caller is charged, where a ledger is kept; default what the
        sites ask.
    """

    kind: str = "classifier"
    rule: str = "auto"
    protection: str = "plain"
    protection_options: Mapping[str, Any] = field(default_factory=dict)
    strategy: str = "ensemble"
    strategy_options: Mapping[str, Any] = field(default_factory=dict)
    clear: bool = True
    sealed: bool = True
    timeout_s: float = 30.0
    quorum: int = 1
    min_sites: int = 1
    straggler_s: float = 0.0
    price: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise InvalidValueError(f"kind of a served model is one of {', '.join(_KINDS)}")
        known = ("ensemble",) if self.kind == "classifier" else ("refine", "mixture", "decode")
        if self.strategy not in known:
            raise InvalidValueError(
                f"strategy of a {self.kind} is one of {', '.join(known)}, not {self.strategy!r}"
            )
        if not (math.isfinite(self.timeout_s) and self.timeout_s > 0.0) or self.straggler_s < 0.0:
            raise InvalidValueError("timeout-s is positive, straggler-s not negative")
        if self.quorum < 1 or self.min_sites < 1:
            raise InvalidValueError("quorum and min-sites are at least 1")


@dataclass(frozen=True, kw_only=True)
class GatewayConfig:
    """What ``gateway.toml`` says.

    Parameters
    ----------
    name : str
    host, port : str, int
        Where to listen. Anything but loopback needs a certificate.
    state : Path
        Folder of the gateway: identity, API keys, outbox, audit log. Only its owner may
        read it.
    certificate, key : Path, optional
        PEM files for TLS.
    site_pins : Path, optional
        Pin file; sites that are not in its table ``[sites]`` are not asked. Without one the
        gateway takes the SuperLink's word for who the sites are.
    public_metrics : bool
        Serve ``/metrics`` without a key.
    ledger : str
        URL of a ledger; empty for none.
    limits, batching : LimitsConfig, BatchingConfig
    models : mapping of name to ModelConfig

    Examples
    --------
    >>> config = GatewayConfig.from_mapping({"models": {"triage": {"protection": "secagg"}}})
    >>> config.models["triage"].protection, config.port
    ('secagg', 8443)
    >>> GatewayConfig.from_mapping({"model": {}})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    fedinfer_flower.errors.UnknownConfigKeyError: FI206 ...
    """

    name: str = "gateway"
    host: str = "127.0.0.1"
    port: int = 8443
    state: Path = Path("gateway-state")
    certificate: Path | None = None
    key: Path | None = None
    site_pins: Path | None = None
    public_metrics: bool = False
    ledger: str = ""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    batching: BatchingConfig = field(default_factory=BatchingConfig)
    models: Mapping[str, ModelConfig]

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("a gateway without models", hint="[models.NAME] in gateway.toml")
        for name in self.models:
            if not _NAME.fullmatch(name):
                raise InvalidValueError(
                    "a model's name has lower-case letters, digits, dots, dashes: at most 64"
                )
        if not 0 <= self.port <= _MAX_PORT:
            raise InvalidValueError(f"gateway.port is at most {_MAX_PORT}")
        if (self.certificate is None) != (self.key is None):
            raise ConfigError("certificate and key go together")
        if self.certificate is None and self.host not in ("127.0.0.1", "::1", "localhost"):
            raise ConfigError(
                "without a certificate the gateway listens on loopback only: API keys and"
                " answers would travel in clear",
                hint="certificate and key in gateway.toml, or a reverse proxy in front",
            )

    def pins(self) -> Pins | None:
        """Return what the pin file says; None without one.

        Raises
        ------
        ConfigError
            If it cannot be read.
        """
        return None if self.site_pins is None else read_pins(self.site_pins)

    @classmethod
    def read(cls, path: str | Path) -> GatewayConfig:
        """Read a file; relative paths in it are relative to its folder.

        Raises
        ------
        ConfigError
            If it cannot be read, or says what nothing reads.
        """
        path = Path(path).absolute()
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
            raise ConfigError(f"{path.name} cannot be read: {type(exc).__name__}") from None
        return cls.from_mapping(values, folder=path.parent)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, folder: Path = Path()) -> GatewayConfig:
        """Read what `tomllib` made of a file: a table ``gateway``, and the others."""
        tables = dict(values)
        own = _table(tables.pop("gateway", {}), "gateway")
        limits = _read(LimitsConfig, tables.pop("limits", {}), "limits")
        batching = _read(BatchingConfig, tables.pop("batching", {}), "batching")
        served = _table(tables.pop("models", {}), "models")
        models = {str(n): _read(ModelConfig, t, f"models.{n}") for n, t in served.items()}
        if tables:
            _refuse(next(iter(tables)), ["gateway", "limits", "batching", "models"], "the file")
        given = {"state": "gateway-state"} | own
        for name in ("state", "certificate", "key", "site_pins", "site-pins"):
            if name in given:
                if not isinstance(given[name], str):
                    raise InvalidValueError(f"gateway.{name} is a path")
                given[name] = folder / given[name]
        return _read(
            cls, given, "gateway", more={"limits": limits, "batching": batching, "models": models}
        )


_T = TypeVar("_T")


def _table(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidValueError(f"{where} is a table")
    return dict(value)


def _read(
    cls: type[_T], values: object, where: str, *, more: Mapping[str, Any] | None = None
) -> _T:
    fields = {f.name: f for f in dataclasses.fields(cls) if f.name not in (more or {})}  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for key, value in _table(values, where).items():
        name = str(key).replace("-", "_")
        if name not in fields:
            _refuse(str(key), [n.replace("_", "-") for n in fields], f"[{where}]")
        given[name] = _typed(value, str(fields[name].type), f"{where}.{key}")
    return cls(**given, **(more or {}))


def _typed(value: Any, kind: str, where: str) -> Any:
    if kind.startswith("float") and type(value) is int:
        value = float(value)
    wanted = {"str": str, "int": int, "float": float, "bool": bool}.get(
        kind.split(" ", maxsplit=1)[0]
    )
    if wanted is not None and type(value) is not wanted:
        raise InvalidValueError(f"{where} is a {type(value).__name__}, expected {wanted.__name__}")
    if wanted in (int, float) and (not math.isfinite(value) or value < 0):
        raise InvalidValueError(f"{where} is a finite number that is not negative")
    if kind.startswith("Mapping"):
        value = {str(k).replace("-", "_"): v for k, v in _table(value, where).items()}
    return value


def _refuse(key: str, known: list[str], where: str) -> None:
    near = difflib.get_close_matches(key, known, n=1)
    raise UnknownConfigKeyError(
        f"{where} has {key[:64]!r}, which nothing reads",
        hint=f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}",
    )
