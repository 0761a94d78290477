"""Pin files: key ids that people have compared out of band.

A pin file is TOML::

    [sites]
    hospital-a = "9f8e..."      # 64 hex digits, as `fedinfer key` prints

    [queriers]
    registry = "01ab..."
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedinfer_flower.errors import ConfigError, UntrustedKeyError

__all__ = ["Pins", "read_pins"]

_KEY_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Pins:
    """Key ids by name.

    Parameters
    ----------
    sites, queriers : mapping of name to key id

    Examples
    --------
    >>> pins = Pins(sites={"a": "0" * 64})
    >>> pins.require_site("a", "1" * 64)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    fedinfer_flower.errors.UntrustedKeyError: FI311 ...
    """

    sites: Mapping[str, str] = field(default_factory=dict)
    queriers: Mapping[str, str] = field(default_factory=dict)

    def require_site(self, name: str, key_id: str) -> None:
        """Require that a site's key is the pinned one.

        Raises
        ------
        UntrustedKeyError
            If the name is pinned to another key, or not pinned at all.
        """
        pinned = self.sites.get(name)
        if pinned is None:
            raise UntrustedKeyError(
                f"site {name!r} with key {key_id[:16]} is not in the pin file",
                hint="compare the key with the site's operator, then add it under [sites]",
            )
        if pinned != key_id:
            raise UntrustedKeyError(
                f"site {name!r} shows key {key_id[:16]}, pinned is {pinned[:16]}: the key was"
                " swapped, or the site made a new one",
                hint="ask the site's operator, by another channel, which key is theirs",
            )


def read_pins(path: Path) -> Pins:
    """Read a pin file.

    Raises
    ------
    ConfigError
        If it is missing or not of this form.
    """
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise ConfigError(
            f"the pin file {path.name!r} cannot be read: {type(exc).__name__}",
            hint='TOML with [sites] and [queriers], lines of name = "key id"',
        ) from None
    unknown = content.keys() - {"sites", "queriers"}
    if unknown:
        raise ConfigError(
            f"the pin file {path.name!r} has an unknown table {min(unknown)[:32]!r}",
            hint="tables: [sites], [queriers]",
        )
    tables = {name: content.get(name, {}) for name in ("sites", "queriers")}
    for name, table in tables.items():
        _require_key_ids(path, name, table)
    return Pins(sites=tables["sites"], queriers=tables["queriers"])


def _require_key_ids(path: Path, name: str, table: object) -> None:
    pairs = table.items() if isinstance(table, dict) else [("", None)]
    for owner, key_id in pairs:
        if not isinstance(key_id, str) or not _KEY_ID.fullmatch(key_id):
            raise ConfigError(
                f"[{name}] of the pin file {path.name!r}: entry {owner[:64]!r} is no key id",
                hint="a key id is 64 lower-case hex digits",
            )
