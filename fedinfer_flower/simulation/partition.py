"""Who holds which rows: the partitioners of flwr-datasets."""

from __future__ import annotations

import warnings
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import InvalidValueError, MissingExtraError

__all__ = ["SCHEMES", "partition_rows"]

SCHEMES: Final = ("dirichlet", "iid", "pathological")
_TRIES: Final = 50


def partition_rows(
    labels: npt.NDArray[np.int64],
    *,
    n_sites: int,
    scheme: str = "dirichlet",
    alpha: float = 0.1,
    classes_per_site: int = 2,
    min_size: int = 10,
    seed: int = 0,
) -> list[npt.NDArray[np.int64]]:
    """Return the row numbers of each site.

    Parameters
    ----------
    labels : int array of shape (n_examples,)
    n_sites : int
    scheme : {"dirichlet", "iid", "pathological"}
    alpha : float
        Concentration of the Dirichlet scheme; small is skewed.
    classes_per_site : int
        For the pathological scheme; rows of a class that falls to nobody are left out.
    min_size : int
        Fewest rows of a site under the Dirichlet scheme.
    seed : int

    Raises
    ------
    InvalidValueError
        If no partition with `min_size` rows a site is found.
    """
    try:
        import datasets
        from flwr_datasets import partitioner as flower
    except ImportError as exc:
        raise MissingExtraError(
            "partitions come from flwr-datasets",
            hint="pip install 'fedinfer-flower[simulation]'",
        ) from exc
    table = datasets.Dataset.from_dict(
        {"label": labels.tolist(), "row": np.arange(len(labels)).tolist()}
    )

    def make(attempt: int) -> Any:
        if scheme == "iid":
            return flower.IidPartitioner(num_partitions=n_sites)
        if scheme == "pathological":
            return flower.PathologicalPartitioner(
                num_partitions=n_sites,
                partition_by="label",
                num_classes_per_partition=classes_per_site,
                class_assignment_mode="deterministic",
                seed=seed,
            )
        if scheme == "dirichlet":
            return flower.DirichletPartitioner(
                num_partitions=n_sites,
                partition_by="label",
                alpha=float(alpha),
                min_partition_size=min_size,
                # Attempts of other seeds stay away from seeds that a user would choose.
                seed=seed + 1_000_003 * attempt,
            )
        raise InvalidValueError(f"no scheme is called {scheme!r}", hint=", ".join(SCHEMES))

    for attempt in range(_TRIES):
        partitioner = make(attempt)
        partitioner.dataset = table
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it tells of each of its own retries
                return [
                    np.array(partitioner.load_partition(k)["row"], dtype=np.int64)
                    for k in range(n_sites)
                ]
        except ValueError as exc:
            # The partitioner gives up after ten draws; small data at small alpha need more.
            if scheme != "dirichlet":
                raise InvalidValueError(f"the {scheme} partition failed: {exc}") from exc
    raise InvalidValueError(
        f"no Dirichlet({alpha:g}) partition gives {n_sites} sites {min_size} rows each",
        hint="raise alpha, ask for fewer sites, or lower min_size",
    )
