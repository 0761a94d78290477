"""Three small language models of different families, built from real transformers configs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedinfer_flower.simulation.facts.tokenizer import build_tokenizer
from fedinfer_flower.simulation.facts.world import FactWorld

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["FAMILIES", "Family", "build"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """Shape of one small model.

    Parameters
    ----------
    name : str
        Name of the institution and of its folder.
    architecture : str
        Model type as transformers knows it.
    piece_length : int, optional
        Letters a token; None for whole words.
    hidden_size, layers, heads, kv_heads, head_size : int
    row_length : int
        Tokens of one training row.
    steps : int
        Training steps.
    """

    name: str
    architecture: str
    piece_length: int | None
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    row_length: int
    steps: int


FAMILIES = (
    Family(
        name="qwen3",
        architecture="qwen3",
        piece_length=None,
        hidden_size=128,
        layers=4,
        heads=4,
        kv_heads=2,
        head_size=32,
        row_length=72,
        steps=1800,
    ),
    Family(
        name="llama",
        architecture="llama",
        piece_length=3,
        hidden_size=96,
        layers=5,
        heads=6,
        kv_heads=3,
        head_size=16,
        row_length=120,
        steps=1300,
    ),
    Family(
        name="qwen2",
        architecture="qwen2",
        piece_length=4,
        hidden_size=128,
        layers=3,
        heads=4,
        kv_heads=2,
        head_size=32,
        row_length=104,
        steps=1600,
    ),
)


def build(
    family: Family, world: FactWorld, *, seed: int = 0
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Return an untrained model of the family, and its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM  # untyped upstream
    index = FAMILIES.index(family)
    tokenizer = build_tokenizer(world.words, piece_length=family.piece_length, seed=100 + index)
    shape: dict[str, Any] = {} if family.architecture != "qwen3" else {"head_dim": family.head_size}
    config = AutoConfig.for_model(
        family.architecture,
        vocab_size=len(tokenizer),
        hidden_size=family.hidden_size,
        intermediate_size=256,
        num_hidden_layers=family.layers,
        num_attention_heads=family.heads,
        num_key_value_heads=family.kv_heads,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
        initializer_range=0.05,
        **shape,
    )
    torch.manual_seed(seed + index)
    return auto.from_config(config, attn_implementation="sdpa"), tokenizer
