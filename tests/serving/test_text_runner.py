"""Text jobs on three small language models, in process."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from flwr.clientapp import ClientApp

from fedinfer_flower import InferenceMod
from fedinfer_flower.clients import language_state
from fedinfer_flower.clients.candidate_model import CandidateModel
from fedinfer_flower.clients.language_mod import LanguageMod, LanguagePolicy, LanguageSite
from fedinfer_flower.errors import (
    FedInferError,
    InvalidValueError,
    KeyAtCoordinatorError,
    UnknownConfigKeyError,
)
from fedinfer_flower.serving.config import ModelConfig
from fedinfer_flower.serving.jobs import JobKind, JobRequest, Progress
from fedinfer_flower.serving.text_decode import settled
from fedinfer_flower.serving.text_job import TextAnswer, TextJob
from fedinfer_flower.serving.text_options import require_text_options
from fedinfer_flower.serving.text_runner import text_runner
from fedinfer_flower.serving.text_sites import KnownSites
from fedinfer_flower.simulation.facts.checkpoints import NAMES, load
from fedinfer_flower.simulation.facts.world import FactWorld
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.wire.actions import LANGUAGE_ACTIONS, REFINE
from fedinfer_flower.wire.identity import Identity

WORLD = FactWorld()
SITES = ("north", "east", "south")
FACTS = [WORLD.facts(people)[0] for people in WORLD.private]
VALUES = [value for values in WORLD.values.values() for value in values]


class CountingGrid(LocalGrid):
    """Counts introductions."""

    introductions = 0

    def push_messages(self, messages: Any) -> Any:
        messages = list(messages)
        self.introductions += sum("introduce" in m.metadata.message_type for m in messages)
        return super().push_messages(messages)


@dataclass
class ToyJob:
    """What the gateway's core gives a runner, as far as a runner looks at it."""

    body: bytes
    model: str = "assistant"
    cancelled: bool = False
    left_s: float = 60.0
    told: list[Progress] = field(default_factory=list)
    answer: TextAnswer | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    error: FedInferError | None = None
    job_id: str = "0" * 32

    @property
    def request(self) -> JobRequest:
        return JobRequest(
            owner="k", model=self.model, kind=JobKind.TEXT, body=self.body, n_rows=1, timeout_s=60.0
        )

    def tell(self, progress: Progress) -> None:
        self.told.append(progress)

    def finish(self, answer: bytes, *, provenance: Any, receipt: bytes = b"") -> None:
        assert self.answer is None
        assert self.error is None
        self.answer, self.facts = TextAnswer.from_bytes(answer), dict(provenance)
        json.dumps(self.facts)

    def fail(self, exc: FedInferError) -> None:
        assert self.answer is None
        assert self.error is None
        self.error = exc


@dataclass
class ToyBench:
    """The gateway, as far as a runner looks at it."""

    of: LocalGrid
    served: ModelConfig
    identity: Identity = field(default_factory=Identity.generate)
    pins: None = None

    def grid(self) -> AbstractContextManager[LocalGrid]:
        return nullcontext(self.of)

    @property
    def run_id(self) -> int:
        return int(self.of.run.run_id)

    def model(self, name: str) -> ModelConfig:
        assert name == "assistant"
        return self.served


@pytest.fixture(scope="module")
def models() -> list[Any]:
    torch.set_num_threads(1)
    return [load(name) for name in NAMES]


@contextmanager
def language_sites(models: list[Any], *, gone: str = "", seen: Any = None) -> Iterator[LocalGrid]:
    def mod(place: int) -> LanguageMod:
        def load_model(context: Any) -> LanguageSite:
            return LanguageSite(model=models[place])

        load_model.__qualname__ = f"load_{SITES[place]}"
        policy = LanguagePolicy(text=True, share_speeds=False)
        return LanguageMod(load_model, policy=policy, name=SITES[place])

    app, mods = ClientApp(), [mod(place) for place in range(3)]
    for action in LANGUAGE_ACTIONS:

        @app.query(action)
        def handle(message: Any, context: Any, action: str = action) -> Any:
            place = context.node_config["partition-id"]
            if seen is not None:
                seen.append(bytes(str(message.content), "utf-8"))
            if SITES[place] == gone and action == REFINE:
                raise RuntimeError("gone")
            return mods[place].handle(message, context)

    with CountingGrid(app, num_supernodes=3, workers=3) as grid:
        yield grid
    language_state.clear()


@contextmanager
def candidate_sites(models: list[Any]) -> Iterator[LocalGrid]:
    def load_model(context: Any) -> Any:
        place = context.node_config["partition-id"]
        return CandidateModel(models[place], VALUES).local_model()

    app, mod = ClientApp(), InferenceMod(load_model)
    for action in ("fi_hello", "fi_predict", "fi_recover"):

        @app.query(action)
        def handle(message: Any, context: Any) -> Any:
            return mod.handle(message, context)

    with LocalGrid(app, num_supernodes=3) as grid:
        yield grid


def served(strategy: str = "refine", **options: Any) -> ModelConfig:
    own = {k: options.pop(k) for k in ("protection", "rule", "min_sites") if k in options}
    model = ModelConfig(kind="language", strategy=strategy, strategy_options=options, **own)
    require_text_options(model)
    return model


def asks(*facts: Any, **options: Any) -> ToyJob:
    settings = {"max_new_tokens": 4, **options}
    return ToyJob(
        body=TextJob(questions=[f.question() for f in facts], options=settings).to_bytes()
    )


def run(strategy: str, grid: LocalGrid, model: ModelConfig, *jobs: ToyJob) -> None:
    text_runner(strategy).run(jobs, ToyBench(grid, model))  # type: ignore[arg-type]


def test_refinement_answers_and_says_who_helped(models: list[Any]) -> None:
    job = asks(FACTS[1], FACTS[0])
    with language_sites(models) as grid:
        run("refine", grid, served(receiver="north", sharers=["east"], rephrase="none"), job)

    assert job.error is None
    assert job.answer is not None
    assert job.answer.texts == (FACTS[1].value, FACTS[0].value)
    assert job.answer.used[0] == ("east",)
    assert job.facts["receiver"] == "north"
    assert job.facts["sharers"] == [{"receiver": "north", "site": "east", "medium": "text"}]
    assert job.facts["sites_asked"] == job.facts["sites_answered"] == 2
    assert job.told[-1] == Progress(rows_done=2, rows=2)


def test_questions_are_sealed_and_signed_with_the_gateways_key(models: list[Any]) -> None:
    seen: list[bytes] = []
    with language_sites(models, seen=seen) as grid:
        run("refine", grid, served(receiver="north", medium="own"), asks(FACTS[0]))

    assert len(seen) > 3
    words = FACTS[0].question().split()
    assert not any(words[-3].encode() in message for message in seen)


def test_cards_are_collected_once(models: list[Any]) -> None:
    with language_sites(models) as grid:
        runner, bench = text_runner("refine"), ToyBench(grid, served(medium="own"))
        for _ in range(3):
            job = asks(FACTS[0])
            runner.run([job], bench)  # type: ignore[list-item, arg-type]
            assert job.answer is not None

        assert grid.introductions == 3  # type: ignore[attr-defined]


def test_jobs_with_the_same_options_are_asked_together(models: list[Any]) -> None:
    jobs = [asks(fact) for fact in FACTS]
    with language_sites(models) as grid:
        run("refine", grid, served(receiver="north", medium="own"), *jobs)

    assert len({tuple(job.facts["query_ids"]) for job in jobs}) == 1
    assert jobs[0].answer is not None
    assert jobs[0].answer.texts == (FACTS[0].value,)
    assert all(job.told[-1] == Progress(rows_done=1, rows=1) for job in jobs)


def test_one_callers_question_does_not_spoil_anothers(models: list[Any]) -> None:
    good, long = asks(FACTS[0]), ToyJob(body=b"")
    text = FACTS[0].question() + " Q" * 5000
    long.body = TextJob(questions=[text], options={"max_new_tokens": 4}).to_bytes()
    with language_sites(models) as grid:
        run("refine", grid, served(receiver="north", medium="own"), long, good)

    assert long.answer is None
    assert long.error is not None
    assert good.answer is not None
    assert good.answer.texts == (FACTS[0].value,)


def test_next_receiver_answers_if_the_first_fails(models: list[Any]) -> None:
    job = asks(FACTS[1])
    model = served(receiver=["north", "east"], medium="own")
    with language_sites(models, gone="north") as grid:
        run("refine", grid, model, job)

    assert job.answer is not None
    assert job.answer.texts == (FACTS[1].value,)
    assert job.facts["receiver"] == "east"
    assert job.facts["tried_before"] == ["FI402"]


def test_majority_counts_votes_and_says_how_far_sites_disagree(models: list[Any]) -> None:
    job = asks(FACTS[0], FACTS[1])
    with language_sites(models) as grid:
        run("mixture", grid, served("mixture"), job)

    assert job.answer is not None
    assert job.answer.texts == (FACTS[0].value, FACTS[1].value)
    assert job.answer.used[0] == tuple(sorted(SITES))
    assert len(job.facts["disagreement"]) == 2
    assert job.facts["mixing"] == "majority"


def test_decoding_streams_what_stays(models: list[Any]) -> None:
    job = asks(FACTS[0], max_new_tokens=2)
    model = served("decode", max_steps=3, candidates=sorted({*VALUES[:12], FACTS[0].value}))
    with candidate_sites(models) as grid:
        run("decode", grid, model, job)

    assert job.error is None
    assert job.answer is not None
    text = job.answer.texts[0]
    assert text is not None
    assert len(job.told) == 2
    assert all(text.startswith(p.text) and p.text for p in job.told)
    assert job.answer.finish == ("length",)
    assert (job.facts["sites_asked"], job.facts["sites_answered"]) == (3, 3)
    assert len(job.facts["query_ids"]) == 2


def test_decoding_under_masks_gives_what_decoding_in_clear_gives(models: list[Any]) -> None:
    texts = []
    for protection in ("plain", "secagg"):
        job = asks(FACTS[0], max_new_tokens=1)
        with candidate_sites(models) as grid:
            run("decode", grid, served("decode", protection=protection, min_sites=3), job)
        assert job.answer is not None, job.error
        texts.append(job.answer.texts)

    assert texts[0] == texts[1]


def test_a_stop_text_is_cut_off(models: list[Any]) -> None:
    job = asks(FACTS[0], stop=[FACTS[0].value[1:]])
    with language_sites(models) as grid:
        run("refine", grid, served(receiver="north", medium="own"), job)

    assert job.answer is not None
    assert job.answer.texts == (FACTS[0].value[0],)


def test_cancelled_jobs_ask_nobody(models: list[Any]) -> None:
    job = asks(FACTS[0])
    job.cancelled = True
    with language_sites(models) as grid:
        run("refine", grid, served(), job)

        assert grid.introductions == 0  # type: ignore[attr-defined]
    assert job.error is not None
    assert job.error.code == "FI416"


def test_nobody_there_is_told(models: list[Any]) -> None:
    job = asks(FACTS[0])
    with candidate_sites(models) as grid:
        job.left_s = 2.0
        run("refine", grid, served(), job)

    assert job.error is not None
    assert job.error.code == "FI405"


@pytest.mark.parametrize(
    ("strategy", "options", "error"),
    [
        ("refine", {"reciever": "north"}, UnknownConfigKeyError),
        ("refine", {"medium": "smoke"}, InvalidValueError),
        ("refine", {"temperature": 9.0}, InvalidValueError),
        ("mixture", {"mixing": "majority", "site": "north"}, InvalidValueError),
        ("mixture", {"mixing": "aggregator"}, InvalidValueError),
        ("decode", {"max_steps": 0}, InvalidValueError),
        ("decode", {"receiver": "north"}, UnknownConfigKeyError),
        ("decode", {"protection": "he"}, KeyAtCoordinatorError),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_settings_that_cannot_work_are_refused_before_serving(
    strategy: str, options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        served(strategy, **options)


def test_what_candidates_cannot_do_is_refused(models: list[Any]) -> None:
    job = asks(FACTS[0], temperature=0.7)
    with candidate_sites(models) as grid:
        run("decode", grid, served("decode"), job)

    assert job.error is not None
    assert "temperature" in job.error.message


def test_sites_are_asked_again_when_they_may_have_changed(models: list[Any]) -> None:
    now = [0.0]
    known = KnownSites(fresh_s=10.0, clock=lambda: now[0])
    with language_sites(models) as grid:

        def found() -> int:
            known.get(grid, int(grid.run.run_id), timeout_s=20.0)
            return grid.introductions  # type: ignore[attr-defined,no-any-return]

        counts = [found(), found()]
        now[0] = 11.0
        counts.append(found())
        known.forget()
        counts.append(found())

    assert counts == [3, 3, 6, 9]


def test_a_site_that_started_anew_with_other_keys_is_asked_again(models: list[Any]) -> None:
    runner, served_model = text_runner("refine"), served(receiver="north", medium="own")
    answers = []
    for _ in range(2):  # the same nodes and run, other keys
        job = asks(FACTS[0])
        with language_sites(models) as grid:
            runner.run([job], ToyBench(grid, served_model))  # type: ignore[list-item, arg-type]
        answers.append(job.answer and job.answer.texts)

    assert answers == [(FACTS[0].value,)] * 2


def test_different_options_run_side_by_side(models: list[Any]) -> None:
    jobs = [asks(FACTS[0], max_new_tokens=n) for n in (3, 4, 5)]
    with language_sites(models) as grid:
        run("refine", grid, served(receiver="north", medium="own"), *jobs)

    assert all(j.answer is not None and j.answer.texts == (FACTS[0].value,) for j in jobs)
    assert threading.active_count() < 20


@pytest.mark.parametrize(
    ("text", "stops", "kept"),
    [
        ("red", (), "red"),
        ("red ", (), "red"),
        ("red E", (" END",), "red"),
        ("red END", ("END!",), "red"),
        ("E red", ("END",), "E red"),
    ],
)
def test_settled(text: str, stops: tuple[str, ...], kept: str) -> None:
    assert settled(text, stops) == kept
