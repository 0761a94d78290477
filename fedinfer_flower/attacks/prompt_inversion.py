"""Read a prompt from a KV cache by looking it up: no training, only the model.

Two look-ups. Entries of the first layer are made from a token's embedding alone, so, once
keys are free of positions, a table with a line for every token of the vocabulary turns a
full cache back into text. Deeper entries depend on the whole prompt, so one computes the
caches of all prompts that are likely and takes the nearest: what was asked is found among
thousands of candidates even where the last token's entries alone travel.

Whoever holds the model can do both: who trained it, or anybody if it is published.

Axes: B prompts, T tokens, V vocabulary, C candidates, F numbers of a cache.

References
----------
.. [1] Luo, Shao, Zhang, Zhou, Hu, Zhao, Liu and Qin, Shadow in the Cache: Unveiling and
   Mitigating Privacy Risks of KV-cache in LLM Inference, arXiv 2508.09442, 2025 (inversion
   and collision attacks).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from fedinfer_flower.errors import CacheError, InvalidValueError

if TYPE_CHECKING:
    from torch import Tensor

    from fedinfer_flower.kv.layout import CacheEntries
    from fedinfer_flower.kv.share import ShareSpec
    from fedinfer_flower.language.model import LanguageModel

__all__ = [
    "cache_features",
    "nearest_prompts",
    "prompt_features",
    "read_tokens",
    "token_dictionary",
]

_PROMPTS_AT_ONCE: Final = 2048
_LEAST_SPREAD: Final = 1e-4


def token_dictionary(model: LanguageModel, *, layer: int = 0) -> Tensor:
    """Return what every token of the vocabulary leaves in one layer of a cache.

    Parameters
    ----------
    model : LanguageModel
    layer : int
        Beyond the first, entries depend on what stands before: each token is then read as
        if alone, and the look-up gets worse with depth.

    Returns
    -------
    dictionary : float32 tensor (V, 2 H D)
        Position-free keys and values side by side, as `CacheEntries.flat`.

    Examples
    --------
    >>> from fedinfer_flower.simulation.facts.checkpoints import load
    >>> model = load("qwen3")
    >>> read = model.prefill(["Q city of bodun ?"])
    >>> found = read_tokens(read.entries, token_dictionary(model))
    >>> bool((found == read.tokens.ids).all())
    True
    """
    import torch

    from fedinfer_flower.kv.layout import CacheEntries
    from fedinfer_flower.kv.rotary import rotary_tables, unrotate

    layout = model.layout
    if not 0 <= layer < layout.layers:
        raise InvalidValueError(f"a layer of this model is in [0, {layout.layers})")
    vocabulary = int(model.model.get_input_embeddings().weight.shape[0])
    parts = []
    for start in range(0, vocabulary, _PROMPTS_AT_ONCE):
        ids = torch.arange(start, min(start + _PROMPTS_AT_ONCE, vocabulary))[:, None]
        mask, at = torch.ones_like(ids), torch.zeros_like(ids)
        with torch.no_grad():
            out: Any = model._forward(ids, mask, at, past=None)
        cos, sin = rotary_tables(model.model, at)
        kept = out.past_key_values.layers
        entries = CacheEntries(
            keys=tuple(unrotate(one.keys, cos, sin) for one in kept),
            values=tuple(one.values for one in kept),
            mask=mask,
            layout=layout,
        )
        parts.append(entries.flat(layer)[:, 0].float())
    return torch.cat(parts)


def read_tokens(entries: CacheEntries, dictionary: Tensor, *, layer: int = 0) -> Tensor:
    """Look up the token behind every entry of one layer.

    Parameters
    ----------
    entries : CacheEntries
        Whole caches, or what travelled of them.
    dictionary : tensor (V, 2 H D)
        From `token_dictionary` of the same model and layer.
    layer : int

    Returns
    -------
    ids : int64 tensor (B, T)
        -1 where an entry is padding.

    Raises
    ------
    CacheError
        If the dictionary is of a model with other entries.
    """
    import torch

    if dictionary.ndim != 2 or dictionary.shape[1] != entries.layout.entry_floats:
        raise CacheError("a dictionary of a model whose entries have another size")
    flat = entries.flat(layer).float()
    found = torch.cdist(flat.reshape(-1, flat.shape[-1]), dictionary).argmin(1)
    return torch.where(entries.mask > 0, found.reshape(entries.mask.shape), -1)


def cache_features(entries: CacheEntries, *, last: int = 0) -> Tensor:
    """Return all numbers of a cache as one line a prompt.

    Parameters
    ----------
    entries : CacheEntries
    last : int
        Use the last tokens only; 0 for all.

    Returns
    -------
    features : float32 tensor (B, F)
        Layers, then the hidden state if it is there; padding is 0.
    """
    import torch

    kept = entries.cut(-last) if last else entries
    parts = [kept.flat(layer) for layer in range(kept.layout.layers)]
    if kept.hidden is not None:
        parts.append(kept.hidden)
    whole = torch.cat([x.float() for x in parts], -1)
    return torch.where(kept.mask[..., None] > 0, whole, 0.0).flatten(1)


def prompt_features(model: LanguageModel, prompts: Sequence[str], share: ShareSpec) -> Tensor:
    """Return what these prompts would make travel: what an attacker compares with.

    Parameters
    ----------
    model : LanguageModel
    prompts : sequence of str
        As the model's prompt format writes them.
    share : ShareSpec
        Of the last tokens: full caches have a width of their own each.

    Returns
    -------
    features : float32 tensor (C, F)

    Raises
    ------
    InvalidValueError
        If the whole prompt travels: `read_tokens` then reads it without candidates.
    """
    from fedinfer_flower.refine.sharer import share_prompts

    if share.full:
        raise InvalidValueError(
            "candidates are compared by the last tokens", hint="read a full cache with read_tokens"
        )
    return cache_features(share_prompts(model, prompts, share).entries)


def nearest_prompts(observed: Tensor, candidates: Tensor) -> Tensor:
    """Return which candidate each observed cache is nearest to.

    Parameters
    ----------
    observed : tensor (B, F)
        `cache_features` of what was seen.
    candidates : tensor (C, F), or (B, C, F)
        `prompt_features`: the same candidates for all, or their own for each.

    Returns
    -------
    index : int64 tensor (B,)

    Raises
    ------
    CacheError
        If the features have other widths: other shares, or other models.

    Privacy
    -------
    Asks for nothing but the model. Candidates are what the attacker thinks possible: names
    in a directory, values of a field. Where it cannot list them (long free text), it finds
    nothing this way.

    Examples
    --------
    >>> import torch
    >>> nearest_prompts(torch.tensor([[0.9, 0.1]]), torch.eye(2)).tolist()
    [0]
    """
    import torch

    own = candidates.ndim == 3
    if observed.shape[-1] != candidates.shape[-1] or (own and len(candidates) != len(observed)):
        raise CacheError("caches and candidates of different shares or models")
    # Channels differ in size by orders of magnitude: each counts by how much it tells apart.
    spread = candidates.flatten(0, -2).std(0)
    known = spread > _LEAST_SPREAD * spread.max().clamp_min(1e-12)
    scale = spread[known]
    seen, listed = observed[:, known] / scale, candidates[..., known] / scale
    if own:
        return torch.cdist(seen[:, None], listed)[:, 0].argmin(1)
    return torch.cat([torch.cdist(part, listed).argmin(1) for part in torch.split(seen, 256)])
