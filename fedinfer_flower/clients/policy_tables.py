"""The tables of a site policy, one frozen value each; keys in the file are in kebab-case."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fedinfer_flower.clients.consent import FURTHER_WORK, OptionLimits
from fedinfer_flower.clients.policy_kinds import ACTION_VERBS, KINDS
from fedinfer_flower.errors import ConfigError, InvalidValueError
from fedinfer_flower.query import CountsKind
from fedinfer_flower.wire.envelope import DEFAULT_LIMITS

__all__ = ["AnswerRules", "AuditRules", "CodeRules", "LimitRules", "ModelRules", "SiteRules"]

_LOADER: Final = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_MODULE: Final = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class SiteRules:
    """Table ``[site]``.

    Parameters
    ----------
    name : str
        As the coordinator and the other sites see it: 1 to 128 printable characters.
    home : Path
        Folder of keys, used query ids, budget, counters, audit log and status files. Made
        for its owner alone.
    """

    name: str
    home: Path

    def __post_init__(self) -> None:
        if not (0 < len(self.name) <= 128 and self.name.isprintable()):
            raise InvalidValueError("[site] name has 1 to 128 printable characters")


@dataclass(frozen=True, kw_only=True)
class ModelRules:
    """Table ``[model]``: where the model comes from, and what is said of it.

    Parameters
    ----------
    loader : str
        ``"module:function"``, importable at the site, called with Flower's Context.
    kind : str
        An adapter of `clients.adapters`, such as ``"onnx"``; instead of `loader`.
    options : mapping
        Of the adapter. A ``path`` in it is relative to the folder of the policy.
    id : str
        Name of the model in its card, which the coordinator sees.
    digest : str
        SHA-256 in hex of the loaded model (`clients.model_digest`), or of the file at
        ``options.path``. With another one the site does not serve.
    classes : tuple of str
        Class of each output column, where the model does not know.
    share_counts : {"presence", "counts", "withheld"}
        What the coordinator is told of the training data's classes.
    """

    loader: str = ""
    kind: str = ""
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    id: str = ""
    digest: str = ""
    classes: tuple[str, ...] = ()
    share_counts: str = "presence"

    def __post_init__(self) -> None:
        require_source("model", self.loader, self.kind, self.options)
        if self.digest and not _DIGEST.fullmatch(self.digest):
            raise InvalidValueError("[model] digest is a SHA-256: 64 lower-case hex digits")
        if self.share_counts not in CountsKind.__members__.values():
            raise InvalidValueError("[model] share-counts is 'presence', 'counts' or 'withheld'")
        if len(self.id) > 128 or not self.id.isprintable():
            raise InvalidValueError("[model] id has at most 128 printable characters")


@dataclass(frozen=True, kw_only=True)
class AnswerRules:
    """Table ``[answers]``: what may leave the site.

    Parameters
    ----------
    actions : tuple of str
        Verbs that the site follows; see `policy_kinds.ACTION_VERBS`.
    kinds : tuple of str
        What an answer may be; see `policy_kinds.KINDS`.
    protections : tuple of str
        The only protections under which the classifier answers. A site with a classifier
        must say them; language models have none, as text and caches are for who gets them.
    rules : tuple of str
        The only ensemble rules; empty for all whose kind is listed.
    require_seal : bool
        Refuse queries that the coordinator could read, or make up.
    anyone : bool
        Answer queriers whose key is not in ``[queriers]``.
    min_cohort : int
        Fewest sites in a sum that may be opened, where a sum hides the answer; a protection
        that asks for more keeps its own. 0 for that alone.
    max_epsilon_per_query : float, optional
        Most epsilon for one query row.
    require_self_mask, max_dropout_share, min_collusion_share, max_delta : see `OptionLimits`
    agrees_to : tuple of str
        Of `clients.consent.FURTHER_WORK`.
    receipts : bool
        Sign a statement with every answer.
    price_per_query : float, optional
        Credits for one row, shown in the site's profile; default what the model's loader says.
    """

    protections: tuple[str, ...] = ()
    actions: tuple[str, ...] = ("hello", "predict", "recover", "ping")
    kinds: tuple[str, ...] = ("votes", "scores")
    rules: tuple[str, ...] = ()
    require_seal: bool = True
    anyone: bool = False
    min_cohort: int = 0
    max_epsilon_per_query: float | None = None
    require_self_mask: bool = False
    max_dropout_share: float = 0.5
    min_collusion_share: float = 0.0
    max_delta: float = 1e-3
    agrees_to: tuple[str, ...] = ()
    receipts: bool = True
    price_per_query: float | None = None

    def __post_init__(self) -> None:
        for name, given, known in (
            ("actions", self.actions, ACTION_VERBS),
            ("kinds", self.kinds, KINDS),
            ("agrees-to", self.agrees_to, sorted(FURTHER_WORK)),
        ):
            wrong = [item for item in given if item not in known]
            if wrong:
                raise InvalidValueError(
                    f"[answers] {name} names {wrong[0][:64]!r}", hint=f"known: {', '.join(known)}"
                )
        if not self.actions:
            raise InvalidValueError("[answers] actions is empty: the site would do nothing")
        if not 0 <= self.min_cohort <= 1_000_000:
            raise InvalidValueError("[answers] min-cohort is in [0, 1000000]")
        for name, value, most in (
            ("max-epsilon-per-query", self.max_epsilon_per_query, 1e6),
            ("price-per-query", self.price_per_query, 1e9),
            ("max-dropout-share", self.max_dropout_share, 1.0),
            ("min-collusion-share", self.min_collusion_share, 1.0),
            ("max-delta", self.max_delta, 1.0),
        ):
            if value is not None and not 0.0 <= value <= most:
                raise InvalidValueError(f"[answers] {name} is in [0, {most:g}]")

    @property
    def option_limits(self) -> OptionLimits:
        """How far the querier's choice of privacy options may go."""
        return OptionLimits(
            require_self_mask=self.require_self_mask,
            max_dropout_share=self.max_dropout_share,
            min_collusion_share=self.min_collusion_share,
            max_delta=self.max_delta,
        )


@dataclass(frozen=True, kw_only=True)
class LimitRules:
    """Table ``[limits]``; 0 is no limit where it says so. Counters: `clients.rate_guard`.

    Parameters
    ----------
    rows_per_query : int
        Most rows, or questions, in one message.
    bytes_per_query : int
        Largest message that is read.
    queries_per_minute : int
        Of one querier, in any 60 seconds; 0 for no limit.
    rows_per_day : int
        Of one querier, in any 24 hours; 0 for no limit.
    rows_per_day_in_all : int
        Of all queriers together, in any 24 hours; 0 for no limit.
    """

    rows_per_query: int = 10_000
    bytes_per_query: int = 64 << 20
    queries_per_minute: int = 0
    rows_per_day: int = 0
    rows_per_day_in_all: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("rows_per_query", 1, DEFAULT_LIMITS.max_rows),
            ("bytes_per_query", 1024, DEFAULT_LIMITS.max_payload_bytes),
            ("queries_per_minute", 0, 1_000_000),
            ("rows_per_day", 0, 10**12),
            ("rows_per_day_in_all", 0, 10**12),
        ):
            if not low <= getattr(self, name) <= high:
                key = name.replace("_", "-")
                raise InvalidValueError(f"[limits] {key} is in [{low}, {high}]")


@dataclass(frozen=True, kw_only=True)
class CodeRules:
    """Table ``[code]``: whose code answers.

    Parameters
    ----------
    app : {"own", "fab"}
        ``"own"``: the package installed at the site, and no code of a FAB. ``"fab"``: the
        ClientApp of a FAB whose SHA-256 is in `fab_hashes`.
    fab_hashes : tuple of str
    trusted_entities : Path, optional
        For ``flower-supernode --trusted-entities``.
    preload : tuple of str
        Modules that the worker imports before its first task.
    """

    app: str = "own"
    fab_hashes: tuple[str, ...] = ()
    trusted_entities: Path | None = None
    preload: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.app not in ("own", "fab"):
            raise InvalidValueError("[code] app is 'own' or 'fab'")
        if not all(_DIGEST.fullmatch(item) for item in self.fab_hashes):
            raise InvalidValueError("[code] fab-hashes are SHA-256: 64 lower-case hex digits")
        if (self.app == "fab") != bool(self.fab_hashes):
            raise ConfigError(
                "[code] app = 'fab' and fab-hashes go together",
                hint="list the SHA-256 of every FAB that may run, or leave both out",
            )
        if not all(_MODULE.fullmatch(item) for item in self.preload):
            raise InvalidValueError("[code] preload is a list of modules, such as 'torch'")


@dataclass(frozen=True, kw_only=True)
class AuditRules:
    """Table ``[audit]``.

    Parameters
    ----------
    log : str
        Name of the file in the home.
    enabled : bool
        Whether decisions are logged; while they are, a log that cannot be written stops all
        answers.
    """

    log: str = "audit.jsonl"
    enabled: bool = True

    def __post_init__(self) -> None:
        if not self.log or Path(self.log).name != self.log:
            raise InvalidValueError("[audit] log is the name of a file in the home")


def require_source(where: str, loader: str, kind: str, options: Mapping[str, Any]) -> None:
    """Require one source of a model: a loader, or a kind with its options.

    Raises
    ------
    ConfigError
    """
    if bool(loader) == bool(kind):
        raise ConfigError(
            f"[{where}] names either loader or kind",
            hint='loader = "my_package.models:load_model", or kind = "onnx" with [model.options]',
        )
    if loader and not _LOADER.fullmatch(loader):
        raise InvalidValueError(f"[{where}] loader has the form 'module:function'")
    if loader and options:
        raise ConfigError(f"[{where}] options belong to a kind, not to a loader")
