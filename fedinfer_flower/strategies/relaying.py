"""Where the coordinator adds nothing: it passes sealed answers on."""

from __future__ import annotations

from fedinfer_flower.errors import BindingError, SizeLimitError
from fedinfer_flower.privacy.base import Protection, ScorePlan
from fedinfer_flower.wire.relayed import pack_relayed
from fedinfer_flower.wire.sealed_query import ANSWER_SEAL_BYTES

__all__ = ["RelaySide"]


class RelaySide:
    """Collect answers that are sealed to the querier. Memory grows with the sites.

    Parameters
    ----------
    protection : Protection
    plan : ScorePlan
    most_bytes : int
        Of an honest payload before it is sealed.

    Privacy
    -------
    The coordinator sees who answered, and how many bytes. The querier sees every answer.
    """

    def __init__(self, protection: Protection, plan: ScorePlan, *, most_bytes: int) -> None:
        self._protection, self._plan = protection, plan
        self._answers: dict[str, bytes] = {}
        self._most_bytes = most_bytes + ANSWER_SEAL_BYTES

    @property
    def n_sites(self) -> int:
        """Answers so far."""
        return len(self._answers)

    def add(self, payload: bytes | memoryview, *, sender: str = "") -> None:
        """Keep one site's answer.

        Raises
        ------
        ProtocolError
            If it is longer than an honest one, or the site's second.
        """
        self._plan.require_room(self.n_sites)
        if len(payload) > self._most_bytes:
            raise SizeLimitError(
                f"a sealed answer of this batch has at most {self._most_bytes} bytes"
            )
        if sender in self._answers:
            raise BindingError("a second answer of one site")
        self._answers[sender] = bytes(payload)

    def total(self) -> bytes:
        """Return all answers, for the querier."""
        self._protection.require_cohort(self.n_sites, self._plan)
        return pack_relayed(sorted(self._answers.items()))
