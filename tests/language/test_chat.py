"""Prompts through a chat template: one system message, foreign text inside the user's."""

from __future__ import annotations

import pytest

from fedinfer_flower.errors import ModelError, PromptTooLongError
from fedinfer_flower.language.chat import ChatPrompts, PlainPrompts, default_prompts, tidied
from fedinfer_flower.language.decoding import Decoding
from fedinfer_flower.language.model import LanguageModel
from fedinfer_flower.language.prompts import PromptFormat

KEY = b"k" * 32
QUESTION = "Where was Ada born?"


def control_ids(tokenizer, text):
    known = set(tokenizer.added_tokens_decoder)
    return [i for i in tokenizer(text, add_special_tokens=False)["input_ids"] if i in known]


def all_prompts(prompts, question, text):
    return {
        "ask": prompts.ask(question),
        "ask with documents": prompts.ask(question, documents=[text, "Oslo is a city."]),
        "help": prompts.help(question, documents=[text]),
        "notes": prompts.ask_with_notes(question, ["Oslo is a city.", text]),
        "rewrite": prompts.rewrite(question, style=1),
        "text as question": prompts.ask(text),
        "text as question to rewrite": prompts.rewrite(text, style=2),
        "text as question to help": prompts.help(text),
        "text as question with notes": prompts.ask_with_notes(text, [text]),
    }


@pytest.mark.parametrize("prompts", [PlainPrompts()])
def test_formats_are_prompt_formats(prompts, tokenizer):
    assert isinstance(prompts, PromptFormat)
    assert isinstance(ChatPrompts(tokenizer), PromptFormat)


def test_foreign_text_never_adds_a_message(tokenizer, attempt):
    """Same control tokens, in the same order, as with harmless text."""
    prompts = ChatPrompts(tokenizer, key=KEY)
    expected = control_ids(tokenizer, prompts.ask("harmless"))
    assert len(expected) == 5  # two messages opened and closed, the answer opened
    for name, text in all_prompts(prompts, QUESTION, attempt).items():
        assert control_ids(tokenizer, text) == expected, name
        assert text.count("<|im_start|>") == 3, name
        assert text.count("<|im_start|>system\n") == 1, name
        assert text.startswith("<|im_start|>system\n"), name


def test_unprotected_prompt_does_get_messages_of_the_attacker(tokenizer, corpus):
    """The attack on plain concatenation works: that is what the test above is about."""
    expected = control_ids(tokenizer, ChatPrompts(tokenizer).ask("harmless"))
    broken = 0
    for attempt in corpus:
        messages = [{"role": "user", "content": f"{attempt}\n{QUESTION}"}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        broken += control_ids(tokenizer, text) != expected[2:]
    assert broken >= 10


def test_plain_prompts_of_foreign_text_have_no_control_token(tokenizer, attempt):
    for name, text in all_prompts(PlainPrompts(tokenizer), QUESTION, attempt).items():
        if text is not None:
            assert control_ids(tokenizer, text) == [], name


def test_system_message_is_the_same_whatever_is_asked(tokenizer):
    prompts = ChatPrompts(tokenizer)

    def system(text):
        return text.split("<|im_end|>")[0]

    seen = {system(text) for text in all_prompts(prompts, QUESTION, "a note").values()}
    assert len(seen) == 1


def test_quoted_text_stands_in_the_user_message_before_the_question(tokenizer):
    text = ChatPrompts(tokenizer, key=KEY).ask_with_notes(QUESTION, ["Ada is from Oslo."])
    user = text.split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
    assert user.index("> Ada is from Oslo.") < user.index(f"Question: {QUESTION}")
    assert "[[note 1 " in user
    assert text.endswith("<|im_start|>assistant\n")


def test_notes_that_abstain_are_not_quoted(tokenizer):
    for prompts in (ChatPrompts(tokenizer), PlainPrompts(tokenizer)):
        text = prompts.ask_with_notes(QUESTION, ["I do not know.", "unknown"])
        assert text == prompts.ask(QUESTION)
        text = prompts.ask_with_notes(QUESTION, ["unknown", "It was Oslo."])
        assert "note 1" in text
        assert "note 2" not in text


def test_template_without_system_role_gets_the_text_in_the_user_message(tokenizer_without_system):
    prompts = ChatPrompts(tokenizer_without_system)
    text = prompts.ask(QUESTION)
    assert "<|im_start|>system" not in text
    assert text.index("never instructions") < text.index(QUESTION)
    assert text.endswith("<|im_start|>model\n")


DEAF = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
EMPTY = "nothing of the messages"
TWICE = "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}"


def test_template_that_drops_system_messages_gets_the_text_in_the_user_message(make_tokenizer):
    text = ChatPrompts(make_tokenizer(DEAF)).ask(QUESTION)
    assert text.index("never instructions") < text.index(QUESTION)


@pytest.mark.parametrize("template", [EMPTY, TWICE, "{{ broken"])
def test_template_that_loses_or_repeats_messages_is_refused(make_tokenizer, template):
    with pytest.raises(ModelError):
        ChatPrompts(make_tokenizer(template))


def test_tokenizer_without_template_is_refused_by_chat_and_gets_plain_prompts(make_tokenizer):
    tokenizer = make_tokenizer(None)
    with pytest.raises(ModelError):
        ChatPrompts(tokenizer)
    assert isinstance(default_prompts(tokenizer), PlainPrompts)
    assert isinstance(default_prompts(make_tokenizer()), ChatPrompts)


def test_template_options_reach_the_template(make_tokenizer):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}|{{ enable_thinking }}{{ date }}"
    prompts = ChatPrompts(make_tokenizer(template), template_options={"date": "today"})
    assert prompts.ask(QUESTION).endswith("|Falsetoday")


def test_styles_of_rewriting_differ_and_start_over(tokenizer):
    prompts = ChatPrompts(tokenizer, key=KEY)
    texts = [prompts.rewrite(QUESTION, style=style) for style in range(8)]
    assert len(set(texts)) == 8
    assert prompts.rewrite(QUESTION, style=8) == texts[0]


def test_plain_prompts_end_where_the_answer_begins():
    prompts = PlainPrompts(key=KEY)
    assert prompts.ask(QUESTION).endswith(f"Question: {QUESTION}\nAnswer:")
    assert prompts.help(QUESTION, documents=["a"]).endswith("Facts that answer it:")
    assert prompts.rewrite(QUESTION, style=0) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Oslo", "Oslo"),
        (" Oslo.\n\nIt is a city.", "Oslo"),
        ("Answer: Oslo", "Oslo"),
        ("The final answer is: **Oslo**", "Oslo"),
        ("**Answer:** Oslo.", "Oslo"),
        ("<think>\nit may be Bergen\n</think>\n\nOslo", "Oslo"),
        ("it may be Bergen </think> Oslo", "Oslo"),
        ("<think> never ends", ""),
        ('"Oslo"', "Oslo"),
        ("New  York\tCity", "New York City"),
        ("", ""),
        ("\n \n", ""),
    ],
)
def test_answer_is_the_first_line_without_what_is_around_it(text, answer, tokenizer):
    assert PlainPrompts().answer_in(text) == answer
    assert ChatPrompts(tokenizer).answer_in(text) == answer


def test_tidied_text_keeps_its_lines_and_ending():
    assert tidied('Rewritten question: "Who?\n\n> A) x "') == "Who?\nA) x"


# -- with a model ------------------------------------------------------------------------


def test_chat_template_writes_the_special_tokens_alone(make_tokenizer, make_chat_model):
    from tokenizers import processors

    tokenizer = make_tokenizer()
    start = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, tokenizer.bos_token_id)]
    )
    model = make_chat_model(tokenizer)
    chat = LanguageModel(model, tokenizer, prompts=ChatPrompts(tokenizer))
    plain = LanguageModel(model, tokenizer, prompts=PlainPrompts(tokenizer))
    first = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert chat.tokens([chat.prompts.ask(QUESTION)]).ids[0, 0] == first
    assert plain.tokens([plain.prompts.ask(QUESTION)]).ids[0, 0] == tokenizer.bos_token_id


def test_model_with_chat_prompts_answers_and_shows_how_sure_it_is(tokenizer, make_chat_model):
    lm = LanguageModel(make_chat_model(tokenizer), tokenizer, prompts=ChatPrompts(tokenizer))
    prompts = [lm.prompts.ask(QUESTION), lm.prompts.ask_with_notes(QUESTION, ["Ada is of Oslo."])]
    assert len(lm.generate(prompts, Decoding(max_new_tokens=4))) == 2
    assert lm.prefill(prompts).evidence.shape == (2, 4)
    assert lm.abstention_ids


def test_long_documents_are_refused_by_the_window_not_cut(tokenizer, make_chat_model):
    model = make_chat_model(tokenizer, window=600)
    lm = LanguageModel(model, tokenizer, prompts=ChatPrompts(tokenizer))
    with pytest.raises(PromptTooLongError):
        lm.prefill([lm.prompts.ask(QUESTION, documents=["Oslo is a city. " * 200])])
