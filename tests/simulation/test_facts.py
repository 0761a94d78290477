"""The fact world: what the models may know, the two cuts of the language, the shipped models."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from fedinfer_flower.errors import UnknownNameError  # noqa: E402
from fedinfer_flower.simulation.facts.checkpoints import NAMES, examine, load  # noqa: E402
from fedinfer_flower.simulation.facts.families import FAMILIES, build  # noqa: E402
from fedinfer_flower.simulation.facts.pretraining import RowSampler, pretrain  # noqa: E402
from fedinfer_flower.simulation.facts.prompts import FactPrompts  # noqa: E402
from fedinfer_flower.simulation.facts.tokenizer import build_tokenizer  # noqa: E402
from fedinfer_flower.simulation.facts.world import (  # noqa: E402
    ABSTENTION,
    WORDINGS,
    FactWorld,
)

WORLD = FactWorld()


def test_nobody_is_in_two_groups():
    groups = [*WORLD.people, WORLD.strangers_seen, WORLD.strangers_new]
    everyone = [person for group in groups for person in group]
    assert len(set(everyone)) == len(everyone) == 64 * 64
    for known, fusers, gates, private in zip(
        WORLD.people, WORLD.fuser_people, WORLD.gate_people, WORLD.private, strict=True
    ):
        assert [*fusers, *gates, *private] == known


def test_world_is_the_same_for_a_seed_and_another_for_another():
    again, other = FactWorld(), FactWorld(seed=1)
    assert again.facts(again.private[0]) == WORLD.facts(WORLD.private[0])
    assert other.facts(other.private[0]) != WORLD.facts(WORLD.private[0])


def test_documents_carry_their_fact_once_and_values_are_drawn_anew():
    pairs = WORLD.documents(200, people=WORLD.private[1], statements=3, seed=3)
    truths = {(f.person, f.relation): f.value for f in WORLD.facts(WORLD.private[1])}
    for fact, document in pairs:
        assert document.startswith("D ")
        assert document.count(" is ") == 3
        assert fact.statement() in document
    # One of twelve values is right by chance: 200 draws give 17, and never 60.
    assert sum(truths[f.person, f.relation] == f.value for f, _ in pairs) < 60


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_tokenizer_brings_every_word_back(family):
    tokenizer = build_tokenizer(WORLD.words, piece_length=family.piece_length, seed=3)
    text = " ".join(WORLD.words)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text


def test_tokenizers_do_not_share_ids():
    a, b = (build_tokenizer(WORLD.words, piece_length=None, seed=s) for s in (1, 2))
    assert a.get_vocab().keys() == b.get_vocab().keys()
    assert a.get_vocab() != b.get_vocab()


@pytest.mark.parametrize("style", range(len(WORDINGS)))
def test_rewording_keeps_name_and_relation(style):
    prompts, fact = FactPrompts(WORLD.words), WORLD.facts(WORLD.private[2])[1]
    for asked in range(len(WORDINGS)):
        assert prompts.reword(fact.question(asked), style=style) == fact.question(style)


def test_notes_lose_what_is_not_of_the_language_and_what_abstains():
    prompts, fact = FactPrompts(WORLD.words), WORLD.facts(WORLD.private[0])[0]
    notes = [f"{fact.statement()} Q ignore all ? A", f"x is {ABSTENTION} .", "<bos> A A A"]
    prompt = prompts.ask_with_notes(fact.question(), notes)
    assert prompt == f"D {fact.statement()} {fact.question()} A"


def test_rows_have_labels_on_values_and_never_on_names():
    tokenizer = build_tokenizer(WORLD.words, piece_length=None, seed=0)
    sampler = RowSampler(WORLD, tokenizer, WORLD.people[0], 72, seed=1, abstention_share=0.3)
    ids, labels = sampler.batch(32)
    assert ids.shape == labels.shape == (32, 72)
    names = {tokenizer.convert_tokens_to_ids(n) for n in WORLD.first_names}
    learnt = set(labels[labels >= 0].tolist())
    asked = {tokenizer.convert_tokens_to_ids(n) for n in ("?", "Q")}
    assert learnt
    assert not learnt & asked
    # A statement that a sharer writes out repeats the name: there it can be predicted.
    assert names & learnt
    assert bool((labels[labels >= 0] == ids[labels >= 0]).all())


def test_pretraining_changes_the_model_and_repeats():
    people = WORLD.people[2][:4]

    def run() -> torch.Tensor:
        model, _ = pretrain(FAMILIES[2], WORLD, people, steps=10)
        return model.get_input_embeddings().weight

    torch.set_num_threads(1)
    first, second = run(), run()
    assert torch.equal(first, second)
    untrained = build(FAMILIES[2], WORLD)[0].get_input_embeddings().weight
    assert not torch.equal(first, untrained)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_models_know_their_own_read_and_abstain(name):
    model, index = load(name), NAMES.index(name)
    others = [p for j, group in enumerate(WORLD.private) if j != index for p in group]
    assert examine(model, WORLD.facts(WORLD.private[index])) >= 0.98
    # Standard error of 200 questions at 0.95 is 1.5 points; the models were at 0.95 and more.
    assert examine(model, WORLD.unanswerable(others[::2])) >= 0.88
    assert examine(model, WORLD.unanswerable(WORLD.strangers_new[:50])) >= 0.88
    facts, documents = zip(
        *WORLD.documents(100, people=WORLD.strangers_new, statements=1, seed=4), strict=True
    )
    assert examine(model, facts, documents) >= 0.95


def test_unknown_model_is_refused():
    with pytest.raises(UnknownNameError, match="no model"):
        load("gpt5")
