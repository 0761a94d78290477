"""Candidates of a language model: the same numbers as scoring them one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedinfer_flower.clients.candidate_model import CandidateModel, writable
from fedinfer_flower.clients.site_model import prepare
from fedinfer_flower.errors import (
    InvalidValueError,
    ModelError,
    PromptTooLongError,
    ShapeError,
    SizeLimitError,
)
from fedinfer_flower.query import CountsKind
from fedinfer_flower.simulation.facts.checkpoints import NAMES, load
from fedinfer_flower.simulation.facts.world import ABSTENTION, FactWorld
from fedinfer_flower.wire.text_rows import MAX_ROW_BYTES, read_text_rows, text_rows

WORLD = FactWorld()
VALUES = [value for values in WORLD.values.values() for value in values]
FACTS = [WORLD.facts(people)[0] for people in WORLD.private]

plain_text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


@pytest.fixture(scope="module", params=NAMES)
def language(request):
    torch.set_num_threads(1)
    return load(request.param)


@pytest.fixture(scope="module")
def qwen3():
    return load("qwen3")


def log_probabilities(scores: np.ndarray) -> np.ndarray:
    return scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)


def test_scores_equal_those_of_the_candidates_one_by_one(language):
    questions = [fact.question() for fact in FACTS]
    model = CandidateModel(language, VALUES, abstentions=())

    found = model(text_rows(questions, [""] * 3))

    one_by_one = language.score([language.prompts.ask(q) for q in questions], VALUES)
    # float32 sums of the same passes, in another order of batching.
    np.testing.assert_allclose(found, one_by_one.numpy(), atol=2e-4)


def test_text_so_far_is_continued(qwen3):
    fact = FACTS[0]
    row = text_rows([fact.question()], [fact.statement().removesuffix(f" {fact.value} .")])
    model = CandidateModel(qwen3, VALUES, style="statement")

    assert model.classes[model(row)[0].argmax()] == fact.value


def test_rows_in_passes_of_any_size_score_the_same(qwen3):
    rows = text_rows([fact.question() for fact in FACTS], [""] * 3)

    whole = CandidateModel(qwen3, VALUES)(rows)
    single = CandidateModel(qwen3, VALUES, batch_rows=1)(rows)

    # Padding on the left changes the order of float32 sums, no more.
    np.testing.assert_allclose(whole, single, atol=2e-4)


def test_a_model_that_abstains_has_no_say(qwen3):
    stranger = WORLD.unanswerable(WORLD.strangers_new)[0].question()
    rows = text_rows([stranger, FACTS[0].question()], ["", ""])

    spread = np.exp(log_probabilities(CandidateModel(qwen3, VALUES)(rows)))
    forced = np.exp(log_probabilities(CandidateModel(qwen3, VALUES, abstentions=())(rows)))

    # Uniform over 48 is 0.021; a model that is not let abstain prefers something.
    assert spread[0].max() < 0.1 < forced[0].max()
    assert VALUES[spread[1].argmax()] == FACTS[0].value
    assert spread[1].max() > 0.9


def test_abstention_that_is_a_candidate_is_scored_as_one(qwen3):
    stranger = WORLD.unanswerable(WORLD.strangers_new)[0].question()
    model = CandidateModel(qwen3, [*VALUES, ABSTENTION])

    scores = model(text_rows([stranger], [""]))

    assert scores.shape == (1, 49)
    assert model.classes[scores[0].argmax()] == ABSTENTION


def test_candidates_that_cannot_be_written_are_left_out(qwen3):
    assert writable(qwen3, ["butor", "Paris", "unk", ""]) == ["butor", "unk"]
    assert CandidateModel(qwen3, ["Paris", "butor"]).classes == ("butor",)


@pytest.mark.parametrize(
    ("candidates", "options"),
    [
        (["Paris"], {}),
        (["butor", "butor"], {}),
        ("butor", {}),
        (["butor"], {"style": "essay"}),
        (["butor"], {"batch_rows": 0}),
    ],
)
def test_unusable_candidates_fail_when_built(qwen3, candidates, options):
    with pytest.raises(ModelError):
        CandidateModel(qwen3, candidates, **options)


def test_site_profile_names_candidates_and_model_and_is_calibrated(qwen3):
    facts = WORLD.facts(WORLD.private[0])[:12]
    holdout = ([f.question() for f in facts], [f.value for f in facts])
    local = CandidateModel(qwen3, VALUES).local_model(holdout=holdout)

    profile = prepare(local, name="north", share_counts=CountsKind.PRESENCE).profile

    assert profile.classes == tuple(VALUES)
    assert profile.model_digest == qwen3.layout.model_digest
    assert profile.calibrated
    assert profile.model_card["style"] == "answer"


def test_documents_of_the_site_are_read(qwen3):
    fact, document = WORLD.documents(1, people=WORLD.private[1], statements=3, seed=4)[0]
    rows = text_rows([fact.question()], [""])

    with_it = CandidateModel(qwen3, VALUES, documents=lambda question: [document])(rows)
    without = CandidateModel(qwen3, VALUES)(rows)

    assert VALUES[with_it[0].argmax()] == fact.value
    assert np.abs(with_it - without).max() > 1.0


def test_prompt_beyond_the_window_is_refused(qwen3):
    long = " ".join(["Q"] * (qwen3.layout.window + 1))
    with pytest.raises(PromptTooLongError):
        CandidateModel(qwen3, VALUES)(text_rows([long], [""]))


# -- rows of text -----------------------------------------------------------------------


@given(st.lists(st.tuples(plain_text.filter(bool), plain_text), min_size=1, max_size=4))
def test_text_rows_come_back(pairs):
    questions, texts = zip(*pairs, strict=True)
    rows = text_rows(questions, texts)
    assert read_text_rows(rows) == pairs
    assert rows.shape[1] % 128 == 0


@given(st.binary(min_size=1, max_size=40))
def test_any_bytes_are_read_or_refused(data):
    row = np.frombuffer(data, dtype=np.uint8)[None]
    try:
        ((question, text),) = read_text_rows(row)
    except ShapeError:
        return
    assert (question + "\0" + text).encode().rstrip(b"\0") == data.rstrip(b"\0")


@pytest.mark.parametrize(
    ("questions", "texts", "error"),
    [
        ([], [], InvalidValueError),
        (["a"], ["", ""], InvalidValueError),
        ([""], [""], InvalidValueError),
        (["a\0b"], [""], InvalidValueError),
        (["a"], ["\0"], InvalidValueError),
        (["\ud800"], [""], InvalidValueError),
        (["a" * MAX_ROW_BYTES], [""], SizeLimitError),
    ],
)
def test_texts_that_cannot_travel_are_refused(questions, texts, error):
    with pytest.raises(error):
        text_rows(questions, texts)


@pytest.mark.parametrize(
    "rows",
    [
        np.zeros((1, 4), dtype=np.uint8),
        np.ones((1, 4), dtype=np.int64),
        np.ones(4, dtype=np.uint8),
        np.array([[97, 0, 98, 0, 99]], dtype=np.uint8),
        np.array([[255, 254]], dtype=np.uint8),
        np.ones((1, 0), dtype=np.uint8),
    ],
)
def test_arrays_without_text_are_refused(rows):
    with pytest.raises(ShapeError):
        read_text_rows(rows)
