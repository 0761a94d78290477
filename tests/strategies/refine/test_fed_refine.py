"""Who helps whom, in which medium, and what comes back."""

from __future__ import annotations

import json

import pytest

from fedinfer_flower.clients.language_mod import LanguagePolicy
from fedinfer_flower.errors import UnknownNameError
from fedinfer_flower.kv.fuser import FuserSpec, make_fuser
from fedinfer_flower.kv.fuser_bank import FuserBank
from fedinfer_flower.kv.share import ShareSpec
from fedinfer_flower.language.decoding import Decoding
from fedinfer_flower.query import SiteStatus
from fedinfer_flower.strategies.refine_result import Pairing

from .conftest import ALLOW_ALL, OPEN, Federation, bank_for, strategy

GREEDY = Decoding(max_new_tokens=4, stop=(" .", "."))
TEXT_ONLY = LanguagePolicy(text=True, share_speeds=False)
SHARES_NOTHING = LanguagePolicy(share_speeds=False)


def own_answers(model, questions) -> tuple[str, ...]:
    return tuple(model.generate([model.prompts.ask(q) for q in questions], GREEDY))


def media_used(result, receiver: str = "north") -> set[str]:
    found = next(each for each in result.receivers if each.name == receiver)
    return {medium for row in found.used for medium in row.values()}


# -- media -------------------------------------------------------------------------------


def test_own_answers_are_the_models_and_ask_nobody(federation, questions, untrained):
    result = federation.ask(questions, medium="own")

    assert result.answers["north"] == own_answers(untrained[0], questions)
    assert federation.verbs("south") == ["hello", "language-card"]
    assert not result.degraded
    assert media_used(result) == set()


def test_caches_of_two_sharers_help_one_receiver(federation, questions, untrained):
    result = federation.ask(questions)

    assert media_used(result) == {"cache"}
    assert all(set(row) == {"south", "west"} for row in result.receivers[0].used)
    assert result.pairings == {
        ("north", "south"): (Pairing.HETEROGENEOUS_CACHE,),
        ("north", "west"): (Pairing.HETEROGENEOUS_CACHE,),
    }
    assert [o.payload_bytes > 500 for o in result.outcomes] == [True, True]
    assert not result.degraded
    # Random fusers write random entries: the answers are others than the receiver's own.
    assert result.answers["north"] != own_answers(untrained[0], questions)


def test_notes_in_text_help_without_fusers(untrained, questions):
    result = Federation(untrained, fusers=False).ask(questions, medium="text")

    assert media_used(result) == {"text"}
    assert set(result.pairings.values()) == {(Pairing.HETEROGENEOUS_TEXT,)}


def test_planner_says_what_it_compared(federation, questions):
    result = federation.ask(questions, medium="auto")

    assert media_used(result) == {"cache"}
    plan = result.plans[0]
    assert (plan.receiver, plan.sharer, plan.medium) == ("north", "south", "cache")
    assert [line.split(":")[0] for line in plan.table][:2] == ["own", "text"]
    assert "Not chosen" in plan.reason
    assert plan.predicted_s > 0.0


def test_planner_leaves_the_receiver_alone_where_time_is_short(federation, questions):
    # Nobody says how fast it is: unknown sites are taken to be slow.
    from fedinfer_flower.query import Deadline

    result = federation.ask(questions, medium="auto", deadline=Deadline(timeout_s=2.5))

    assert {plan.medium for plan in result.plans} == {"own"}
    assert "later than the deadline" in result.plans[0].reason
    assert all(result.receivers[0].answered)


FALLBACKS = {
    "sharer without caches": ({"south": {"policy": TEXT_ONLY}}, ALLOW_ALL, "text"),
    "sharer that shares nothing": ({"south": {"policy": SHARES_NOTHING}}, ALLOW_ALL, "own"),
    "text not allowed": ({"south": {"policy": TEXT_ONLY}}, ("cache",), "own"),
    "receiver without a fuser": ({"north": {"fusers": None}}, ALLOW_ALL, "text"),
    "no fuser and no text": ({"north": {"fusers": None}}, ("cache",), "own"),
}


@pytest.mark.parametrize(("options", "allow", "medium"), FALLBACKS.values(), ids=FALLBACKS)
def test_cache_falls_back_on_text_then_on_own(untrained, questions, options, allow, medium):
    federation = Federation(untrained, options=options)

    result = federation.ask(questions, sharers=["south"], allow=allow)

    assert media_used(result) == ({medium} - {"own"})
    assert result.plans[0].medium == medium
    assert "does not allow" in result.plans[0].reason or "no fuser" in result.plans[0].reason
    assert all(result.receivers[0].answered)


def test_full_caches_need_consent_of_their_own(untrained, questions):
    options = {"north": {"fusers": bank_for(untrained[0], untrained, "concat")}}
    federation = Federation(untrained, options=options)

    refused = federation.ask(questions, sharers=["south"], allow=("cache",))
    agreed = federation.ask(questions, sharers=["south"], allow=("full-cache",))

    assert media_used(refused) == set()
    assert "the querier does not allow full-cache" in refused.plans[0].reason
    assert media_used(agreed) == {"cache"}


def test_large_bodies_are_offered_and_fetched(untrained, questions):
    two_phases = type(OPEN)(cache=True, text=True, one_phase_bytes=0, share_speeds=False)
    federation = Federation(untrained, options={"south": {"policy": two_phases}})

    result = federation.ask(questions)
    in_one = Federation(untrained).ask(questions)

    assert federation.verbs("south")[-4:] == ["share", "offered", "fetch", "shared"]
    assert result.answers == in_one.answers
    assert not result.degraded


# -- who ---------------------------------------------------------------------------------


def test_pair_helps_each_other_in_both_directions(federation, questions):
    pair = ["north", "south"]

    result = federation.ask(questions, receiver=pair, sharers=pair)

    assert set(result.pairings) == {("north", "south"), ("south", "north")}
    assert [each.name for each in result.receivers] == pair
    assert federation.verbs("west") == ["hello", "language-card"]


def test_all_to_all_is_one_exchange(federation, questions):
    result = federation.ask(questions, receiver="all")

    assert len(result.pairings) == 6
    assert all(len(row) == 2 for each in result.receivers for row in each.used)
    alone = federation.ask(questions, receiver="south")
    assert result.answers["south"] == alone.answers["south"]


def test_same_model_at_two_sites_is_a_homogeneous_pair(untrained, questions):
    model = untrained[0]
    share = ShareSpec(last=0, decode=0)
    spec = FuserSpec(kind="identity", sharer=model.layout, receiver=model.layout, share=share)
    bank = FuserBank({spec.pair: make_fuser(spec)})
    federation = Federation([model, model], names=("north", "south"), fusers=False)
    federation.options["north"] = {"fusers": bank}

    cache = federation.ask(questions, allow=("full-cache",), min_available_nodes=2)
    text = federation.ask(questions, medium="text", min_available_nodes=2)

    assert cache.pairings == {("north", "south"): (Pairing.HOMOGENEOUS_CACHE,)}
    assert text.pairings == {("north", "south"): (Pairing.HOMOGENEOUS_TEXT,)}


def test_two_sites_of_one_name_are_told_apart(untrained, questions):
    federation = Federation(untrained, names=("north", "twin", "twin"), fusers=False)

    result = federation.ask(questions, medium="text")

    helpers = set(result.receivers[0].used[0])
    assert len(helpers) == 2
    assert all(name.startswith("twin#") for name in helpers)


def test_named_sharer_that_is_not_there_is_reported_where_fewer_nodes_are_enough(
    federation, questions
):
    sharers = ["south", "east-wing"]
    result = federation.ask(questions, sharers=sharers, min_available_nodes=2)

    assert [(o.sharer, o.error_code) for o in result.failures] == [("east-wing", "FI405")]
    assert set(result.receivers[0].used[0]) == {"south"}
    assert result.degraded
    with federation.grid() as grid, pytest.raises(UnknownNameError):
        strategy(sharers=sharers, min_available_nodes=0).start(grid, questions)


def test_receiver_alone_online_answers_alone(untrained, questions):
    federation = Federation(untrained[:1], names=("north",), fusers=False)

    result = federation.ask(questions, medium="auto", min_available_nodes=1)

    assert result.answers["north"] == own_answers(untrained[0], questions)


# -- rounds and batches ------------------------------------------------------------------


def test_round_that_changes_nothing_is_the_last(federation, questions):
    result = federation.ask(questions, rounds=4)

    # Sharers that receive nothing share the same again, so the second round changes nothing.
    assert result.rounds == (2,)
    assert federation.verbs("north").count("refine") == 2


def test_later_rounds_build_on_what_sharers_fused(federation, questions):
    federation.options = {n: {"policy": OPEN} for n in federation.names}

    once = federation.ask(questions, receiver="all")
    twice = federation.ask(questions, receiver="all", rounds=2)

    assert twice.rounds == (2,)
    assert once.answers != twice.answers


def test_questions_go_out_in_batches_and_progress_is_told(federation, questions):
    told = []
    with federation.grid() as grid:
        result = strategy(batch_size=2).start(
            grid, questions, progress=lambda done, total: told.append((done, total))
        )

    assert told == [(2, 3), (3, 3)]
    assert result.rounds == (1, 1)
    assert len(result.answers["north"]) == 3
    whole = federation.ask(questions, batch_size=3)
    assert result.answers == whole.answers


def test_links_are_measured_from_what_arrives(federation, questions):
    with federation.grid() as grid:
        ours = strategy(medium="auto")
        first = ours.start(grid, questions)
        second = ours.start(grid, questions)

    assert "the link is unknown" in first.plans[0].reason
    assert "the link is unknown" not in second.plans[0].reason
    assert second.plans[0].predicted_s < first.plans[0].predicted_s


# -- results -----------------------------------------------------------------------------


def test_result_tells_costs_and_no_texts(federation, questions):
    result = federation.ask(questions)
    shown = json.dumps(result.to_dict()) + result.summary() + repr(result)

    for text in (*questions, *result.answers["north"]):
        assert text not in shown
    assert result.request_bytes > 1000
    assert result.reply_bytes > 1000
    assert all(o.status is SiteStatus.ANSWERED and o.seconds > 0.0 for o in result.outcomes)


def test_same_questions_give_the_same_answers(federation, questions):
    assert federation.ask(questions).answers == federation.ask(questions).answers
