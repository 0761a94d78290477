"""After a batch under masks: the rounds that make good for sites that dropped out."""

from __future__ import annotations

import time
from typing import Final

from flwr.app import Message
from flwr.serverapp import Grid

from fedinfer_flower.strategies.pull_loop import stream_replies
from fedinfer_flower.strategies.query_round import QueryRound
from fedinfer_flower.wire.actions import RECOVER, message_type
from fedinfer_flower.wire.records import pack
from fedinfer_flower.wire.recovery import recovery

__all__ = ["ANSWER_SHARE", "recover"]

ANSWER_SHARE: Final = 0.6
"""Part of the deadline for answers, where what dropouts leave behind takes time as well."""

_LEAST_S: Final = 0.05


def recover(
    grid: Grid, current: QueryRound, *, run_id: int, start: float, timeout_s: float
) -> bool:
    """Ask survivors until the sum can be opened; return whether there was anything to ask.

    Parameters
    ----------
    start : float
        When the batch began, by `time.monotonic`; rounds end `timeout_s` later.

    Raises
    ------
    RecoveryError
        If the survivors' help does not suffice.
    """
    asked = False
    while calls := current.recovery_calls():
        asked = True
        left_s = max(timeout_s - (time.monotonic() - start), _LEAST_S)
        asks = [
            Message(
                pack(recovery(call, run_id=run_id)),
                node_id,
                message_type(RECOVER),
                ttl=left_s,
                group_id=call.query_id,
            )
            for node_id, call in calls.items()
        ]
        for arrival in stream_replies(grid, asks, timeout_s=left_s):
            current.accumulate_recovery(arrival)
    return asked
