"""`fedinfer gateway`: keys on the command line, and the check of its settings."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from fedinfer_flower.cli.gateway import gateway_app
from fedinfer_flower.errors import ConfigError, FedInferError
from fedinfer_flower.observability.audit_log import verify_audit_log
from fedinfer_flower.serving.key_store import KeyStore

TOML = """
[gateway]
state = "state"
public-metrics = true

[models.wine]
protection = "secagg"
quorum = 2
min-sites = 3

[models.plain]
clear = false
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "gateway.toml"
    path.write_text(TOML)
    return path


def call(*arguments):
    done = CliRunner().invoke(gateway_app, [str(a) for a in arguments])
    if isinstance(done.exception, FedInferError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def test_key_is_made_listed_rotated_and_revoked(config, tmp_path):
    text = call("key", "create", "lab", "--config", config, "--scope", "query", "--expires", "90d")
    text = text.strip()
    key_id, secret = text.split("_", 2)[1:]
    [line] = json.loads(call("key", "list", "--config", config, "--json"))
    assert (line["key_id"], line["name"], line["state"]) == (key_id, "lab", "good")
    assert line["expires_at"]
    listed = call("key", "list", "--config", config)
    assert key_id in listed
    assert secret not in listed
    new = call("key", "rotate", key_id, "--config", config, "--grace", "1h").strip()
    store = KeyStore(tmp_path / "state" / "keys.db")
    assert store.authenticate(text) == store.authenticate(new)
    call("key", "revoke", key_id, "--config", config)
    store.close()
    [line] = json.loads(call("key", "list", "--config", config, "--json"))
    assert line["state"] == "revoked"


def test_making_and_revoking_keys_is_written_down_without_secrets(config, tmp_path):
    text = call("key", "create", "lab", "--config", config).strip()
    call("key", "revoke", text.split("_")[1], "--config", config)
    path = tmp_path / "state" / "audit.jsonl"
    assert verify_audit_log(path).ok
    written = path.read_text()
    assert "key-created" in written
    assert "key-revoked" in written
    assert text.split("_", 2)[2] not in written


def test_secret_can_go_to_a_file(config, tmp_path):
    out = tmp_path / "lab.key"
    shown = call("key", "create", "lab", "--config", config, "--out", out)
    text = out.read_text().strip()
    assert text.startswith("fik_")
    assert text not in shown
    assert out.stat().st_mode & 0o077 == 0
    with pytest.raises(ConfigError, match="exists"):
        call("key", "create", "lab", "--config", config, "--out", out)
    assert len(json.loads(call("key", "list", "--config", config, "--json"))) == 1


@pytest.mark.parametrize(
    "wrong",
    [("--model", "none"), ("--scope", "all"), ("--expires", "soon")],
    ids=["model", "scope", "time"],
)
def test_wrong_options_make_no_key(config, wrong):
    with pytest.raises(ConfigError):
        call("key", "create", "lab", "--config", config, *wrong)
    assert json.loads(call("key", "list", "--config", config, "--json")) == []


def test_state_that_others_can_read_is_refused(config, tmp_path):
    (tmp_path / "state").mkdir(mode=0o755)
    (tmp_path / "state").chmod(0o755)
    with pytest.raises(ConfigError, match="chmod 700"):
        call("key", "list", "--config", config)


def test_check_warns_of_what_is_weak(config):
    found = json.loads(call("check", config, "--json"))
    assert found["models"] == ["plain", "wine"]
    words = " ".join(found["warnings"])
    for part in ("no certificate", "metrics are public", "wine: a quorum", "plain: under 'plain'"):
        assert part in words
    assert "wine, plain" in call("check", config) or "plain, wine" in call("check", config)


def test_check_refuses_what_would_not_start(tmp_path, config):
    config.write_text(TOML + "\n[model]\n")
    with pytest.raises(ConfigError, match="nothing reads"):
        call("check", config)
    config.write_text(TOML.replace("[gateway]", '[gateway]\ncertificate = "a"\nkey = "b"'))
    with pytest.raises(ConfigError, match="certificate and key"):
        call("check", config)
