"""Simulated sites of a joint computation: three that compute, all with a network each.

What operators compare out of band before they compute together is in a `JointSetUp`: who
computes and where, and who may ask. Each site keeps its keys in a folder of its own.
"""

from __future__ import annotations

import functools
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from flwr.app import Context, Message

from fedinfer_flower.clients.containment import log_locally
from fedinfer_flower.clients.mpc_answering import MpcSite, answer_mpc
from fedinfer_flower.errors import FedInferError, InvalidValueError, ModelAnswerError
from fedinfer_flower.mpc.documents import MpcAnswer, MpcJob
from fedinfer_flower.mpc.session import MpcConsent
from fedinfer_flower.mpc.shares import N_PARTIES
from fedinfer_flower.simulation.institution import read_institution
from fedinfer_flower.wire import messages
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.records import pack, unpack

__all__ = ["JointSetUp", "JointSites", "clear_mean_logits", "joint_report"]

_MPC: Final = "mpc"


@dataclass(frozen=True, kw_only=True)
class JointSetUp:
    """What the sites agreed on.

    Parameters
    ----------
    parties : tuple of str
        Key ids of the sites that compute: the first three.
    addresses : tuple of str
        Where they listen for each other, ``host:port``.
    querier : str
        Key id of who may ask.
    """

    parties: tuple[str, ...]
    addresses: tuple[str, ...]
    querier: str

    @classmethod
    def make(cls, folder: Path, *, n_sites: int, querier: str) -> JointSetUp:
        """Make the sites' keys, each in its own file, and free addresses on the loopback.

        Raises
        ------
        InvalidValueError
            If there are fewer than three sites.
        """
        if n_sites < N_PARTIES:
            raise InvalidValueError(f"{_MPC!r} needs {N_PARTIES} sites that compute")
        keys = [Identity.load_or_create(_key_file(folder, k)).key_id for k in range(n_sites)]
        return cls(parties=tuple(keys[:N_PARTIES]), addresses=_free_addresses(), querier=querier)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> JointSetUp:
        """Read what `to_dict` gave."""
        return cls(
            parties=tuple(plain["parties"]),
            addresses=tuple(plain["addresses"]),
            querier=plain["querier"],
        )


class JointSites:
    """Handler of joint computations at every simulated site.

    Parameters
    ----------
    folder : Path
        Holds the institutions' rows and keys.
    set_up : JointSetUp
    """

    def __init__(self, folder: Path, set_up: JointSetUp) -> None:
        self.folder, self.set_up = folder, set_up

    def handle(self, message: Message, context: Context) -> Message:
        """Answer one message of a joint computation."""
        run_id, sender = context.run_id, context.node_id
        try:
            site = _site(self.folder, self.set_up, int(context.node_config["partition-id"]))
            envelope = unpack(message.content)
            reply = answer_mpc(envelope, site=site, run_id=run_id, sender=sender)
        except FedInferError as exc:
            reply = messages.error(exc, run_id=run_id, sender=sender)
        except Exception as exc:  # the text of an exception would travel to the coordinator
            log_locally(exc)
            generic = ModelAnswerError("the site's handler failed", hint="see the site's own log")
            reply = messages.error(generic, run_id=run_id, sender=sender)
        return Message(pack(reply), reply_to=message)


@functools.lru_cache(maxsize=64)
def _site(folder: Path, set_up: JointSetUp, number: int) -> MpcSite:
    rows = read_institution(folder, number)
    consent = MpcConsent(
        parties=frozenset(set_up.parties), queriers=frozenset({set_up.querier}), min_owners=3
    )
    return MpcSite(
        identity=Identity.load_or_create(_key_file(folder, number)),
        consent=consent,
        name=f"site-{number}",
        model=rows.fit_network(),
        input_shape=rows.inputs.shape[1:],
        classes=[str(c) for c in range(rows.n_classes)],
        address=set_up.addresses[number] if number < len(set_up.addresses) else "",
    )


def clear_mean_logits(
    folder: Path, inputs: npt.NDArray[np.float64], *, n_sites: int
) -> npt.NDArray[np.float64]:
    """Return the mean of the sites' logits, computed in one place: what only a check can do.

    Returns
    -------
    means : float array of shape (n_queries, n_classes)
    """
    import torch

    rows, total = torch.tensor(inputs, dtype=torch.float32), np.zeros(())
    for number in range(n_sites):
        network = read_institution(folder, number).fit_network()
        with torch.inference_mode():
            total = total + network(rows).numpy().astype(np.float64)
    return np.asarray(total / n_sites)


def joint_report(job: MpcJob, answer: MpcAnswer, *, n_queries: int) -> dict[str, Any]:
    """Return the figures of a joint answer under the names of other answers' reports."""
    request = sum(len(part) for triple in job.queries for part in triple)
    results = sum(len(part) for triple in answer.results for part in triple)
    return {
        "queries": n_queries,
        "seconds": answer.seconds,
        "onboarding_s": 0.0,
        "degraded": False,
        "rule": "mean-logit",
        "rule_reason": "Asked for",
        "protection": _MPC,
        "reply_bytes_per_query": results / n_queries,
        "epsilon_total": None,
        "delta_total": None,
        "reports": [
            {
                "epsilon_per_query": None,
                "delta_per_query": None,
                "key_at_coordinator": False,
                "request_bytes": request,
            }
        ],
        "profiles": {},
    }


def _key_file(folder: Path, number: int) -> Path:
    return folder / "keys" / f"site-{number}" / "identity.json"


def _free_addresses() -> tuple[str, ...]:
    # Bound at once, so that they differ; a port may still be taken before a party has it.
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(N_PARTIES)]
    addresses = tuple(f"127.0.0.1:{each.getsockname()[1]}" for each in held)
    for each in held:
        each.close()
    return addresses
