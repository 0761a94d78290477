"""One batch at all its receivers: rounds, one after the other, within one deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from flwr.serverapp import Grid

from fedinfer_flower.errors import FedInferError
from fedinfer_flower.strategies.refine_mailbox import Mailbox
from fedinfer_flower.strategies.refine_messages import StepKey
from fedinfer_flower.strategies.refine_result import PlannedMedium, SharerOutcome
from fedinfer_flower.strategies.refine_round import ReceiverRound
from fedinfer_flower.wire.envelope import WireLimits
from fedinfer_flower.wire.refine_job import AskedBatch

__all__ = ["BatchOutcome", "ReceiverOutcome", "run_batch"]

_POLL_S: Final = 0.02
_FIRST_POLL_S: Final = 0.001


@dataclass(kw_only=True)
class ReceiverOutcome:
    """What one receiver answered to one batch, after the last round that it answered.

    Parameters
    ----------
    batch : AskedBatch
    body : bytes
        The answers as they came; empty if none did.
    texts : tuple of str, optional
        None where they are sealed, or missing.
    used : tuple of dict
    round_number : int
    error : FedInferError, optional
    settled : bool
        Whether further rounds are of no use: it failed, or its answers stay the same.
    """

    batch: AskedBatch
    body: bytes = field(default=b"", repr=False)
    texts: tuple[str, ...] | None = field(default=None, repr=False)
    used: tuple[dict[str, str], ...] = ()
    round_number: int = 0
    error: FedInferError | None = None
    settled: bool = False

    def take(self, done: ReceiverRound) -> None:
        """Note how a round ended; a failed one leaves the answers of the one before."""
        if not done.body:
            self.settled = True
            if not self.body:
                self.error = done.error
            return
        texts = None if done.answers is None else done.answers.texts
        # Sealed answers cannot be compared: such a job runs all its rounds.
        self.settled = texts is not None and texts == self.texts
        self.body, self.texts, self.used = done.body, texts, done.used
        self.round_number = done.terms.number


@dataclass(kw_only=True)
class BatchOutcome:
    """What happened to one batch.

    Parameters
    ----------
    receivers : dict of key id to ReceiverOutcome
    outcomes : list of SharerOutcome
    plans : dict of (receiver, sharer) to PlannedMedium
        Names; the last plan of each pair.
    rounds : int
    seconds : float
    refine_s : float
        The slowest answer of a receiver.
    bytes_out, bytes_in : int
    """

    receivers: dict[str, ReceiverOutcome]
    outcomes: list[SharerOutcome] = field(default_factory=list)
    plans: dict[tuple[str, str], PlannedMedium] = field(default_factory=dict)
    rounds: int = 0
    seconds: float = 0.0
    refine_s: float = 0.0
    bytes_out: int = 0
    bytes_in: int = 0


OpenRound = Callable[[int, Sequence[AskedBatch], float, float], list[ReceiverRound]]
"""From round number, batches of the receivers that go on, start and end to their rounds."""


def run_batch(
    grid: Grid,
    batches: Sequence[AskedBatch],
    open_round: OpenRound,
    *,
    run_id: int,
    rounds: int,
    timeout_s: float,
    limits: WireLimits,
    clock: Callable[[], float] = time.monotonic,
) -> BatchOutcome:
    """Run the rounds of one batch; ends by `timeout_s` whatever the sites do.

    Parameters
    ----------
    grid : Grid
    batches : sequence of AskedBatch
        The same questions for each receiver.
    open_round : callable
    run_id, rounds : int
    timeout_s : float
    limits : WireLimits
    clock : callable
        Monotonic seconds.
    """
    start_s = clock()
    end_s = start_s + timeout_s
    found = BatchOutcome(receivers={b.receiver: ReceiverOutcome(batch=b) for b in batches})
    for number in range(1, rounds + 1):
        going = [r.batch for r in found.receivers.values() if not r.settled]
        now_s = clock()
        if not going or now_s >= end_s:
            break
        # An equal share of what is left: rounds that end early leave theirs to the next.
        until_s = now_s + (end_s - now_s) / (rounds - number + 1)
        opened = open_round(number, going, now_s, until_s)
        mailbox: Mailbox[StepKey] = Mailbox(grid, run_id=run_id, limits=limits, clock=clock)
        _drive(mailbox, {r.site.key_id: r for r in opened}, clock)
        found.rounds = number
        found.bytes_out += mailbox.bytes_out
        found.bytes_in += mailbox.bytes_in
        for done in opened:
            found.receivers[done.site.key_id].take(done)
            found.outcomes += done.outcomes
            found.plans |= {(p.receiver, p.sharer): p for p in done.plans.values()}
            found.refine_s = max(found.refine_s, done.refine_s)
    found.seconds = clock() - start_s
    return found


def _drive(
    mailbox: Mailbox[StepKey], rounds: dict[str, ReceiverRound], clock: Callable[[], float]
) -> None:
    for each in rounds.values():
        mailbox.push(each.start(clock()))
    pause_s = _FIRST_POLL_S
    while True:
        came = 0
        for letter in mailbox.collect():
            came += 1
            mailbox.push(rounds[letter.key.receiver].take(letter, clock()))
        for each in rounds.values():
            mailbox.push(each.tick(clock()))
        if all(each.done for each in rounds.values()):
            return
        pause_s = _FIRST_POLL_S if came else min(2.0 * pause_s, _POLL_S)
        if not came:
            time.sleep(pause_s)
