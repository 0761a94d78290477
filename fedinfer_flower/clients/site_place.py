"""Where a site keeps its things, and what it is called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flwr.app import Context

__all__ = ["Home", "site_folder", "site_name"]

Home = str | Path | Callable[[Context], str | Path] | None


def site_folder(home: Home, context: Context) -> Path | None:
    """Return the site's home folder; in simulation the one of its partition.

    Parameters
    ----------
    home : path or callable, optional
        As given to the mod; default ``fedinfer-home`` in the node config.
    context : Context
    """
    given = home(context) if callable(home) else home
    name = str(given or context.node_config.get("fedinfer-home") or "")
    if not name:
        return None
    partition = context.node_config.get("partition-id")
    return Path(name) / ("" if partition is None else f"partition-{partition}")


def site_name(name: str | None, context: Context) -> str:
    """Return the site's name: the given one, that of the node config, or its number."""
    default = f"site-{context.node_config.get('partition-id', context.node_id)}"
    return str(name or context.node_config.get("name", default))[:128]
