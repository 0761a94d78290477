"""When a batch stops waiting for its slowest sites."""

from __future__ import annotations

from fedinfer_flower.query import Deadline

__all__ = ["Stragglers"]


class Stragglers:
    """Notes answers, and says until when the rest is waited for.

    Parameters
    ----------
    deadline : Deadline
    least : int
        Fewest answers that the protection needs.
    timeout_s : float
        When the batch ends in any case.

    Examples
    --------
    >>> rest = Stragglers(Deadline(quorum=2, straggler_s=0.5), least=1, timeout_s=30.0)
    >>> rest.note(1, 0.1), rest.ends_s()
    (None, None)
    >>> rest.note(2, 0.3), rest.ends_s()
    (None, 0.8)
    """

    def __init__(self, deadline: Deadline, *, least: int, timeout_s: float) -> None:
        self._enough = max(deadline.quorum, least)
        self._straggler_s, self.timeout_s = deadline.straggler_s, timeout_s
        self._ends_s: float | None = None

    def note(self, n_answered: int, seconds: float) -> None:
        """Note that so many answers are there, so long after the push."""
        if self._straggler_s and self._ends_s is None and n_answered >= self._enough:
            self._ends_s = min(seconds + self._straggler_s, self.timeout_s)

    def ends_s(self) -> float | None:
        """Return when to stop waiting, in seconds after the push; None: not decided yet."""
        return self._ends_s
