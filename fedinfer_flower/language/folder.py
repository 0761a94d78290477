"""Load a model folder without running anything in it, and describe what was loaded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final

import torch

from fedinfer_flower.errors import InvalidValueError, MissingExtraError, ModelError
from fedinfer_flower.kv.layout import CacheLayout

__all__ = ["describe", "load_folder"]

_DTYPES: Final = ("float32", "bfloat16")
_CHUNK_BYTES: Final = 1 << 20
_PROBE_TOKENS: Final = 4
_PROBE_TOLERANCE: Final = 0.05
"""Relative; bfloat16 keeps eight bits. Interleaved or partial rotation misses by far more."""


def load_folder(path: Path, *, dtype: str) -> tuple[Any, Any, str]:
    """Return model, tokenizer and the digest of the files that hold the weights.

    Raises
    ------
    ModelError
        If the folder lacks a part, or transformers cannot read it.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
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
    try:
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        model = AutoModelForCausalLM.from_pretrained(
            path, use_safetensors=True, dtype=getattr(torch, dtype), **options
        )
    except (OSError, ValueError, KeyError, RuntimeError) as exc:
        # The text of the exception may quote the path or the file.
        raise ModelError(
            f"transformers could not read the model folder ({type(exc).__name__})",
            hint="try AutoModelForCausalLM.from_pretrained on it by hand",
        ) from exc
    return model, tokenizer, _digest([path / "config.json", *weights])


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
        tokenizer.pad_token = tokenizer.eos_token
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ModelError(
            "the model has layers that do not keep a full cache",
            hint="sliding-window, recurrent and latent caches cannot be shared; use text",
        )
    if not hasattr(model.base_model, "rotary_emb"):
        raise ModelError("the model has no rotary positions", hint="use the text medium")
    _require_plain_rotation(model)
    heads = config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    return CacheLayout(
        layers=config.num_hidden_layers,
        heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        hidden_size=config.hidden_size,
        window=config.max_position_embeddings,
        rope=json.dumps(rope, sort_keys=True, default=str)[:4096],
        architecture=config.model_type,
        tokenizer_digest=hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        model_digest=digest or _state_digest(model),
    )


@torch.no_grad()
def _require_plain_rotation(model: Any) -> None:
    """Compare keys computed at two places: free of rotation they must be the same."""
    from fedinfer_flower.kv.rotary import rotary_tables, unrotate

    ids = torch.arange(1, _PROBE_TOKENS + 1)[None] % model.config.vocab_size
    seen = []
    for start in (0, 7):
        at = torch.arange(start, start + _PROBE_TOKENS)[None]
        try:
            layers = model(input_ids=ids, position_ids=at, use_cache=True).past_key_values.layers
            keys = [layer.keys for layer in layers]
            cos, sin = rotary_tables(model, at)
            seen.append(torch.stack([unrotate(k.float(), cos, sin) for k in keys]))
        except (AttributeError, TypeError, RuntimeError):
            raise ModelError(
                "the model's cache is not one of keys and values with rotary positions",
                hint="use the text medium",
            ) from None
    error = (seen[0] - seen[1]).norm() / seen[0].norm().clamp_min(1e-12)
    if not float(error) < _PROBE_TOLERANCE:
        raise ModelError(
            "the model turns its keys in another way than Qwen and Llama do",
            hint="use the text medium",
        )


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
