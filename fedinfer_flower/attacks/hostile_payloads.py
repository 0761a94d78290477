"""Payloads that no honest site sends, and what becomes of them.

The attacker sits on the way to the coordinator, or is a site. It alters bytes, cuts them
off, and puts in payloads of other sites, batches and keys.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from fedinfer_flower.attacks.rounds import Round
from fedinfer_flower.ensemble.base import Array, EnsembleRule, make_rule
from fedinfer_flower.errors import FedInferError, SiteFailedError
from fedinfer_flower.privacy.base import Protection, make_protection

__all__ = [
    "HostilePayload",
    "Outcomes",
    "damaged",
    "isolated_survey",
    "survey",
    "survey_protection",
]

_TIMEOUT_S: Final = 300.0


@dataclass(frozen=True, kw_only=True)
class HostilePayload:
    """Bytes in place of one site's payload.

    Parameters
    ----------
    kind : str
    payload : bytes
    """

    kind: str
    payload: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """How many payloads of each kind met which end.

    Parameters
    ----------
    refused : mapping
        Ended in a typed error, at the coordinator or the querier.
    harmless : mapping
        Accepted, and the opened sum was right.
    wrong : mapping
        Accepted, and the opened sum was wrong.
    untyped : mapping
        Ended in an exception that is not a `FedInferError`.
    died : bool
        Whether the process ended, or hung.
    """

    refused: Mapping[str, int] = field(default_factory=dict)
    harmless: Mapping[str, int] = field(default_factory=dict)
    wrong: Mapping[str, int] = field(default_factory=dict)
    untyped: Mapping[str, int] = field(default_factory=dict)
    died: bool = False

    def counts(self) -> dict[str, int]:
        """Return totals by end, and wrong sums by kind."""
        ends = {
            name: sum(getattr(self, name).values())
            for name in ("refused", "harmless", "wrong", "untyped")
        }
        by_kind = {f"wrong by {kind}": number for kind, number in sorted(self.wrong.items())}
        return ends | by_kind


def damaged(honest: bytes, *, n_random: int, seed: int) -> list[HostilePayload]:
    """Return damaged forms of an honest payload.

    Examples
    --------
    >>> sorted({hostile.kind for hostile in damaged(bytes(9), n_random=2, seed=0)})
    ['bit flip', 'extension', 'fill', 'random bytes', 'truncation']
    """
    rng = np.random.default_rng(seed)
    found = [
        HostilePayload(kind="truncation", payload=honest[:length])
        for length in {0, 1, len(honest) // 2, len(honest) - 1}
    ]
    found += [
        HostilePayload(kind="extension", payload=honest + tail)
        for tail in (b"\x00", b"\xff" * 16, honest)
    ]
    found += [
        HostilePayload(kind="fill", payload=bytes([octet]) * len(honest))
        for octet in (0x00, 0x7F, 0x80, 0xFF)
    ]
    for _ in range(n_random):
        flipped = bytearray(honest)
        flipped[int(rng.integers(len(honest)))] ^= 1 << int(rng.integers(8))
        found.append(HostilePayload(kind="bit flip", payload=bytes(flipped)))
        start = int(rng.integers(len(honest)))
        length = min(int(rng.integers(1, 17)), len(honest) - start)
        torn = honest[:start] + rng.bytes(length) + honest[start + length :]
        found.append(HostilePayload(kind="random bytes", payload=torn))
    return found


def survey(
    payloads: Sequence[HostilePayload],
    deliver: Callable[[bytes], Array],
    *,
    honest: Array,
    tolerance: float,
) -> Outcomes:
    """Deliver every payload in a round of its own and count the ends.

    Parameters
    ----------
    payloads : sequence of HostilePayload
    deliver : callable
        Puts the bytes in one honest site's place and returns the opened sum.
    honest : float array
        The sum without an attack.
    tolerance : float
        Largest honest deviation of an entry; infinite under noise, where no single sum
        is wrong.
    """
    ends: dict[str, Counter[str]] = {
        name: Counter() for name in ("refused", "harmless", "wrong", "untyped")
    }
    for hostile in payloads:
        try:
            opened = deliver(hostile.payload)
            near = np.abs(opened - honest) <= tolerance
            end = "harmless" if bool(near.all()) else "wrong"
        except FedInferError:
            end = "refused"
        except Exception:  # counted: the promise is that there are none
            end = "untyped"
        ends[end][hostile.kind] += 1
    return Outcomes(
        refused=dict(ends["refused"]),
        harmless=dict(ends["harmless"]),
        wrong=dict(ends["wrong"]),
        untyped=dict(ends["untyped"]),
    )


def survey_protection(
    protection: Protection,
    rule: EnsembleRule,
    scores_kbs: Array,
    *,
    n_classes: int,
    n_random: int = 40,
    seed: int = 0,
) -> Outcomes:
    """Attack one batch of a protection in this process.

    Parameters
    ----------
    protection : Protection
    rule : EnsembleRule
    scores_kbs : float array of shape (n_sites, n_queries, width)
    n_classes, n_random, seed : int
    """
    options = {"n_classes": n_classes, "n_queries": scores_kbs.shape[1]}
    n_sites = len(scores_kbs)
    batch = Round(protection, rule, n_sites=n_sites, **options)
    sent = [batch.payload(site, scores) for site, scores in enumerate(scores_kbs)]

    def deliver(payload: bytes) -> Array:
        side = batch.coordinator()
        for site in range(n_sites):
            side.add(payload if site == 0 else sent[site], sender=batch.sender(site))
        return batch.open(batch.total(side), n_sites=n_sites)

    # The same site and key, other rows; then the same rows under another key.
    later = Round(
        protection, rule, n_sites=n_sites, keys=batch.keys, identities=batch.identities, **options
    )
    elsewhere = Round(protection, rule, n_sites=n_sites, **options)
    payloads = damaged(sent[0], n_random=n_random, seed=seed)
    payloads += [
        HostilePayload(kind="another site's", payload=sent[1]),
        HostilePayload(
            kind="another batch's", payload=later.payload(0, np.roll(scores_kbs[0], 1, axis=0))
        ),
        HostilePayload(kind="another key's", payload=elsewhere.payload(0, scores_kbs[1])),
    ]
    is_noisy = protection.epsilon_delta(batch.plan) is not None
    # Half a step of the coarsest grid in use, 2**-8, a site.
    tolerance = float("inf") if is_noisy else n_sites * 2.0**-9
    return survey(payloads, deliver, honest=scores_kbs.sum(axis=0), tolerance=tolerance)


def isolated_survey(
    protection: Protection,
    rule: EnsembleRule,
    scores_kbs: Array,
    *,
    n_classes: int,
    n_random: int = 40,
    seed: int = 0,
) -> Outcomes:
    """Do as `survey_protection`, in a process that may die.

    For protections that hand bytes to a native library.
    """
    job = {
        "protection": protection.name,
        "options": protection.options(),
        "rule": rule.name,
        "rule_options": rule.options(),
        "scores": scores_kbs.tolist(),
        "n_classes": n_classes,
        "n_random": n_random,
        "seed": seed,
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", "fedinfer_flower.attacks.hostile_payloads"],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Outcomes(died=True)
    if done.returncode < 0:
        return Outcomes(died=True)
    if done.returncode:
        raise SiteFailedError("the process that is attacked did not start its work")
    return Outcomes(**json.loads(done.stdout))


def _work(job: Mapping[str, Any]) -> Outcomes:
    return survey_protection(
        make_protection(job["protection"], job["options"]),
        make_rule(job["rule"], job["rule_options"]),
        np.array(job["scores"], dtype=float),
        n_classes=job["n_classes"],
        n_random=job["n_random"],
        seed=job["seed"],
    )


if __name__ == "__main__":
    outcomes = _work(json.load(sys.stdin))
    plain = {name: getattr(outcomes, name) for name in ("refused", "harmless", "wrong", "untyped")}
    sys.stdout.write(json.dumps(plain))
