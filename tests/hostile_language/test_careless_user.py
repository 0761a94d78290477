"""Settings that cannot work fail where they are made, with a typed error."""

from __future__ import annotations

import json

import pytest

from fedinfer_flower.errors import ConfigError, EnvelopeError, InvalidValueError, SizeLimitError
from fedinfer_flower.querier.language_querier import LanguageQuerier
from fedinfer_flower.strategies.fed_refine import FedRefine
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.language_card import LanguageCard
from fedinfer_flower.wire.refine_fields import (
    decoding_options,
    spans_from_bytes,
    texts_from_bytes,
)

LAYOUT = json.dumps({"model_digest": "0" * 64})


def card(name):
    return LanguageCard(run_id=7, name=name, layout=LAYOUT).signed(Identity.generate())


@pytest.mark.parametrize(
    "options",
    [
        {"receiver": 5},
        {"sharers": 5},
        {"allow": None},
        {"allow": 5},
        {"allow": [["text"]]},
        {"medium": None},
        {"rephrase": None},
        {"deadline": 3},
        {"min_available_nodes": "2"},
        {"decoding": "x"},
        {"decoding": {"max_tokens": 3}},
        {"decoding": {"max_new_tokens": "32"}},
        {"decoding": {"max_new_tokens": True}},
        {"decoding": {"max_new_tokens": 0}},
        {"decoding": {"temperature": "hot"}},
        {"decoding": {"temperature": float("nan")}},
        {"decoding": {"top_p": 1.5}},
        {"decoding": {"seed": -1}},
    ],
)
def test_strategy_that_cannot_work_is_not_built(options):
    with pytest.raises(InvalidValueError):
        FedRefine(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"ttl_s": float("inf")},
        {"ttl_s": float("nan")},
        {"ttl_s": "1"},
        {"ttl_s": 0},
        {"allow": None},
        {"allow": [["text"]]},
        {"rounds": True},
        {"batch_size": "3"},
        {"decoding": {"max_tokens": 3}},
        {"decoding": {"max_new_tokens": "x"}},
        {"decoding": [1]},
        {"rephrase": 5},
        {"receiver": 5},
    ],
)
def test_job_that_no_site_would_answer_is_not_made(options):
    querier = LanguageQuerier([card("north"), card("south")])
    with pytest.raises(InvalidValueError):
        querier.ask(["why ?"], **options)


def test_site_cannot_be_its_own_only_sharer():
    querier = LanguageQuerier([card("north"), card("south")])
    with pytest.raises(ConfigError, match="only sharer"):
        querier.ask(["why ?"], receiver="north", sharers=["north"])
    assert querier.ask(["why ?"], receiver="north", sharers=["north"], allow=()).n_questions == 1


def test_misspelt_setting_gets_the_nearest_name():
    with pytest.raises(InvalidValueError) as info:
        decoding_options({"max_new_token": 3})
    assert "max_new_tokens" in info.value.hint


@pytest.mark.parametrize("name", ["north\nWARNING all sites agreed", "\x1b[31mnorth", "\u202e"])
def test_name_that_would_write_into_a_log_is_refused(name):
    data = card(name).to_bytes()
    with pytest.raises(EnvelopeError, match="does not print"):
        LanguageCard.from_bytes(data)


@pytest.mark.parametrize("read", [texts_from_bytes, spans_from_bytes])
def test_brackets_are_refused_before_they_are_read(read, monkeypatch):
    def parse(data):
        raise AssertionError("read all the same")

    monkeypatch.setattr(json, "loads", parse)
    with pytest.raises(SizeLimitError):
        read(b"[" + b"[]," * (9 << 20) + b"[]]")
