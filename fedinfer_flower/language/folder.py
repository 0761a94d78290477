"""Load a model folder without running anything in it, and describe what was loaded."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch

from fedinfer_flower.errors import InvalidValueError, MissingExtraError, ModelError
from fedinfer_flower.kv.layout import CacheLayout

__all__ = ["describe", "load_folder"]

_DTYPES: Final = ("float32", "bfloat16")
_CHUNK_BYTES: Final = 1 << 20
_MAX_INDEX_BYTES: Final = 64 << 20
_PROBE_TOKENS: Final = 4
_LOADING: Final = threading.Lock()
"""Two threads that load at once make transformers miss weights that are there."""
_PROBE_TOLERANCE: Final = 0.05
"""Relative; bfloat16 keeps eight bits. Interleaved or partial rotation misses by far more."""


def load_folder(path: Path, *, dtype: str) -> tuple[Any, Any, str]:
    """Return model, tokenizer and the digest of the files that hold the weights.

    Raises
    ------
    ModelError
        If the folder lacks a part, or transformers cannot read it.
    """
    with _LOADING:
        return _load(path, dtype=dtype)


def _load(path: Path, *, dtype: str) -> tuple[Any, Any, str]:
    try:
        from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    except ImportError as exc:
        raise MissingExtraError(
            "language models need transformers", hint="pip install 'fedinfer-flower[llm]'"
        ) from exc
    if dtype not in _DTYPES:
        raise InvalidValueError(f"dtype is one of {', '.join(_DTYPES)}")
    weights = sorted(path.glob("*.safetensors"))
    if not (path / "config.json").is_file() or not weights:
        raise ModelError(
            "the folder has no config.json with safetensors beside it",
            hint="give a local folder as save_pretrained writes it; pickled weights are not read",
        )
    _require_own_weights(path, {file.name for file in weights})
    try:
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        # AutoTokenizer puts the architecture's own splitting in place of tokenizer.json's,
        # which drops text where the two differ.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path, **options)
        with _no_progress_bar():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                use_safetensors=True,
                dtype=getattr(torch, dtype),
                output_loading_info=True,
                **options,
            )
    except Exception as exc:
        # Readers of damaged files raise whatever they like, and quote the path or the file.
        raise ModelError(
            f"transformers could not read the model folder ({type(exc).__name__})",
            hint="try AutoModelForCausalLM.from_pretrained on it by hand",
        ) from exc
    model, report = loaded
    if report["missing_keys"] or report["mismatched_keys"]:
        raise ModelError(
            "the folder lacks weights of the model, or has them in another shape",
            hint="transformers would go on with random ones; save the model again",
        )
    return model, tokenizer, _digest([path / "config.json", *weights])


def _require_own_weights(path: Path, weights: set[str]) -> None:
    """Refuse a folder whose weights are elsewhere, or pickled: the digest would miss them.

    transformers follows the index wherever it leads, also to a file of pickles, and an adapter
    to the folder of its base model.
    """
    if (path / "adapter_config.json").exists():
        raise ModelError(
            "the folder holds an adapter, whose base model is elsewhere",
            hint="merge the adapter into its base model, and save that",
        )
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return
    try:
        with index.open("rb") as stream:
            data = stream.read(_MAX_INDEX_BYTES + 1)
        names = json.loads(data)["weight_map"].values() if len(data) <= _MAX_INDEX_BYTES else [""]
        own = all(isinstance(name, str) and name in weights for name in names)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        own = False
    if not own:
        raise ModelError(
            f"{index.name} names weights that are not safetensors in the same folder",
            hint="save the model again with save_pretrained; pickled weights are not read",
        )


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing on a site's terminal; its setting is put back."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging  # untyped upstream
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def describe(model: Any, tokenizer: Any, *, digest: str) -> CacheLayout:
    """Return the layout of a model's cache, after checking that it can be shared.

    Raises
    ------
    ModelError
    """
    config = model.config
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            "the tokenizer cannot say which characters a token covers",
            hint="save a fast tokenizer: tokenizer.json must be in the folder",
        )
    if tokenizer.pad_token_id is None:
        # Padding is masked: any token will do.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise ModelError(
            "the tokenizer has no token to pad with", hint="give it a pad or an end token"
        )
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ModelError(
            "the model has layers that do not keep a full cache",
            hint="sliding-window, recurrent and latent caches cannot be shared; use text",
        )
    if not hasattr(model.base_model, "rotary_emb"):
        raise ModelError("the model has no rotary positions", hint="use the text medium")
    rope = getattr(config, "rope_parameters", None) or {}
    _require_fixed_rotation(rope, config.max_position_embeddings)
    layers, heads, head_size = _require_plain_rotation(model)
    return CacheLayout(
        layers=layers,
        heads=heads,
        head_size=head_size,
        hidden_size=config.hidden_size,
        window=config.max_position_embeddings,
        rope=json.dumps(rope, sort_keys=True, default=str)[:4096],
        architecture=config.model_type,
        tokenizer_digest=_tokenizer_digest(tokenizer),
        model_digest=digest or _state_digest(model),
    )


def _require_fixed_rotation(rope: dict[str, Any], window: int) -> None:
    """Refuse tables that change when a text grows: keys before and after would not agree."""
    if rope.get("rope_type") == "longrope":
        short = rope.get("original_max_position_embeddings") or 0
        if window > short:
            raise ModelError(
                "the model turns its keys differently in long texts",
                hint=f"set max_position_embeddings to {short} in config.json, or use text",
            )


@torch.no_grad()
def _require_plain_rotation(model: Any) -> tuple[int, int, int]:
    """Compare keys computed at two places: free of rotation they must be the same.

    Returns
    -------
    layers, heads, head_size : int
        Of the cache as it is, whatever the config calls them.
    """
    from transformers.cache_utils import DynamicLayer

    from fedinfer_flower.kv.rotary import rotary_tables, unrotate

    ids = torch.arange(1, _PROBE_TOKENS + 1)[None] % model.config.vocab_size
    seen = []
    for start in (0, 7):
        at = torch.arange(start, start + _PROBE_TOKENS)[None]
        try:
            layers = model(input_ids=ids, position_ids=at, use_cache=True).past_key_values.layers
            full = all(type(layer) is DynamicLayer for layer in layers)
            same = len({layer.keys.shape for layer in layers}) == 1
            same &= all(layer.keys.shape == layer.values.shape for layer in layers)
            cos, sin = rotary_tables(model, at)
            seen.append(torch.stack([unrotate(x.keys.float(), cos, sin)[0] for x in layers]))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError):
            raise ModelError(
                "the model's cache is not one of keys and values with rotary positions",
                hint="use the text medium",
            ) from None
        # A window that the config does not list by layer (Mistral, Phi-3) shows here.
        if not full or not same:
            raise ModelError(
                "the model has layers that do not keep a full cache",
                hint="sliding-window, recurrent and latent caches cannot be shared; use text",
            )
    # By layer: some models leave every fourth one without rotation.
    error = (seen[0] - seen[1]).flatten(1).norm(dim=1)
    size = seen[0].flatten(1).norm(dim=1).clamp_min(1e-12)
    if not bool((error / size < _PROBE_TOLERANCE).all()):
        raise ModelError(
            "the model turns its keys in another way than Qwen and Llama do",
            hint="use the text medium",
        )
    n_layers, n_heads, _, head_size = seen[0].shape
    return n_layers, n_heads, head_size


def _tokenizer_digest(tokenizer: Any) -> str:
    """Return a digest that using the tokenizer does not change: padding leaves traces."""
    from tokenizers import Tokenizer

    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.no_padding()
    core.no_truncation()
    return hashlib.sha256(core.to_str().encode()).hexdigest()


def _digest(files: list[Path]) -> str:
    whole = hashlib.sha256()
    for file in files:
        part = hashlib.sha256()
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                part.update(chunk)
        whole.update(file.name.encode() + b"\0" + part.digest())
    return whole.hexdigest()


def _state_digest(model: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        data = tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()
        digest.update(name.encode() + b"\0" + data)
    return digest.hexdigest()
