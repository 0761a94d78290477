"""Sites of a federation that pays: their prices, a free rider, and settling through files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from flwr.app import Context

from fedinfer_flower.clients.local_model import LocalModel
from fedinfer_flower.incentives.base import LinearScheme, make_scheme
from fedinfer_flower.settlement.book import EvidenceBook
from fedinfer_flower.settlement.desk import SettlementDesk
from fedinfer_flower.settlement.documents import SettlementReply
from fedinfer_flower.simulation.institution import Institution
from fedinfer_flower.strategies.handover import write_whole
from fedinfer_flower.wire.identity import PublicIdentity

__all__ = [
    "PRICE",
    "REPLY_FILE",
    "REQUEST_FILE",
    "SCHEME",
    "SETTLEMENT_FILE",
    "FreeRider",
    "PricedSites",
    "settle_by_files",
    "settlement_scheme",
    "write_free_rider",
]

PRICE: Final = 0.001
"""Credits a query row that every simulated site asks for: made up, and the same for all."""

SCHEME: Final = "audited-blend"

REQUEST_FILE: Final = "settlement-request.fi"
REPLY_FILE: Final = "settlement-reply.fi"
SETTLEMENT_FILE: Final = "settlement.fi"

_CLAIMED: Final = 50
"""Training examples of each class that a free rider says it has."""


@dataclass(frozen=True, kw_only=True)
class FreeRider:
    """Answers each row with a class drawn by chance, and is sure of it. It has no model.

    Drawn by a keyed hash of the row, so that the same row gets the same answer in whichever
    process and batch it comes: asking twice does not give it away.

    Parameters
    ----------
    n_classes : int
    seed : int

    Examples
    --------
    >>> rider = FreeRider(n_classes=3, seed=0)
    >>> answers = rider(np.zeros((2, 4)))
    >>> answers.sum(axis=1), bool((answers[0] == answers[1]).all())
    (array([1., 1.]), True)
    """

    n_classes: int
    seed: int

    def __call__(self, inputs: npt.NDArray[np.generic]) -> npt.NDArray[np.float64]:
        """Return one-hot rows, shape (n_queries, n_classes)."""
        key = self.seed.to_bytes(8, "little")
        drawn = [
            int.from_bytes(hashlib.blake2b(row.tobytes(), key=key, digest_size=8).digest())
            % self.n_classes
            for row in np.ascontiguousarray(inputs)
        ]
        return np.asarray(np.eye(self.n_classes)[drawn])

    def local_model(self) -> LocalModel:
        """Return what its ClientApp loads; the class counts in it are made up."""
        classes = [str(c) for c in range(self.n_classes)]
        return LocalModel(
            model=self,
            classes=classes,
            class_counts=dict.fromkeys(classes, _CLAIMED),
            model_card={"kind": "free rider"},
            digest=f"free rider {self.seed}",
        )


def write_free_rider(folder: Path, site: int, rider: FreeRider) -> None:
    """Make a site of the folder a free rider."""
    plain = {"n_classes": rider.n_classes, "seed": rider.seed}
    (folder / f"rider-{site}.json").write_text(json.dumps(plain))


@dataclass(frozen=True, kw_only=True)
class PricedSites:
    """`load_model` of a simulated site that asks for money: an institution, or a free rider.

    Parameters
    ----------
    folder : Path
        Of `write_institutions`; a ``rider-<partition>.json`` in it makes a free rider.
    price : float
        Credits a query row.
    """

    folder: Path
    price: float = PRICE

    def __call__(self, context: Context) -> LocalModel:
        """Load the model of the partition in the node's config."""
        rider = self.folder / f"rider-{int(context.node_config['partition-id'])}.json"
        if rider.exists():
            loaded = FreeRider(**json.loads(rider.read_text())).local_model()
        else:
            loaded = Institution(self.folder)(context)
        return replace(loaded, price_per_query=self.price)


def settlement_scheme() -> LinearScheme:
    """Return the scheme on which both roles of the simulation have agreed."""
    scheme = make_scheme(SCHEME)
    assert isinstance(scheme, LinearScheme)  # noqa: S101  by its registration
    return scheme


def settle_by_files(
    folder: Path,
    book: EvidenceBook,
    querier: PublicIdentity,
    *,
    wait_for: Callable[[Path], None],
) -> None:
    """Settle everything in a book at the coordinator: request out, reply in, settlement out.

    Parameters
    ----------
    folder : Path
        Where the querier reads `REQUEST_FILE` and writes `REPLY_FILE`.
    book : EvidenceBook
    querier : PublicIdentity
        Whose signature the reply must have.
    wait_for : callable
        Returns once the file is there; before that, the querier is told.

    Raises
    ------
    ProtocolError
        If the reply is not the querier's, or does not pass the checks.
    """
    desk = SettlementDesk(book, scheme=settlement_scheme(), querier=querier)
    write_whole(folder / REQUEST_FILE, desk.request().to_bytes())
    wait_for(folder / REPLY_FILE)
    reply = SettlementReply.from_bytes((folder / REPLY_FILE).read_bytes())
    write_whole(folder / SETTLEMENT_FILE, desk.finish(reply).to_bytes())
