"""Receipts of a gateway that answers in parts, and of one that lies about them."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from fedinfer_flower.cli.main import app as cli
from fedinfer_flower.errors import FedInferError, ProtocolError
from fedinfer_flower.querier.gateway_job import check_receipt
from fedinfer_flower.serving.jobs import JobState


@pytest.fixture
def several(bed, rows):
    """Return the receipts of a query that was asked in three batches."""
    core = bed.core(bed.sites(3), batching={"max-rows": 2})
    ended = bed.ended(core, core.submit(bed.request(rows)))
    assert ended.state is JobState.DONE
    assert ended.provenance["batches"] == 3
    return ended.receipt


def test_receipts_of_a_query_that_was_cut_are_all_verified(several):
    checks = check_receipt(several, pins=None)
    assert checks.ok
    assert len({id(check) for check in checks.checks}) == len(checks.checks)
    assert len(checks.checks) % 3 == 0


@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_wrong_receipt_among_several_is_found(several, place):
    plain = json.loads(several)
    plain["receipts"][place]["batches"][0]["n_rows"] += 1
    with pytest.raises(FedInferError):
        check_receipt(json.dumps(plain).encode(), pins=None)


@pytest.mark.parametrize(
    "data",
    [b'{"receipts":[]}', b'{"receipts":{}}', b'{"receipts":[1]}', b'{"receipts":[{}]}', b"[]"],
)
def test_what_is_no_list_of_receipts_is_refused(data):
    with pytest.raises(ProtocolError):
        check_receipt(data, pins=None)


def test_command_verifies_each(several, tmp_path):
    path = tmp_path / "receipt.json"
    path.write_bytes(several)
    done = CliRunner().invoke(cli, ["verify", str(path), "--json"])
    assert done.exit_code == 0, done.output
    assert [json.loads(line)["ok"] for line in done.output.splitlines()] == [True] * 3
    plain = json.loads(several)
    plain["receipts"][2]["rule"] = "other"
    path.write_text(json.dumps(plain))
    assert CliRunner().invoke(cli, ["verify", str(path), "--json"]).exit_code == 1
