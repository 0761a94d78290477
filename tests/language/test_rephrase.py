"""Questions in other words: what is kept, what is refused, and how much still shows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedinfer_flower.errors import InvalidValueError, UnknownNameError
from fedinfer_flower.language.chat import ChatPrompts, PlainPrompts
from fedinfer_flower.language.keeping import Keeping, keeps, names_in
from fedinfer_flower.language.model import LanguageModel
from fedinfer_flower.language.overlap import Overlap, mean_overlap, overlap
from fedinfer_flower.language.rephrase import (
    REPHRASERS,
    Rephraser,
    Rewriting,
    make_rephraser,
    sharer_styles,
)
from fedinfer_flower.simulation.facts.families import FAMILIES, build
from fedinfer_flower.simulation.facts.prompts import FactPrompts
from fedinfer_flower.simulation.facts.world import WORDINGS, FactWorld

WORLD = FactWorld()
FACTS = WORLD.facts(WORLD.private[1][:20])
QUESTIONS = [
    "Who wrote Emma in 1815?",
    "What is the boiling point of H2O at 2.5 bar?",
    "Where was Ada Lovelace born?",
    "When did the Berlin Wall fall?",
    "How many people live in Bergen?",
    'Which film won the "Golden Bear" in 1999?',
    "Which is not a mammal?\nA) whale\nB) shark\nC) bat",
    "Explain why the sky is blue.",
]


@pytest.fixture(scope="module")
def fact_model():
    return LanguageModel(*build(FAMILIES[1], WORLD), prompts=FactPrompts(WORLD.words))


class Writer:
    """A model that writes what it is told to; the rest of `LanguageModel` is not used."""

    def __init__(self, prompts, texts):
        self.prompts, self._texts, self.asked = prompts, dict(texts), []

    def generate(self, prompts, settings):
        self.asked += prompts
        found = []
        for prompt in prompts:
            found += [new for old, new in self._texts.items() if old in prompt]
        assert len(found) == len(prompts)
        return found


# -- keeping -----------------------------------------------------------------------------


@pytest.mark.parametrize("question", QUESTIONS)
def test_every_question_keeps_itself(question):
    assert Keeping(content_share=1.0, common=()).lost(question, question) == ()


@pytest.mark.parametrize(
    ("question", "rewritten", "kind"),
    [
        ("Where was Ada Lovelace born?", "Where was Ada born?", "name"),
        ("Where was Ada Lovelace born?", "Where was ada lovelace born, in Rome?", "added name"),
        ("Where was Ada Lovelace born?", "London: there Ada Lovelace was born.", "added name"),
        ("Who won in 1999?", "Who won in 1998?", "number"),
        ("Who won in 1999?", "Who won in 1999, with 3 points?", "added number"),
        ("How far is 2.5 km?", "How far is 25 km?", "number"),
        ('Who said "never mind"?', "Who said that it does not matter, never?", "quotation"),
        ("Who said \u201cso it goes\u201d?", "Who said that so goes it?", "quotation"),
        ("Is it not red?", "Is it red?", "negation"),
        ("Is it red?", "Isn't it red?", "negation"),
        ("Can it fly?", "Tell me: it cannot fly?", "negation"),
        ("Which?\nA) whale\nB) shark", "Which? A) whale", "option"),
        ("Why does yeast make bread rise?", "Why is the sky blue?", "content"),
        ("What is it?", "", "length"),
        ("What is it?", "What is it? " * 40, "length"),
    ],
)
def test_what_is_lost_is_named_by_kind(question, rewritten, kind):
    assert kind in Keeping().lost(question, rewritten)
    assert not keeps(question, rewritten)


@pytest.mark.parametrize(
    ("question", "rewritten"),
    [
        ("Who wrote Emma in 1815?", "In 1815 Emma was published: who wrote it?"),
        ("Where was Ada Lovelace born?", "Tell me the place in which Ada Lovelace was born."),
        ("Is Anna's car red?", "Does Anna have a red car?"),
        ('Who won the "Golden Bear"?', 'Name the winner of the "golden bear": who won it?'),
        ("Which cities are large?", "What large city is there?"),
    ],
)
def test_rewrites_that_keep_the_meaning_pass(question, rewritten):
    assert Keeping().lost(question, rewritten) == ()


def test_share_of_content_words_is_an_option():
    question, rewritten = "Why does yeast make bread rise?", "Why does yeast lift dough?"
    assert "content" in Keeping().lost(question, rewritten)
    assert Keeping(content_share=0.25).lost(question, rewritten) == ()
    assert "content" in Keeping(content_share=1.0).lost("is bread brown", "is bread beige")


def test_all_rare_words_may_be_required():
    question, rewritten = "which city has bodun lekap ?", "which town has bodun lekap ?"
    assert Keeping(content_share=0.5, common=["city"]).lost(question, rewritten) == ()
    assert Keeping(content_share=0.5, common=()).lost(question, rewritten) == ("rare word",)
    assert Keeping(content_share=0.0).lost(question, "which town has lekap ?") == ()
    strict = Keeping(content_share=0.0, common=["city"])
    assert strict.lost(question, "which town has lekap ?") == ("rare word",)


def test_work_on_hostile_text_grows_with_its_length_only():
    """Without care these take minutes: the suite's own time limit is the check."""
    for text in ("\u00ab" * 50_000, "A) x" + " " * 50_000 + "y", "\n" * 50_000, "a." * 50_000):
        Keeping().lost(text, "x")


def test_two_names_that_change_places_are_not_noticed():
    """A limit that the documentation states: the check reads words, not grammar."""
    assert keeps("Did Anna pay Ben?", "Did Ben pay Anna?")


@given(st.text(max_size=80), st.text(max_size=80))
def test_any_texts_can_be_compared(a, b):
    kinds = Keeping(common=()).lost(a, b)
    assert set(kinds) <= {
        "length", "name", "added name", "number", "added number", "quotation", "option",
        "negation", "content", "rare word",
    }  # fmt: skip
    measured = overlap(a, b)
    assert all(0.0 <= x <= 1.0 for x in (*measured.ngrams, measured.substring, measured.entities))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("Which city is Oslo in?", ("Oslo",)),
        ("Paris is where?", ("Paris",)),
        ("Tell me. Can I go?", ()),
        ("the mRNA of E. coli", ("mRNA", "E")),
        ("a b2b deal", ("b2b",)),
        ("", ()),
    ],
)
def test_names_are_words_with_capitals_or_mixed_with_digits(text, names):
    assert names_in(text) == names


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_share_out_of_range_is_refused(share):
    with pytest.raises(InvalidValueError):
        Keeping(content_share=share)


def test_common_words_as_one_text_are_refused():
    with pytest.raises(InvalidValueError):
        Keeping(common="the of")


# -- overlap -----------------------------------------------------------------------------


def test_same_text_overlaps_in_full_and_other_text_not_at_all():
    text = "Where was Ada Lovelace born in 1815?"
    assert overlap(text, text) == Overlap(ngrams=(1.0,) * 4, substring=1.0, entities=1.0)
    assert overlap("one two three four", "qqq") == Overlap(
        ngrams=(0.0,) * 4, substring=0.0, entities=1.0
    )


def test_overlap_counts_what_the_rewrite_shows_of_the_question():
    measured = overlap("a b c d e", "c d e x a b")
    # Of 5 words all; of ab bc cd de all but bc; of abc bcd cde the last; of abcd bcde none.
    assert measured.ngrams == (1.0, 0.75, pytest.approx(1 / 3), 0.0)
    assert measured.substring == 5 / 9  # "c d e" of "a b c d e"


def test_entities_are_names_and_numbers_or_those_that_are_given():
    assert overlap("Was Ada there in 1815?", "In 1815 she was").entities == 0.5
    given_names = overlap("city of kim lot", "city of kim", entities=["kim", "lot"])
    assert given_names.entities == 0.5


def test_spacing_case_and_punctuation_do_not_count():
    assert overlap("Who, then?", "who THEN").substring == 1.0


def test_mean_is_over_every_number():
    a = Overlap(ngrams=(1.0, 1.0, 0.0, 0.0), substring=1.0, entities=1.0)
    b = Overlap(ngrams=(0.0, 1.0, 0.0, 0.0), substring=0.5, entities=0.0)
    assert mean_overlap([a, b]) == Overlap(
        ngrams=(0.5, 1.0, 0.0, 0.0), substring=0.75, entities=0.5
    )
    with pytest.raises(InvalidValueError):
        mean_overlap([])


# -- rephrasers --------------------------------------------------------------------------


def test_registry_knows_the_three():
    assert REPHRASERS.names() == ("model", "none", "template")
    with pytest.raises(UnknownNameError):
        make_rephraser("modle", None)


@pytest.mark.parametrize("name", ["model", "none", "template"])
def test_every_rephraser_keeps_what_answers_depend_on(name, tokenizer):
    model = Writer(ChatPrompts(tokenizer), {q.split("\n")[0]: "something else" for q in QUESTIONS})
    rephraser = make_rephraser(name, model)
    assert isinstance(rephraser, Rephraser)
    assert rephraser.name == name
    for style in range(10):
        texts = rephraser.rephrase(QUESTIONS, style=style)
        assert len(texts) == len(QUESTIONS)
        for question, text in zip(QUESTIONS, texts, strict=True):
            assert keeps(question, text)


def test_none_passes_questions_on():
    done = make_rephraser("none", None).rewrite(QUESTIONS, style=3)
    assert [d.text for d in done] == QUESTIONS
    assert {d.by for d in done} == {"none"}


def test_template_uses_the_wordings_of_the_prompt_format(fact_model):
    rephraser = make_rephraser("template", fact_model)
    questions = [fact.question() for fact in FACTS]
    for style in range(len(WORDINGS)):
        texts = rephraser.rephrase(questions, style=style)
        assert texts == [fact.question(style) for fact in FACTS]
    assert rephraser.rephrase(questions, style=len(WORDINGS)) == questions


def test_template_leaves_questions_outside_the_grammar_alone(fact_model):
    done = make_rephraser("template", fact_model).rewrite(["Q ?"], style=1)
    assert done == [Rewriting(text="Q ?", by="none", reason="no wording")]


def test_template_refuses_a_wording_that_loses_a_word():
    class Careless(PlainPrompts):
        def reword(self, question, *, style):
            return question.replace("Ada ", "")

    model = Writer(Careless(), {})
    done = make_rephraser("template", model).rewrite(["Where was Ada Lovelace born?"], style=1)
    assert done == [Rewriting(text="Where was Ada Lovelace born?", by="none", reason="lost: name")]


def test_english_template_takes_common_questions_apart_and_frames_others():
    rephraser = make_rephraser("template", None)
    assert rephraser.rephrase(["Who wrote Emma?"], style=2) == ["Name the one who wrote Emma."]
    assert rephraser.rephrase(["What is a fjord?"], style=1) == ["Tell me what a fjord is."]
    framed = rephraser.rephrase(["Explain tides."], style=1)[0]
    assert "Explain tides." in framed
    assert framed != "Explain tides."
    assert rephraser.rephrase(QUESTIONS, style=0) == QUESTIONS


@pytest.mark.parametrize("question", QUESTIONS)
def test_english_template_gives_sharers_different_wordings(question):
    rephraser = make_rephraser("template", None)
    texts = [rephraser.rephrase([question], style=style)[0] for style in range(4)]
    assert len(set(texts)) == 4


def test_template_is_safe_with_braces_in_questions():
    question = "What is {x} or {0.__class__}?"
    assert "{0.__class__}" in make_rephraser("template", None).rephrase([question], style=1)[0]
    assert "{q}" in make_rephraser("template", None).rephrase(["Explain {q}."], style=1)[0]


def test_model_needs_a_model():
    with pytest.raises(InvalidValueError):
        make_rephraser("model", None)


def test_model_that_was_never_taught_falls_back_to_the_template_and_says_so(fact_model):
    questions = [FACTS[0].question()]
    done = make_rephraser("model", fact_model).rewrite(questions, style=1)
    assert done == [Rewriting(text=FACTS[0].question(1), by="template", reason="not taught")]


def test_model_rewrite_is_used_when_nothing_is_lost(tokenizer):
    new = "Tell me the place in which Ada Lovelace was born."
    model = Writer(ChatPrompts(tokenizer), {"Ada Lovelace": f"New question: {new}"})
    done = make_rephraser("model", model).rewrite(["Where was Ada Lovelace born?"], style=1)
    assert done == [Rewriting(text=new, by="model")]


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("Where was Ada born?", "lost: name"),
        ("London.", "lost: name, added name, content"),
        ("", "lost: length, name, content"),
        ("where was  Ada Lovelace born?", "unchanged"),
    ],
)
def test_model_rewrite_that_loses_something_is_replaced_by_the_template(tokenizer, written, reason):
    model = Writer(ChatPrompts(tokenizer), {"Ada Lovelace": written})
    done = make_rephraser("model", model).rewrite(["Where was Ada Lovelace born?"], style=1)
    expected = "In which place was Ada Lovelace born?"
    assert done == [Rewriting(text=expected, by="template", reason=reason)]


def test_one_question_too_long_to_rewrite_does_not_cost_the_others_theirs(
    tokenizer, make_chat_model
):
    model = make_chat_model(tokenizer, window=1500)
    lm = LanguageModel(model, tokenizer, prompts=ChatPrompts(tokenizer))
    seen = []
    generate = lm.generate

    def counted(prompts, settings):
        texts = generate(prompts, settings)
        seen.extend(prompts)
        return texts

    lm.generate = counted
    long = "Where was Ada Lovelace born? " + "She was a countess. " * 150
    done = make_rephraser("model", lm).rewrite(["Where was Ada Lovelace born?", long], style=1)
    assert [d.by for d in done] == ["template", "template"]
    # An untrained model writes nonsense, but it was asked.
    assert done[0].reason.startswith("lost")
    assert done[1].reason == "too long"
    assert len(seen) == 1


def test_rewritings_do_not_show_the_question():
    assert "Ada" not in repr(Rewriting(text="Ada", by="model"))


def test_sharers_get_different_styles_whatever_the_order():
    styles = sharer_styles(["b", "a", "c", "a"])
    assert styles == sharer_styles(["c", "a", "b"])
    assert sorted(styles.values()) == [1, 2, 3]


def test_rewording_facts_changes_the_sentence_and_hides_no_entity(fact_model):
    """What the page on rephrasing says: wording goes, names and relation stay."""
    rephraser = make_rephraser("template", fact_model)
    for style in (1, 2, 3):
        measured = []
        for fact in FACTS:
            text = rephraser.rephrase([fact.question()], style=style)[0]
            entities = [fact.person.first, fact.person.last, fact.relation]
            measured.append(overlap(fact.question(), text, entities=entities))
        mean = mean_overlap(measured)
        assert mean.entities == 1.0
        assert mean.ngrams[3] == 0.0
        assert mean.ngrams[0] > 0.7
