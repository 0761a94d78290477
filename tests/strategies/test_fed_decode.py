"""Texts decoded by a federation are those of the clear rule, under every protection."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from flwr.clientapp import ClientApp
from hypothesis import given
from hypothesis import strategies as st

from fedinfer_flower import InferenceMod, LocalModel, Querier
from fedinfer_flower.clients.candidate_model import CandidateModel
from fedinfer_flower.clients.label_space import align_logits
from fedinfer_flower.ensemble import RULES
from fedinfer_flower.ensemble.base import SiteContext
from fedinfer_flower.errors import (
    BindingError,
    ConfigError,
    IncompatibleProtection,
    InvalidValueError,
    KeyAtCoordinatorError,
    LabelSpaceError,
    NotEnoughNodesError,
    QuorumNotMetError,
    ShapeError,
)
from fedinfer_flower.privacy.dp import DP
from fedinfer_flower.privacy.secagg_dp import SecAggDP
from fedinfer_flower.query import Deadline, Prediction, SiteProfile
from fedinfer_flower.simulation.facts.checkpoints import NAMES, load
from fedinfer_flower.simulation.facts.world import FactWorld
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.strategies.decode_querier import DecodingQuerier
from fedinfer_flower.strategies.decode_steps import (
    DecodeSteps,
    DecodeTerms,
    Ended,
    agreed_candidates,
)
from fedinfer_flower.strategies.fed_decode import FedDecode
from fedinfer_flower.wire.text_rows import read_text_rows, text_rows

WORLD = FactWorld()
VALUES = [value for values in WORLD.values.values() for value in values]
MANY = [fact for people in WORLD.private for fact in WORLD.facts(people)[:10]]
WORDS = ("red", "green", "blue", ".")


# -- sites ------------------------------------------------------------------------------


def toy_logits(place: int, words: tuple[str, ...]):
    """A model of its own for each site: any function of question, text and candidate."""

    def score(rows: np.ndarray) -> np.ndarray:
        return np.array(
            [
                [
                    hashlib.sha256(f"{place % 2}|{q}|{t}|{word}".encode()).digest()[0] / 64
                    for word in words
                ]
                for q, t in read_text_rows(rows)
            ]
        )

    return score


def app_of(load_model, wrap=None) -> ClientApp:
    app, mod = ClientApp(), InferenceMod(load_model)

    for action in ("fi_hello", "fi_predict", "fi_recover"):

        @app.query(action)
        def handle(message, context, action=action):
            if wrap is None:
                return mod.handle(message, context)
            return wrap(action, context.node_config["partition-id"], message, context, mod.handle)

    return app


def toy_app(*, words=lambda place: WORDS, wrap=None) -> ClientApp:
    def load_model(context):
        place = context.node_config["partition-id"]
        own = tuple(words(place))
        return LocalModel(model=toy_logits(place, own), classes=own, outputs="logits")

    return app_of(load_model, wrap)


def toys(**options):
    return LocalGrid(toy_app(**options), num_supernodes=3)


def decoder(**options) -> FedDecode:
    defaults = {"min_available_nodes": 3, "deadline": Deadline(timeout_s=20.0), "max_steps": 3}
    return FedDecode(**(defaults | options))


def toy_reference(questions, *, rule="product-of-experts", words=WORDS, max_steps=3, stop=()):
    """Decode in this process by the clear rule."""
    steps = DecodeSteps(questions, DecodeTerms(max_steps=max_steps, stop=stop))
    clear, site = RULES.get(rule)(), SiteContext(present=np.ones(len(words), dtype=bool))
    while steps.open:
        rows = steps.rows()
        scores = [clear.score(toy_logits(k, words)(rows), site) for k in range(3)]
        steps.take(clear.decide(np.sum(scores, axis=0), 3, tuple(words)))
    return steps


@pytest.fixture(scope="module")
def sites():
    torch.set_num_threads(1)
    models = [load(name) for name in NAMES]
    return [CandidateModel(model, VALUES) for model in models]


@pytest.fixture(scope="module")
def unsure_sites():
    torch.set_num_threads(1)
    return [CandidateModel(load(name), [*VALUES, "unk"]) for name in NAMES]


QUESTIONS = ["one ?", "two ?", "three ?", "four ?"]


# -- the three trained models -----------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "protection"),
    [
        *itertools.product(["product-of-experts", "mean-probability"], ["plain", "secagg", "he"]),
        ("mean-probability", DP(epsilon=64.0)),
    ],
)
def test_facts_of_any_one_model_are_answered_as_by_the_clear_rule(sites, rule, protection):
    strategy = decoder(
        rule=rule,
        protection=protection,
        candidates=VALUES,
        max_steps=1,
        allow_coordinator_key=protection == "he",
    )
    questions = [fact.question() for fact in MANY]
    app = app_of(lambda context: sites[context.node_config["partition-id"]].local_model())

    with LocalGrid(app, num_supernodes=3) as grid:
        result = strategy.start(grid, questions)

    clear, rows = RULES.get(rule)(), text_rows(questions, [""] * len(questions))
    present = SiteContext(present=np.ones(len(VALUES), dtype=bool))
    scores = [
        clear.score(align_logits(site(rows), site.classes, tuple(VALUES)), present)
        for site in sites
    ]
    expected = clear.decide(np.sum(scores, axis=0), 3, tuple(VALUES)).names
    right = [fact.value for fact in MANY]
    # Ten facts of each institution: nobody knows more than ten of the thirty by itself.
    assert sum(a == b for a, b in zip(expected, right, strict=True)) >= 27
    if isinstance(protection, DP):
        # Noise of standard deviation 0.31 on sums of 48 shares, one of which is near 1: each
        # is right with probability 0.79. Fewer than 12 of 30: below one in a million.
        assert sum(a == b for a, b in zip(result.texts, right, strict=True)) >= 12
    else:
        assert list(result.texts) == expected


def test_whole_statement_is_written_word_by_word():
    torch.set_num_threads(1)
    fact = WORLD.facts(WORLD.private[1])[0]
    words = [fact.relation, "of", fact.person.first, fact.person.last, "is", ".", *VALUES]
    models = [CandidateModel(load(name), words, style="statement") for name in NAMES]
    app = app_of(lambda context: models[context.node_config["partition-id"]].local_model())

    with LocalGrid(app, num_supernodes=3) as grid:
        strategy = decoder(protection="secagg", max_steps=8, stop=(".",))
        result = strategy.start(grid, [fact.question()])

    assert result.texts == (fact.statement().removesuffix(" ."),)
    assert result.ended == (Ended.STOP,)
    assert result.n_steps == 7
    assert result.lengths == (7,)


# -- steps ------------------------------------------------------------------------------


@pytest.mark.parametrize("protection", ["plain", "secagg", "he"])
def test_several_steps_equal_the_clear_reference(protection):
    with toys() as grid:
        strategy = decoder(protection=protection, allow_coordinator_key=protection == "he")
        result = strategy.start(grid, QUESTIONS)

    expected = toy_reference(QUESTIONS)
    assert result.texts == expected.texts
    # Masks and ciphertexts carry fixed-point numbers: a few parts in a thousand.
    np.testing.assert_allclose(result.probabilities, expected.probabilities, rtol=1e-2)
    assert result.n_steps == 3
    assert result.n_rows == 12
    assert result.epsilon_delta_total() is None
    assert all(r.receipt is not None for r in result.results)


def test_texts_that_stopped_are_not_asked_again():
    with toys() as grid:
        result = decoder(stop=(".",), max_steps=6).start(grid, QUESTIONS)

    expected = toy_reference(QUESTIONS, stop=(".",), max_steps=6)
    assert result.texts == expected.texts
    assert result.ended == expected.ended
    assert set(result.ended) == {Ended.STOP, Ended.STEPS}, "choose other questions"
    assert result.n_rows == sum(expected.lengths)


def test_candidates_of_a_step_come_from_a_function():
    def narrowed(step, texts):
        return ["red", "blue"] if step == 0 else ["."]

    with toys() as grid:
        result = decoder(candidates=narrowed, max_steps=2).start(grid, QUESTIONS)

    assert result.n_candidates == (2, 1)
    assert all(text in ("red .", "blue .") for text in result.texts)


def test_default_candidates_are_those_of_all_sites():
    offers = [("red", "green", "blue"), ("blue", "black", "red"), ("red", "blue")]
    with toys(words=lambda place: offers[place]) as grid:
        result = decoder(max_steps=1).start(grid, QUESTIONS)
        assert result.results[0].combined.classes == ("red", "blue")
        with pytest.raises(LabelSpaceError, match="1 of 2"):
            decoder(candidates=["red", "green"]).start(grid, QUESTIONS)


def test_sites_without_a_candidate_in_common_are_refused():
    profiles = [SiteProfile(name="a", classes=("x",)), SiteProfile(name="b", classes=("y",))]
    with pytest.raises(LabelSpaceError):
        agreed_candidates(profiles)


def test_unsure_texts_end_as_abstained():
    with toys() as grid:
        result = decoder(abstain_below=0.99).start(grid, QUESTIONS)

    assert set(result.ended) == {Ended.ABSTAINED}
    assert set(result.texts) == {""}


# -- budgets ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "protection",
    [DP(epsilon=2.0), DP(mechanism="randomised-response", epsilon=2.0), SecAggDP(epsilon=2.0)],
    ids=["dp", "randomised-response", "secagg+dp"],
)
def test_epsilon_of_a_text_is_composed_over_its_steps(protection):
    rule = "majority-vote" if "randomised-response" in repr(protection) else "mean-probability"
    with toys() as grid:
        result = decoder(rule=rule, protection=protection).start(grid, QUESTIONS)

    text, total = result.epsilon_delta_text(), result.epsilon_delta_total()
    assert result.n_steps == 3
    assert text is not None
    assert total is not None
    assert 2.0 < text[0] < total[0]
    if isinstance(protection, DP):
        # The same numbers from the protection's own composition of 3 rows, and of 12; for
        # Gaussian noise that is an upper bound, as noise is rounded up.
        for found, n_rows in ((text, 3), (total, 12)):
            expected = protection.total_epsilon_delta(n_rows)
            assert found[0] <= expected[0] * (1 + 1e-6)
            assert found[0] >= expected[0] * 0.99
    assert "epsilon of a site" in result.summary()


def test_budget_ends_texts_before_a_step_that_would_exceed_it():
    protection = DP(mechanism="randomised-response", epsilon=1.0)
    # 4 texts cost epsilon 4 a step at most; 9 pays for two steps and not for three.
    strategy = decoder(rule="majority-vote", protection=protection, max_steps=50, max_epsilon=9.0)
    with toys() as grid:
        result = strategy.start(grid, QUESTIONS)

    total = result.epsilon_delta_total()
    assert total is not None
    assert total[0] <= 9.0
    assert set(result.ended) == {Ended.BUDGET}
    assert result.n_steps == 2
    assert all(len(text.split()) == 2 for text in result.texts)


def test_budget_below_one_step_is_refused_before_anything_is_asked():
    asked = []

    def wrap(action, place, message, context, handle):
        asked.append(action)
        return handle(message, context)

    strategy = decoder(rule="mean-probability", protection=DP(epsilon=4.0), max_epsilon=0.5)
    with toys(wrap=wrap) as grid, pytest.raises(InvalidValueError, match="does not pay"):
        strategy.start(grid, QUESTIONS)
    assert set(asked) == {"fi_hello"}


# -- sealed -----------------------------------------------------------------------------


@pytest.mark.parametrize("protection", ["plain", "secagg"])
def test_querier_elsewhere_writes_the_same_texts_and_the_coordinator_reads_none(protection):
    source = DecodingQuerier(
        Querier(protection=protection), QUESTIONS, terms=DecodeTerms(max_steps=3)
    )
    seen = []

    class Relay:
        def job(self, directory):
            job = source.job(directory)
            seen.append(b"" if job is None else job.to_bytes())
            return job

        def take(self, combined):
            seen.append(combined.to_bytes())
            source.take(combined)

    with toys() as grid:
        result = decoder(protection=protection).start(grid, Relay())

    assert source.texts == toy_reference(QUESTIONS).texts
    assert result.texts is None
    assert "sealed for the querier" in result.summary()
    assert not any(b"three ?" in data for data in seen)
    assert len(seen) == 7


def test_querier_elsewhere_keeps_to_its_budget():
    protection = DP(mechanism="randomised-response", epsilon=1.0)
    source = DecodingQuerier(
        Querier(protection=protection),
        QUESTIONS,
        rule="majority-vote",
        terms=DecodeTerms(max_steps=50),
        max_epsilon=9.0,
    )
    with toys() as grid:
        result = decoder(rule="majority-vote", protection=protection).start(grid, source)

    assert result.n_steps == 2
    assert set(source.steps.ended) == {Ended.BUDGET}


def test_answer_to_another_step_is_refused():
    source = DecodingQuerier(Querier(protection="plain"), QUESTIONS)

    class Confused:
        def job(self, directory):
            return source.job(directory)

        def take(self, combined):
            source.take(combined)
            source.take(combined)

    with toys() as grid, pytest.raises(BindingError):
        decoder().start(grid, Confused())


# -- failures ---------------------------------------------------------------------------


def failing_after(n_answers: int, *, place: int):
    """Let one site stop answering after some answers."""
    counts = {"n": 0}
    lock = threading.Lock()

    def wrap(action, partition, message, context, handle):
        if partition == place and action == "fi_predict":
            with lock:
                counts["n"] += 1
                if counts["n"] > n_answers:
                    raise RuntimeError("gone")
        return handle(message, context)

    return wrap


def test_site_that_fails_is_missing_from_the_step_and_the_texts_go_on():
    with toys(wrap=failing_after(1, place=2)) as grid:
        result = decoder(deadline=Deadline(timeout_s=20.0, quorum=2)).start(grid, QUESTIONS)

    assert result.degraded
    assert result.n_steps == 3
    assert [len(r.reports[0].answered) for r in result.results] == [3, 2, 2]
    # It is not waited for again.
    assert [len(r.reports[0].sites) for r in result.results] == [3, 3, 2]


def test_too_few_sites_left_ends_the_texts():
    with toys(wrap=failing_after(1, place=2)) as grid:
        strategy = decoder(deadline=Deadline(timeout_s=20.0, quorum=2), min_query_nodes=3)
        result = strategy.start(grid, QUESTIONS)
        assert set(result.ended) == {Ended.FAILED}
        assert result.error_code == NotEnoughNodesError.code
        assert result.n_steps == 2
        # Another job asks everybody again.
        assert len(strategy.start(grid, QUESTIONS).results[0].reports[0].sites) == 3


def test_late_site_costs_one_deadline():
    slow = threading.Event()

    def wrap(action, place, message, context, handle):
        if place == 2 and action == "fi_predict":
            slow.wait(30.0)
        return handle(message, context)

    with toys(wrap=wrap) as grid:
        result = decoder(deadline=Deadline(timeout_s=8.0, quorum=2)).start(grid, QUESTIONS)
        slow.set()

    assert [len(r.reports[0].sites) for r in result.results] == [3, 2, 2]
    assert result.results[0].reports[0].degraded
    assert not result.results[1].reports[0].degraded


def test_texts_so_far_are_kept_when_a_later_step_fails():
    with toys(wrap=failing_after(1, place=2)) as grid:
        result = decoder(deadline=Deadline(timeout_s=20.0, quorum=3)).start(grid, QUESTIONS)

    assert set(result.ended) == {Ended.FAILED}
    assert result.error_code == QuorumNotMetError.code
    assert result.texts == toy_reference(QUESTIONS, max_steps=1).texts


def test_first_step_that_fails_raises():
    with (
        toys(wrap=failing_after(0, place=2)) as grid,
        pytest.raises(QuorumNotMetError),
    ):
        decoder(deadline=Deadline(timeout_s=20.0, quorum=3)).start(grid, QUESTIONS)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"rule": "auto"}, ConfigError),
        ({"rule": "median", "protection": "secagg"}, IncompatibleProtection),
        ({"classes": ["a"]}, ConfigError),
        ({"max_steps": 0}, InvalidValueError),
        ({"stop": "."}, InvalidValueError),
        ({"stop": ("",)}, InvalidValueError),
        ({"candidates": []}, InvalidValueError),
        ({"candidates": ["a", "a"]}, InvalidValueError),
        ({"candidates": ["a", ""]}, InvalidValueError),
        ({"abstain_below": 1.0}, InvalidValueError),
        ({"abstentions": ["unk"]}, ConfigError),
        ({"abstentions": "unk", "abstain_below": 0.2}, InvalidValueError),
        ({"max_epsilon": 1.0}, ConfigError),
        ({"max_epsilon": -1.0, "protection": "dp", "rule": "mean-probability"}, InvalidValueError),
    ],
)
def test_wrong_combinations_fail_when_built(options, error):
    with pytest.raises(error):
        FedDecode(**options)


def test_key_at_the_coordinator_has_to_be_allowed():
    with toys() as grid, pytest.raises(KeyAtCoordinatorError):
        decoder(protection="he").start(grid, QUESTIONS)


def test_texts_cannot_be_asked_without_questions():
    with toys() as grid:
        for questions in ([], "why ?"):
            with pytest.raises(InvalidValueError):
                decoder().start(grid, questions)


# -- the steps themselves ---------------------------------------------------------------


def answer(labels, *, n_classes=3):
    probabilities = np.full((len(labels), n_classes), 0.1)
    probabilities[np.arange(len(labels)), labels] = 1.0 - 0.1 * (n_classes - 1)
    return Prediction(
        classes=("a", "b", ".")[:n_classes],
        labels=np.array(labels),
        probabilities=probabilities,
        margin=np.ones(len(labels)),
        abstained=np.zeros(len(labels), dtype=bool),
    )


@given(
    st.integers(1, 5),
    st.integers(1, 6),
    st.lists(st.integers(0, 2), min_size=30, max_size=30),
)
def test_steps_end_all_texts_within_max_steps(n_texts, max_steps, lots):
    steps = DecodeSteps(["q"] * n_texts, DecodeTerms(max_steps=max_steps, stop=(".",)))
    drawn = iter(lots)
    while steps.open:
        assert len(steps.rows()) == len(steps.open)
        steps.take(answer([next(drawn) for _ in steps.open]))
    for text, ended, length in zip(steps.texts, steps.ended, steps.lengths, strict=True):
        assert "." not in text
        assert length <= max_steps
        assert len(text.split()) == length - (ended is Ended.STOP)
        assert ended is Ended.STOP or length == max_steps


def test_one_that_knows_is_heard_among_those_that_abstain():
    votes = np.array([[1.0, 2.0, 0.0], [0.0, 3.0, 0.0], [1.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    prediction = RULES.get("majority-vote")().decide(votes, 3, ("red", "unk", "blue"))
    terms = DecodeTerms(abstain_below=0.2, abstentions=("unk",))
    steps = DecodeSteps(["a", "b", "c", "d"], terms)

    steps.take(prediction)

    assert steps.texts[0] == "red"
    assert steps.texts[2] in ("red", "blue")
    assert steps.texts[3] == "red"
    assert steps.ended[1] is Ended.ABSTAINED


def test_abstention_that_is_the_only_candidate_is_not_picked():
    steps = DecodeSteps(["q"], DecodeTerms(abstain_below=0.2, abstentions=("a",)))
    steps.take(answer([0], n_classes=1))
    assert steps.ended == (Ended.ABSTAINED,)


def test_facts_survive_randomised_response_of_each_site(unsure_sites):
    # At epsilon 8 a site's vote among 49 is its own with probability 0.98.
    protection = DP(mechanism="randomised-response", epsilon=8.0)
    strategy = decoder(
        rule="majority-vote",
        protection=protection,
        max_steps=1,
        abstentions=["unk"],
        abstain_below=0.2,
    )
    app = app_of(lambda context: unsure_sites[context.node_config["partition-id"]].local_model())
    with LocalGrid(app, num_supernodes=3) as grid:
        result = strategy.start(grid, [fact.question() for fact in MANY])

    right = sum(a == f.value for a, f in zip(result.texts, MANY, strict=True))
    # About 29 of 30 are expected; fewer than 18 is a chance below one in a billion.
    assert right >= 18
    assert result.epsilon_delta_text() == (8.0, 0.0)


def test_answers_to_other_rows_are_refused():
    with pytest.raises(ShapeError):
        DecodeSteps(["a", "b"], DecodeTerms()).take(answer([0]))


def test_texts_that_still_grow_have_not_ended():
    with pytest.raises(ConfigError):
        _ = DecodeSteps(["a"], DecodeTerms()).ended


# -- on Flower's engine -----------------------------------------------------------------

ON_THE_ENGINE = """
import json, sys
from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from fedinfer_flower.clients.candidate_model import CandidateModel
from fedinfer_flower.clients.language_mod import LanguageMod, LanguagePolicy
from fedinfer_flower.clients.mod import InferenceMod
from fedinfer_flower.query import Deadline
from fedinfer_flower.simulation.engine import run_on_engine
from fedinfer_flower.simulation.facts.checkpoints import NAMES, load
from fedinfer_flower.simulation.facts.world import FactWorld
from fedinfer_flower.strategies.fed_decode import FedDecode
from fedinfer_flower.strategies.mixture_of_answers import MixtureOfAnswers

world = FactWorld()
values = [value for group in world.values.values() for value in group]
facts = [fact for people in world.private for fact in world.facts(people)[:2]]
questions = [fact.question() for fact in facts]

def language(context):
    return load(NAMES[int(context.node_config["partition-id"])])

def candidates(context):
    return CandidateModel(language(context), values).local_model()

app = InferenceMod(candidates).attach(ClientApp())
LanguageMod(language, policy=LanguagePolicy(share_speeds=False)).attach(app)
server = ServerApp()

@server.main()
def main(grid: Grid, context: Context) -> None:
    waiting = {"min_available_nodes": 3, "deadline": Deadline(timeout_s=200.0, quorum=3)}
    decoded = FedDecode(protection="secagg", **waiting).start(grid, questions)
    mixed = MixtureOfAnswers(decoding={"max_new_tokens": 4}, **waiting).start(grid, questions)
    found = {"right": [fact.value for fact in facts], "decoded": decoded.texts,
             "mixed": mixed.answers}
    with open(sys.argv[1], "w") as file:
        json.dump(found, file)

if __name__ == "__main__":
    run_on_engine(server, app, num_supernodes=3, num_cpus=2)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_both_ways_to_mix_work_on_the_engine(tmp_path):
    script, out = tmp_path / "engine_script.py", tmp_path / "out.json"
    script.write_text(ON_THE_ENGINE)
    done = subprocess.run(
        [sys.executable, str(script), str(out)],
        env=os.environ | {"FLWR_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert out.exists(), (done.stdout + done.stderr)[-3000:]
    found = json.loads(out.read_text())
    for way in ("decoded", "mixed"):
        assert sum(a == b for a, b in zip(found[way], found["right"], strict=True)) >= 5
