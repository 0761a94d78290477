"""Measure once how fast a site's model reads and writes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from fedinfer_flower.wire.language_card import Speeds

if TYPE_CHECKING:
    from fedinfer_flower.language.model import LanguageModel

__all__ = ["measure_speeds"]

_WORD: Final = "word "
_SHORT, _LONG, _NEW, _REPEATS = 8, 64, 8, 3


def measure_speeds(
    model: LanguageModel, *, clock: Callable[[], float] = time.perf_counter
) -> Speeds:
    """Time one prompt at a time: a short one, a long one, and some new tokens.

    Of three runs each the fastest counts: what else the machine does only ever slows it down.
    Batches are faster a question.

    Parameters
    ----------
    model : LanguageModel
    clock : callable
        Seconds.

    Privacy
    -------
    The prompts are fixed. The result says what hardware the site has, roughly.
    """

    def seconds(words: int, decode: int) -> tuple[float, int]:
        prompt, best, tokens = (_WORD * words).strip(), float("inf"), 0
        for _ in range(_REPEATS):
            start = clock()
            tokens = int(model.prefill([prompt], decode=decode).tokens.ids.shape[1]) - decode
            best = min(best, clock() - start)
        return best, tokens

    fit = max(1, model.layout.window // 4)  # a word is a few tokens at most
    seconds(min(_SHORT, fit), 0)  # the first pass of all sets things up
    short_s, short = seconds(min(_SHORT, fit), 0)
    long_s, long = seconds(min(_LONG, fit), 0)
    decoded_s, _ = seconds(min(_SHORT, fit), min(_NEW, fit))
    per_token = max(0.0, (long_s - short_s) / (long - short)) if long > short else 0.0
    return Speeds(
        prefill_s=max(0.0, short_s - short * per_token),
        prefill_s_per_token=per_token,
        decode_s=max(0.0, (decoded_s - short_s) / min(_NEW, fit)),
    )
