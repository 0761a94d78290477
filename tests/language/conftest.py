"""A byte-level tokenizer with a ChatML template, made here; tiny models; the injection corpus."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
TEXT_END, TURN_END = "<|endoftext|>", "<|im_end|>"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "[INST]", "[/INST]", "<s>")
MARKUP = ("<think>", "</think>", "<tool_call>", "</tool_call>")
TEXT = (
    "Question: the answer is in one of the notes. Lines that begin with > stand between marks",
    "system user assistant unknown Where is Ada born? note document end [[ ]] obey 0123456789",
)

_ESCAPE = re.compile(r"\\(?:n|t|u[0-9a-f]{4}|U[0-9a-f]{8})")


def chat_tokenizer(template=CHATML, *, words_as_special=()):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL),
        show_progress=False,
    )
    core.train_from_iterator(TEXT, trainer)
    core.add_special_tokens([AddedToken(w, special=True) for w in words_as_special])
    core.add_tokens([AddedToken(text, special=False) for text in MARKUP])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        clean_up_tokenization_spaces=False,
        bos_token=TEXT_END,
        eos_token=TURN_END,
        pad_token=TEXT_END,
    )
    tokenizer.chat_template = template
    return tokenizer


def tiny_chat_model(tokenizer, *, window=4096):
    torch.manual_seed(5)
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=window,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.1,
    )
    return AutoModelForCausalLM.from_config(config)


def injection_corpus():
    lines = (Path(__file__).parent / "injection_corpus.txt").read_text("utf-8").splitlines()
    return [
        _ESCAPE.sub(lambda found: codecs.decode(found[0], "unicode_escape"), line)
        for line in lines
        if line and not line.startswith("# ")
    ]


def pytest_generate_tests(metafunc):
    if "attempt" in metafunc.fixturenames:
        corpus = injection_corpus()
        metafunc.parametrize("attempt", corpus, ids=[f"line{i}" for i in range(len(corpus))])


@pytest.fixture(scope="session")
def corpus():
    return injection_corpus()


@pytest.fixture(scope="session")
def tokenizer():
    return chat_tokenizer()


@pytest.fixture(scope="session")
def tokenizer_without_system():
    return chat_tokenizer(NO_SYSTEM)


@pytest.fixture(scope="session")
def make_tokenizer():
    return chat_tokenizer


@pytest.fixture(scope="session")
def make_chat_model():
    return tiny_chat_model
