"""Tokenizers that cut the same language differently: whole words, or pieces of n letters."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["build_tokenizer"]

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<?>"


def build_tokenizer(
    words: Iterable[str], *, piece_length: int | None, seed: int
) -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words, or of pieces of `piece_length` letters.

    Longest-match-first over a vocabulary of such pieces cuts every known word into exactly
    these pieces.

    Parameters
    ----------
    words : iterable of str
        The language.
    piece_length : int, optional
        None: whole words.
    seed : int
        Order of the ids: models do not share them.

    Examples
    --------
    >>> tokenizer = build_tokenizer(["bodun", "is"], piece_length=3, seed=0)
    >>> tokenizer.tokenize("bodun is")
    ['bod', '##un', 'is']
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = sorted({piece for word in words for piece in _cut(word, piece_length)})
    random.Random(seed).shuffle(pieces)  # noqa: S311
    vocabulary = {piece: i for i, piece in enumerate([PAD, BOS, EOS, UNKNOWN, *pieces])}
    core = Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.WordPiece(cleanup=False)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    make: Any = PreTrainedTokenizerFast  # untyped upstream
    tokenizer: PreTrainedTokenizerFast = make(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    return tokenizer


def _cut(word: str, length: int | None) -> list[str]:
    if length is None or len(word) <= length:
        return [word]
    pieces = [word[i : i + length] for i in range(0, len(word), length)]
    return [pieces[0], *(f"##{piece}" for piece in pieces[1:])]
