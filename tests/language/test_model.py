"""`LanguageModel`: prompts in, answers, scores and evidence out; folders loaded with care."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedinfer_flower.errors import (
    CacheError,
    InvalidValueError,
    ModelError,
    PromptTooLongError,
)
from fedinfer_flower.language.chat import ChatPrompts, PlainPrompts
from fedinfer_flower.language.decoding import Decoding
from fedinfer_flower.language.folder import load_folder
from fedinfer_flower.language.model import LanguageModel
from fedinfer_flower.simulation.facts.families import FAMILIES, build
from fedinfer_flower.simulation.facts.prompts import FactPrompts
from fedinfer_flower.simulation.facts.world import ABSTENTION, FactWorld

torch.set_num_threads(1)

WORLD = FactWorld()
PROMPTS = FactPrompts(WORLD.words)
FACTS = WORLD.facts(WORLD.private[0])
QUESTIONS = [
    PROMPTS.ask(FACTS[0].question()),
    PROMPTS.ask(FACTS[1].question(3), documents=[FACTS[2].statement()]),
    PROMPTS.ask(FACTS[4].question(2)),
]
TOLERANCE = 1e-4  # float32 logits, see tests/kv/test_layout.py


@pytest.fixture(scope="module")
def lm():
    return LanguageModel(*build(FAMILIES[1], WORLD), prompts=PROMPTS)


@pytest.fixture
def fresh():
    return LanguageModel(*build(FAMILIES[1], WORLD), prompts=PROMPTS)


# -- tokens ------------------------------------------------------------------------------


def test_prompts_are_padded_on_the_left(lm):
    tokens = lm.tokens(QUESTIONS)
    lengths = tokens.mask.sum(1)
    assert len(set(lengths.tolist())) > 1
    for row, question in enumerate(QUESTIONS):
        n = int(lengths[row])
        assert tokens.mask[row].tolist() == [0] * (tokens.ids.shape[1] - n) + [1] * n
        single = lm.tokens([question])
        assert torch.equal(tokens.ids[row, -n:], single.ids[0])
        assert tokens.positions[row, -n:].tolist() == list(range(n))
        assert (tokens.ids[row, :-n] == lm.tokenizer.pad_token_id).all()


def test_spans_say_which_characters_a_token_covers(lm):
    tokens = lm.tokens(QUESTIONS)
    for question, spans, mask in zip(QUESTIONS, tokens.spans, tokens.mask, strict=True):
        assert len(spans) == int(mask.sum())
        assert spans[0] == (0, 0)  # the start token
        text = "".join(question[a:b] for a, b in spans)
        assert text == question.replace(" ", "")


def test_prompt_that_fills_the_window_is_taken_and_one_more_is_not(lm):
    word = FACTS[0].relation
    pieces = len(lm.tokenizer(word, add_special_tokens=False)["input_ids"])
    words = (lm.layout.window - 1) // pieces
    text = " ".join([word] * words)
    room = lm.layout.window - lm.tokens([text]).ids.shape[1]
    lm.tokens([text], room=room)
    with pytest.raises(PromptTooLongError):
        lm.tokens([text], room=room + 1)
    with pytest.raises(PromptTooLongError):
        lm.generate([text], Decoding(max_new_tokens=room + 1))
    with pytest.raises(PromptTooLongError):
        lm.prefill([text], decode=room + 1)


def test_errors_do_not_quote_the_prompt(lm):
    secret = FACTS[0].person.first
    with pytest.raises(PromptTooLongError) as caught:
        lm.tokens([f"{secret} " * 600])
    assert secret not in str(caught.value)


def test_prompt_without_a_token_is_refused(make_tokenizer, make_chat_model):
    tokenizer = make_tokenizer()
    lm = LanguageModel(make_chat_model(tokenizer), tokenizer, prompts=ChatPrompts(tokenizer))
    with pytest.raises(PromptTooLongError):
        lm.tokens([""])


# -- answers -----------------------------------------------------------------------------


def scripted(lm, rows):
    """Make the model write the given ids, whatever it reads; count its passes."""
    passes = []

    def forward(ids, mask, at, *, past, hidden=False):
        step = len(passes)
        passes.append(ids.shape)
        logits = torch.full((len(rows), ids.shape[1], len(lm.tokenizer)), -9.0)
        for row, script in enumerate(rows):
            logits[row, -1, script[min(step, len(script) - 1)]] = 9.0
        return type("Out", (), {"logits": logits, "past_key_values": past})()

    lm._forward = forward
    return passes


def ids_of(lm, text):
    return lm.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_rows_end_at_their_own_step_and_decoding_with_the_last(fresh):
    first, last = FACTS[0].person.first, FACTS[0].person.last
    past = fresh.prefill(QUESTIONS).past()
    end = [fresh.tokenizer.eos_token_id]
    rest = ids_of(fresh, f"{last} {last} {last} {last}")  # a row that ended says no more
    rows = [
        ids_of(fresh, first) + end + rest,
        ids_of(fresh, f"{first} {last} {first}") + end,
        end + rest,
    ]
    longest = len(rows[1])
    passes = scripted(fresh, rows)
    answers = fresh.decode_on(past, Decoding(max_new_tokens=30))
    assert answers == [first, f"{first} {last} {first}", ""]
    assert len(passes) == longest


def test_text_ends_before_the_first_stop(fresh):
    first = FACTS[0].person.first
    past = fresh.prefill(QUESTIONS[:2]).past()
    rows = [ids_of(fresh, f"{first} . {first} {first}"), ids_of(fresh, f"{first} {first} ? .")]
    scripted(fresh, rows)
    settings = Decoding(max_new_tokens=12, stop=(" .", " ?"))
    assert fresh.decode_on(past, settings) == [first, f"{first} {first}"]


def test_length_is_bounded_by_max_new_tokens(fresh):
    word = ABSTENTION
    past = fresh.prefill(QUESTIONS[:1]).past()
    passes = scripted(fresh, [ids_of(fresh, word)])
    assert fresh.decode_on(past, Decoding(max_new_tokens=3)) == [" ".join([word] * 3)]
    assert len(passes) == 3


def test_end_tokens_of_the_generation_config_end_an_answer():
    """Chat models end a turn with another token than the tokenizer's own."""
    model, tokenizer = build(FAMILIES[1], WORLD)
    turn = tokenizer(ABSTENTION, add_special_tokens=False)["input_ids"][0]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, turn]
    lm = LanguageModel(model, tokenizer, prompts=PROMPTS)
    past = lm.prefill(QUESTIONS[:1]).past()
    passes = scripted(lm, [[*ids_of(lm, FACTS[0].relation), turn, *ids_of(lm, "is")]])
    assert lm.decode_on(past, Decoding(max_new_tokens=9)) == [FACTS[0].relation]
    assert len(passes) == len(ids_of(lm, FACTS[0].relation)) + 1


def test_sampled_answers_are_those_of_a_loop_without_a_cache(lm):
    """Same seed, same draws: the loop reads the whole text anew at every step."""
    settings = Decoding(max_new_tokens=8, temperature=1.5, top_k=50, top_p=0.95, seed=4)
    tokens = lm.tokens(QUESTIONS)
    ids, mask, sampler = tokens.ids, tokens.mask, settings.sampler()
    for _ in range(settings.max_new_tokens):
        at = (mask.cumsum(1) - 1).clamp_min(0)
        with torch.no_grad():
            logits = lm.model(input_ids=ids, attention_mask=mask, position_ids=at).logits[:, -1]
        token = sampler.choose(logits)
        ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
    expected = []
    for row in ids[:, tokens.ids.shape[1] :].tolist():
        end = lm.tokenizer.eos_token_id
        kept = row[: row.index(end)] if end in row else row
        expected.append(lm.tokenizer.decode(kept, skip_special_tokens=True).strip())
    assert lm.generate(QUESTIONS, settings) == expected
    assert lm.generate(QUESTIONS, settings) == expected
    other = Decoding(max_new_tokens=8, temperature=1.5, top_k=50, top_p=0.95, seed=5)
    assert lm.generate(QUESTIONS, other) != expected


def test_answer_beyond_the_window_is_refused_on_any_past(lm):
    past = lm.prefill(QUESTIONS[:1]).past()
    n = int(past.ids_positions.max()) + 1
    room = lm.layout.window - n
    with pytest.raises(PromptTooLongError):
        lm.decode_on(past, Decoding(max_new_tokens=room + 2))


# -- prefill -----------------------------------------------------------------------------


def test_select_takes_rows_of_everything(lm):
    read = lm.prefill(QUESTIONS, hidden=True)
    part = read.select(torch.tensor([2, 0]))
    assert torch.equal(part.tokens.ids, read.tokens.ids[[2, 0]])
    assert part.tokens.spans == [read.tokens.spans[2], read.tokens.spans[0]]
    assert torch.equal(part.entries.keys[1], read.entries.keys[1][[2, 0]])
    assert torch.equal(part.evidence, read.evidence[[2, 0]])
    settings = Decoding(max_new_tokens=5)
    answers = lm.generate(QUESTIONS, settings)
    assert lm.decode_on(part.past(), settings) == [answers[2], answers[0]]


def test_evidence_is_about_the_first_token_whatever_is_decoded_on_top(lm):
    plain, longer = lm.prefill(QUESTIONS), lm.prefill(QUESTIONS, decode=3)
    torch.testing.assert_close(plain.evidence, longer.evidence, atol=TOLERANCE, rtol=0)
    assert plain.evidence.shape == (3, 4)


def test_abstention_ids_are_the_first_tokens_of_the_abstentions(lm):
    assert lm.abstention_ids == [ids_of(lm, ABSTENTION)[0]]


def test_evidence_counts_the_probability_of_abstaining(fresh):
    token = fresh.abstention_ids[0]
    before = fresh.prefill(QUESTIONS).evidence
    head = fresh.model.get_output_embeddings()
    with torch.no_grad():
        hidden = fresh.prefill(QUESTIONS[:1], hidden=True).entries.hidden[0, -1]
        head.weight.data = head.weight.data.clone()
        head.weight.data[token] = hidden / hidden.norm() * 5
    after = fresh.prefill(QUESTIONS[:1]).evidence
    assert after[0, 3] > before[0, 3] + 0.1
    logits = head(hidden).softmax(-1)
    assert after[0, 3] == pytest.approx(float(logits[token]), abs=1e-3)


# -- scores ------------------------------------------------------------------------------


def test_scores_are_log_probabilities_of_whole_continuations(lm):
    candidates = [FACTS[0].value, "is", f"{FACTS[1].value} ."]
    scores = lm.score(QUESTIONS, candidates)
    assert scores.shape == (3, 3)
    for row, question in enumerate(QUESTIONS):
        prompt = lm.tokens([question]).ids
        for column, text in enumerate(candidates):
            pieces = ids_of(lm, text)
            ids = torch.cat([prompt, torch.tensor([pieces])], 1)
            with torch.no_grad():
                logp = lm.model(input_ids=ids).logits[0].log_softmax(-1)
            start = prompt.shape[1] - 1
            expected = sum(float(logp[start + i, piece]) for i, piece in enumerate(pieces))
            assert float(scores[row, column]) == pytest.approx(expected, abs=1e-3)


def test_empty_candidate_is_refused_as_it_would_always_win(lm):
    with pytest.raises(InvalidValueError):
        lm.score(QUESTIONS, ["is", ""])


def test_candidates_beyond_the_window_are_refused(lm):
    with pytest.raises(PromptTooLongError):
        lm.score(QUESTIONS, [" ".join(["is"] * 600)])


# -- weights and description -------------------------------------------------------------


def test_model_is_frozen_and_in_evaluation_mode():
    model, tokenizer = build(FAMILIES[0], WORLD)
    model.train()
    lm = LanguageModel(model, tokenizer, prompts=PROMPTS)
    assert not lm.model.training
    assert not any(p.requires_grad for p in lm.model.parameters())


def test_digests_tell_models_and_tokenizers_apart(lm):
    same = LanguageModel(*build(FAMILIES[1], WORLD), prompts=PROMPTS)
    other = LanguageModel(*build(FAMILIES[1], WORLD, seed=9), prompts=PROMPTS)
    third = LanguageModel(*build(FAMILIES[2], WORLD), prompts=PROMPTS)
    assert same.layout == lm.layout
    assert other.layout.model_digest != lm.layout.model_digest
    assert other.layout.tokenizer_digest == lm.layout.tokenizer_digest
    assert third.layout.tokenizer_digest != lm.layout.tokenizer_digest


def test_using_a_tokenizer_does_not_change_its_digest():
    model, tokenizer = build(FAMILIES[0], WORLD)
    before = LanguageModel(model, tokenizer, prompts=PROMPTS)
    before.tokens(QUESTIONS)  # leaves padding settings in the tokenizer
    tokenizer("x y z", truncation=True, max_length=2)
    after = LanguageModel(model, tokenizer, prompts=PROMPTS)
    assert after.layout.tokenizer_digest == before.layout.tokenizer_digest


def test_tokenizer_without_padding_gets_its_end_token_and_without_any_is_refused():
    model, tokenizer = build(FAMILIES[0], WORLD)
    tokenizer.pad_token = None
    lm = LanguageModel(model, tokenizer, prompts=PROMPTS)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert lm.generate(QUESTIONS, Decoding(max_new_tokens=2))
    model, tokenizer = build(FAMILIES[0], WORLD)
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.unk_token = None
    with pytest.raises(ModelError):
        LanguageModel(model, tokenizer, prompts=PROMPTS)


def test_slow_tokenizer_is_refused():
    model, _ = build(FAMILIES[0], WORLD)

    class Slow:
        is_fast = False

    with pytest.raises(ModelError):
        LanguageModel(model, Slow(), prompts=PROMPTS)


# -- folders -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model, tokenizer = build(FAMILIES[1], WORLD)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_folder_gives_the_model_that_was_saved(folder, lm):
    loaded = LanguageModel.from_folder(folder, prompts=PROMPTS)
    settings = Decoding(max_new_tokens=6)
    assert loaded.generate(QUESTIONS, settings) == lm.generate(QUESTIONS, settings)
    assert loaded.layout.tokenizer_digest == lm.layout.tokenizer_digest
    assert loaded.layout == LanguageModel.from_folder(str(folder), prompts=PROMPTS).layout
    with torch.no_grad():
        exact = loaded.logits_on(loaded.prefill(QUESTIONS).past())
    torch.testing.assert_close(exact, lm.logits_on(lm.prefill(QUESTIONS).past()))


def test_folder_is_loaded_as_bfloat16_on_request(folder):
    loaded = LanguageModel.from_folder(folder, prompts=PROMPTS, dtype="bfloat16")
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.generate(QUESTIONS, Decoding(max_new_tokens=2))
    with pytest.raises(InvalidValueError):
        LanguageModel.from_folder(folder, dtype="float16")


def test_folder_brings_its_own_prompts(folder):
    assert isinstance(LanguageModel.from_folder(folder).prompts, PlainPrompts)


def test_folder_with_a_chat_template_is_spoken_to_through_it(
    tmp_path, make_tokenizer, make_chat_model
):
    tokenizer = make_tokenizer()
    make_chat_model(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    lm = LanguageModel.from_folder(tmp_path)
    assert isinstance(lm.prompts, ChatPrompts)
    assert lm.prompts.ask("Who?").count("<|im_start|>system") == 1


def test_digest_of_a_folder_follows_weights_and_config(copied):
    before = load_folder(copied, dtype="float32")[2]
    assert load_folder(copied, dtype="float32")[2] == before
    weights = load_file(copied / "model.safetensors")
    name = next(iter(weights))
    weights[name] = weights[name] + 1e-3
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    assert load_folder(copied, dtype="float32")[2] != before


def damage_missing_config(path):
    (path / "config.json").unlink()


def damage_no_safetensors(path):
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    torch.save(weights, path / "pytorch_model.bin")


def damage_truncated(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def damage_garbage(path):
    (path / "model.safetensors").write_bytes(b"\xff" * 64)


def damage_missing_weight(path):
    weights = load_file(path / "model.safetensors")
    del weights[next(name for name in weights if "q_proj" in name)]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def damage_shape(path):
    weights = load_file(path / "model.safetensors")
    name = next(name for name in weights if "q_proj" in name)
    weights[name] = weights[name][:-1].clone()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def damage_config(path):
    (path / "config.json").write_text("{ not json")


def damage_architecture(path):
    (path / "config.json").write_text('{"model_type": "no-such-model"}')


def damage_remote_code(path):
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "code.Model"}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "code.py").write_text("raise SystemExit('code of the folder ran')")


def damage_tokenizer(path):
    (path / "tokenizer.json").write_text("{}")


DAMAGES = [
    damage_missing_config,
    damage_no_safetensors,
    damage_truncated,
    damage_garbage,
    damage_missing_weight,
    damage_shape,
    damage_config,
    damage_architecture,
    damage_remote_code,
    damage_tokenizer,
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_folder_that_is_damaged_is_refused_without_its_path(copied, damage):
    damage(copied)
    with pytest.raises(ModelError) as caught:
        LanguageModel.from_folder(copied, prompts=PROMPTS)
    assert str(copied) not in str(caught.value)


def test_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ModelError):
        LanguageModel.from_folder(tmp_path / "nowhere")


def test_past_of_another_model_is_refused(lm):
    other = LanguageModel(*build(FAMILIES[0], WORLD), prompts=PROMPTS)
    with pytest.raises(CacheError):
        lm.decode_on(other.prefill(QUESTIONS).past(), Decoding())
