"""How long an answer takes over each medium: own, text, cache.

A sharer's part (its prefill, the tokens that it decodes, the wire) is predicted with a
factor for jitter; the receiver reads its own prompt meanwhile. Text has to be read on top,
a cache only has to be fused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.kv.link import Link
from fedinfer_flower.kv.media import Medium, require_numbers

__all__ = [
    "JITTER",
    "UNKNOWN_SPEED",
    "Speed",
    "Workload",
    "break_even_bandwidth",
    "predicted_s",
]

JITTER: Final = 1.3
"""Factor on the remote part, so that a deadline is met in most cases and not in half."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast a model runs where it is: seconds, measured there.

    Parameters
    ----------
    prefill_s : float
        Fixed cost of reading a prompt.
    prefill_s_per_token : float
    decode_s_per_token : float

    Examples
    --------
    >>> Speed(prefill_s=0.5, prefill_s_per_token=0.001, decode_s_per_token=0.1).read_s(100)
    0.6
    """

    prefill_s: float
    prefill_s_per_token: float
    decode_s_per_token: float

    def __post_init__(self) -> None:
        require_numbers(self)

    def read_s(self, tokens: int) -> float:
        """Return the seconds to read a prompt."""
        return self.prefill_s + self.prefill_s_per_token * tokens

    def write_s(self, tokens: int) -> float:
        """Return the seconds to decode tokens."""
        return self.decode_s_per_token * tokens


UNKNOWN_SPEED: Final = Speed(prefill_s=2.0, prefill_s_per_token=0.005, decode_s_per_token=0.2)
"""For a site that keeps its speeds to itself: slower than a model of one billion parameters
on two CPU cores (1.6 s, 0.0031 s and 0.111 s)."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Tokens of one question: at the sharer, at the receiver, and of the answer."""

    sharer_prompt_tokens: int
    receiver_prompt_tokens: int
    answer_tokens: int

    def __post_init__(self) -> None:
        require_numbers(self)


def predicted_s(
    medium: Medium,
    *,
    workload: Workload,
    sharer: Speed,
    receiver: Speed,
    link: Link,
    jitter: float = JITTER,
) -> float:
    """Return the seconds until the receiver's answer is complete.

    Examples
    --------
    >>> from fedinfer_flower.kv.link import UNKNOWN_LINK
    >>> fast = Speed(prefill_s=1.0, prefill_s_per_token=0.0, decode_s_per_token=0.1)
    >>> work = Workload(sharer_prompt_tokens=9, receiver_prompt_tokens=9, answer_tokens=5)
    >>> predicted_s(Medium.own(), workload=work, sharer=fast, receiver=fast, link=UNKNOWN_LINK)
    1.5
    """
    own = receiver.read_s(workload.receiver_prompt_tokens)
    answer = receiver.write_s(workload.answer_tokens)
    if medium.kind == "own":
        return own + answer
    remote = jitter * (_local_s(medium, workload, sharer, link.rtt_s) + _wire_s(medium, link))
    if medium.kind == "text":
        # The prompt with the note in it can only be read once the note is there.
        read = receiver.read_s(workload.receiver_prompt_tokens + medium.read_tokens)
        return remote + read + answer
    return max(remote, own) + answer


def break_even_bandwidth(
    cache: Medium,
    text: Medium,
    *,
    workload: Workload,
    sharer: Speed,
    receiver: Speed,
    rtt_s: float = 0.0,
    down_factor: float = 1.0,
    jitter: float = JITTER,
) -> float:
    """Return the bandwidth (bytes/s, sharer to coordinator) where text and cache take as long.

    Above it the cache is faster, if the cache is the larger body of the two; below it, if
    it is the smaller one. 0 where the cache is faster on any link, infinity where text is.

    Parameters
    ----------
    cache, text : Medium
    workload : Workload
    sharer, receiver : Speed
    rtt_s : float
    down_factor : float
        Bandwidth to the receiver as a multiple of that from the sharer.
    jitter : float

    Examples
    --------
    >>> speed = Speed(prefill_s=1.0, prefill_s_per_token=0.0, decode_s_per_token=0.1)
    >>> work = Workload(sharer_prompt_tokens=9, receiver_prompt_tokens=9, answer_tokens=5)
    >>> from fedinfer_flower.kv.share import ShareSpec
    >>> cache = Medium.cache(ShareSpec(), floats=1_000_000)
    >>> 0.0 < break_even_bandwidth(cache, Medium.text(tokens=16), workload=work,
    ...                            sharer=speed, receiver=speed) < float("inf")
    True
    """
    if cache.kind not in ("cache", "full-cache") or text.kind != "text":
        raise InvalidValueError("the break-even is between a cache and a text medium")
    if not (math.isfinite(down_factor) and down_factor > 0.0):
        raise InvalidValueError("down_factor is a positive number")
    # Seconds are a + b / bandwidth for both. The receiver's own reading, which a cache may
    # hide behind, is never longer than what text takes, so it does not move the crossing.
    a_cache, a_text = (jitter * _local_s(m, workload, sharer, rtt_s) for m in (cache, text))
    a_text += receiver.read_s(workload.receiver_prompt_tokens + text.read_tokens)
    b_cache, b_text = (jitter * (m.up_bytes + m.down_bytes / down_factor) for m in (cache, text))
    head_start, heavier = a_text - a_cache, b_cache - b_text
    if head_start * heavier > 0.0:
        return heavier / head_start
    return 0.0 if head_start >= 0.0 and heavier <= 0.0 else math.inf


def _local_s(medium: Medium, workload: Workload, sharer: Speed, rtt_s: float) -> float:
    """Return the remote seconds that do not depend on bandwidth."""
    compute = sharer.read_s(workload.sharer_prompt_tokens) + sharer.write_s(medium.sharer_tokens)
    return compute + medium.codec_s + medium.fuse_s + medium.round_trips * rtt_s


def _wire_s(medium: Medium, link: Link) -> float:
    return medium.up_bytes / link.up_bytes_per_s + medium.down_bytes / link.down_bytes_per_s
