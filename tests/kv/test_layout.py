"""Entries outside their model: position-free, moved, put back, and decoded on as if never gone."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from fedinfer_flower.errors import CacheError, ModelError, UnsupportedVersionError
from fedinfer_flower.kv.layout import CacheEntries, CacheLayout
from fedinfer_flower.kv.past import Past
from fedinfer_flower.kv.rotary import rotary_tables, rotate, unrotate
from fedinfer_flower.language.decoding import Decoding
from fedinfer_flower.language.model import LanguageModel
from fedinfer_flower.simulation.facts.families import FAMILIES, build
from fedinfer_flower.simulation.facts.prompts import FactPrompts
from fedinfer_flower.simulation.facts.world import FactWorld

torch.set_num_threads(1)

WORLD = FactWorld()
PROMPTS = FactPrompts(WORLD.words)
FACTS = WORLD.facts(WORLD.private[0])
# Of different lengths, so that a batch has to be padded.
QUESTIONS = [
    PROMPTS.ask(FACTS[0].question()),
    PROMPTS.ask(FACTS[1].question(3), documents=[FACTS[2].statement(), FACTS[3].statement()]),
    PROMPTS.ask(FACTS[4].question(2)),
]
# float32: the rotation is taken out and put back, about 1e-6 a logit in these models.
TOLERANCE = 1e-4
# bfloat16 keeps 8 bits, and a key is rounded once more on the way out and once on the way in.
TOLERANCE_BF16 = 0.1

YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 10_000.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 10_000.0,
}


def tiny(architecture, *, tokenizer, **options):
    torch.manual_seed(3)
    config = AutoConfig.for_model(
        architecture,
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "initializer_range": 0.08,
            **options,
        },
    )
    return AutoModelForCausalLM.from_config(config)


def language_model(kind):
    tokenizer = build(FAMILIES[0], WORLD)[1]
    if kind in ("qwen3", "llama", "qwen2"):
        family = next(f for f in FAMILIES if f.name == kind)
        return LanguageModel(*build(family, WORLD), prompts=PROMPTS)
    rope = {"yarn": YARN, "llama3": LLAMA3}[kind]
    model = tiny("llama", tokenizer=tokenizer, rope_parameters=rope)
    return LanguageModel(model, tokenizer, prompts=PROMPTS)


@pytest.fixture(scope="module", params=["qwen3", "llama", "qwen2", "yarn", "llama3"])
def lm(request):
    return language_model(request.param)


@pytest.fixture(scope="module")
def one():
    return language_model("llama")


def plain_logits(lm, prompts, labels):
    """What the model says of labels behind prompts, without any cache."""
    tokens = lm.tokens(prompts)
    ids, mask = torch.cat([tokens.ids, labels], 1), tokens.mask
    mask = torch.cat([mask, torch.ones_like(labels)], 1)
    at = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        out = lm.model(input_ids=ids, attention_mask=mask, position_ids=at, use_cache=False)
    return out.logits[:, tokens.ids.shape[1] - 1 :]


def plain_text(lm, prompts, settings):
    """What `generate` of transformers writes."""
    tokens = lm.tokens(prompts)
    with torch.no_grad():
        out = lm.model.generate(
            input_ids=tokens.ids,
            attention_mask=tokens.mask,
            max_new_tokens=settings.max_new_tokens,
            do_sample=False,
            pad_token_id=lm.tokenizer.pad_token_id,
        )
    rows = out[:, tokens.ids.shape[1] :]
    return [lm.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]


# -- the round trip ----------------------------------------------------------------------


def test_export_and_import_gives_the_logits_of_the_plain_model(lm):
    labels = torch.randint(4, 100, (3, 6), generator=torch.Generator().manual_seed(1))
    past = lm.prefill(QUESTIONS).past()
    with torch.no_grad():
        through_cache = lm.logits_on(past, labels)
    expected = plain_logits(lm, QUESTIONS, labels)
    assert through_cache.shape == expected.shape
    assert (through_cache - expected).abs().max() < TOLERANCE


def test_greedy_answers_are_those_of_transformers_generate(lm):
    settings = Decoding(max_new_tokens=12)
    assert lm.generate(QUESTIONS, settings) == plain_text(lm, QUESTIONS, settings)


def test_answers_do_not_depend_on_the_rest_of_the_batch(lm):
    settings = Decoding(max_new_tokens=8)
    alone = [lm.generate([question], settings)[0] for question in QUESTIONS]
    assert lm.generate(QUESTIONS, settings) == alone


def test_entries_of_padded_rows_are_those_of_single_rows(lm):
    batch = lm.prefill(QUESTIONS, hidden=True).entries
    batch.require_finite()
    for row, question in enumerate(QUESTIONS):
        single = lm.prefill([question], hidden=True).entries
        n = single.tokens
        kept = batch.select([row]).cut(batch.tokens - n)
        assert kept.mask.all()
        pairs = zip(
            (*kept.keys, *kept.values, kept.hidden),
            (*single.keys, *single.values, single.hidden),
            strict=True,
        )
        assert max(float((a - b).abs().max()) for a, b in pairs) < TOLERANCE


def test_entries_after_decoding_on_top_are_those_of_the_longer_prompt(lm):
    read = lm.prefill([QUESTIONS[0]], decode=3, hidden=True)
    ids, mask = read.tokens.ids, read.tokens.mask
    assert ids.shape == mask.shape == (1, read.entries.tokens)
    with torch.no_grad():
        out = lm.model(input_ids=ids, use_cache=True, output_hidden_states=True)
    cos, sin = rotary_tables(lm.model, read.tokens.positions)
    for layer, key, value in zip(
        out.past_key_values.layers, read.entries.keys, read.entries.values, strict=True
    ):
        assert (unrotate(layer.keys, cos, sin) - key).abs().max() < TOLERANCE
        assert (layer.values - value).abs().max() < TOLERANCE
    assert (out.hidden_states[-1] - read.entries.hidden).abs().max() < TOLERANCE
    greedy = out.logits[0, -4:-1].argmax(-1)
    assert torch.equal(greedy, ids[0, -3:])


def test_hidden_state_is_what_the_language_head_reads(lm):
    read = lm.prefill(QUESTIONS, hidden=True)
    with torch.no_grad():
        logits = lm.model.get_output_embeddings()(read.entries.hidden[:, -1])
    expected = plain_logits(lm, QUESTIONS, torch.empty(3, 0, dtype=torch.long))[:, -1]
    assert (logits - expected).abs().max() < TOLERANCE


def test_cache_itself_does_not_contain_what_the_last_layer_computed(one):
    # Two models that differ in the last layer's output only have the same entries.
    before = one.prefill([QUESTIONS[0]], hidden=True).entries
    other = language_model("llama")
    with torch.no_grad():
        other.model.model.layers[-1].mlp.down_proj.weight.mul_(-2.0)
    after = other.prefill([QUESTIONS[0]], hidden=True).entries
    assert all(torch.equal(a, b) for a, b in zip(before.keys, after.keys, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before.values, after.values, strict=True))
    assert (before.hidden - after.hidden).abs().max() > 0.01


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen2"])
def test_bfloat16_round_trip_stays_within_its_rounding(family):
    model, tokenizer = build(next(f for f in FAMILIES if f.name == family), WORLD)
    lm = LanguageModel(model.to(torch.bfloat16), tokenizer, prompts=PROMPTS)
    labels = torch.randint(4, 100, (3, 4), generator=torch.Generator().manual_seed(1))
    read = lm.prefill(QUESTIONS)
    assert read.entries.keys[0].dtype == torch.bfloat16
    with torch.no_grad():
        got = lm.logits_on(read.past(), labels).float()
    expected = plain_logits(lm, QUESTIONS, labels).float()
    assert (got - expected).abs().max() < TOLERANCE_BF16 * expected.abs().max()
    assert torch.isfinite(got).all()


def test_prompt_of_one_token_decodes_without_a_past(one):
    text = FACTS[0].person.first
    past = one.prefill([""]).past()  # the start token alone
    assert past.mask.shape == (1, 0)
    settings = Decoding(max_new_tokens=5)
    assert one.decode_on(past, settings) == plain_text(one, [""], settings)
    assert len(one.generate(["", text], settings)) == 2


def test_prefilling_does_not_change_what_was_exported(one):
    read = one.prefill(QUESTIONS)
    copies = [k.clone() for k in read.entries.keys]
    past = read.past()
    first = one.decode_on(past, Decoding(max_new_tokens=6))
    assert one.decode_on(past, Decoding(max_new_tokens=6)) == first
    assert all(torch.equal(a, b) for a, b in zip(copies, read.entries.keys, strict=True))


def test_gradients_reach_every_entry_and_no_weight(one):
    past = one.prefill(QUESTIONS[:2]).past()
    keys = tuple(k.clone().requires_grad_() for k in past.keys)
    values = tuple(v.clone().requires_grad_() for v in past.values)
    past = dataclasses.replace(past, keys=keys, values=values)
    one.logits_on(past, torch.tensor([[5, 6], [7, 8]])).float().logsumexp(-1).sum().backward()
    assert all(float(x.grad.abs().sum()) > 0 for x in (*keys, *values))
    assert all(p.grad is None for p in one.model.parameters())


# -- positions ---------------------------------------------------------------------------


def test_rotation_taken_out_and_put_in_is_the_same_key(lm):
    at = torch.tensor([[0, 1, 5, 40]])
    cos, sin = rotary_tables(lm.model, at)
    shape = (1, lm.layout.heads, 4, lm.layout.head_size)
    keys = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    turned = rotate(keys, cos, sin)
    assert not torch.allclose(turned[:, :, 1:], keys[:, :, 1:], atol=1e-2)
    # Two products and a sum in float32, of numbers of size 1 to 4.
    assert (unrotate(turned, cos, sin) - keys).abs().max() < 1e-5


def test_keys_moved_to_other_positions_are_those_computed_there(lm):
    ids = lm.tokens([QUESTIONS[0]]).ids
    n = ids.shape[1]
    here, there = torch.arange(n)[None], torch.arange(20, 20 + n)[None]
    with torch.no_grad():
        layers = [
            lm.model(input_ids=ids, position_ids=at, use_cache=True).past_key_values.layers
            for at in (here, there)
        ]
    out, into = rotary_tables(lm.model, here), rotary_tables(lm.model, there)
    for a, b in zip(*layers, strict=True):
        moved = rotate(unrotate(a.keys, *out), *into)
        assert (moved - b.keys).abs().max() < TOLERANCE


def test_prefix_and_prompt_behind_it_are_the_joint_text(one):
    """A prefix that is read and placed in front equals reading both at once."""
    joint = QUESTIONS[1]
    tokens = one.tokens([joint])
    ids, cut = tokens.ids, 7
    whole = one.prefill([joint]).entries
    head = whole.cut(0, cut)
    empty = tuple(k[:, :, :0] for k in head.keys)
    rest = Past(
        keys=empty,
        values=empty,
        mask=head.mask[:, :0],
        positions=head.mask[:, :0],
        ids=ids[:, cut:],
        ids_positions=torch.arange(cut, ids.shape[1])[None],
    )
    past = rest.with_prefix(head.keys, head.values, head.mask, head.positions)
    assert past.own_from == cut
    with torch.no_grad():
        got = one.logits_on(past)[:, -1]
    expected = plain_logits(one, [joint], torch.empty(1, 0, dtype=torch.long))[:, -1]
    assert (got - expected).abs().max() < TOLERANCE


def test_masked_prefix_is_the_receiver_alone(lm):
    past = lm.prefill(QUESTIONS).past()
    other = lm.prefill(QUESTIONS[::-1]).entries
    shut = past.with_prefix(other.keys, other.values, torch.zeros_like(other.mask), other.positions)
    labels = torch.tensor([[5, 6], [7, 8], [9, 10]])
    with torch.no_grad():
        assert (lm.logits_on(shut, labels) - lm.logits_on(past, labels)).abs().max() < TOLERANCE
    settings = Decoding(max_new_tokens=6)
    assert lm.decode_on(shut, settings) == lm.decode_on(past, settings)


def test_open_prefix_changes_the_logits(one):
    past = one.prefill(QUESTIONS).past()
    other = one.prefill(QUESTIONS[::-1]).entries
    joined = past.with_prefix(other.keys, other.values, other.mask, other.positions)
    with torch.no_grad():
        assert (one.logits_on(joined) - one.logits_on(past)).abs().max() > 0.01


def test_residual_reaches_own_entries_and_no_prefix(one):
    past = one.prefill(QUESTIONS[:1]).past()
    own = past.mask.shape[1]
    joined = past.with_prefix(past.keys, past.values, past.mask, past.positions)
    ones = tuple(torch.ones_like(k) for k in past.keys)
    done = joined.with_residual(ones, ones)
    assert torch.equal(done.keys[0][:, :, :own], past.keys[0])
    assert torch.equal(done.keys[0][:, :, own:], past.keys[0] + 1)
    assert torch.equal(done.values[-1][:, :, own:], past.values[-1] + 1)


def test_prefix_of_another_depth_is_refused(one):
    past = one.prefill(QUESTIONS[:1]).past()
    with pytest.raises(CacheError):
        past.with_prefix(past.keys[:-1], past.values[:-1], past.mask, past.positions)


# -- the trap ----------------------------------------------------------------------------


def test_transformers_takes_a_mask_of_the_new_tokens_alone_and_answers_wrongly(one):
    """The mistake that our interface must make impossible: no error, another answer."""
    tokens = one.tokens([QUESTIONS[1]])
    out = one.model(input_ids=tokens.ids[:, :-1], use_cache=True)
    pairs = [(layer.keys, layer.values) for layer in out.past_key_values.layers]
    expected = one.model(input_ids=tokens.ids).logits[:, -1]

    def last(mask):
        return one.model(
            input_ids=tokens.ids[:, -1:],
            attention_mask=mask,
            position_ids=tokens.positions[:, -1:],
            past_key_values=DynamicCache(pairs, config=one.model.config),
        ).logits[:, -1]

    assert (last(tokens.mask) - expected).abs().max() < TOLERANCE
    assert (last(tokens.mask[:, -1:]) - expected).abs().max() > 0.01


@pytest.mark.parametrize(
    "change",
    [
        lambda p: {"mask": p.mask[:, -1:]},
        lambda p: {"mask": p.mask[:, :0]},
        lambda p: {"mask": torch.cat([p.mask, p.mask[:, :1]], 1)},
        lambda p: {"positions": p.positions[:, :-1]},
        lambda p: {"ids": torch.cat([p.ids, p.ids], 1)},
        lambda p: {"ids": p.ids[:, :0], "ids_positions": p.ids_positions[:, :0]},
        lambda p: {"ids": p.ids[:1], "ids_positions": p.ids_positions[:1]},
        lambda p: {"keys": p.keys[:-1]},
        lambda p: {"values": (*p.values[:-1], p.values[-1][:, :, :-1])},
        lambda p: {"keys": (p.keys[0][:, :1], *p.keys[1:])},
    ],
    ids=[
        "mask of the last", "no mask", "longer mask", "positions", "ids", "nothing to read",
        "rows", "layers", "tokens", "heads",
    ],
)  # fmt: skip
def test_past_that_does_not_fit_together_is_refused(one, change):
    past = one.prefill(QUESTIONS).past()
    with pytest.raises(CacheError):
        one.decode_on(dataclasses.replace(past, **change(past)), Decoding())


# -- what cannot be shared ---------------------------------------------------------------


REFUSED = {
    "mistral-window": ("mistral", {"sliding_window": 8}),
    "phi3-window": ("phi3", {"sliding_window": 8}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "gemma2-window": ("gemma2", {"head_dim": 16}),
    "gpt2-learned-positions": ("gpt2", {}),
    "bloom-alibi": ("bloom", {}),
    "gpt-neox-partial": ("gpt_neox", {}),
    "phi-partial": ("phi", {}),
    "glm-partial-interleaved": ("glm", {"head_dim": 16}),
    "cohere-interleaved": ("cohere", {}),
    "smollm3-every-fourth-without": ("smollm3", {"num_hidden_layers": 4}),
    "deepseek-latent": ("deepseek_v3", {"first_k_dense_replace": 2}),
    "mamba-recurrent": ("mamba", {}),
    "recurrent-gemma": ("recurrent_gemma", {}),
    "longrope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "factor": 2.0,
                "rope_theta": 10_000.0,
                "short_factor": [1.0] * 8,
                "long_factor": [4.0] * 8,
                "original_max_position_embeddings": 16,
            }
        },
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(REFUSED))
def test_model_whose_cache_cannot_be_shared_is_refused(name):
    architecture, options = REFUSED[name]
    tokenizer = build(FAMILIES[0], WORLD)[1]
    model = tiny(architecture, tokenizer=tokenizer, **options)
    with pytest.raises(ModelError) as caught:
        LanguageModel(model, tokenizer, prompts=PROMPTS)
    assert caught.value.hint


@pytest.mark.parametrize("architecture", ["mistral", "granite", "qwen3_moe"])
def test_full_attention_of_further_families_is_taken(architecture):
    tokenizer = build(FAMILIES[0], WORLD)[1]
    options = {"sliding_window": None} if architecture == "mistral" else {}
    lm = LanguageModel(
        tiny(architecture, tokenizer=tokenizer, **options), tokenizer, prompts=PROMPTS
    )
    settings = Decoding(max_new_tokens=8)
    assert lm.generate(QUESTIONS, settings) == plain_text(lm, QUESTIONS, settings)


# -- the descriptor ----------------------------------------------------------------------

LAYOUT = CacheLayout(
    layers=2,
    heads=1,
    head_size=4,
    hidden_size=6,
    window=16,
    rope="{}",
    architecture="llama",
    tokenizer_digest="0" * 64,
    model_digest="1" * 64,
)


def entries(*, n=2, t=3, hidden=True, layout=LAYOUT):
    generator = torch.Generator().manual_seed(0)
    shape = (n, layout.heads, t, layout.head_size)
    return CacheEntries(
        keys=tuple(torch.randn(shape, generator=generator) for _ in range(layout.layers)),
        values=tuple(torch.randn(shape, generator=generator) for _ in range(layout.layers)),
        mask=torch.tensor([[0] + [1] * (t - 1), [1] * t])[:n],
        layout=layout,
        hidden=torch.randn(n, t, layout.hidden_size, generator=generator) if hidden else None,
    )


def test_layout_of_a_model_says_what_its_cache_is(lm):
    read = lm.prefill([QUESTIONS[0]], hidden=True).entries
    layout = lm.layout
    assert read.layout == layout
    assert len(read.keys) == layout.layers
    assert read.keys[0].shape[1::2] == (layout.heads, layout.head_size)
    assert read.hidden.shape[2] == layout.hidden_size
    assert json.loads(layout.rope)["rope_type"] in ("default", "yarn", "llama3")
    floats = sum(x[0, :, 0].numel() for x in (*read.keys, *read.values))
    assert layout.floats_per_token(hidden=False) == floats
    assert layout.floats_per_token(hidden=True) == floats + layout.hidden_size


def test_layout_round_trips_and_is_canonical(lm):
    assert CacheLayout.from_json(lm.layout.to_json()) == lm.layout
    keys = list(json.loads(lm.layout.to_json()))
    assert keys == sorted(keys)


@pytest.mark.parametrize(
    "change",
    [
        {"layers": 0},
        {"layers": True},
        {"heads": 1.0},
        {"head_size": 10**9},
        {"window": -1},
        {"hidden_size": "6"},
        {"model_digest": "1" * 63},
        {"tokenizer_digest": "G" * 64},
        {"model_digest": 7},
        {"rope": "x" * 5000},
        {"architecture": None},
        {"surplus": 1},
    ],
    ids=lambda change: next(iter(change)) + "-" + str(next(iter(change.values())))[:6],
)
def test_layout_with_a_bad_field_is_refused(change):
    values = json.loads(LAYOUT.to_json()) | change
    with pytest.raises(CacheError):
        CacheLayout.from_json(json.dumps(values))


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, '{"layers":1}'])
def test_layout_that_is_no_layout_is_refused(text):
    with pytest.raises(CacheError):
        CacheLayout.from_json(text)


def test_layout_of_another_version_is_refused():
    values = json.loads(LAYOUT.to_json()) | {"version": 2}
    with pytest.raises(UnsupportedVersionError):
        CacheLayout.from_json(json.dumps(values))


def test_layout_of_another_model_is_refused():
    LAYOUT.require_model("1" * 64)
    with pytest.raises(CacheError, match="expected"):
        LAYOUT.require_model("2" * 64)


# -- entries -----------------------------------------------------------------------------


def test_entries_have_positions_from_the_first_real_token():
    assert entries().positions.tolist() == [[0, 0, 1], [0, 1, 2]]


def test_cut_and_select_take_the_same_tokens_and_rows_everywhere():
    whole = entries()
    part = whole.cut(-2).select([1])
    assert (part.rows, part.tokens) == (1, 2)
    assert torch.equal(part.keys[1], whole.keys[1][1:, :, 1:])
    assert torch.equal(part.values[0], whole.values[0][1:, :, 1:])
    assert torch.equal(part.hidden, whole.hidden[1:, 1:])
    assert torch.equal(part.mask, whole.mask[1:, 1:])
    assert part.without_hidden().hidden is None
    assert whole.select(torch.tensor([1, 0])).mask.tolist() == [[1, 1, 1], [0, 1, 1]]


def test_flat_puts_keys_before_values_and_heads_side_by_side():
    layout = dataclasses.replace(LAYOUT, heads=2)
    whole = entries(layout=layout)
    flat = whole.flat(1)
    assert flat.shape == (2, 3, layout.entry_floats)
    expected = torch.cat([whole.keys[1][0, 0, 2], whole.keys[1][0, 1, 2]])
    assert torch.equal(flat[0, 2, :8], expected)
    assert torch.equal(flat[1, 0, 12:], whole.values[1][1, 1, 0])


@pytest.mark.parametrize("part", ["keys", "values", "hidden"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_entries_that_are_not_finite_are_found(part, bad):
    whole = entries()
    whole.require_finite()
    target = whole.hidden if part == "hidden" else getattr(whole, part)[-1]
    target.view(-1)[-1] = bad
    with pytest.raises(CacheError):
        whole.require_finite()


@pytest.mark.parametrize(
    "change",
    [
        lambda e: {"keys": e.keys[:1]},
        lambda e: {"values": (*e.values, e.values[0])},
        lambda e: {"keys": (e.keys[0], e.keys[1][:, :, :2])},
        lambda e: {"mask": e.mask[:, :2]},
        lambda e: {"hidden": e.hidden[:, :2]},
        lambda e: {"layout": dataclasses.replace(LAYOUT, head_size=8)},
    ],
    ids=["layers", "more layers", "tokens", "mask", "hidden", "layout"],
)
def test_entries_of_other_shapes_than_their_layout_are_refused(change):
    whole = entries()
    with pytest.raises(CacheError):
        dataclasses.replace(whole, **change(whole))


def test_entries_do_not_show_their_numbers():
    assert "tensor" not in repr(entries())
