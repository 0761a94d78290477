"""A site policy is read whole, or not at all: every wrong file names table and key."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedinfer_flower.clients.policy import SitePolicy
from fedinfer_flower.clients.policy_kinds import ACTION_VERBS, KINDS, kind_of, verb_of
from fedinfer_flower.clients.policy_words import explain
from fedinfer_flower.ensemble.base import RULES
from fedinfer_flower.errors import ConfigError, DeploymentError, UnknownConfigKeyError
from fedinfer_flower.wire.actions import ACTIONS, LANGUAGE_ACTIONS
from fedinfer_flower.wire.stack_messages import STACK_ACTIONS

KEY = "ab" * 32
POLICIES = sorted((Path(__file__).parents[2] / "deploy" / "policies").glob("*.toml"))


def tables(**changes):
    given = {
        "site": {"name": "north", "home": "state"},
        "model": {"loader": "ward.models:load_model"},
        "answers": {"protections": ["secagg"]},
        "queriers": {"registry": KEY},
    }
    for name, table in changes.items():
        given[name] = {**given.get(name, {}), **table} if table is not None else None
    return {name: table for name, table in given.items() if table is not None}


WRONG = {
    "table": ({"answer": {}}, "'answer'", "did you mean 'answers'?"),
    "site-key": ({"site": {"hom": "x"}}, "[site]", "did you mean 'home'?"),
    "answers-key": ({"answers": {"protection": []}}, "[answers]", "'protections'"),
    "limits-key": ({"limits": {"rows-a-day": 5}}, "[limits]", "rows-per-day"),
    "budget-key": ({"budget": {"epsilon": 5}}, "[budget]", "epsilon"),
    "language-key": ({"language": {"loader": "a:b", "cach": True}}, "[language]", "'cache'"),
    "code-key": ({"code": {"ap": "own"}}, "[code]", "'app'"),
    "audit-key": ({"audit": {"logs": "x"}}, "[audit]", "'log'"),
    "no-site": ({"site": None}, "[site]", ""),
    "no-answers": ({"answers": None}, "[answers]", ""),
    "no-model": ({"model": None}, "[model]", ""),
    "no-queriers": ({"queriers": None}, "[queriers]", "anyone = true"),
    "no-protections": ({"answers": {"protections": []}}, "[answers] protections", "secagg"),
    "protection": ({"answers": {"protections": ["secag"]}}, "[answers] protections", "'secagg'"),
    "rule": ({"answers": {"rules": ["borba"]}}, "[answers] rules", "'borda'"),
    "rule-kind": ({"answers": {"rules": ["borda"]}}, "[answers] rules", ""),
    "action": ({"answers": {"actions": ["predikt"]}}, "[answers] actions", "predict"),
    "no-actions": ({"answers": {"actions": []}}, "[answers] actions", ""),
    "kind": ({"answers": {"kinds": ["score"]}}, "[answers] kinds", "scores"),
    "agrees-to": ({"answers": {"agrees-to": ["work"]}}, "[answers] agrees-to", "stacking"),
    "twice": ({"answers": {"kinds": ["votes", "votes"]}}, "[answers] kinds", ""),
    "text-for-list": ({"answers": {"kinds": "votes"}}, "[answers] kinds", ""),
    "text-for-flag": ({"answers": {"require-seal": "no"}}, "[answers] require-seal", ""),
    "flag-for-number": ({"limits": {"rows-per-day": True}}, "[limits] rows-per-day", ""),
    "negative": ({"limits": {"rows-per-day": -1}}, "[limits] rows-per-day", ""),
    "fraction": ({"limits": {"rows-per-day": 1.5}}, "[limits] rows-per-day", ""),
    "not-finite": (
        {"answers": {"max-epsilon-per-query": float("nan")}},
        "[answers] max-epsilon-per-query",
        "",
    ),
    "epsilon": ({"answers": {"max-epsilon-per-query": -1.0}}, "max-epsilon-per-query", ""),
    "anyone-and-some": ({"answers": {"anyone": True}}, "[queriers]", ""),
    "key-id": ({"queriers": {"registry": "AB" * 32}}, "[queriers] registry", "64"),
    "peer-key-id": ({"sites": {"south": 7}}, "[sites] south", ""),
    "min-cohort-he": ({"answers": {"protections": ["he"], "min-cohort": 4}}, "min-cohort", "'he'"),
    "two-sources": ({"model": {"kind": "onnx"}}, "[model]", ""),
    "options-of-loader": ({"model": {"options": {"path": "x"}}}, "[model] options", ""),
    "loader-form": ({"model": {"loader": "ward.models"}}, "[model] loader", ""),
    "digest-form": ({"model": {"digest": "12"}}, "[model] digest", ""),
    "counts": ({"model": {"share-counts": "all"}}, "[model] share-counts", ""),
    "language-verb": ({"answers": {"actions": ["refine"]}}, "[language]", ""),
    "language-kind": ({"language": {"loader": "a:b", "text": True}}, "kinds", ""),
    "encrypted-half": ({"answers": {"actions": ["encrypted"]}}, "encrypted-query", ""),
    "calibrate-half": ({"answers": {"actions": ["calibrate"]}}, "calibration", ""),
    "calibrate-sealed": (
        {"answers": {"actions": ["calibrate"], "agrees-to": ["calibration"]}},
        "require-seal",
        "",
    ),
    "stack-half": ({"answers": {"agrees-to": ["stacking"]}}, "'stack'", ""),
    "settlement-of-votes": (
        {"answers": {"agrees-to": ["settlement"], "kinds": ["votes"]}},
        "settlement",
        "",
    ),
    "budget-and-settlement": (
        {
            "answers": {"agrees-to": ["settlement"], "protections": ["dp"]},
            "budget": {"epsilon-per-querier": 1, "epsilon-global": 2},
        },
        "[budget]",
        "",
    ),
    "budget-range": ({"budget": {"epsilon-per-querier": -1, "epsilon-global": 2}}, "[budget]", ""),
    "fab-without-hashes": ({"code": {"app": "fab"}}, "[code]", "SHA-256"),
    "hashes-without-fab": ({"code": {"fab-hashes": [KEY]}}, "[code]", ""),
    "hash-form": ({"code": {"app": "fab", "fab-hashes": ["x"]}}, "[code] fab-hashes", ""),
    "preload": ({"code": {"preload": ["os; x"]}}, "[code] preload", ""),
    "audit-elsewhere": ({"audit": {"log": "../audit.jsonl"}}, "[audit] log", ""),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_policy_is_refused_with_table_and_key(case):
    changes, where, hint = WRONG[case]
    with pytest.raises(ConfigError) as caught:
        SitePolicy.from_mapping(tables(**changes))
    assert where in caught.value.message
    assert hint in caught.value.hint + caught.value.message


def test_file_that_is_missing_or_no_toml_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        SitePolicy.read(tmp_path / "site.toml")
    (tmp_path / "site.toml").write_text("[site\n")
    with pytest.raises(ConfigError, match="no TOML"):
        SitePolicy.read(tmp_path / "site.toml")
    (tmp_path / "site.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        SitePolicy.read(tmp_path / "site.toml")


def test_paths_are_relative_to_the_file(tmp_path):
    file = tmp_path / "site.toml"
    file.write_text(
        f'site = {{name = "n", home = "state"}}\nmodel.kind = "onnx"\n'
        f'model.options = {{path = "m.onnx"}}\nqueriers = {{a = "{KEY}"}}\n'
        'answers.protections = ["secagg"]\ncode.trusted-entities = "keys.yaml"\n'
    )
    policy = SitePolicy.read(file)
    assert policy.site.home == tmp_path / "state"
    assert policy.model.options["path"] == str(tmp_path / "m.onnx")
    assert policy.code.trusted_entities == tmp_path / "keys.yaml"


def test_digest_changes_with_any_value():
    one, other = (
        SitePolicy.from_mapping(tables(limits={"rows-per-day": n})).digest for n in (1, 2)
    )
    assert one != other
    assert len(one) == 64


def test_defaults_are_the_strict_ones():
    policy = SitePolicy.from_mapping(tables())
    assert policy.answers.require_seal
    assert policy.code.app == "own"
    assert policy.audit.enabled
    assert policy.answers.actions == ("hello", "predict", "recover", "ping")
    assert policy.consent.querier_key_ids == {KEY}
    assert policy.consent.protections == {"secagg"}
    assert policy.language is None
    assert policy.encrypted is None


def test_language_answers_follow_the_kinds_unless_said():
    kinds = ["cache"]
    rules = {"loader": "a:b", "cache": True}
    policy = SitePolicy.from_mapping(tables(answers={"kinds": kinds}, language=rules))
    assert policy.language_policy.media == ("cache",)
    assert not policy.language_policy.answers
    with pytest.raises(ConfigError, match=r"\[language\] answers"):
        SitePolicy.from_mapping(
            tables(answers={"kinds": kinds}, language={**rules, "answers": True})
        )


@pytest.mark.skipif(os.name != "posix", reason="modes of folders")
def test_home_is_made_for_its_owner_and_refused_if_others_can_read_it(tmp_path):
    policy = SitePolicy.from_mapping(tables(), folder=tmp_path)
    home = policy.open_home()
    assert home.stat().st_mode & 0o777 == 0o700
    home.chmod(0o755)
    with pytest.raises(DeploymentError, match=r"\[site\] home"):
        policy.open_home()


def test_every_action_has_a_verb_and_every_rule_a_kind():
    for action in (*ACTIONS, *LANGUAGE_ACTIONS, *STACK_ACTIONS, "fi_stack", "fi_mpc"):
        assert verb_of(action) in ACTION_VERBS
    for name in RULES.names():
        assert kind_of(RULES.get(name)()) in KINDS


@pytest.mark.parametrize("path", POLICIES, ids=lambda path: path.name)
def test_policy_that_is_shipped_can_be_read(path):
    policy = SitePolicy.read(path)
    assert policy.audit.enabled
    assert explain(policy).leaves


def test_policies_are_shipped():
    assert len(POLICIES) >= 4


def test_unknown_key_of_a_file_says_what_was_meant():
    with pytest.raises(UnknownConfigKeyError, match="did you mean 'require-seal'"):
        SitePolicy.from_mapping(tables(answers={"require-seals": False}))
