"""What the package uses of Flower beyond its public interface: here and nowhere else.

Flower's public interface starts a process for every message and pauses for seconds between
looks. The warm path therefore works with Flower's own parts from within. They may change with
any release, so `require_flower` compares version and signatures before any of them is used, and
everything that needs them stays optional: sites and coordinators run on stock Flower too, slower.

=================  =======================================================================
`guard`            the list of the names that are used, and `require_flower`
`pulling`          `shorten_pull_backoff`
`local_wire`       Flower's wire format in one process, for `simulation.LocalGrid`
`task_frames`      how worker and warm SuperNode pass a task in one request
`task_desk`        the worker's side: take a task, give the reply
`node_client`      a worker's requests to its SuperNode
`node_desk`        the SuperNode's side: hand out a task, wait for its reply, bounded
`node_routes`      the SuperNode's three HTTP routes for the worker
`node_key`         how the two show each other that they have one key
`polling`          how long to pause between looks, and how long to wait at most
`warm_node`        `flower-supernode` with all of that put in
`lean_grid`        Flower's grid with fewer requests
`derived`          objects of a message that its receiver rebuilds
`fab_app`          the ClientApp of an app bundle, and its run config
=================  =======================================================================

Importing this module imports nothing of Flower.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedinfer_flower.flower_internals.guard import KNOWN_FLOWER, require_flower

if TYPE_CHECKING:
    from flwr.serverapp import Grid

__all__ = ["KNOWN_FLOWER", "lean_grid", "require_flower", "shorten_pull_backoff"]


def lean_grid(grid: Grid) -> Grid:
    """Return a grid that needs fewer requests; the given one, if it is not Flower's HTTP grid.

    Parameters
    ----------
    grid : Grid
        Nobody else may call it from now on.

    Raises
    ------
    DeploymentError
        If this is not the Flower whose internals are known.
    """
    require_flower()
    from flwr.superlink.grid.http_grid import HttpGrid

    from fedinfer_flower.flower_internals.lean import LeanGrid

    return LeanGrid(grid) if type(grid) is HttpGrid else grid


def shorten_pull_backoff(*, initial_s: float = 0.01, cap_s: float = 0.25) -> None:
    """Look again after milliseconds, not a second, when a message is there before its objects.

    Flower announces a message first and uploads its parts after. Whoever looks in between waits
    for `initial_s`, doubled up to `cap_s`, instead of 1 s doubled up to 10 s. For this process;
    call it in a SuperNode, a worker and a ServerApp.

    Parameters
    ----------
    initial_s, cap_s : float

    Raises
    ------
    DeploymentError
        If this is not the Flower whose internals are known.
    """
    require_flower()
    from fedinfer_flower.flower_internals.pulling import shorten

    shorten(initial_s=initial_s, cap_s=cap_s)
