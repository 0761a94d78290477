"""`fedinfer refine`: what it asks, how it counts, what it writes, and one small real run."""

from __future__ import annotations

import doctest
import importlib
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from fedinfer_flower.cli.refine import refine
from fedinfer_flower.cli.refine_results import results_of
from fedinfer_flower.cli.refine_run import RefineOutcome, RefineRun, run_federation
from fedinfer_flower.cli.refine_scores import HELPED, Scores, share
from fedinfer_flower.cli.refine_steps import CODECS, RefineOptions, plan_sites, plan_steps
from fedinfer_flower.cli.refine_words import title_of
from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.querier.language_querier import OpenedAnswers
from fedinfer_flower.reporting.refine_plots import write_figures
from fedinfer_flower.reporting.refine_report import (
    refine_sentences,
    refine_table,
    write_refine_report,
)
from fedinfer_flower.simulation.facts.checkpoints import NAMES
from fedinfer_flower.simulation.facts.federation import RefinePlan, RefineStep
from fedinfer_flower.simulation.facts.preparation import Prepared, Recipe, prepare
from fedinfer_flower.simulation.facts.questions import (
    DocumentShelf,
    MisreadingPrompts,
    TrialQuestion,
    trial_questions,
)
from fedinfer_flower.simulation.facts.world import ABSTENTION, WORDINGS, FactWorld

GATES = {name: Path("gates") / name for name in NAMES}
CARD = {"kind": "last-token", "parameters": 10, "steps": 2, "seconds": 1.0, "reading_seconds": 0.5}
GATE_CARD = {
    "seconds": 1.0,
    "margin": None,
    "options": {"allowed_harm": 0.1, "confidence": 0.95},
}


@pytest.fixture(scope="module")
def world() -> FactWorld:
    return FactWorld()


def answered(question: TrialQuestion, receiver: str, label: str) -> str:
    """Answer as a federation would in which help always helps, and the control never."""
    if label.startswith("control"):
        return "nonsense"
    knows = question.task(receiver) in ("own", None) or question.kind == "nobody"
    sharers = (
        NAMES
        if label.endswith(("both", "gated", *CODECS))
        else (label.rsplit("-", maxsplit=1)[-1],)
    )
    if knows or (label != "alone" and question.holder in sharers):
        return question.answer
    return ABSTENTION


def outcome_of(step: RefineStep, run: RefineRun) -> RefineOutcome:
    answers = {
        site: OpenedAnswers(
            texts=tuple(answered(q, site.split()[0], step.label) for q in run.questions),
            used=(("somebody",) if step.sharers else (),) * len(run.questions),
        )
        for site in step.receivers
    }
    outcomes = [
        {
            "receiver": site,
            "sharer": sharer,
            "payload_bytes": 100 * len(run.questions),
            "seconds": 0.5,
            "error_code": "",
        }
        for site in step.receivers
        for sharer in step.sharers
        if sharer != site.split()[0]
    ]
    report = {
        "seconds": 2.0,
        "request_bytes": 10,
        "reply_bytes": 20,
        "degraded": False,
        "outcomes": outcomes,
        "plans": [{"medium": "cache", "reason": "it is best"}] if step.medium == "auto" else [],
    }
    return RefineOutcome(step=step, answers=answers, report=report)


@pytest.fixture(scope="module")
def run(world: FactWorld) -> RefineRun:
    options = RefineOptions(questions=4)
    pairs = [(s, r) for r in NAMES for s in NAMES if s != r]
    made = RefineRun(
        options=options,
        prepared=Prepared(
            fusers=Path("fusers"),
            gates=GATES,
            fuser_cards=dict.fromkeys(pairs, CARD),
            gate_cards=dict.fromkeys(NAMES, GATE_CARD),
            parameters=dict.fromkeys(NAMES, 500_000),
            trained=(),
        ),
        sites=plan_sites(options, GATES),
        questions=trial_questions(world, options.each),
    )
    made.outcomes = {step.label: outcome_of(step, made) for step in plan_steps(options)}
    return made


@pytest.fixture(scope="module")
def results(run: RefineRun) -> dict:
    return json.loads(json.dumps(results_of(run)))


# -- what is asked ---------------------------------------------------------------------


def test_questions_are_distinct_and_only_their_holder_has_the_document(world):
    questions = trial_questions(world, 5, seed=3)

    counts = {}
    for q in questions:
        counts[q.kind, q.holder] = counts.get((q.kind, q.holder), 0) + 1
        assert bool(q.document) == q.kind.startswith("doc")
        assert not q.document or q.answer in q.document
    assert len({q.question for q in questions}) == len(questions)
    assert set(counts.values()) == {5}
    assert len(counts) == 3 * 3 + 1


def test_questions_are_of_people_that_no_training_saw(world):
    known = {
        (p.first, p.last)
        for group in (*world.fuser_people, *world.gate_people, world.strangers_seen)
        for p in group
    }
    for q in trial_questions(world, 20):
        words = q.question.split()
        assert (words[3], words[4]) not in known


def test_same_seed_draws_the_same_questions_and_another_seed_others(world):
    first, again, other = (trial_questions(world, 6, seed=s) for s in (1, 1, 2))

    assert first == again
    assert {q.question for q in first} != {q.question for q in other}


@pytest.mark.parametrize("each", [0, 201])
def test_questions_out_of_range_are_refused(world, each):
    with pytest.raises(InvalidValueError):
        trial_questions(world, each)


def test_shelf_finds_a_document_in_every_wording_and_no_other(world):
    fact, other = world.facts(world.private[0])[:2]
    shelf = DocumentShelf([(fact.question(), "D here")])

    assert [list(shelf(fact.question(w))) for w in range(len(WORDINGS))] == [["D here"]] * 4
    assert list(shelf(other.question())) == []
    assert list(shelf("what ?")) == []


def test_control_asks_another_question_of_the_same_relation(world):
    held = [q for q in trial_questions(world, 20) if q.holder == "llama"]
    prompts = MisreadingPrompts(world.words, [(q.question, q.document) for q in held])

    for q in held:
        asked = prompts.ask(q.question, documents=["D right one"])
        relation = q.question.split()[1]
        assert q.question not in asked
        assert "right one" not in asked
        assert relation in asked.split("Q")[-1]
        assert asked == prompts.ask(q.question)


def test_steps_name_sites_that_are_there_and_no_receiver_helps_itself_alone():
    for options in (RefineOptions(), RefineOptions(quick=True), RefineOptions(media=("text",))):
        names = {site.name for site in plan_sites(options, GATES)}
        steps = plan_steps(options)
        assert len({step.label for step in steps}) == len(steps)
        for step in steps:
            assert set(step.receivers) | set(step.sharers) <= names
            assert step.receivers
            assert len(step.sharers) != 1 or step.sharers[0] not in step.receivers
    assert not any(s.misreads or s.gate for s in plan_sites(RefineOptions(media=("text",)), {}))


def test_plan_survives_its_file(tmp_path):
    options = RefineOptions()
    plan = RefinePlan(
        sites=plan_sites(options, GATES), steps=plan_steps(options), fusers="f", in_process=True
    )
    plan.write(tmp_path)

    assert RefinePlan.read(tmp_path) == plan
    for step in plan.steps:
        plan.strategy(step)  # builds: no combination that cannot work


@pytest.mark.parametrize("media", [(), ("smoke",), ("text", "full-cache")])
def test_unknown_media_are_refused_when_built(media):
    with pytest.raises(InvalidValueError):
        RefineOptions(media=media)


@pytest.mark.parametrize(
    "name",
    [
        "cli.refine_words",
        "simulation.facts.federation",
        "simulation.facts.preparation",
        "simulation.facts.questions",
        "simulation.facts.sites",
    ],
)
def test_docstring_examples_hold(name):
    outcome = doctest.testmod(importlib.import_module(f"fedinfer_flower.{name}"))

    assert outcome.attempted > 0
    assert outcome.failed == 0


# -- how it counts ---------------------------------------------------------------------


def test_scores_count_each_task_of_each_receiver(run):
    scores = Scores(run)

    assert share(scores.of("alone", task="own"))["accuracy"] == 1.0
    assert share(scores.of("alone", task=HELPED))["accuracy"] == 0.0
    assert share(scores.of("text-both", task=HELPED))["accuracy"] == 1.0
    assert share(scores.of("control", task=HELPED))["accuracy"] == 0.0
    # Four of a kind from each of two others, to three receivers.
    assert share(scores.of("text-both", task="fact"))["n"] == 3 * 2 * 4
    assert share(scores.of("text-llama", receiver="qwen3", holder="llama"))["n"] == 3 * 4
    assert share(scores.of("text-llama", receiver="qwen3", holder="qwen2"))["accuracy"] == 0.0
    assert not any(label.startswith("warm-up") for label in scores.labels)


def test_missing_answer_counts_as_wrong(run):
    step = run.outcomes["alone"].step
    nothing = OpenedAnswers(texts=(None,) * len(run.questions), used=((),) * len(run.questions))
    silent = RefineRun(
        options=run.options, prepared=run.prepared, sites=run.sites, questions=run.questions
    )
    silent.outcomes = {
        "alone": RefineOutcome(step=step, answers=dict.fromkeys(step.receivers, nothing), report={})
    }

    assert share(Scores(silent).of("alone"))["accuracy"] == 0.0


def test_results_hold_the_figures_and_no_question(results, run):
    by = {(row["medium"], row["sharers"]): row["accuracy"] for row in results["by_sharers"]}
    text = json.dumps(results)

    assert by["alone", 0] < by["text", 1] < by["text", 2] == 1.0
    assert by["cache, gated", 2] == 1.0
    assert len(results["pairs"]) == 6
    assert all(row["ways"]["alone"]["accuracy"] == 0.0 for row in results["pairs"])
    assert all(row["control"]["accuracy"] == 0.0 for row in results["control"])
    assert {row["codec"] for row in results["codecs"]} == {*CODECS, "static4", "text"}
    # Two tokens travel: the last one of the prompt, and one that the sharer decoded.
    assert {row["bytes_per_token"] for row in results["codecs"]} == {50.0, None}
    assert results["plans"] == [{"medium": "cache", "count": 1, "reason": "it is best"}]
    assert sum("answers alone" in warning for warning in results["warnings"]) == 3
    assert not any(q.question in text or (q.document and q.document in text) for q in run.questions)


def test_every_step_has_a_title_of_its_own(results):
    titles = [step["title"] for step in results["steps"]]

    assert len(set(titles)) == len(titles)
    assert title_of("cache-verbatim") in titles


# -- what it writes --------------------------------------------------------------------


def test_report_loads_nothing_and_shows_every_figure(results, tmp_path):
    page = write_refine_report(results, tmp_path / "a" / "report.html").read_text()

    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert "http://" not in without_namespaces
    assert "https://" not in without_namespaces
    assert page.count("<svg") == 6
    assert "no receiver can tell a cache of another question" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_report_of_text_alone_leaves_out_what_was_not_measured(results, tmp_path):
    small = dict(results, control=[], codecs=[], plans=[], gates=[], fusers=[])
    small["steps"] = [s for s in results["steps"] if s["label"] in ("alone", "text-both")]
    small["by_sharers"] = [r for r in results["by_sharers"] if r["medium"] in ("alone", "text")]

    page = write_refine_report(small, tmp_path / "report.html").read_text()

    assert "No control was run." in page
    assert page.count("<svg") == 4
    assert len(refine_sentences(small)) == 3  # alone, with text, and what text left of own facts


def test_report_shows_markup_in_names_as_text(results, tmp_path):
    hostile = dict(results, warnings=["<script>alert(1)</script>"])

    page = write_refine_report(hostile, tmp_path / "report.html").read_text()

    assert "<script" not in page


def test_report_without_a_key_says_which(results, tmp_path):
    with pytest.raises(InvalidValueError, match="lack steps"):
        write_refine_report({k: v for k, v in results.items() if k != "steps"}, tmp_path / "r")
    with pytest.raises(InvalidValueError, match="lack steps"):
        refine_table({k: v for k, v in results.items() if k != "steps"})


def test_figures_come_as_png_and_well_formed_svg(results, tmp_path):
    paths = write_figures(results, tmp_path)

    assert [path.suffix for path in paths] == [".png", ".svg"] * 6
    for path in paths:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
        else:
            assert ET.fromstring(path.read_text()).tag.endswith("svg")  # noqa: S314  our own file


def test_table_has_a_line_for_every_step(results):
    assert refine_table(results).row_count == len(results["steps"])


# -- the command -----------------------------------------------------------------------


def command() -> typer.Typer:
    app = typer.Typer()
    app.command()(refine)
    return app


def test_help_names_every_option():
    shown = CliRunner().invoke(command(), ["--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})

    assert shown.exit_code == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown.output)
    for option in ("--questions", "--media", "--seed", "--quick", "--out", "--workdir", "--json"):
        assert option in plain


def test_unknown_medium_ends_before_anything_is_made(tmp_path):
    done = CliRunner().invoke(command(), ["--media", "smoke", "--out", str(tmp_path / "out")])

    assert isinstance(done.exception, InvalidValueError)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_prepared_parts_are_found_again_and_help_in_a_federation(tmp_path, world):
    recipe = Recipe(steps=80, documents=150, gates=False)
    first = prepare(tmp_path / "work", receivers=("qwen3",), recipe=recipe)
    again = prepare(tmp_path / "work", receivers=("qwen3",), recipe=recipe)
    options = RefineOptions(questions=6, quick=True, in_process=True)
    run = RefineRun(
        options=options,
        prepared=again,
        sites=tuple(site for site in plan_sites(options, {"qwen3": tmp_path}) if not site.gate),
        questions=trial_questions(world, options.each),
    )
    steps = [s for s in plan_steps(options) if s.label in ("alone", "text-both", "cache-both")]
    steps += [s for s in plan_steps(options) if s.label == "control"]

    run_federation(run, steps, tmp_path / "run", lambda *_: None)

    scores = Scores(run)
    right = {s.label: share(scores.of(s.label, task=HELPED))["accuracy"] for s in steps}
    assert len(first.trained) == 2
    assert again.trained == ()
    assert first.fuser_cards == again.fuser_cards
    # 36 questions: alone it abstains, a note is nearly always right, a fuser of a fifth of the
    # training is far above what another question's cache does.
    assert right["alone"] <= 0.1
    assert right["text-both"] >= 0.7
    assert right["cache-both"] >= 0.3
    assert right["control"] <= right["cache-both"] - 0.15


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_quick_run_on_the_engine_leaves_report_and_figures_that_agree(tmp_path):
    out = tmp_path / "report"
    done = CliRunner().invoke(
        command(),
        [
            *("--quick", "--questions", "4", "--json"),
            *("--out", str(out), "--workdir", str(tmp_path / "work")),
        ],
    )

    assert done.exit_code == 0, done.output[-3000:]
    results = json.loads((out / "results.json").read_text())
    by = {(row["medium"], row["sharers"]): row["accuracy"] for row in results["by_sharers"]}
    assert results["in_process"] is False
    assert by["text", 2] > by["alone", 0] + 0.3
    assert by["cache", 2] > by["alone", 0] + 0.2
    assert (out / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert len(list((out / "figures").glob("*.png"))) == 5
