"""App bundles: the ClientApp of one, as Flower's own executor loads it, and its run config."""

from __future__ import annotations

import hashlib
import logging
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any, Final

from flwr.cli.install import install_from_fab
from flwr.clientapp import ClientApp
from flwr.clientapp.utils import get_load_client_app_fn
from flwr.common.config import get_fused_config_from_fab

from fedinfer_flower.errors import DeploymentError

__all__ = ["app_of_fab", "run_config_of"]

log = logging.getLogger("fedinfer_flower.site")

_MAX_CONFIG_BYTES: Final = 1 << 20


def app_of_fab(content: bytes, *, fab_id: str, fab_version: str, fab_hash: str) -> ClientApp:
    """Install a bundle under Flower's home folder and import its ClientApp.

    Runs the bundle's code: whether it may is the caller's question.

    Raises
    ------
    DeploymentError
        If the bytes are not those of the hash.
    """
    if hashlib.sha256(content).hexdigest() != fab_hash:
        raise DeploymentError("the app bundle is not the one that its hash names")
    install_from_fab(content, skip_prompt=True)
    load = get_load_client_app_fn(default_app_ref="", app_path=None, multi_app=True)
    return load(fab_id, fab_version, fab_hash)


def run_config_of(fab_file: Path | bytes, run: Any) -> dict[str, Any]:
    """Return a run's config from its bundle as Flower reads it; empty if that cannot be read.

    In Flower a bundle that is damaged, or whose ``pyproject.toml`` unpacks to gigabytes, ends
    the SuperNode.
    """
    try:
        source = BytesIO(fab_file) if isinstance(fab_file, bytes) else fab_file
        with zipfile.ZipFile(source) as bundle:
            # The reader stops at this size, so it cannot be a lie.
            if bundle.getinfo("pyproject.toml").file_size > _MAX_CONFIG_BYTES:
                raise ValueError("a run config that is too large")
        return dict(get_fused_config_from_fab(fab_file, run))
    except Exception as exc:
        log.warning("a run's app bundle cannot be read (%s)", type(exc).__name__)
        return {}
