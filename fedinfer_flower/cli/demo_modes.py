"""What `fedinfer demo --protect` takes: the protections, and two modes that hide the query."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import IncompatibleProtection, InvalidValueError, UnknownNameError
from fedinfer_flower.mpc.party_process import require_spu
from fedinfer_flower.mpc.shares import N_PARTIES
from fedinfer_flower.privacy.base import PROTECTIONS, optional_module
from fedinfer_flower.simulation.data import Dataset, load_dataset
from fedinfer_flower.simulation.federation import ENCRYPTED_QUERY, MPC
from fedinfer_flower.simulation.institution import KINDS
from fedinfer_flower.simulation.networks import (
    RELU_NETWORK,
    SOFTMAX_REGRESSION,
    SQUARE_NETWORK,
    dirichlet_rows,
    in_unit_box,
)
from fedinfer_flower.simulation.partition import partition_rows

__all__ = ["DemoMode", "mode_of", "modes"]

_MEAN_LOGIT: Final = "mean-logit"


@dataclass(frozen=True, kw_only=True)
class DemoMode:
    """How the demo's institutions are made under one protection.

    Parameters
    ----------
    name : str
    min_sites : int
    kinds : tuple of str
        Kinds of model, which go round.
    hides_query : bool
        Whether sites answer without reading the query. Then they hold networks over agreed
        classes, inputs are in an agreed box, and the rule is the mean of logits.
    min_rows : int
        Fewest rows of a site.
    """

    name: str
    min_sites: int
    kinds: tuple[str, ...] = KINDS
    hides_query: bool = False
    min_rows: int = 10

    def rule(self, asked: str) -> str:
        """Return the rule of the run.

        Raises
        ------
        IncompatibleProtection
            If the mode has no such rule.
        """
        if not self.hides_query:
            return asked
        if asked not in ("auto", _MEAN_LOGIT):
            raise IncompatibleProtection(
                f"rule {asked!r} cannot work under {self.name!r}: what sites compute there is"
                " added up, and nothing else is done with it",
                hint="leave --rule out, or use --rule mean-logit",
            )
        return _MEAN_LOGIT

    def require(self, n_sites: int) -> None:
        """Refuse what could not run, before anything is started.

        Raises
        ------
        InvalidValueError
            If the protection needs more sites.
        MissingExtraError
            If a package is not installed that it stands on.
        """
        if n_sites < self.min_sites:
            raise InvalidValueError(
                f"{self.name!r} needs at least {self.min_sites} sites in a sum",
                hint=f"fedinfer demo --sites {self.min_sites}",
            )
        if self.name == MPC:
            require_spu()
        if self.name == ENCRYPTED_QUERY:
            optional_module("tenseal", extra="he")
        if self.hides_query:
            optional_module("torch", extra="torch")

    @property
    def in_process(self) -> bool:
        """Whether sites must be threads of one process, for want of a working engine.

        Ray imports pyarrow where it is installed, and pyarrow's current release refuses the
        numpy that SPU needs. Elsewhere a missing engine stays an error.
        """
        return self.name == MPC and not (_imports("ray") and _imports_if_there("pyarrow"))

    def load(self, dataset: str, *, seed: int) -> Dataset:
        """Load the data as this mode's sites take them."""
        loaded = load_dataset(dataset, seed=seed)
        return in_unit_box(loaded) if self.hides_query else loaded

    def rows(
        self, labels: npt.NDArray[np.int64], *, n_sites: int, alpha: float, seed: int
    ) -> list[npt.NDArray[np.int64]]:
        """Return the row numbers of each site."""
        if self.hides_query:
            return dirichlet_rows(
                labels, n_sites=n_sites, alpha=alpha, min_size=self.min_rows, seed=seed
            )
        return partition_rows(
            labels, n_sites=n_sites, alpha=alpha, min_size=self.min_rows, seed=seed
        )


_HIDING: Final = {
    ENCRYPTED_QUERY: DemoMode(
        name=ENCRYPTED_QUERY,
        min_sites=3,
        kinds=(SQUARE_NETWORK, SOFTMAX_REGRESSION),
        hides_query=True,
        # Less the held-out ones, enough to calibrate a polynomial form on.
        min_rows=32,
    ),
    MPC: DemoMode(name=MPC, min_sites=N_PARTIES, kinds=(RELU_NETWORK,), hides_query=True),
}


def modes() -> tuple[str, ...]:
    """Return the names that `mode_of` knows.

    Examples
    --------
    >>> "mpc" in modes() and "secagg+dp" in modes()
    True
    """
    return tuple(sorted({*PROTECTIONS.names(), *_HIDING}))


def _imports(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def _imports_if_there(module: str) -> bool:
    return importlib.util.find_spec(module) is None or _imports(module)


def mode_of(name: str) -> DemoMode:
    """Return the mode of a name.

    Raises
    ------
    UnknownNameError
        Listing the names.
    """
    if name not in modes():
        raise UnknownNameError(
            f"the demo has no protection called {name[:64]!r}",
            hint=f"use one of {', '.join(modes())}",
        )
    if name in _HIDING:
        return _HIDING[name]
    return DemoMode(name=name, min_sites=PROTECTIONS.get(name).min_cohort)
