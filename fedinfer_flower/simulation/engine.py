"""Flower's simulation engine (Ray), started with settings that fit small machines."""

from __future__ import annotations

import os
import warnings
from typing import Final

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedinfer_flower.errors import MissingExtraError

__all__ = ["QUIET_ENVIRONMENT", "run_on_engine"]

QUIET_ENVIRONMENT: Final = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # One thread a model: several sites share the cores.
    "OMP_NUM_THREADS": "1",
}
"""No telemetry, no update checks, no installing at run time."""


def run_on_engine(
    server_app: ServerApp, client_app: ClientApp, *, num_supernodes: int, num_cpus: int = 2
) -> None:
    """Run both apps on Flower's simulation engine; one per process.

    Parameters
    ----------
    server_app : ServerApp
    client_app : ClientApp
        Pickled to the engine's workers; they keep models resident.
    num_supernodes : int
    num_cpus : int
        Workers, one core each.

    Raises
    ------
    MissingExtraError
        If the engine is not installed.
    """
    os.environ.update({k: v for k, v in QUIET_ENVIRONMENT.items() if k not in os.environ})
    try:
        import ray  # noqa: F401
        from flwr.simulation import run_simulation
    except ImportError as exc:
        raise MissingExtraError(
            "Flower's simulation engine is not installed",
            hint="pip install 'fedinfer-flower[simulation]'",
        ) from exc
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        run_simulation(
            server_app=server_app,
            client_app=client_app,
            num_supernodes=num_supernodes,
            backend_config={
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                "init_args": {"num_cpus": num_cpus, "log_to_driver": False},
            },
        )
