"""`fedinfer key`: the fingerprint that people compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["key"]


def key(
    path: Annotated[Path, typer.Argument(help="identity file, or the home folder of a site")],
) -> None:
    """Print the key id of an identity; make the identity if there is none.

    A site's operator gives the key id to queriers, a querier to the sites, by a channel
    that the coordinator does not control. Both write it into their pin files.

    Example: fedinfer key /var/lib/fedinfer
    """
    from fedinfer_flower.wire.identity import Identity

    file = path / "identity.json" if path.is_dir() or not path.suffix else path
    typer.echo(Identity.load_or_create(file).key_id)
