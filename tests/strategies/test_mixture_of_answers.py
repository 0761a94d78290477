"""Whole answers of three sites, mixed; and the baseline beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from flwr.clientapp import ClientApp
from hypothesis import given
from hypothesis import strategies as st

from fedinfer_flower.clients import language_state
from fedinfer_flower.clients.language_mod import LanguageMod, LanguagePolicy, LanguageSite
from fedinfer_flower.errors import (
    ConfigError,
    InvalidValueError,
    QueryError,
    ShapeError,
    UnknownNameError,
)
from fedinfer_flower.querier.language_querier import LanguageQuerier
from fedinfer_flower.query import Deadline
from fedinfer_flower.simulation.facts.checkpoints import NAMES, load
from fedinfer_flower.simulation.facts.world import FactWorld
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.strategies.answer_mixing.aggregator import Aggregator
from fedinfer_flower.strategies.answer_mixing.base import ANSWER_MIXINGS, normalised, vote
from fedinfer_flower.strategies.answer_mixing.majority import Majority
from fedinfer_flower.strategies.answer_mixing.self_consistency import SelfConsistency
from fedinfer_flower.strategies.fed_refine import FedRefine
from fedinfer_flower.strategies.mixture_of_answers import MixtureOfAnswers
from fedinfer_flower.wire.actions import LANGUAGE_ACTIONS, REFINE

WORLD = FactWorld()
SITES = ("north", "east", "south")
FACTS = [fact for people in WORLD.private for fact in WORLD.facts(people)[:2]]
QUESTIONS = [fact.question() for fact in FACTS]
RIGHT = [fact.value for fact in FACTS]


@pytest.fixture(scope="module")
def models():
    torch.set_num_threads(1)
    return [load(name) for name in NAMES]


@contextmanager
def grid_of(models, *, gone: str = "", policy=None) -> Iterator[LocalGrid]:
    """Three sites; one of them may fail to answer."""

    def mod(place: int) -> LanguageMod:
        def load_model(context):
            return LanguageSite(model=models[place])

        load_model.__qualname__ = f"load_{SITES[place]}"
        agreed = policy or LanguagePolicy(text=True, share_speeds=False)
        return LanguageMod(load_model, policy=agreed, name=SITES[place])

    app, mods = ClientApp(), [mod(place) for place in range(3)]
    for action in LANGUAGE_ACTIONS:

        @app.query(action)
        def handle(message, context, action=action):
            place = context.node_config["partition-id"]
            if SITES[place] == gone and action == REFINE:
                raise RuntimeError("gone")
            return mods[place].handle(message, context)

    with LocalGrid(app, num_supernodes=3, workers=3) as grid:
        yield grid
    language_state.clear()


def mixture(mixing="majority", **options) -> MixtureOfAnswers:
    defaults = {
        "min_available_nodes": 3,
        "patience_s": 5.0,
        "deadline": Deadline(timeout_s=30.0),
        "decoding": {"max_new_tokens": 4},
    }
    return MixtureOfAnswers(mixing, **(defaults | options))


def n_right(answers) -> int:
    return sum(a == b for a, b in zip(answers, RIGHT, strict=True))


def test_majority_of_those_that_know_beats_each_site_alone(models):
    with grid_of(models) as grid:
        result = mixture().start(grid, QUESTIONS)

    assert set(result.by_site) == set(SITES)
    alone = {name: n_right(answers) for name, answers in result.by_site.items()}
    # Each institution knows its own two facts; the others mostly abstain.
    assert n_right(result.answers) >= 5
    assert n_right(result.answers) > max(alone.values())
    assert result.mixture.wire_bytes > 0
    assert not result.mixture.degraded
    assert "majority, 6 answered" in result.summary()


def test_aggregator_reads_what_the_others_say(models):
    with grid_of(models) as grid:
        result = mixture("aggregator", site="north").start(grid, QUESTIONS)

    assert list(result.by_site) == ["north"]
    (refined,) = result.mixture.results
    # It knows the first two alone; for the others it rests on a note of the one who knows.
    assert n_right(result.answers) > 2
    assert any(refined.receivers[0].refined)


def test_baseline_is_reported_beside_the_mixture(models):
    baseline = SelfConsistency(site="north", samples=3, temperature=0.7, seed=5)
    done = []
    with grid_of(models) as grid:
        result = mixture(baseline=baseline).start(
            grid, QUESTIONS, progress=lambda a, b: done.append((a, b))
        )

    assert result.baseline is not None
    assert len(result.baseline.results) == 3
    assert result.baseline.answers[:2] == tuple(RIGHT[:2])
    assert n_right(result.answers) > n_right(result.baseline.answers)
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert result.to_dict()["baseline"]["mixing"] == "self-consistency"


def test_samples_have_seeds_of_their_own(models):
    stranger = WORLD.unanswerable(WORLD.strangers_new)[0].question()
    hot = SelfConsistency(site="north", samples=4, temperature=20.0)
    with grid_of(models) as grid:
        first = mixture(hot).start(grid, [stranger])
        again = mixture(hot).start(grid, [stranger])

    samples = [r.answers["north"][0] for r in first.mixture.results]
    assert len(set(samples)) > 1
    assert samples == [r.answers["north"][0] for r in again.mixture.results]


def test_site_that_fails_has_no_vote(models):
    with grid_of(models, gone="south") as grid:
        result = mixture().start(grid, QUESTIONS)

    assert result.by_site["south"] == (None,) * 6
    assert result.mixture.degraded
    assert result.answers[:2] == tuple(RIGHT[:2])


def test_nobody_answers_raises_a_typed_error(models):
    with grid_of(models, gone="north") as grid, pytest.raises(QueryError):
        mixture("self-consistency", site="north").start(grid, QUESTIONS)


def test_sites_that_are_named_are_asked(models):
    with grid_of(models) as grid:
        result = mixture(sites=["north", "east"]).start(grid, QUESTIONS)
        with pytest.raises(UnknownNameError):
            mixture(sites=["north", "nrth"]).start(grid, QUESTIONS)
    assert set(result.by_site) == {"north", "east"}


def test_querier_elsewhere_mixes_what_the_coordinator_cannot_read(models):
    with grid_of(models) as grid:
        relay = FedRefine(medium="own", min_available_nodes=3, deadline=Deadline(timeout_s=30.0))
        querier = LanguageQuerier(relay.collect(grid))
        job = querier.ask(QUESTIONS, allow=(), decoding={"max_new_tokens": 4})
        result = relay.start(grid, job)

    opened = querier.open(result.answer)
    mixed = Majority().mix([{name: each.texts for name, each in opened.items()}])
    assert n_right(mixed.answers) >= 5
    assert all(text is None for answers in result.answers.values() for text in answers)


# -- when built -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mixing", "options", "error"),
    [
        ("majority", {"site": "north"}, ConfigError),
        ("majority", {"sites": ["north"]}, ConfigError),
        ("majority", {"sites": "north"}, InvalidValueError),
        ("majority", {"sites": ["north", "north"]}, InvalidValueError),
        ("majority", {"medium": "cache"}, ConfigError),
        ("majority", {"min_available_nodes": -1}, InvalidValueError),
        ("aggregator", {}, InvalidValueError),
        ("aggregator", {"site": "all"}, InvalidValueError),
        ("aggregator", {"site": "north", "sites": ["north"]}, ConfigError),
        ("self-consistency", {"site": "north", "sites": ["east"]}, ConfigError),
        (Majority(), {"site": "north"}, ConfigError),
        ("majorty", {}, UnknownNameError),
    ],
)
def test_wrong_combinations_fail_when_built(mixing, options, error):
    with pytest.raises(error):
        mixture(mixing, **options)


@pytest.mark.parametrize(
    "options", [{"samples": 1}, {"samples": True}, {"temperature": 0.0}, {"site": ""}]
)
def test_self_consistency_refuses_what_is_no_sampling(options):
    with pytest.raises(InvalidValueError):
        SelfConsistency(**({"site": "north"} | options))


def test_all_mixings_are_registered():
    assert ANSWER_MIXINGS.names() == ("aggregator", "majority", "self-consistency")
    assert isinstance(mixture("aggregator", site="north").mixing, Aggregator)


# -- votes ------------------------------------------------------------------------------

ANSWER = st.sampled_from(["Nile", "nile.", "Congo", "unknown", "", None])


@given(st.lists(st.lists(ANSWER, min_size=3, max_size=3), min_size=1, max_size=7))
def test_winner_has_most_votes_and_abstentions_have_none(columns):
    mixed = vote(columns)
    silent = {"unknown", ""}
    for row, answer, share in zip(
        zip(*columns, strict=True), mixed.answers, mixed.shares, strict=True
    ):
        given_answers = [a for a in row if a is not None]
        cast = [normalised(a) for a in given_answers if normalised(a) not in silent]
        if not given_answers:
            assert (answer, share) == (None, 0.0)
        elif not cast:
            assert normalised(answer) in silent
            assert share == 0.0
        else:
            most = max(cast.count(key) for key in cast)
            assert cast.count(normalised(answer)) == most
            assert share == most / len(cast)


@given(st.permutations(["Nile", "Congo", "Amur"]), st.integers(0, 9))
def test_tie_does_not_depend_on_the_order_of_sites(order, seed):
    one = vote([[answer] for answer in order], tie_seed=seed).answers
    assert one == vote([["Nile"], ["Congo"], ["Amur"]], tie_seed=seed).answers


def test_ties_fall_to_every_side():
    rows = [["Nile"] * 40, ["Congo"] * 40]
    assert set(vote(rows).answers) == {"Nile", "Congo"}


def test_voters_with_other_numbers_of_answers_are_refused():
    for columns in ([["a"], ["a", "b"]], []):
        with pytest.raises(ShapeError):
            vote(columns)
