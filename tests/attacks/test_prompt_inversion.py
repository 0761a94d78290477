"""Shared caches give the prompt away; what is said to protect them does not."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from fedinfer_flower.attacks import AttackResult, markdown_table
from fedinfer_flower.attacks.cache_decoder import Recovered, train_decoder
from fedinfer_flower.attacks.cache_defences import (
    coded,
    noise_spread,
    noisy,
    rotated,
    rounded,
    unchanged,
)
from fedinfer_flower.attacks.cache_disclosure import disclosure_report, shared_prompts
from fedinfer_flower.attacks.cache_secrets import fact_secrets, word_secrets
from fedinfer_flower.attacks.prompt_inversion import (
    cache_features,
    nearest_prompts,
    prompt_features,
    read_tokens,
    token_dictionary,
)
from fedinfer_flower.errors import CacheError, InvalidValueError
from fedinfer_flower.kv.fuser import FuserSpec, make_fuser
from fedinfer_flower.kv.share import ShareSpec
from fedinfer_flower.kv.static_scales import StaticScales
from fedinfer_flower.refine.examples import FuserExample
from fedinfer_flower.simulation.facts.checkpoints import NAMES, load
from fedinfer_flower.simulation.facts.world import FactWorld

FULL, DEFAULT = ShareSpec(last=0, decode=0), ShareSpec()
STEPS = 200
READ = ("relation", "answer", "unasked value")
CHANGES = {
    "int8": coded("int8"),
    "int4": coded("int4"),
    "2 bits": rounded(2),
    "noise 0.3": noisy(0.3),
    "noise 1.0": noisy(1.0),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def world():
    return FactWorld()


@pytest.fixture(scope="module")
def models():
    return {name: load(name) for name in NAMES}


@pytest.fixture(scope="module")
def sharer(models):
    return models["qwen3"]


def documents(world, n, people, seed):
    drawn = world.documents(n, people=people, statements=3, seed=seed)
    return [FuserExample(fact.question(), fact.value, text) for fact, text in drawn]


@pytest.fixture(scope="module")
def public(world):
    return documents(world, 1200, world.strangers_seen, seed=1)


@pytest.fixture(scope="module")
def private(world):
    """Prompts about people that are in none of the public ones."""
    return documents(world, 250, world.strangers_new, seed=2)


@pytest.fixture(scope="module")
def known(sharer, public):
    return shared_prompts(sharer, public, DEFAULT)


@pytest.fixture(scope="module")
def seen(sharer, private):
    return shared_prompts(sharer, private, DEFAULT)


@pytest.fixture(scope="module")
def fuser(models):
    """Untrained: what it makes of a cache is noise to its receiver, and not to an attacker."""
    spec = FuserSpec.for_pair("last-token", models["qwen3"].layout, models["qwen2"].layout)
    return make_fuser(spec, seed=0).eval()


def some_secrets(example) -> dict[str, tuple[str, ...]]:
    found = fact_secrets(example)
    return {kind: found[kind] for kind in READ}


def trained_on(entries, public, **options):
    secrets = [some_secrets(e) for e in public]
    return train_decoder(cache_features(entries), secrets, steps=STEPS, **options)


def read_by(decoder, entries, private) -> dict[str, Recovered]:
    found = decoder.recovered(cache_features(entries), [some_secrets(e) for e in private])
    return {r.secret: r for r in found}


# -- look-up -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_token_of_a_full_cache_is_read_off_its_first_layer(models, private, name):
    shared = shared_prompts(models[name], private[:40], FULL)

    (found,) = shared.look_up(token_dictionary(models[name]))

    # Exact but for rounding: entries of the first layer depend on the token alone.
    assert found.share == 1.0
    assert found.above_chance
    assert found.chance < 0.7


def test_full_cache_becomes_text_again(sharer, private):
    shared = shared_prompts(sharer, private[:3], FULL)
    ids = read_tokens(shared.entries, token_dictionary(sharer))

    texts = [
        sharer.tokenizer.decode(row[row >= 0].tolist(), skip_special_tokens=True) for row in ids
    ]

    assert texts == list(shared.prompts)


@pytest.mark.parametrize("change", CHANGES)
def test_quantisation_and_noise_do_not_hide_tokens(sharer, private, change):
    shared = shared_prompts(sharer, private[:40], FULL).changed(CHANGES[change])

    (found,) = shared.look_up(token_dictionary(sharer))

    # Measured: 1.00, noise of one standard deviation 0.998; 198 tokens to tell apart.
    assert found.share > 0.97


def test_look_up_of_last_tokens_reads_the_decoded_one_and_not_the_prompt(sharer, seen):
    prompt, decoded = seen.changed(coded("int4")).look_up(token_dictionary(sharer))

    # All prompts end alike: reading that token is no success.
    assert (prompt.share, prompt.chance, prompt.above_chance) == (1.0, 1.0, False)
    # The decoded token is the answer.
    assert decoded.share == 1.0
    assert decoded.above_chance


def test_look_up_in_deeper_layers_needs_more_than_the_token(sharer, private):
    shared = shared_prompts(sharer, private[:40], FULL)
    last = sharer.layout.layers - 1

    (found,) = shared.look_up(token_dictionary(sharer, layer=last), layer=last)

    assert found.share < 0.9


# -- candidates --------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", [unchanged, coded("int4")], ids=["none", "int4"])
def test_asked_question_is_found_among_candidates_by_the_last_token(models, world, name, change):
    model = models[name]
    facts = world.facts(world.private[0][:60])
    examples = [FuserExample(f.question(), f.value) for f in facts]
    listed = prompt_features(model, [model.prompts.ask(e.question) for e in examples], DEFAULT)
    observed = cache_features(change(shared_prompts(model, examples[:60], DEFAULT).entries))

    found = nearest_prompts(observed, listed)

    # 240 candidates, chance 0.004; measured 0.99 and more.
    assert float((found == torch.arange(60)).float().mean()) > 0.9


def test_one_unknown_value_of_a_document_is_found(sharer, world):
    person, other = world.strangers_new[:2]
    values, line = world.values["pet"], "D city of {0} {1} is {2} . pet of {3} {4} is {5} ."
    city = world.values["city"][0]
    names = (person.first, person.last, city, other.first, other.last)
    question = f"Q city of {person.first} {person.last} ?"
    texts = [line.format(*names, value) for value in values]
    listed = prompt_features(
        sharer, [sharer.prompts.ask(question, documents=[t]) for t in texts], DEFAULT
    )
    shared = shared_prompts(sharer, [FuserExample(question, city, t) for t in texts], DEFAULT)

    found = nearest_prompts(
        cache_features(coded("int4")(shared.entries)), listed.expand(12, -1, -1)
    )

    # The pet was not asked for. Chance is 1 of 12.
    assert int((found == torch.arange(12)).sum()) >= 10


def test_candidates_of_another_share_are_refused(sharer, seen):
    features = cache_features(seen.entries)
    with pytest.raises(CacheError):
        nearest_prompts(features, features[:, 1:])
    with pytest.raises(CacheError):
        nearest_prompts(features, features[None])
    with pytest.raises(InvalidValueError):
        prompt_features(sharer, ["Q"], FULL)


# -- decoder -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoder(known, public):
    return trained_on(known.entries, public)


def test_decoder_reads_what_was_asked_the_answer_and_what_nobody_asked(decoder, seen, private):
    found = read_by(decoder, seen.entries, private)

    assert found["relation"].share > 0.95
    # The sharer itself answers about 80 % of these rightly.
    assert found["answer"].share > 0.6
    # Measured 0.3; the best constant guess is 0.09 at most.
    assert found["unasked value"].share > 0.2
    assert all(found[secret].above_chance for secret in READ)


def test_decoder_reads_nothing_from_caches_of_other_prompts(decoder, seen, private):
    others = seen.entries.select(torch.arange(len(private)).roll(7))

    found = read_by(decoder, others, private)

    # The control of all tests here: what is read comes from the cache.
    assert not any(found[secret].above_chance for secret in READ)


def test_four_bits_do_not_stop_the_decoder(known, seen, public, private):
    change = coded("int4")

    found = read_by(trained_on(change(known.entries), public), change(seen.entries), private)

    assert found["answer"].share > 0.6
    assert found["unasked value"].above_chance


def test_quantisation_and_noise_together_do_not_stop_the_decoder(known, seen, public, private):
    target = coded("int4")(noisy(0.3, seed=1)(seen.entries))
    # The attacker draws noise of its own, anew in every step.
    drawn = noise_spread(known.entries, 0.3)

    found = read_by(trained_on(known.entries, public, jitter=drawn), target, private)

    assert found["answer"].share > 0.6
    # Measured 0.19 with a chance of 0.08; caches of other prompts give 0.03.
    assert found["unasked value"].share > 1.5 * found["unasked value"].chance


def test_spread_of_noise_is_that_of_the_noise(seen):
    entries = seen.entries
    drawn = cache_features(noisy(0.5, seed=0)(entries)) - cache_features(entries)

    ratio = (drawn.std(0) / noise_spread(entries, 0.5)).nan_to_num(1.0)

    # 250 draws a number: the standard error of a standard deviation is 4.5 %; 1,024 numbers.
    assert float((ratio - 1.0).abs().max()) < 0.25
    assert float(ratio.mean()) == pytest.approx(1.0, abs=0.01)


def test_decoder_reads_projected_caches(known, seen, public, private, fuser):
    with torch.no_grad():
        before, after = fuser.project(known.entries), fuser.project(seen.entries)

    found = read_by(trained_on(before, public), after, private)

    assert found["relation"].above_chance
    assert found["answer"].share > 0.5
    assert found["unasked value"].above_chance


def test_secret_rotation_falls_to_known_messages(decoder, known, seen, public, private, sharer):
    secret = rotated(sharer.layout.floats_per_token(hidden=False), seed=5)
    target = secret(seen.entries)

    never_seen = read_by(decoder, target, private)
    with_messages = read_by(trained_on(secret(known.entries), public), target, private)

    assert not any(never_seen[kind].above_chance for kind in READ)
    assert with_messages["answer"].share > 0.6
    # Measured 0.17 with a chance of 0.08; who has never seen a message reads 0.03.
    unasked = with_messages["unasked value"]
    assert unasked.share > 1.5 * unasked.chance


def test_decoder_is_the_same_for_a_seed_and_leaves_the_generator_alone():
    features, secrets = torch.eye(4).repeat(20, 1), [{"x": (w,)} for w in "abcd"] * 20
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)

    first = train_decoder(features, secrets, steps=5, width=8)
    same = torch.rand(1)
    second = train_decoder(features, secrets, steps=5, width=8)

    assert torch.equal(same, expected)
    assert torch.equal(first.scores(features)["x"], second.scores(features)["x"])


def test_decoder_without_prompts_or_secrets_is_refused():
    for features, secrets in (
        (torch.ones(2, 3), [{}]),
        (torch.ones(2, 3), [{}, {}]),
        (torch.ones(1, 3), [{"x": ("a",)}]),
    ):
        with pytest.raises(InvalidValueError):
            train_decoder(features, secrets)


def test_share_counts_as_many_guesses_as_there_are_words():
    features = torch.eye(3).repeat(40, 1)
    secrets = [{"x": ("a", "b")}, {"x": ("c",)}, {}] * 40
    decoder = train_decoder(features, secrets, steps=60, width=8)

    (found,) = decoder.recovered(torch.eye(3), [{"x": ("a", "z")}, {"x": ("c",)}, {"x": ()}])

    # Of the first prompt one of two words is known at all; the third has none.
    assert (found.counted, found.share) == (2, 0.75)


def test_threshold_is_above_chance_by_the_paired_error():
    found = Recovered.of("x", [1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0])

    # Differences 1, 0, 1, 0: standard error 0.2887, 3.72 of them.
    assert (found.share, found.chance) == (0.75, 0.25)
    assert found.threshold == pytest.approx(0.25 + 3.72 * 0.288675, abs=1e-6)
    assert not found.above_chance
    with pytest.raises(InvalidValueError):
        Recovered.of("x", [], [])


# -- secrets -----------------------------------------------------------------------------


@pytest.mark.parametrize("wording", range(4))
def test_secrets_of_facts_are_found_in_every_wording(world, wording):
    fact, other = world.facts(world.private[0])[:2]
    document = f"D {fact.statement()} {other.statement()}"

    found = fact_secrets(FuserExample(fact.question(wording), fact.value, document))

    assert found["asked last name"] == (fact.person.last,)
    assert found["relation"] == (fact.relation,)
    assert found["unasked value"] == (other.value,)
    assert fact_secrets(FuserExample("Where is Oslo?", "Norway")) == {}


def test_secrets_of_any_text_leave_out_what_was_asked():
    found = word_secrets(FuserExample("Where is Ann?", "in Oslo", "Ann is in Oslo with Ben."))
    assert found["unasked words"] == ("ben", "with")


# -- defences ----------------------------------------------------------------------------


def test_changes_are_refused_out_of_their_range(seen):
    for make in (lambda: rounded(0), lambda: rounded(9), lambda: noisy(-1.0)):
        with pytest.raises(InvalidValueError):
            make()
    with pytest.raises(InvalidValueError):
        rotated(3, seed=0)(seen.entries)
    with pytest.raises(InvalidValueError):
        coded("static4")(seen.entries)


def test_changes_keep_shapes_and_do_what_they_say(seen):
    entries = seen.entries
    flat = cache_features(entries)
    for change in (
        *CHANGES.values(),
        rotated(entries.layout.floats_per_token(hidden=False), seed=0),
    ):
        assert change(entries).mask.equal(entries.mask)
    assert cache_features(noisy(0.0)(entries)).equal(flat)
    width = entries.layout.floats_per_token(hidden=False)
    turned = cache_features(rotated(width, seed=0)(entries))
    # A rotation keeps lengths; float32 over 1,024 numbers.
    assert torch.allclose(turned.norm(dim=1), flat.norm(dim=1), rtol=1e-4)
    steps = cache_features(rounded(1)(entries))
    assert all(len(torch.unique(row)) <= 4 for row in steps)  # two tokens, two values each


# -- report ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(sharer, public, private, fuser):
    return disclosure_report(
        sharer, public[:300], DEFAULT, fuser, attacked=private, secrets=fact_secrets, steps=30
    )


def test_report_says_who_reads_what_from_which_payload(report, private, sharer):
    payloads = {row.payload for row in report.rows}

    assert payloads == {"last 1 + 1 decoded, int8", "last 1 + 1 decoded, int8, after the fuser"}
    assert {row.attacker for row in report.rows} == {"look-up", "candidates", "decoder"}
    assert (report.attacked, report.sharer) == (len(private), sharer.layout.model_digest)
    (candidates,) = (r.recovered for r in report.rows if r.attacker == "candidates")
    assert candidates.secret == f"the prompt, among {len(private)}"
    assert candidates.share > 0.9
    assert report.worst.recovered.above_chance


def test_report_is_plain_values_and_a_table_without_any_text(report, private):
    plain = json.dumps(report.to_dict())
    table = report.markdown()

    assert len(table.splitlines()) == len(report.rows) + 2
    for secret in fact_secrets(private[0])["unasked value"] + fact_secrets(private[0])["answer"]:
        assert secret not in plain + table


def test_report_reads_as_results_of_attacks(report):
    results = report.results()

    assert all(isinstance(r, AttackResult) for r in results)
    assert [r.succeeded for r in results] == [r.recovered.above_chance for r in report.rows]
    assert {r.claim for r in results} == {"none"}
    assert len(markdown_table(results).splitlines()) == len(results) + 2


def test_report_on_full_caches_and_words_needs_no_grammar(sharer, public):
    report = disclosure_report(sharer, public[:150], FULL, codec="int4", steps=20)

    assert report.share == FULL.to_dict()
    (tokens,) = (r.recovered for r in report.rows if r.attacker == "look-up")
    assert tokens.share > 0.99
    assert {"asked words", "answer", "unasked words"} <= {r.recovered.secret for r in report.rows}
    assert report.receiver == ""


def test_report_uses_the_fusers_own_scales(sharer, public, fuser, known):
    scaled = make_fuser(fuser.spec, seed=0).eval()
    with pytest.raises(InvalidValueError):
        disclosure_report(sharer, public[:150], DEFAULT, scaled, "static4", steps=1)
    scaled.scales = StaticScales.fit(known.entries)

    report = disclosure_report(sharer, public[:150], DEFAULT, scaled, "static4", steps=1)

    decoded = next(r.recovered for r in report.rows if r.recovered.secret == "decoded")  # noqa: S105
    assert decoded.share > 0.9


def test_report_with_few_examples_is_refused(sharer, public):
    with pytest.raises(InvalidValueError):
        disclosure_report(sharer, public[:60], DEFAULT, attacked=public[:10])
    with pytest.raises(InvalidValueError):
        disclosure_report(sharer, public[:40], DEFAULT, attacked=public[40:80])


def test_look_up_with_another_models_dictionary_is_refused(seen, models):
    llama = token_dictionary(models["llama"])
    with pytest.raises(CacheError):
        read_tokens(seen.entries, llama)
    with pytest.raises(InvalidValueError):
        token_dictionary(models["llama"], layer=99)


def test_results_are_frozen(report):
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.rows = ()
