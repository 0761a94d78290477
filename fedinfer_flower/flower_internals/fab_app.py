"""The ClientApp of an app bundle, as Flower's own executor installs and loads it."""

from __future__ import annotations

import hashlib

from flwr.cli.install import install_from_fab
from flwr.clientapp import ClientApp
from flwr.clientapp.utils import get_load_client_app_fn

from fedinfer_flower.errors import DeploymentError

__all__ = ["app_of_fab"]


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
