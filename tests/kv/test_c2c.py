"""Published C2C fusers: the networks, the folder, its conversion, and rotated keys."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fedinfer_flower.errors import CacheError, FuserError, InvalidValueError
from fedinfer_flower.kv.c2c_checkpoint import C2CCheckpoint, load_c2c
from fedinfer_flower.kv.c2c_projector import C2CProjector, ProjectorShape
from fedinfer_flower.kv.fuser import FUSERS, FuserSpec, make_fuser
from fedinfer_flower.kv.fuser_file import load_fuser, save_fuser
from fedinfer_flower.kv.layout import CacheEntries, CacheLayout
from fedinfer_flower.kv.past import Past
from fedinfer_flower.kv.rope_tables import layout_tables
from fedinfer_flower.kv.rotary import rotary_tables, rotate, unrotate
from fedinfer_flower.kv.share import ShareSpec

torch.set_num_threads(1)
SCRIPT = Path(__file__).parents[2] / "scripts" / "convert_c2c.py"
TOLERANCE = 2e-5
"""Absolute, on entries of size 1: float32 sums of at most 30 terms, in another order than the
reference's float64, through six layers."""


def layout(layers: int, heads: int, head_size: int, *, theta: float, name: str) -> CacheLayout:
    return CacheLayout(
        layers=layers,
        heads=heads,
        head_size=head_size,
        hidden_size=8,
        window=64,
        rope=json.dumps({"rope_theta": theta, "rope_type": "default"}),
        architecture="llama",
        tokenizer_digest="0" * 64,
        model_digest=name * 64,
    )


SHARER = layout(2, 2, 4, theta=10_000.0, name="a")
RECEIVER = layout(4, 3, 6, theta=1_000_000.0, name="b")
LAST_ALIGNED = {0: (0, 0), 1: (0, 1), 2: (0, 2), 3: (1, 3)}
ARGUMENTS = {
    "source_dim": 4,
    "target_dim": 6,
    "source_num_heads": 2,
    "target_num_heads": 3,
    "hidden_dim": 8,
    "intermediate_dim": 12,
    "num_layers": 4,
    "dropout": 0.1,
    "initial_temperature": 1.0,
    "final_temperature": 0.001,
    "anneal_steps": 1929,
    "dtype": {"__type__": "torch.dtype", "value": "float32"},
}
BLOCK = {"norm.weight": (8,), "w1.weight": (12, 8), "w2.weight": (8, 12)}
SCALAR_BLOCK = {"norm.weight": (8,), "w1.weight": (8, 8), "w2.weight": (8, 8)}


def published_names() -> dict[str, tuple[int, ...]]:
    """Return names and shapes as the published layout has them, written down by hand."""
    names: dict[str, tuple[int, ...]] = {"gate_temperature": ()}
    for x in ("key", "value"):
        names |= {f"{x}_in.weight": (8, 2 * 4 + 3 * 6), f"{x}_in.bias": (8,)}
        names |= {f"{x}_mlp1.blocks.0.{k}": v for k, v in BLOCK.items()}
        names |= {f"{x}_scalar_mlp2.blocks.0.{k}": v for k, v in SCALAR_BLOCK.items()}
        names |= {f"{x}_scalar_head.weight": (3, 8), f"{x}_scalar_head.bias": (3,)}
        for i in range(2):
            names |= {f"{x}_proj_mlp2.blocks.{i}.{k}": v for k, v in BLOCK.items()}
        names |= {f"{x}_proj_out.weight": (18, 8), f"{x}_proj_out.bias": (18,)}
        names[f"{x}_gate_logit"] = ()
    return names


def random_state(number: int, *, open_gates: tuple[str, ...] = ("key", "value")) -> dict:
    generator = torch.Generator().manual_seed(number)
    state = {
        name: torch.randn(shape, generator=generator) * (0.5 if len(shape) == 2 else 0.3)
        for name, shape in published_names().items()
    }
    for side in ("key", "value"):
        state[f"{side}_gate_logit"] = torch.tensor(0.4 if side in open_gates else -0.4)
    state["gate_temperature"] = torch.tensor(0.001)
    return state


def write(
    folder: Path,
    *,
    pickled: bool = False,
    layers: dict = LAST_ALIGNED,
    states: list | None = None,
    dtype: torch.dtype = torch.float32,
    **model,
) -> Path:
    """Write a fuser in the published layout."""
    final = folder / "final"
    final.mkdir(parents=True)
    described = {
        "base_model": "Some/Receiver",
        "teacher_model": "Some/Sharer",
        "mapping": "last_aligned",
        "is_do_alignment": False,
        "alignment_strategy": "first",
        "include_response": False,
        "multi_source_fusion_mode": "sequential",
        "projector": {"type": "C2CProjector", "params": {}},
        **model,
    }
    described = {key: value for key, value in described.items() if value is not None}
    (folder / "config.json").write_text(json.dumps({"model": described, "training": {}}))
    rows = {str(here): [[there, i]] for here, (there, i) in layers.items()}
    (final / "projector_config.json").write_text(json.dumps({"0": {"1": rows}}))
    count = 1 + max(i for _, i in layers.values())
    arguments = {**ARGUMENTS, "dtype": {**ARGUMENTS["dtype"], "value": str(dtype)[6:]}}
    for i in range(count):
        head = {"class": "C2CProjector", "init_args": arguments}
        (final / f"projector_{i}.json").write_text(json.dumps(head))
        state = random_state(i) if states is None else states[i]
        state = {name: x.to(dtype) for name, x in state.items()}
        if pickled:
            torch.save(state, final / f"projector_{i}.pt")
        else:
            save_file(state, final / f"projector_{i}.safetensors")
    return folder


def prompts(rows: int = 2, tokens: int = 5, sharer_tokens: int = 7, seed: int = 0):
    """Return a receiver's past, a sharer's entries, and an alignment; one row is padded."""
    torch.manual_seed(seed)
    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[0, :2] = 0
    at = (mask.cumsum(1) - 1).clamp_min(0)

    def entries(of: CacheLayout, width: int):
        shape = (rows, of.heads, width, of.head_size)
        return tuple(torch.randn(shape) for _ in range(of.layers))

    past = Past(
        keys=entries(RECEIVER, tokens),
        values=entries(RECEIVER, tokens),
        mask=mask,
        positions=at,
        ids=torch.zeros(rows, 1, dtype=torch.long),
        ids_positions=at[:, -1:] + 1,
    )
    sharer_mask = torch.ones(rows, sharer_tokens, dtype=torch.long)
    sharer_mask[0, 0] = 0
    sharer = CacheEntries(
        keys=entries(SHARER, sharer_tokens),
        values=entries(SHARER, sharer_tokens),
        mask=sharer_mask,
        layout=SHARER,
    )
    alignment = torch.tensor([[1, 1, 1, 3, 6], [0, 2, 2, 4, 6]])[:rows]
    return past, sharer, alignment


# -- a reference in plain loops ----------------------------------------------------------


def linear(state: dict, name: str, x: list[float]) -> list[float]:
    weight = state[f"{name}.weight"].double().tolist()
    bias = (
        state[f"{name}.bias"].double().tolist() if f"{name}.bias" in state else [0.0] * len(weight)
    )
    return [
        sum(w * v for w, v in zip(row, x, strict=True)) + b
        for row, b in zip(weight, bias, strict=True)
    ]


def block(state: dict, name: str, x: list[float]) -> list[float]:
    size = math.sqrt(sum(v * v for v in x) / len(x) + 1e-6)
    scale = state[f"{name}.norm.weight"].double().tolist()
    inner = linear(state, f"{name}.w1", [g * v / size for g, v in zip(scale, x, strict=True)])
    inner = [0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in inner]
    return [a + b for a, b in zip(x, linear(state, f"{name}.w2", inner), strict=True)]


def turned(key: list[float], position: int, theta: float, *, back: bool = False) -> list[float]:
    half, out = len(key) // 2, list(key)
    for i in range(half):
        angle = position * theta ** (-i / half) * (-1 if back else 1)
        out[i] = key[i] * math.cos(angle) - key[half + i] * math.sin(angle)
        out[half + i] = key[half + i] * math.cos(angle) + key[i] * math.sin(angle)
    return out


def added(state: dict, side: str, source: list[list[float]], target: list[list[float]]):
    """Return what a network adds to one token: one list of numbers a receiver head."""
    x = [v for head in source for v in head] + [v for head in target for v in head]
    x = block(state, f"{side}_mlp1.blocks.0", linear(state, f"{side}_in", x))
    strength = linear(state, f"{side}_scalar_head", block(state, f"{side}_scalar_mlp2.blocks.0", x))
    for i in range(2):
        x = block(state, f"{side}_proj_mlp2.blocks.{i}", x)
    out = linear(state, f"{side}_proj_out", x)
    gate = 1.0 if float(state[f"{side}_gate_logit"]) > 0 else 0.0
    return [
        [gate / (1 + math.exp(-s)) * out[6 * h + d] for d in range(6)]
        for h, s in enumerate(strength)
    ]


def reference(states: list, layers: dict, past: Past, sharer: CacheEntries, alignment) -> tuple:
    """Return keys (rotated, as a model caches them) and values after fusing, float64."""
    shape = (RECEIVER.layers, *past.keys[0].shape)
    keys, values = np.zeros(shape), np.zeros(shape)
    heads, other = range(RECEIVER.heads), range(SHARER.heads)
    for layer in range(RECEIVER.layers):
        for row in range(shape[1]):
            for t in range(shape[3]):
                at = int(past.positions[row, t])
                own_k = [
                    turned(past.keys[layer][row, h, t].double().tolist(), at, 1e6) for h in heads
                ]
                own_v = [past.values[layer][row, h, t].double().tolist() for h in heads]
                more_k = more_v = [[0.0] * 6] * 3
                if layer in layers and int(past.mask[row, t]):
                    (there, number), s = layers[layer], int(alignment[row, t])
                    k = [
                        turned(sharer.keys[there][row, h, s].double().tolist(), at, 1e4)
                        for h in other
                    ]
                    v = [sharer.values[there][row, h, s].double().tolist() for h in other]
                    more_k = added(states[number], "key", k, own_k)
                    more_v = added(states[number], "value", v, own_v)
                keys[layer, row, :, t] = np.array(own_k) + np.array(more_k)
                values[layer, row, :, t] = np.array(own_v) + np.array(more_v)
    return keys, values


def as_cached(past: Past) -> np.ndarray:
    cos, sin = layout_tables(RECEIVER, past.positions)
    return np.stack([rotate(k, cos, sin).detach().numpy() for k in past.keys])


def stacked(entries) -> np.ndarray:
    return np.stack([x.detach().numpy() for x in entries])


# -- networks ----------------------------------------------------------------------------


def test_weights_have_the_published_names_and_shapes():
    net = C2CProjector(ProjectorShape.from_dict(ARGUMENTS))
    assert {k: tuple(x.shape) for k, x in net.state_dict().items()} == published_names()
    assert "gate_temperature" not in dict(net.named_parameters())


def test_arguments_that_are_left_out_are_those_of_the_published_recipe():
    least = {k: ARGUMENTS[k] for k in ("source_dim", "target_dim")}
    least |= {"source_num_heads": 2, "target_num_heads": 3}
    shape = ProjectorShape.from_dict(least)
    assert (shape.hidden_dim, shape.intermediate_dim, shape.num_layers) == (1024, 1024, 3)
    assert (shape.dropout, shape.anneal_steps, shape.final_temperature) == (0.1, 1929, 0.001)


@pytest.mark.parametrize(
    "layers",
    [LAST_ALIGNED, {0: (1, 0), 2: (0, 2), 3: (1, 1)}, {1: (1, 0), 3: (0, 0)}],
    ids=["last-aligned", "crossed-with-a-gap", "one-network-for-two"],
)
def test_loaded_fuser_equals_the_reference_loop(tmp_path, layers):
    fuser = load_c2c(write(tmp_path / "f", layers=layers), SHARER, RECEIVER)
    past, sharer, alignment = prompts()
    fused = fuser.extend(past, sharer, alignment=alignment)
    states = [random_state(i) for i in range(4)]
    keys, values = reference(states, layers, past, sharer, alignment)
    np.testing.assert_allclose(as_cached(fused), keys, atol=TOLERANCE)
    np.testing.assert_allclose(stacked(fused.values), values, atol=TOLERANCE)
    # The reference moved the entries, so equality says something.
    assert np.abs(keys - as_cached(past)).max() > 0.1
    untouched = set(range(4)) - set(layers)
    assert all(torch.equal(fused.keys[i], past.keys[i]) for i in untouched)


def test_only_the_side_whose_gate_is_open_changes(tmp_path):
    states = [random_state(i, open_gates=("value",)) for i in range(4)]
    fuser = load_c2c(write(tmp_path / "f", states=states), SHARER, RECEIVER)
    past, sharer, alignment = prompts()
    fused = fuser.extend(past, sharer, alignment=alignment)
    assert all(torch.equal(a, b) for a, b in zip(fused.keys, past.keys, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(fused.values, past.values, strict=True))


def test_closed_gates_give_exactly_the_receiver_alone(tmp_path):
    states = [random_state(i, open_gates=()) for i in range(4)]
    states[2]["key_gate_logit"] = torch.tensor(0.0)  # at zero a gate is closed
    fuser = load_c2c(write(tmp_path / "f", states=states), SHARER, RECEIVER)
    past, sharer, alignment = prompts()
    fused = fuser.extend(past, sharer, alignment=alignment)
    both = zip((*fused.keys, *fused.values), (*past.keys, *past.values), strict=True)
    assert all(torch.equal(a, b) for a, b in both)


def test_closed_rows_and_tokens_without_a_sharer_token_stay_as_they_are(tmp_path):
    fuser = load_c2c(write(tmp_path / "f"), SHARER, RECEIVER)
    past, sharer, alignment = prompts()
    alignment[1, 3] = -1
    fused = fuser.extend(past, sharer, alignment=alignment, gate=torch.tensor([0, 1]))
    changed = stacked(fused.keys) != stacked(past.keys)
    assert not changed[:, 0].any()
    assert not changed[:, 1, :, 3].any()
    assert changed[:, 1][:, :, [0, 1, 2, 4]].any(axis=(0, 1, 3)).all()


def test_padding_of_either_side_cannot_matter(tmp_path):
    fuser = load_c2c(write(tmp_path / "f"), SHARER, RECEIVER)
    past, sharer, alignment = prompts()
    plain = fuser.extend(past, sharer, alignment=alignment)
    for entries in (sharer.keys[0], sharer.values[1]):
        entries[0, :, 0] = math.nan  # masked
    again = fuser.extend(past, sharer, alignment=alignment)
    assert all(torch.equal(a, b) for a, b in zip(plain.keys, again.keys, strict=True))
    assert torch.equal(plain.keys[0][0, :, :2], past.keys[0][0, :, :2])


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_several_sharers_are_joined_as_the_config_says(tmp_path, mode):
    fuser = load_c2c(write(tmp_path / "f", multi_source_fusion_mode=mode), SHARER, RECEIVER)
    assert fuser.multi_source_mode == mode
    past, first, alignment = prompts()
    _, second, _ = prompts(seed=5)
    once = fuser.extend(past, first, alignment=alignment, clean=past)
    twice = fuser.extend(once, second, alignment=alignment, clean=past)
    states = [random_state(i) for i in range(4)]
    if mode == "sequential":
        keys, _ = reference(states, LAST_ALIGNED, once, second, alignment)
    else:
        parts = [reference(states, LAST_ALIGNED, past, s, alignment)[0] for s in (first, second)]
        keys = parts[0] + parts[1] - as_cached(past)
    np.testing.assert_allclose(as_cached(twice), keys, atol=2 * TOLERANCE)


def test_training_path_lets_gradients_reach_the_gates_and_cools_to_a_switch(tmp_path):
    fuser = load_c2c(write(tmp_path / "f"), SHARER, RECEIVER).train()
    past, sharer, alignment = prompts()
    fused = fuser.extend(past, sharer, alignment=alignment)
    sum(x.square().sum() for x in (*fused.keys, *fused.values)).backward()
    for net in fuser.projectors:
        for name, parameter in net.named_parameters():
            assert parameter.grad is not None, name
            assert bool(torch.isfinite(parameter.grad).all()), name
        assert float(net.key_gate_logit.grad.abs()) > 0
    net = fuser.projectors[0]
    torch.manual_seed(0)
    gates = net._gate(net.key_gate_logit, torch.ones(4, 3, 50, 1), 1e-4).detach()
    # At this temperature a gate is soft only where its noise is within 1e-3 of the edge:
    # 600 draws, expected below one.
    assert float(((gates < 0.01) | (gates > 0.99)).float().mean()) > 0.99
    # One-sided Gumbel noise: a logit of 0.4 opens with probability 1 - exp(-exp(0.4)) = 0.775;
    # the tolerance is 6 standard errors of 600 draws.
    assert abs(float(gates.mean()) - 0.775) < 0.1


# -- with models -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair():
    from fedinfer_flower.language.model import LanguageModel
    from fedinfer_flower.simulation.facts.families import FAMILIES, build
    from fedinfer_flower.simulation.facts.prompts import FactPrompts
    from fedinfer_flower.simulation.facts.world import FactWorld

    world = FactWorld()
    models = [build(family, world) for family in FAMILIES[:2]]
    return [LanguageModel(m, t, prompts=FactPrompts(world.words)) for m, t in models], world


def c2c_spec(sharer: CacheLayout, receiver: CacheLayout, **options) -> FuserSpec:
    share = options.pop("share", ShareSpec(last=0, decode=0))
    return FuserSpec(kind="c2c", sharer=sharer, receiver=receiver, share=share, **options)


def opened(spec: FuserSpec):
    fuser = make_fuser(spec, seed=3).eval()
    for net in fuser.projectors:
        net.key_gate_logit.data.fill_(1.0)
        net.value_gate_logit.data.fill_(1.0)
    return fuser


@torch.no_grad()
def test_fused_answer_equals_networks_on_the_caches_as_the_models_hold_them(pair):
    """Position-free entries and back give what C2C computes on rotated caches in place."""
    from transformers import DynamicCache

    from fedinfer_flower.kv.align import alignment_tensor
    from fedinfer_flower.kv.retokenize import retokenize

    (receiver, sharer), world = pair
    questions = [" ".join(world.words[i : i + 6]) for i in (0, 40)]
    own = receiver.prefill(questions)
    ids = retokenize(
        own.tokens.ids, own.tokens.mask, receiver=receiver.tokenizer, sharer=sharer.tokenizer
    )
    fuser = opened(c2c_spec(sharer.layout, receiver.layout, layer_map="terminal", width=24))

    # In place: both models read one token each at the same positions; nothing is unrotated.
    caches = [
        model.model(input_ids=x[:, :-1], use_cache=True).past_key_values.layers
        for model, x in ((receiver, own.tokens.ids), (sharer, ids))
    ]
    joined = []
    for layer, mine in enumerate(caches[0]):
        theirs = caches[1][fuser.spec.layers[layer]]
        source, target = (theirs.keys, theirs.values), (mine.keys, mine.values)
        keys, values = fuser.projectors[layer](source, target)
        joined.append((mine.keys + keys, mine.values + values))
    cache = DynamicCache(joined, config=receiver.model.config)
    direct = receiver.model(
        input_ids=own.tokens.ids[:, -1:], past_key_values=cache, use_cache=True
    ).logits

    # Ours.
    read = sharer.model(input_ids=ids, use_cache=True).past_key_values.layers
    cos, sin = rotary_tables(sharer.model, own.tokens.positions)
    entries = CacheEntries(
        keys=tuple(unrotate(x.keys, cos, sin) for x in read),
        values=tuple(x.values for x in read),
        mask=own.tokens.mask,
        layout=sharer.layout,
    )
    alignment = alignment_tensor(own.tokens, own.tokens, strategy="first")[:, :-1]
    fused = fuser.extend(own.past(), entries, alignment=alignment)
    ours = receiver.logits_on(fused)
    # Rotating forth and back in float32, through five layers: 2.4e-6 without a fuser.
    assert float((ours - direct).abs().max()) < 2e-5
    assert float((ours - receiver.logits_on(own.past())).abs().max()) > 1e-2


@torch.no_grad()
def test_answers_are_decoded_on_a_fused_past_with_spans(pair):
    from fedinfer_flower.kv.align import alignment_tensor
    from fedinfer_flower.language.decoding import Decoding

    (sharer, receiver), world = pair
    questions = [" ".join(world.words[i : i + n]) for i, n in ((0, 6), (40, 3))]
    own, theirs = receiver.prefill(questions), sharer.prefill(questions)
    alignment = alignment_tensor(theirs.tokens, own.tokens)[:, :-1]
    fuser = opened(c2c_spec(sharer.layout, receiver.layout, layer_map="terminal", width=24))
    fused = fuser.extend(own.past(), theirs.entries, alignment=alignment)
    assert len(receiver.decode_on(fused, Decoding(max_new_tokens=3))) == 2
    alone = fuser.extend(own.past(), theirs.entries, alignment=alignment, gate=torch.tensor([1, 0]))
    # A closed row is the receiver alone, whatever stands in the other rows.
    assert torch.equal(receiver.logits_on(alone)[1], receiver.logits_on(own.past())[1])
    assert not torch.equal(receiver.logits_on(alone)[0], receiver.logits_on(own.past())[0])


SCALED = {
    "llama3": {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "linear": {"factor": 4.0},
    "default": {},
}


@pytest.mark.parametrize("kind", sorted(SCALED))
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_tables_from_a_layout_are_those_of_the_model(kind, architecture):
    from transformers import AutoConfig, AutoModelForCausalLM

    rope = {"rope_type": kind, "rope_theta": 500_000.0, **SCALED[kind]}
    config = AutoConfig.for_model(
        architecture,
        vocab_size=8,
        hidden_size=32,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=2048,
        rope_parameters=rope,
    )
    model = AutoModelForCausalLM.from_config(config)
    there = layout(1, 1, 16, theta=1.0, name="c")
    there = dataclasses.replace(there, rope=json.dumps(config.rope_parameters))
    at = torch.tensor([[0, 1, 17, 999], [3, 4, 5, 2047]])
    for a, b in zip(layout_tables(there, at), rotary_tables(model, at), strict=True):
        # Angles up to 2047 in float32 have an absolute error of 1e-4.
        assert torch.allclose(a, b, atol=2e-4)
        assert a.shape == b.shape


@pytest.mark.parametrize(
    "rope",
    [
        "{}",
        "[]",
        "{",
        '{"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}',
        '{"rope_type": "default"}',
        '{"rope_type": "default", "rope_theta": -1.0}',
        '{"rope_type": "default", "rope_theta": "1e4"}',
        '{"rope_type": "default", "rope_theta": NaN}',
        '{"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}',
        '{"rope_type": "linear", "rope_theta": 1e4}',
        '{"rope_type": "llama3", "rope_theta": 1e4, "factor": 8, "low_freq_factor": 4,'
        ' "high_freq_factor": 4, "original_max_position_embeddings": 8192}',
    ],
)
def test_rotation_that_is_not_known_is_refused_when_the_fuser_is_built(rope):
    unknown = dataclasses.replace(SHARER, rope=rope)
    with pytest.raises(CacheError):
        layout_tables(unknown, torch.zeros(1, 1, dtype=torch.long))
    for pair_ in ((unknown, RECEIVER), (dataclasses.replace(RECEIVER, rope=rope), SHARER)):
        with pytest.raises(FuserError):
            make_fuser(c2c_spec(*pair_))


# -- as a kind ---------------------------------------------------------------------------


def test_kind_is_registered_and_starts_closed():
    fuser = make_fuser(c2c_spec(SHARER, RECEIVER, layer_map="terminal", width=8), seed=1).eval()
    assert type(fuser) is FUSERS.get("c2c")
    assert fuser.needs_alignment
    assert fuser.layers.tolist() == [[there, i] for there, i in LAST_ALIGNED.values()]
    past, sharer, alignment = prompts()
    assert torch.equal(fuser.extend(past, sharer, alignment=alignment).keys[3], past.keys[3])


@pytest.mark.parametrize(
    "options",
    [
        {"share": ShareSpec(last=1, decode=0)},
        {"share": ShareSpec(last=0, decode=1)},
        {"share": ShareSpec(last=0, decode=0, hidden=True)},
        {"lookahead": 1},
        {"depth": 1},
    ],
)
def test_spec_that_no_published_fuser_has_is_refused(options):
    with pytest.raises(FuserError):
        make_fuser(c2c_spec(SHARER, RECEIVER, **options))


def test_fuser_keeps_layer_map_and_mode_when_it_is_saved(tmp_path):
    spec = c2c_spec(SHARER, RECEIVER, layer_map="terminal", width=8)
    cls = FUSERS.get("c2c")
    crossed = {0: (1, 3), 1: (0, 2), 2: (1, 1), 3: (0, 0)}
    torch.manual_seed(0)
    fuser = cls(spec, layers=crossed, multi_source_mode="sequential").eval()
    for net in fuser.projectors:
        net.key_gate_logit.data.fill_(1.0)
    there = load_fuser(save_fuser(fuser, tmp_path / "saved", {"by": "a test"}))
    assert there.multi_source_mode == "sequential"
    past, sharer, alignment = prompts()
    once, again = (f.extend(past, sharer, alignment=alignment) for f in (fuser, there))
    assert all(torch.equal(a, b) for a, b in zip(once.keys, again.keys, strict=True))
    assert not torch.equal(once.keys[0], past.keys[0])


def test_published_fuser_is_kept_by_the_bank_where_a_spec_can_say_its_shape(tmp_path):
    spec = c2c_spec(SHARER, RECEIVER, layer_map="terminal", width=8, depth=3)
    as_published = make_fuser(spec, seed=2).projectors[0].shape
    assert as_published.num_layers == ARGUMENTS["num_layers"]
    # A spec has one width: another inner width is refused when read, never read as something else.
    fuser = load_c2c(write(tmp_path / "f"), SHARER, RECEIVER)
    assert fuser.projectors[0].shape.intermediate_dim != fuser.spec.width
    with pytest.raises(FuserError, match="shape"):
        load_fuser(save_fuser(fuser, tmp_path / "saved"))


@pytest.mark.parametrize("row", [[0, 9], [7, 0], [0, -2]])
def test_saved_layer_map_that_cannot_be_is_refused_in_use(row):
    fuser = make_fuser(c2c_spec(SHARER, RECEIVER, width=8))
    fuser.layers[1] = torch.tensor(row)
    past, sharer, alignment = prompts()
    with pytest.raises(FuserError):
        fuser.extend(past, sharer, alignment=alignment)


def test_misuse_is_refused(tmp_path):
    fuser = load_c2c(write(tmp_path / "f"), SHARER, RECEIVER)
    past, sharer, alignment = prompts()
    with pytest.raises(FuserError, match="alignment"):
        fuser.extend(past, sharer)
    with pytest.raises(CacheError):
        fuser.extend(past, sharer, alignment=alignment[:, :-1])
    other = dataclasses.replace(sharer, layout=dataclasses.replace(SHARER, model_digest="c" * 64))
    with pytest.raises(CacheError):
        fuser.extend(past, other, alignment=alignment)
    with pytest.raises(FuserError):
        fuser.project(sharer)
    with pytest.raises(InvalidValueError):
        FUSERS.get("c2c")(fuser.spec, multi_source_mode="both")


# -- the folder --------------------------------------------------------------------------


def test_folder_says_what_it_is(tmp_path):
    folder = write(tmp_path / "f", is_do_alignment=True, alignment_strategy="longest")
    found = C2CCheckpoint.read(folder)
    assert C2CCheckpoint.read(folder / "final") == found
    assert (found.receiver_name, found.sharer_name) == ("Some/Receiver", "Some/Sharer")
    assert (found.alignment, found.networks) == ("longest", 4)
    fuser = load_c2c(folder, SHARER, RECEIVER)
    assert not fuser.training
    assert fuser.spec.layer_map == "terminal"
    assert fuser.card["alignment"] == "longest"
    assert json.loads(json.dumps(fuser.card)) == fuser.card


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.pop("value_gate_logit"),
        lambda s: s.update(more=torch.zeros(1)),
        lambda s: s.update({"key_mlp.0.weight": s.pop("key_in.weight")}),
        lambda s: s.update({"key_in.weight": s["key_in.weight"][:, :-1].clone()}),
        lambda s: s.update({"key_gate_logit": torch.zeros(1)}),
        lambda s: s.update({"key_proj_out.bias": torch.zeros(18, dtype=torch.int32)}),
        lambda s: s.update({"key_proj_out.bias": torch.zeros(18, dtype=torch.float64)}),
        lambda s: s["value_in.bias"].fill_(math.nan),
        lambda s: s["key_proj_out.weight"].fill_(math.inf),
    ],
    ids=["missing", "extra", "renamed", "shape", "scalar-shape", "integer", "double", "nan", "inf"],
)
def test_weights_that_are_not_exactly_the_networks_are_refused(tmp_path, change):
    folder = write(tmp_path / "f")
    path = folder / "final" / "projector_2.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)
    with pytest.raises(FuserError):
        load_c2c(folder, SHARER, RECEIVER)


def test_damaged_missing_and_oversized_files_are_refused(tmp_path):
    folder = write(tmp_path / "f")
    path = folder / "final" / "projector_1.safetensors"
    whole = path.read_bytes()
    for data in (b"", whole[:100], whole[:-8], b"\xff" * 200, whole + b"\0" * (1 << 20)):
        path.write_bytes(data)
        with pytest.raises(FuserError):
            load_c2c(folder, SHARER, RECEIVER)
    path.unlink()
    with pytest.raises(FuserError, match=re.escape("convert_c2c.py")):
        load_c2c(folder, SHARER, RECEIVER)


JSON_CHANGES = {
    "class": ("final/projector_1.json", ["class"], "AllInOneProjector"),
    "unknown argument": ("final/projector_1.json", ["init_args", "gate_depth"], 2),
    "no argument": ("final/projector_1.json", ["init_args", "source_dim"], None),
    "other shape": ("final/projector_1.json", ["init_args", "hidden_dim"], 16),
    "bool": ("final/projector_1.json", ["init_args", "hidden_dim"], True),
    "huge": ("final/projector_1.json", ["init_args", "hidden_dim"], 1 << 40),
    "dropout": ("final/projector_1.json", ["init_args", "dropout"], 1.5),
    "temperature": ("final/projector_1.json", ["init_args", "final_temperature"], 0.0),
    "zero_init": ("final/projector_1.json", ["init_args", "zero_init"], "yes"),
    "few layers": ("final/projector_1.json", ["init_args", "num_layers"], 2),
    "dtype": ("final/projector_1.json", ["init_args", "dtype", "value"], "int8"),
    "dtype code": ("final/projector_1.json", ["init_args", "dtype", "__type__"], "os.system"),
    "plain dtype": ("final/projector_1.json", ["init_args", "dtype"], "float32"),
    "arguments": ("final/projector_1.json", ["init_args"], []),
    "two networks": ("final/projector_config.json", ["0", "1", "2"], [[0, 2], [1, 1]]),
    "no network": ("final/projector_config.json", ["0", "1", "2"], []),
    "text": ("final/projector_config.json", ["0", "1", "2"], [["0", 2]]),
    "negative": ("final/projector_config.json", ["0", "1", "2"], [[-1, 2]]),
    "sharer layer": ("final/projector_config.json", ["0", "1", "2"], [[2, 2]]),
    "unused network": ("final/projector_config.json", ["0", "1", "3"], [[0, 2]]),
    "hole": ("final/projector_config.json", ["0", "1", "2"], [[0, 1]]),
    "receiver layer": ("final/projector_config.json", ["0", "1", "4"], [[0, 2]]),
    "layer name": ("final/projector_config.json", ["0", "1", "-1"], [[0, 2]]),
    "two sharers": ("final/projector_config.json", ["0", "2"], {}),
    "receiver index": ("final/projector_config.json", ["1"], {}),
    "no layers": ("final/projector_config.json", ["0", "1"], {}),
    "mapping": ("config.json", ["model", "mapping"], "last_first"),
    "response": ("config.json", ["model", "include_response"], True),
    "mode": ("config.json", ["model", "multi_source_fusion_mode"], "both"),
    "strategy": ("config.json", ["model", "alignment_strategy"], "middle"),
    "names": ("config.json", ["model", "base_model"], 7),
    "model": ("config.json", ["model"], []),
}


@pytest.mark.parametrize("change", JSON_CHANGES)
def test_json_that_says_something_else_is_refused(tmp_path, change):
    name, path, value = JSON_CHANGES[change]
    folder = write(tmp_path / "f")
    values = json.loads((folder / name).read_text())
    part = values
    for key in path[:-1]:
        part = part[key]
    part.update({path[-1]: value}) if value is not None else part.pop(path[-1])
    (folder / name).write_text(json.dumps(values))
    with pytest.raises(FuserError):
        load_c2c(folder, SHARER, RECEIVER)


@pytest.mark.parametrize(
    "name", ["config.json", "final/projector_config.json", "final/projector_0.json"]
)
@pytest.mark.parametrize(
    "data", [None, b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b" " * (2 << 20)]
)
def test_json_that_is_none_is_refused(tmp_path, name, data):
    folder = write(tmp_path / "f")
    (folder / name).unlink() if data is None else (folder / name).write_bytes(data)
    with pytest.raises(FuserError):
        load_c2c(folder, SHARER, RECEIVER)


def test_fuser_of_another_pair_is_refused(tmp_path):
    folder = write(tmp_path / "f")
    with pytest.raises(FuserError, match="check which is the sharer"):
        load_c2c(folder, RECEIVER, SHARER)
    with pytest.raises(FuserError):
        load_c2c(folder, SHARER, dataclasses.replace(RECEIVER, layers=3))
    with pytest.raises(FuserError):
        load_c2c(tmp_path, SHARER, RECEIVER)


def test_mode_that_the_config_leaves_open_must_be_given(tmp_path):
    folder = write(tmp_path / "f", multi_source_fusion_mode=None)
    with pytest.raises(FuserError, match="several sharers"):
        load_c2c(folder, SHARER, RECEIVER)
    fuser = load_c2c(folder, SHARER, RECEIVER, multi_source_mode="parallel")
    assert fuser.multi_source_mode == "parallel"
    with pytest.raises(InvalidValueError):
        load_c2c(folder, SHARER, RECEIVER, multi_source_mode="both")


# -- the conversion ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("convert_c2c", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_script_runs_from_the_command_line(tmp_path):
    folder = write(tmp_path / "f", pickled=True)
    done = subprocess.run(
        [sys.executable, SCRIPT, folder, tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "4 networks converted\n"), done.stderr
    assert load_c2c(tmp_path / "out", SHARER, RECEIVER).card["sharer"] == "Some/Sharer"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_converted_folder_gives_the_published_weights(tmp_path, script, capsys, dtype):
    folder = write(tmp_path / "f", pickled=True, dtype=dtype)
    (folder / "final" / "training_state.pt").write_bytes(b"not read")
    out = tmp_path / "out"
    assert script.main([str(folder), str(out)]) == 0
    stored = load_file(out / "final" / "projector_0.safetensors")
    assert {x.dtype for x in stored.values()} == {dtype}
    fuser = load_c2c(out, SHARER, RECEIVER)
    for i, net in enumerate(fuser.projectors):
        published = {name: x.to(dtype).float() for name, x in random_state(i).items()}
        state = net.state_dict()
        assert all(torch.equal(state[name], x) for name, x in published.items())
    assert not list(out.rglob("*.pt"))
    assert script.main([str(folder), str(out)]) == 1
    assert "exists already" in capsys.readouterr().err


class Malicious:
    """Would leave a file behind when unpickled without restriction."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def refusal(script, capsys, folder: Path, out: Path) -> str:
    assert script.main([str(folder), str(out)]) == 1
    assert not out.exists()  # nothing half converted
    return capsys.readouterr().err


def test_script_refuses_pickles_that_hold_anything_but_the_weights(tmp_path, script, capsys):
    folder = write(tmp_path / "f", pickled=True)
    path, mark = folder / "final" / "projector_3.pt", tmp_path / "was-run"
    torch.save({"x": Malicious(mark)}, path)
    text = refusal(script, capsys, folder, tmp_path / "out")
    assert "something else than tensors" in text
    assert not mark.exists()
    # The file would have done it.
    torch.load(path, weights_only=False)
    assert mark.exists()


def test_script_refuses_bombs_and_other_archives(tmp_path, script, capsys):
    folder = write(tmp_path / "f", pickled=True)
    path = folder / "final" / "projector_0.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * (64 << 20))
    assert path.stat().st_size < 1 << 20
    assert "larger than" in refusal(script, capsys, folder, tmp_path / "out")
    path.write_bytes(b"\x80\x02}q\x00.")  # a bare pickle
    assert "no archive" in refusal(script, capsys, folder, tmp_path / "out")
    path.unlink()
    assert "no archive" in refusal(script, capsys, folder, tmp_path / "out")


def test_script_refuses_another_state(tmp_path, script, capsys):
    states = [random_state(i) for i in range(4)]
    states[1].pop("key_gate_logit")
    folder = write(tmp_path / "f", pickled=True, states=states)
    assert "lacks weights" in refusal(script, capsys, folder, tmp_path / "out")
    torch.save([1, 2], folder / "final" / "projector_0.pt")
    assert "lacks weights" in refusal(script, capsys, folder, tmp_path / "out")
