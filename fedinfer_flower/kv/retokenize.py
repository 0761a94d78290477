"""C2C's one-to-one re-tokenisation: what the sharer reads, one token for each of the receiver's.

It makes the sharer read a sequence that its own tokenizer would never write. Use it for
published fusers that were trained in this way, and `fedinfer_flower.kv.align` for all others.

Axes: B prompts, T tokens.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from fedinfer_flower.errors import CacheError, InvalidValueError

__all__ = ["retokenize"]

_ROLES: Final = ("eos_token_id", "bos_token_id", "unk_token_id", "pad_token_id")


def retokenize(
    ids: Tensor, mask: Tensor, *, receiver: Any, sharer: Any, strategy: str = "first"
) -> Tensor:
    """Return the one sharer token for each receiver token that C2C would let the sharer read.

    Each receiver token is decoded alone and encoded again; of what comes out one id is kept.
    A token that holds part of a character decodes to U+FFFD: use ``"spans"`` unless a fuser
    was trained in this way.

    Parameters
    ----------
    ids, mask : int64 tensors (B, T)
        Of the receiver.
    receiver, sharer : transformers.PreTrainedTokenizerBase
    strategy : str
        ``"first"`` or ``"longest"``: which id is kept; among equally long ones the first.

    Returns
    -------
    ids : int64 tensor (B, T)
        Of the sharer. Special tokens are translated by role (end, start, unknown, padding),
        else by their text, else to the unknown token; a tokenizer without one gives its
        padding or end token.

    Raises
    ------
    InvalidValueError
        If the strategy is another one.
    CacheError
        If a token has no counterpart, and the sharer's tokenizer no token to stand for it.

    Notes
    -----
    *Privacy.* The sharer learns how the receiver cuts the question.

    References
    ----------
    Fu et al., "Cache-to-Cache: Direct Semantic Communication Between Large Language Models",
    2025.

    Examples
    --------
    >>> from fedinfer_flower.simulation.facts.tokenizer import build_tokenizer
    >>> whole = build_tokenizer(["bodun", "is"], piece_length=None, seed=0)
    >>> pieces = build_tokenizer(["bodun", "is"], piece_length=3, seed=0)
    >>> read = whole(["bodun is"], return_tensors="pt")
    >>> ids = retokenize(read["input_ids"], read["attention_mask"], receiver=whole, sharer=pieces)
    >>> pieces.convert_ids_to_tokens(ids[0].tolist())
    ['<bos>', 'bod', 'is']
    """
    if strategy not in ("first", "longest"):
        raise InvalidValueError("re-tokenisation keeps the 'first' or the 'longest' id")
    known = {i: _counterpart(i, receiver, sharer, strategy) for i in set(ids.flatten().tolist())}
    out = torch.tensor([[known[i] for i in row] for row in ids.tolist()], dtype=torch.long)
    padding = sharer.pad_token_id
    return out if padding is None else torch.where(mask.bool(), out, padding)


def _counterpart(token: int, receiver: Any, sharer: Any, strategy: str) -> int:
    if token in receiver.all_special_ids:
        return _special_counterpart(token, receiver, sharer)
    text = receiver.decode([token], clean_up_tokenization_spaces=False)
    ids: list[int] = sharer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        return _unknown(sharer)
    if strategy == "first":
        return ids[0]
    return max(ids, key=lambda i: len(sharer.decode([i], clean_up_tokenization_spaces=False)))


def _special_counterpart(token: int, receiver: Any, sharer: Any) -> int:
    for role in _ROLES:
        there = getattr(sharer, role)
        if getattr(receiver, role) == token and there is not None:
            return int(there)
    text = receiver.convert_ids_to_tokens(token)
    vocabulary = sharer.get_vocab()
    return int(vocabulary[text]) if text in vocabulary else _unknown(sharer)


def _unknown(sharer: Any) -> int:
    for role in ("unk_token_id", "pad_token_id", "eos_token_id"):
        if (token := getattr(sharer, role)) is not None:
            return int(token)
    raise CacheError(
        "the sharer's tokenizer has no token for something that is unknown to it",
        hint="use alignment 'spans'",
    )
