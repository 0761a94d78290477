"""Examples: strict files, honest splits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedinfer_flower.errors import InvalidValueError, SizeLimitError
from fedinfer_flower.refine import examples as module
from fedinfer_flower.refine.examples import (
    FuserExample,
    examples_digest,
    read_examples,
    split_examples,
    write_examples,
)

texts = st.text(min_size=1, max_size=40).filter(str.strip)


@given(st.lists(st.builds(FuserExample, texts, texts, st.text(), st.text()), min_size=1))
def test_file_round_trip_is_exact(tmp_path_factory: pytest.TempPathFactory, every: list) -> None:
    path = tmp_path_factory.mktemp("examples") / "e.jsonl"

    write_examples(every, path)

    assert read_examples(path) == every


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "line 2 is no JSON object"),
        ("[1]", "line 2 is no JSON object"),
        ("[" * 100_000, "line 2 is no JSON object"),
        ('{"question": "q"}', "line 2 is no JSON object with question and answer"),
        ('{"question": "q", "answer": "a", "anwser": "secret"}', "line 2 has an unknown field"),
        ('{"question": "q", "answer": 7}', "line 2: an example with a field that is no text"),
        ('{"question": " ", "answer": "secret"}', "line 2: an example without a question"),
    ],
)
def test_malformed_line_is_refused_without_its_content(
    tmp_path: Path, line: str, what: str
) -> None:
    path = tmp_path / "e.jsonl"
    path.write_text('{"question": "q", "answer": "a"}\n' + line + "\n")

    with pytest.raises(InvalidValueError, match=what) as caught:
        read_examples(path)

    assert "secret" not in str(caught.value)


def test_file_that_is_missing_empty_binary_or_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidValueError, match="cannot be read: FileNotFoundError"):
        read_examples(tmp_path / "none.jsonl")
    (tmp_path / "empty").write_text("\n\n")
    with pytest.raises(SizeLimitError, match="0 examples"):
        read_examples(tmp_path / "empty")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidValueError, match="UnicodeDecodeError"):
        read_examples(tmp_path / "binary")
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 1)
    with pytest.raises(SizeLimitError, match="the limit is 1"):
        read_examples(tmp_path / "binary")


def test_text_of_an_example_is_not_in_its_repr() -> None:
    assert "secret" not in repr(FuserExample("secret", "secret", "secret", "task"))


def test_digest_depends_on_every_field_and_on_order() -> None:
    one, two = FuserExample("q", "a", "d", "t"), FuserExample("p", "a", "d", "t")
    changed = [
        [two, one],
        [one],
        [FuserExample("q", "b", "d", "t"), two],
        [FuserExample("q", "a", "e", "t"), two],
        [FuserExample("q", "a", "d", "u"), two],
    ]

    digests = {examples_digest(every) for every in [[one, two], *changed]}

    assert len(digests) == 1 + len(changed)


def test_split_keeps_a_question_whole_and_takes_of_every_task() -> None:
    every = [
        FuserExample(f"{task}{i}", "a", document=document, task=task)
        for task in "ab"
        for i in range(20)
        for document in ("", "d")
    ]

    train, held = split_examples(every, holdout=0.25, seed=3)

    assert not {e.question for e in train} & {e.question for e in held}
    assert sorted(json.dumps(vars(e)) for e in [*train, *held]) == sorted(
        json.dumps(vars(e)) for e in every
    )
    assert [sum(e.task == task for e in held) for task in "ab"] == [10, 10]
    assert split_examples(every, holdout=0.25, seed=3) == (train, held)
    assert split_examples(every, holdout=0.25, seed=4)[1] != held


@pytest.mark.parametrize("holdout", [0.0, 1.0, 0.01])
def test_split_that_leaves_nothing_is_refused(holdout: float) -> None:
    with pytest.raises(InvalidValueError):
        split_examples([FuserExample("q", "a"), FuserExample("p", "a")], holdout=holdout, seed=0)
