"""Wrong combinations are refused when the strategy is built, or when it learns who is there."""

from __future__ import annotations

import pytest

from fedinfer_flower.errors import (
    ConfigError,
    InvalidValueError,
    NotEnoughNodesError,
    UnknownNameError,
)
from fedinfer_flower.kv.fuser import FuserSpec, make_fuser
from fedinfer_flower.kv.fuser_bank import FuserBank
from fedinfer_flower.kv.share import ShareSpec
from fedinfer_flower.language.decoding import Decoding
from fedinfer_flower.query import Deadline
from fedinfer_flower.strategies.fed_refine import FedRefine

from .conftest import ALLOW_ALL, OPEN, bank_for, strategy

WRONG = {
    "cache without consent": ({"medium": "cache"}, "can be inverted"),
    "text without consent": ({"medium": "text", "allow": ("cache",)}, "does not consent"),
    "auto with consent to nothing": ({"allow": ()}, "consent to no medium"),
    "unknown medium": ({"medium": "cahce"}, "did you mean 'cache'"),
    "unknown consent": ({"allow": ("txt",)}, "did you mean 'text'"),
    "no receiver": ({"receiver": ()}, "nobody would answer"),
    "no sharer": ({"sharers": ()}, "no sharer is named"),
    "a site alone with itself": ({"receiver": "a", "sharers": "a"}, "only receiver"),
    "a name twice": ({"sharers": ("a", "a")}, "twice"),
    "no round": ({"rounds": 0}, "rounds is in"),
    "too many rounds": ({"rounds": 17}, "rounds is in"),
    "rounds of own answers": ({"medium": "own", "rounds": 2}, "nothing comes in"),
    "unknown decoding": ({"decoding": {"max_tokens": 3}}, "did you mean 'max_new_tokens'"),
    "unknown fusers": ({"fusers": "coordinator"}, "'receiver' or a FuserBank"),
    "gate without fusers here": ({"gate": "top-k"}, "fusers at the receivers"),
    "quorum beyond the receivers": (
        {"receiver": "a", "deadline": Deadline(quorum=2)},
        "quorum of 2",
    ),
    "negative nodes": ({"min_available_nodes": -1}, "at least 0"),
    "batch of nothing": ({"batch_size": 0}, "batch_size"),
}


@pytest.mark.parametrize(("options", "text"), WRONG.values(), ids=WRONG)
def test_wrong_combination_is_refused_when_built(options, text):
    with pytest.raises(ConfigError, match=text):
        FedRefine(**options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"medium": "text"}, "sends no cache"),
        ({"medium": "auto"}, "can be inverted"),
        ({"allow": ALLOW_ALL, "gate": 3}, "gate is a name"),
        ({"allow": ALLOW_ALL, "gate": "learned"}, "has to be trained"),
        ({"allow": ALLOW_ALL, "gate": "topk"}, "no gate is called"),
    ],
)
def test_fusers_here_need_caches_and_consent(untrained, options, text):
    bank = bank_for(untrained[0], untrained)
    with pytest.raises(ConfigError, match=text):
        FedRefine(fusers=bank, **options)


def test_fuser_that_reads_the_receivers_own_entries_stays_there(untrained):
    spec = FuserSpec.for_pair(
        "fuse", untrained[1].layout, untrained[0].layout, ShareSpec(last=0, decode=0)
    )
    bank = FuserBank({spec.pair: make_fuser(spec)})

    with pytest.raises(ConfigError, match="never leave the receiver"):
        FedRefine(fusers=bank, allow=ALLOW_ALL)


def test_decoding_object_is_taken_without_its_stop_texts():
    made = FedRefine(decoding=Decoding(max_new_tokens=5, stop=("x",)))

    assert made.options.decoding["max_new_tokens"] == 5
    assert "stop" not in made.options.decoding


@pytest.mark.parametrize("option", ["receiver", "sharers"])
def test_unknown_name_is_refused_with_the_nearest(federation, questions, option):
    names = {"receiver": "north", "sharers": ["south"]} | {option: ["nort", "sout"]}
    with (
        federation.grid() as grid,
        pytest.raises(UnknownNameError, match=r"did you mean '(north|south)'"),
    ):
        strategy(**names, min_available_nodes=0).start(grid, questions)


def test_site_that_takes_no_part_as_receiver_is_refused_by_name(federation, questions):
    federation.options["north"] = {"policy": type(OPEN)(answers=False)}
    with federation.grid() as grid, pytest.raises(ConfigError, match="takes no part as receiver"):
        strategy().start(grid, questions)


def test_no_site_that_answers_is_a_typed_error(federation, questions):
    closed = type(OPEN)(answers=False, share_speeds=False)
    federation.options = {name: {"policy": closed} for name in federation.names}
    with federation.grid() as grid, pytest.raises(NotEnoughNodesError, match="none of 3 sites"):
        strategy(receiver="all").start(grid, questions)


@pytest.mark.parametrize("wrong", ["one text", [], [1], 7, None])
def test_questions_that_are_no_list_of_texts_are_refused(federation, wrong):
    with federation.grid() as grid, pytest.raises(InvalidValueError, match="list of texts"):
        strategy().start(grid, wrong)


def test_summary_shows_the_settings_and_no_question():
    text = FedRefine(medium="auto", rounds=2, receiver=["a", "b"]).summary()

    assert "receivers: a, b; sharers: all others" in text
    assert "rounds: 2" in text
