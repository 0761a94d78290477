"""Who can learn what: complete, no stronger than the code, the same words everywhere."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import fedinfer_flower.receipts as package
from fedinfer_flower.errors import EnvelopeError, InvalidValueError, UnknownNameError
from fedinfer_flower.privacy.base import PROTECTIONS
from fedinfer_flower.receipts.disclosure import (
    MODES,
    DisclosureLine,
    disclosure_table,
    disclosures,
    query_table,
)
from fedinfer_flower.receipts.disclosure_texts import ANSWER, QUERY, Party
from fedinfer_flower.receipts.receipt import Receipt
from fedinfer_flower.receipts.statement import SiteStatement

ROOT = Path(__file__).parents[2]
MODULES = [f"{package.__name__}.{module.name}" for module in pkgutil.iter_modules(package.__path__)]
OPTIONS = [{}, {"self_mask": True}, {"allow_coordinator_key": True}, {"epsilon": 1.0}]


def learns(mode, party, *, about="answer", sealed=False, **options):
    lines = disclosures(mode, sealed=sealed, options=options)
    (text,) = [line.learns for line in lines if (line.about, line.party) == (about, party)]
    return text


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_modes_are_those_that_are_promised():
    assert set(MODES) == {
        *("plain", "dp", "secagg", "he", "secagg+dp", "he+dp"),
        *("encrypted-query", "mpc", "split"),
    }


def test_every_registered_protection_has_its_table():
    for name in PROTECTIONS.names():
        if PROTECTIONS.get(name).__module__.startswith("fedinfer_flower."):
            assert disclosures(name)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_mode_speaks_of_every_party_and_of_the_query(mode, sealed, options):
    lines = disclosures(mode, sealed=sealed, options=options)
    assert [line.party for line in lines if line.about == "answer"] == list(Party)
    parties = [line.party for line in lines if line.about == "query"]
    assert parties == ["coordinator alone", "active coordinator", "sites that are asked"]
    for line in lines:
        assert 0 < len(line.learns) <= 1000
        assert "|" not in line.learns
        assert "\n" not in line.learns


def test_variants_change_known_modes_only():
    for key in ANSWER:
        assert key.split(" ")[0] in MODES
        assert set(ANSWER[key]) <= set(Party)
    assert {key.split(" ")[0] for key in QUERY} <= {*MODES, "", "sealed"}


def test_pooling_opens_every_answer_under_he_and_not_under_secagg():
    assert learns("he", Party.POOLED).startswith("every answer")
    assert learns("secagg", Party.POOLED).startswith("the sum")
    assert learns("plain", Party.COORDINATOR).startswith("every answer")


def test_active_pooling_opens_one_answer_under_secagg_unless_self_mask():
    assert learns("secagg", Party.ACTIVE_POOLED).startswith("one answer")
    masked = learns("secagg", Party.ACTIVE_POOLED, self_mask=True)
    assert masked.startswith("the sum")
    assert "fewer than a third" in masked


@pytest.mark.parametrize("mode", ["he", "he+dp", "secagg", "secagg+dp", "encrypted-query"])
def test_coordinator_with_the_key_alone_is_what_both_are_together(mode):
    key = {"allow_coordinator_key": True}
    assert learns(mode, Party.COORDINATOR, **key) == learns(mode, Party.POOLED)
    assert learns(mode, Party.ACTIVE_COORDINATOR, **key) == learns(mode, Party.ACTIVE_POOLED)
    assert "pooling with the coordinator only" not in learns(mode, Party.OTHER_SITES, **key)
    for party in (Party.COORDINATOR, Party.ACTIVE_COORDINATOR):
        seen = learns(mode, party, about="query", sealed=True, **key)
        assert seen == "the query, in clear"


@pytest.mark.parametrize("mode", MODES)
def test_sealing_hides_the_query_from_the_coordinator_and_answers_only_if_relayed(mode):
    clear = learns(mode, Party.COORDINATOR, about="query")
    hidden = learns(mode, Party.COORDINATOR, about="query", sealed=True)
    assert "in clear" not in hidden
    if mode not in {"encrypted-query", "mpc"}:
        assert clear != hidden
        # Under plain and dp the sites seal their answers to the querier as well.
        same = learns(mode, Party.COORDINATOR) == learns(mode, Party.COORDINATOR, sealed=True)
        assert same == (mode not in {"plain", "dp"})


def test_a_site_reads_the_query_unless_it_is_encrypted_or_shared():
    party = "sites that are asked"
    for mode in MODES:
        text = learns(mode, party, about="query", sealed=True)
        assert ("in clear" in text) == (mode not in {"encrypted-query", "mpc", "split"})


def test_pins_are_named_as_a_defence_only_where_a_sealed_query_is_signed():
    assert "unless the site pins" not in learns("plain", Party.ACTIVE_COORDINATOR)
    assert "unless the site pins" in learns("plain", Party.ACTIVE_COORDINATOR, sealed=True)


def test_noise_in_a_split_model_is_about_the_query():
    party = Party.COORDINATOR
    assert "can be rebuilt" in learns("split", party, about="query")
    assert "(epsilon, delta)" in learns("split", party, about="query", epsilon=8.0)
    assert learns("split", party, epsilon=8.0) == learns("split", party)


@pytest.mark.parametrize("name", ["", "magic", "secagg self-mask", "Plain"])
def test_mode_that_nobody_wrote_about_is_an_error(name):
    with pytest.raises(UnknownNameError, match="known: plain"):
        disclosures(name)


def test_line_is_read_strictly():
    line = disclosures("plain")[0]
    assert DisclosureLine.from_dict(line.to_dict()) == line
    with pytest.raises(InvalidValueError):
        DisclosureLine(about="weather", party="x", learns="y")
    with pytest.raises(EnvelopeError):
        DisclosureLine.from_dict(line.to_dict() | {"about": "weather"})
    with pytest.raises(EnvelopeError):
        DisclosureLine.from_dict(line.to_dict() | {"x": 1})


def test_table_in_the_reference_is_that_of_the_code():
    text = (ROOT / "docs" / "reference" / "receipt.md").read_text()
    for marker, table in (("answers", disclosure_table), ("queries", query_table)):
        written = text.partition(f"<!-- {marker} -->\n")[2].partition("\n<!-- end -->")[0]
        assert written == table(sealed=True)


def test_reference_names_every_field_of_receipt_and_statement():
    text = (ROOT / "docs" / "reference" / "receipt.md").read_text()
    file_part, statement_part = text.partition("## Who can learn what")[0].split("## A statement")
    for part, cls in ((file_part, Receipt), (statement_part, SiteStatement)):
        cells = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", part, flags=re.M)
        named = {name for cell in cells for name in re.findall(r"\w+", cell)}
        assert named == {"version"} | {spec.name for spec in dataclasses.fields(cls)}


def test_second_copies_are_said_to_open_everything_to_who_pools():
    def pooled(**options):
        lines = disclosures("secagg", sealed=True, options=options)
        return next(x.learns for x in lines if x.party == "coordinator and querier pooling")

    assert "every answer" not in pooled()
    for form in ("shares", "ckks"):
        assert "every answer, from the second copies" in pooled(evidence=form)
    assert pooled(evidence="") == pooled()
