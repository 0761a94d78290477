"""Which token of the sharer has read what a token of the receiver has just read.

Two tokenizers cut one text differently. Both say which characters a token covers, so the
canonical tokenisations of both models are compared by characters. C2C's one-to-one
re-tokenisation stands in `fedinfer_flower.kv.retokenize`, for fusers that were trained with it.

Axes: B prompts, T tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Final, Protocol

import torch
from torch import Tensor

from fedinfer_flower.errors import CacheError, InvalidValueError

__all__ = ["STRATEGIES", "align_sections", "align_spans", "alignment_tensor"]

STRATEGIES: Final = ("spans", "first", "longest")
Span = tuple[int, int]
_SPECIAL: Final = (0, 0)


class TokenBatch(Protocol):
    """What is needed of `fedinfer_flower.language.model.Tokens`."""

    @property
    def mask(self) -> Tensor:
        """1 for real tokens; int64 (B, T), padded on the left."""
        ...

    @property
    def spans(self) -> list[list[Span]]:
        """Characters that each real token covers; (0, 0) for special tokens."""
        ...


def align_spans(
    sharer: Sequence[Sequence[Span]],
    receiver: Sequence[Sequence[Span]],
    *,
    strategy: str = "spans",
    offset: int | Sequence[int] = 0,
) -> list[list[int]]:
    """Return, for each receiver token, the sharer token that has just read the same text.

    That is the last one that ends at or before the receiver token's end, or the one inside
    which the receiver token ends. Tokens that hold parts of one character have one span and
    are paired in their order. Special tokens have read what stands before them and are paired
    in their order with those of the sharer at the same place; where it has none, with the
    token before.

    Parameters
    ----------
    sharer, receiver : sequences of sequences of (int, int)
        Characters [start, stop) of each token, per prompt; (0, 0) marks a special token.
    strategy : str
        ``"spans"``; or ``"first"`` / ``"longest"`` where the sharer read the ids that
        `fedinfer_flower.kv.retokenize` gives: then token t belongs to token t.
    offset : int or sequence of int
        Characters that stand in front of the receiver's text in the sharer's prompt, such as
        a document; one for all prompts, or one each. Only for ``"spans"``.

    Returns
    -------
    indices : list of list of int
        Indices into the sharer's real tokens, never decreasing; 0, 1, 2, … when both sides
        were cut alike.

    Raises
    ------
    CacheError
        If the sharer has no token to point at, or ``"first"`` / ``"longest"`` was asked for
        and the sharer read another number of tokens.
    InvalidValueError
        If the strategy is unknown, or the numbers of prompts or offsets differ.

    References
    ----------
    Fu et al., "Cache-to-Cache: Direct Semantic Communication Between Large Language Models",
    2025, for ``"first"`` and ``"longest"``.

    Examples
    --------
    >>> words, letters = [(0, 3), (3, 7)], [(0, 2), (2, 3), (3, 5), (5, 7)]
    >>> align_spans([letters], [words]), align_spans([words], [letters])
    ([[1, 3]], [[0, 0, 1, 1]])
    """
    offsets = [offset] * len(receiver) if isinstance(offset, int) else list(offset)
    if strategy not in STRATEGIES:
        raise InvalidValueError(f"the alignment strategy is one of {', '.join(STRATEGIES)}")
    if not len(sharer) == len(receiver) == len(offsets):
        raise InvalidValueError("sharer, receiver and offsets are of different numbers of prompts")
    if strategy == "spans":
        return [_row(s, r, o) for s, r, o in zip(sharer, receiver, offsets, strict=True)]
    if any(len(s) != len(r) for s, r in zip(sharer, receiver, strict=True)):
        raise CacheError(
            f"alignment {strategy!r} pairs tokens one to one, but the sharer read another number",
            hint="let the sharer read retokenize(...), or use alignment 'spans'",
        )
    if any(offsets):
        raise InvalidValueError(f"alignment {strategy!r} takes no offset; use 'spans'")
    return [list(range(len(r))) for r in receiver]


def align_sections(
    sharer: Sequence[Span],
    receiver: Sequence[Span],
    *,
    sharer_sections: Sequence[Span],
    receiver_sections: Sequence[Span],
) -> list[int]:
    """Align one prompt that two chat templates wrap differently.

    Messages are aligned with messages, character by character; what a template writes before,
    between and after them is paired in its order, the last token with the last.

    Parameters
    ----------
    sharer, receiver : sequences of (int, int)
        Spans of the tokens, as in `align_spans`.
    sharer_sections, receiver_sections : sequences of (int, int)
        Where the same messages stand in each prompt, in order.

    Returns
    -------
    indices : list of int

    Raises
    ------
    CacheError
        If the numbers of messages differ, or a message has not the same length on both sides:
        rephrased text cannot be aligned token by token.

    Examples
    --------
    The sharer's template writes three tokens before the message, the receiver's one:

    >>> sharer = [(0, 1), (1, 2), (2, 3), (3, 5), (5, 6)]
    >>> receiver = [(0, 4), (4, 6), (6, 9)]
    >>> align_sections(sharer, receiver, sharer_sections=[(3, 5)], receiver_sections=[(4, 6)])
    [2, 3, 4]
    """
    _require_same_sections(sharer_sections, receiver_sections)
    theirs = _regions(sharer, sharer_sections)
    ours = _regions(receiver, receiver_sections)
    if receiver and not sharer:
        raise _nothing_to_align()
    found: list[int] = []
    first = 0
    for region in range(2 * len(receiver_sections) + 1):
        there = [s for s, at in zip(sharer, theirs, strict=True) if at == region]
        here = [r for r, at in zip(receiver, ours, strict=True) if at == region]
        if not there:
            indices = [-1] * len(here)  # the running maximum takes the token before
        elif region % 2:
            start, own = sharer_sections[region // 2][0], receiver_sections[region // 2][0]
            indices = _row(_shifted(there, start), _shifted(here, own), 0)
        else:
            indices = [_paired(k, len(here), len(there)) for k in range(len(here))]
        found += [max(first + i, 0) for i in indices]
        first += len(there)
    return list(accumulate(found, max))


def alignment_tensor(
    sharer: TokenBatch,
    receiver: TokenBatch,
    *,
    strategy: str = "spans",
    offset: int | Sequence[int] = 0,
    sharer_sections: Sequence[Sequence[Span]] | None = None,
    receiver_sections: Sequence[Sequence[Span]] | None = None,
) -> Tensor:
    """Return the alignment of a batch as indices into the sharer's padded columns.

    Parameters
    ----------
    sharer, receiver : Tokens
        Padded on the left.
    strategy, offset
        See `align_spans`.
    sharer_sections, receiver_sections : sequences of sequences of (int, int), optional
        Per prompt, see `align_sections`; both or none, and with neither strategy nor offset.

    Returns
    -------
    alignment : int64 tensor (B, T_receiver)
        Padding points at the sharer's first real token, and tokens without a span (decoded
        ones) at the token of the last span: their entries are masked, or not of the prompt. A
        `Past` lacks the last prompt token: give its fuser ``alignment[:, :-1]``.

    Raises
    ------
    CacheError, InvalidValueError

    Notes
    -----
    *Privacy.* The spans of a sharer's prompt tell how its documents are cut, so more than their
    length. They are for the receiver that aligns, which opens the entries anyway, and not for
    the coordinator.

    Examples
    --------
    >>> from types import SimpleNamespace as Batch
    >>> sharer = Batch(mask=torch.tensor([[0, 1, 1]]), spans=[[(0, 2), (2, 4)]])
    >>> receiver = Batch(mask=torch.tensor([[0, 1]]), spans=[[(0, 4)]])
    >>> alignment_tensor(sharer, receiver).tolist()
    [[1, 2]]
    """
    if (sharer_sections is None) != (receiver_sections is None):
        raise InvalidValueError("message sections are given for both sides or for none")
    if sharer_sections is None or receiver_sections is None:
        rows = align_spans(sharer.spans, receiver.spans, strategy=strategy, offset=offset)
    elif strategy != "spans" or offset != 0:
        raise InvalidValueError("message sections combine with neither a strategy nor an offset")
    elif not len(sharer_sections) == len(receiver_sections) == len(receiver.spans):
        raise InvalidValueError("message sections of another number of prompts")
    else:
        rows = [
            align_sections(s, r, sharer_sections=a, receiver_sections=b)
            for s, r, a, b in zip(
                sharer.spans, receiver.spans, sharer_sections, receiver_sections, strict=True
            )
        ]
    theirs, ours = _first_columns(sharer), _first_columns(receiver)
    columns = torch.zeros(receiver.mask.shape, dtype=torch.long)
    for at, (row, there, here) in enumerate(zip(rows, theirs, ours, strict=True)):
        columns[at] = there
        if row:
            columns[at, here : here + len(row)] += torch.tensor(row)
            columns[at, here + len(row) :] += row[-1]
    return columns


# -- one prompt --------------------------------------------------------------------------


def _row(sharer: Sequence[Span], receiver: Sequence[Span], offset: int) -> list[int]:
    if not receiver:
        return []
    if not sharer:
        raise _nothing_to_align()
    there, here = _groups(sharer, 0), _groups(receiver, offset)
    text = [i for i, span in enumerate(sharer) if span != _SPECIAL]
    # What has been read after each text token; ends may go back after normalisation.
    read = list(accumulate((sharer[i][1] for i in text), max))
    leading = there.get(None, ([], []))[1]
    found = [-1] * len(receiver)
    for place, (texts, specials) in here.items():
        their_texts, their_specials = there.get(place, ([], []))
        for k, i in enumerate(texts):
            if their_texts:
                found[i] = their_texts[_paired(k, len(texts), len(their_texts))]
            else:
                found[i] = _nearest(place or 0, sharer, text, read, leading)
        for k, i in enumerate(specials):
            if their_specials:
                found[i] = their_specials[min(k, len(their_specials) - 1)]
    # A special token without a counterpart takes what stands before it: the running maximum.
    return [max(i, 0) for i in accumulate(found, max)]


def _groups(spans: Sequence[Span], offset: int) -> dict[int | None, tuple[list[int], list[int]]]:
    """Group tokens by how many characters have been read after them; None before any text.

    Each group has its tokens of text, and its special ones.
    """
    out: dict[int | None, tuple[list[int], list[int]]] = {}
    place: int | None = None
    for i, span in enumerate(spans):
        if span != _SPECIAL:
            place = span[1] + offset if place is None else max(place, span[1] + offset)
        out.setdefault(place, ([], []))[span == _SPECIAL].append(i)
    return out


def _nearest(
    end: int, sharer: Sequence[Span], text: list[int], read: list[int], leading: list[int]
) -> int:
    """Return the text token that contains `end`, else the last one that ends before it."""
    after = bisect_right(read, end)
    if after < len(text) and sharer[text[after]][0] < end:
        return text[after]
    if after:
        return text[after - 1]
    return leading[-1] if leading else 0


def _paired(k: int, n: int, m: int) -> int:
    """Return which of m things goes with the k-th of n: in order, and the last with the last."""
    return m - 1 if k == n - 1 else min(k, m - 1)


# -- sections ----------------------------------------------------------------------------


def _require_same_sections(sharer: Sequence[Span], receiver: Sequence[Span]) -> None:
    if len(sharer) != len(receiver):
        raise CacheError(
            f"a prompt of {len(receiver)} messages at the receiver and {len(sharer)} at the sharer",
            hint="give both models the same messages, or fuse by concatenation",
        )
    for sections in (sharer, receiver):
        bounds = [at for section in sections for at in section]
        if bounds != sorted(bounds) or any(at < 0 for at in bounds):
            raise CacheError("message sections that overlap or are out of order")
    if any(s[1] - s[0] != r[1] - r[0] for s, r in zip(sharer, receiver, strict=True)):
        raise CacheError(
            "a message that is longer at one side than at the other",
            hint="aligning needs the same wording on both sides; a rephrased question needs a"
            " fuser that concatenates",
        )


def _regions(spans: Sequence[Span], sections: Sequence[Span]) -> list[int]:
    """Return 2k + 1 for tokens that end inside section k, 2k for those before it."""
    out, read = [], 0
    for span in spans:
        read = max(read, span[1])
        before = sum(stop < read for _, stop in sections)
        inside = before < len(sections) and sections[before][0] < read
        out.append(2 * before + inside)
    return out


def _shifted(spans: Sequence[Span], start: int) -> list[Span]:
    return [s if s == _SPECIAL else (max(s[0] - start, 0), s[1] - start) for s in spans]


# -- parts -------------------------------------------------------------------------------


def _first_columns(tokens: TokenBatch) -> list[int]:
    width = tokens.mask.shape[1]
    real: list[int] = tokens.mask.sum(1).tolist()
    for n, row, spans in zip(real, tokens.mask, tokens.spans, strict=True):
        if not bool(row[width - n :].all()) or len(spans) > n:
            raise CacheError("tokens not padded on the left, or with more spans than tokens")
    return [min(width - n, max(width - 1, 0)) for n in real]


def _nothing_to_align() -> CacheError:
    return CacheError(
        "the sharer has not a single token to align with", hint="give it the receiver's question"
    )
