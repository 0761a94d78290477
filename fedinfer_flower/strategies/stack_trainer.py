"""Flower's own strategies, set to train a stack: its message type, its sites, its replies.

`FedAvg` and `FedAdam` send rounds as ``train`` messages to all nodes of a grid. Here they
get a grid that shows the stack's sites alone and sends under a message type of its own, so
an app's own training is not touched, and that leaves out replies which would end a round.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdam, FedAvg, Result

from fedinfer_flower.ensemble.fitted import MAX_VALUE
from fedinfer_flower.errors import InvalidValueError, QueryError
from fedinfer_flower.strategies.pull_loop import stream_replies
from fedinfer_flower.wire.stack_messages import TRAIN

__all__ = ["TRAINERS", "StackGrid", "TrainerOptions", "run_rounds"]

log = logging.getLogger("fedinfer_flower.coordinator")

TRAINERS: Final = ("FedAdam", "FedAvg")

MAX_ROWS: Final = 1_000_000
"""Most held-out rows that a site may say it has: they are its weight in the mean."""

FloatArray = npt.NDArray[np.float64]

_SERVER_RATES: Final = {
    "linear-stack": 0.1,
    "deep-set": 0.03,
    "gated-mixture": 0.3,
    "mlp-stack": 0.03,
}


@dataclass(frozen=True, kw_only=True)
class TrainerOptions:
    """How Flower trains.

    Parameters
    ----------
    trainer : {"FedAdam", "FedAvg"}
        With `FedAdam`, sites take one step of rate 1, so that the weighted mean of what they
        send is the gradient over all held-out rows, and the server moves along it. With
        `FedAvg` they take `steps` of `learning_rate`, and the server takes the mean.
    rounds : int
    steps : int
    learning_rate : float
        At the sites.
    server_rate : float, optional
        Of `FedAdam`; default by the kind of stack.
    decay : float
        Pull of the weights towards their start (linear) or zero (others).
    """

    trainer: str = "FedAdam"
    rounds: int = 40
    steps: int = 1
    learning_rate: float = 1.0
    server_rate: float | None = None
    decay: float = 1e-3

    def __post_init__(self) -> None:
        if self.trainer not in TRAINERS:
            raise InvalidValueError(
                f"no trainer {self.trainer!r}", hint=f"trainers: {', '.join(TRAINERS)}"
            )
        if self.rounds < 1 or self.steps < 1:
            raise InvalidValueError("rounds and steps are at least 1")
        rates = (self.learning_rate, 1.0 if self.server_rate is None else self.server_rate)
        if not all(0.0 < rate <= 100.0 for rate in rates) or not 0.0 <= self.decay <= 1.0:
            raise InvalidValueError("rates are in (0, 100], decay is in [0, 1]")

    def strategy(self, kind: str, n_sites: int) -> FedAvg:
        """Return Flower's strategy."""
        most: dict[str, Any] = {
            "fraction_train": 1.0,
            "fraction_evaluate": 0.0,
            "min_train_nodes": n_sites,
            "min_available_nodes": n_sites,
        }
        if self.trainer == "FedAvg":
            return FedAvg(**most)
        return FedAdam(**most, eta=self.server_rate or _SERVER_RATES[kind])


class StackGrid(Grid):
    """A grid of some nodes, that sends training messages as `TRAIN` and checks the replies.

    Parameters
    ----------
    grid : Grid
        Carries the messages.
    node_ids : iterable of int
    shapes : mapping of str to tuple of int
        Of the arrays that are trained.
    timeout_s : float
        Of one round.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        node_ids: Iterable[int],
        shapes: Mapping[str, tuple[int, ...]],
        timeout_s: float,
    ) -> None:
        self._grid = grid
        self._node_ids = list(node_ids)
        self._shapes = dict(shapes)
        self._timeout_s = timeout_s
        self.dropped = 0

    def set_run(self, run: Any) -> None:
        """Pass on."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """The run of the grid below."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Pass on."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes of the stack's sites."""
        return list(self._node_ids)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Pass on."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pass on."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send training messages under `TRAIN`, and return the replies that can be averaged."""
        limit_s = self._timeout_s if timeout is None else min(timeout, self._timeout_s)
        asks = [
            Message(m.content, m.metadata.dst_node_id, TRAIN, ttl=limit_s, group_id="stack")
            for m in messages
        ]
        good = []
        for arrival in stream_replies(self._grid, asks, timeout_s=limit_s) if asks else ():
            if arrival.reply is not None and self._usable(arrival.reply):
                good.append(arrival.reply)
        self.dropped += len(asks) - len(good)
        if len(good) < len(asks):
            log.warning("%d of %d sites did not train in a round", len(asks) - len(good), len(asks))
        return good

    def _usable(self, reply: Message) -> bool:
        if reply.has_error() or set(reply.content.keys()) != {"arrays", "metrics"}:
            return False
        if "metrics" not in reply.content.metric_records:
            return False
        if "arrays" not in reply.content.array_records:
            return False
        metrics = reply.content.metric_records["metrics"]
        arrays = reply.content.array_records["arrays"]
        rows, loss = metrics.get("num-examples"), metrics.get("loss")
        return (
            set(metrics) == {"num-examples", "loss"}
            and isinstance(rows, int)
            and 0 < rows <= MAX_ROWS
            and isinstance(loss, float)
            and bool(np.isfinite(loss))
            and set(arrays) == set(self._shapes)
            and all(_sound(array, self._shapes[name]) for name, array in arrays.items())
        )


def _sound(array: Array, shape: tuple[int, ...]) -> bool:
    try:
        values = array.numpy()
    except Exception:  # bytes of a site, in a format that is not ours
        return False
    return (
        values.dtype == np.float64
        and values.shape == shape
        and bool((np.abs(values) <= MAX_VALUE).all())
    )


def run_rounds(
    grid: StackGrid,
    kind: str,
    arrays: Mapping[str, FloatArray],
    options: TrainerOptions,
    *,
    job_id: str,
    timeout_s: float,
) -> tuple[dict[str, FloatArray], dict[int, float]]:
    """Train with Flower's strategy; return the arrays and the loss before each round.

    Raises
    ------
    QueryError
        If no round had a usable reply, or the strategy failed.
    """
    strategy = options.strategy(kind, len(list(grid.get_node_ids())))
    config = ConfigRecord(
        {
            "job": job_id,
            "kind": kind,
            "steps": options.steps,
            "learning-rate": options.learning_rate,
            "decay": options.decay,
        }
    )
    try:
        result: Result = strategy.start(
            grid,
            ArrayRecord({name: Array(array) for name, array in arrays.items()}),
            num_rounds=options.rounds,
            timeout=timeout_s,
            train_config=config,
        )
    except QueryError:
        raise
    except Exception as exc:
        raise QueryError(f"Flower's {options.trainer} failed ({type(exc).__name__})") from exc
    history = {
        number: float(metrics["loss"])  # type: ignore[arg-type]
        for number, metrics in result.train_metrics_clientapp.items()
    }
    if not history:
        raise QueryError("no site trained in any round", hint="see the sites' own logs")
    trained = {n: np.asarray(a.numpy(), dtype=np.float64) for n, a in result.arrays.items()}
    return trained, history
