"""Are masked words uniform? A chi-square test over many payloads.

The mask of a sound scheme is uniform over its ring, so the masked word is as well, whatever
it hides. A biased generator, a mask that is too short for the ring or one that is used twice
shows up here, long before anyone reads an answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.attacks.base import ATTACKS, Attack, AttackResult, Position
from fedinfer_flower.attacks.federation import TargetFederation
from fedinfer_flower.attacks.measures import ERROR_RATE
from fedinfer_flower.attacks.rounds import Round, label_of
from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.privacy.base import KeyPair, Protection, optional_module
from fedinfer_flower.privacy.masked_answer import MaskedAnswer
from fedinfer_flower.wire.identity import Identity

__all__ = ["MaskedWords", "UniformMasks", "uniformity_p_value"]

_BINS: Final = 256


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskedWords:
    """Masked words of many payloads.

    Parameters
    ----------
    words : unsigned int array of shape (n_payloads, m)
        In [0, 2**ring_bits).
    ring_bits : int
        32 or 64.
    claimed : bool
        Whether the mode promises uniform words.
    """

    words: npt.NDArray[np.unsignedinteger]
    ring_bits: int = 32
    claimed: bool = True


def uniformity_p_value(words: npt.NDArray[np.unsignedinteger], *, ring_bits: int) -> float:
    """Return the smallest p-value of the words' four test views, times four.

    Views: the highest byte, the lowest byte, and the same of differences between one
    payload and the next, which a mask that is used twice leaves small.

    Examples
    --------
    >>> uniformity_p_value(np.zeros((2, 999), dtype=np.uint64), ring_bits=32)
    0.0
    """
    if words.ndim != 2 or words.size < 5 * _BINS or len(words) < 2:
        raise InvalidValueError(f"the test needs two payloads and {5 * _BINS} words or more")
    chdtrc = optional_module("scipy.special", extra="dp").chdtrc
    mask = np.uint64(2**ring_bits - 1)
    wide = words.astype(np.uint64) & mask
    steps = (wide[1:] - wide[:-1]) & mask
    smallest = 1.0
    for view in (wide, steps):
        for byte in (view >> np.uint64(ring_bits - 8), view & np.uint64(_BINS - 1)):
            counts = np.bincount(byte.ravel().astype(np.int64), minlength=_BINS)
            expected = counts.sum() / _BINS
            statistic = float(((counts - expected) ** 2).sum() / expected)
            smallest = min(smallest, float(chdtrc(_BINS - 1, statistic)))
    return min(4.0 * smallest, 1.0)


@ATTACKS.register("uniform-masks")
@dataclass(frozen=True, kw_only=True)
class UniformMasks(Attack[MaskedWords]):
    """Tell masked payloads from uniform words.

    Parameters
    ----------
    n_payloads, n_rows : int
        Payloads that `evidence` collects, and rows of each.

    Privacy
    -------
    Masked payloads promise uniform words to who holds none of the masks.
    """

    n_payloads: int = 40
    n_rows: int = 50

    sees = frozenset({Position.COORDINATOR})
    threat = "A mask that is not uniform lets its bias, and then the answer, show."
    stopped_by = frozenset({"secagg", "secagg+dp"})

    def evidence(
        self,
        federation: TargetFederation,
        protection: Protection,
        *,
        seed: int = 0,  # noqa: ARG002
    ) -> dict[str, MaskedWords]:
        """Collect one site's payloads for the same rows, as 32-bit words."""
        is_masked = protection.name in self.stopped_by
        if not is_masked and protection.name != "plain":
            return {}
        n_sites, n_classes = len(federation.sites), federation.n_classes
        scores = federation.scores(federation.inputs[: self.n_rows])[0]

        def batch(keys: KeyPair | None = None, sites: tuple[Identity, ...] = ()) -> Round:
            return Round(
                protection,
                federation.rule,
                n_classes=n_classes,
                n_queries=len(scores),
                n_sites=n_sites,
                keys=keys,
                identities=sites,
            )

        first = batch()
        header = MaskedAnswer.size(0, n_sites=n_sites, self_mask=False)
        words = []
        for _ in range(self.n_payloads):
            payload = batch(first.keys, first.identities).payload(0, scores)
            start = header if is_masked else 0
            words.append(np.frombuffer(payload, "<u4", count=scores.size, offset=start))
        return {label_of(protection): MaskedWords(words=np.stack(words), claimed=is_masked)}

    def run(self, evidence: MaskedWords, *, mode: str = "", seed: int = 0) -> AttackResult:  # noqa: ARG002
        """Test the words against the uniform distribution."""
        p_value = uniformity_p_value(evidence.words, ring_bits=evidence.ring_bits)
        threshold = -math.log10(ERROR_RATE)
        return AttackResult(
            attack=self.name,
            mode=mode,
            statistic="-log10 of the p-value for uniform words",
            value=abs(math.log10(max(p_value, 1e-300))),
            baseline=-math.log10(0.5),
            threshold=threshold,
            threshold_reason=f"uniform words pass it with a chance of {ERROR_RATE:g}",
            claim_limit=threshold if evidence.claimed else None,
            detail={"words": int(evidence.words.size)},
        )
