"""Who is turned away by a real deployment: nodes, keys, certificates, rules; and in what words."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from contextlib import contextmanager

import httpx
import pytest

import fedinfer_flower as fedinfer
from fedinfer_flower.errors import AuthenticationError, GatewayError, PolicyRefusedError
from fedinfer_flower.observability.audit_log import verify_audit_log
from fedinfer_flower.simulation.loopback import Deployment, SiteSpec
from fedinfer_flower.simulation.loopback.certificates import Authority, make_node_key
from fedinfer_flower.simulation.loopback.models import held_out_digits
from fedinfer_flower.simulation.loopback.processes import command_path, free_ports

pytestmark = [pytest.mark.deployment, pytest.mark.slow, pytest.mark.timeout(300)]

N_SITES = 2
MODELS = """
[models.digits]
rule = "mean-probability"
protection = "plain"
timeout-s = 20.0
quorum = 2

[models.votes]
rule = "majority-vote"
protection = "plain"
timeout-s = 20.0
quorum = 2
"""
ONE_RULE = 'rules = ["mean-probability"]'


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deployment")
    sites = [SiteSpec(name=f"site-{i}", answers=ONE_RULE) for i in range(N_SITES)]
    with Deployment(folder, sites=sites, models=MODELS) as it:
        yield it


@pytest.fixture(scope="module")
def api_key(deployment):
    return deployment.api_key("app", scopes=("query", "sealed", "status"))


def gateway_of(deployment, key, **options):
    return fedinfer.Gateway(
        deployment.gateway_url, api_key=key, ca=deployment.ca, **({"timeout_s": 30.0} | options)
    )


def fedinfer_once(deployment, *arguments, timeout_s=60.0):
    done = subprocess.run(
        [command_path("fedinfer"), *arguments, "--once"],
        env=deployment.processes.environment,
        cwd=deployment.folder,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("seal", [False, True], ids=["clear", "sealed"])
def test_right_key_and_allowed_rule_are_answered(deployment, api_key, seal):
    x, _ = held_out_digits(5)
    with gateway_of(deployment, api_key) as gateway:
        answer = gateway.ask(x, model="digits", seal=seal, identity=deployment.app_identity)
    assert len(answer.prediction.names) == 5
    assert answer.provenance["sites_answered"] == N_SITES


@pytest.mark.parametrize("seal", [False, True], ids=["clear", "sealed"])
def test_rule_that_the_policies_forbid_is_fi322_at_the_querier(deployment, api_key, seal):
    x, _ = held_out_digits(1)
    with (
        gateway_of(deployment, api_key) as gateway,
        pytest.raises(PolicyRefusedError, match="FI322") as caught,
    ):
        gateway.ask(x, model="votes", seal=seal, identity=deployment.app_identity)
    assert "2 of 2 sites refused the query by their policies (site-0, site-1)" in str(caught.value)
    log = deployment.folder / "site-0-home/audit.jsonl"
    refused = [
        entry["facts"]["code"]
        for entry in map(json.loads, log.read_text().splitlines())
        if entry["event"] == "refused"
    ]
    assert set(refused) == {"FI322"}
    assert verify_audit_log(log).ok


def test_wrong_api_key_is_refused(deployment, api_key):
    wrong = api_key[:-4] + "AAAA"
    with gateway_of(deployment, wrong) as gateway, pytest.raises(AuthenticationError) as caught:
        gateway.ask(held_out_digits(1)[0], model="digits")
    assert wrong[13:] not in str(caught.value)
    raw = httpx.post(
        f"{deployment.gateway_url}/v1/query",
        json={"model": "digits", "inputs": [[0.0] * 64]},
        verify=deployment.trust(),
    )
    assert (raw.status_code, raw.json()["error"]["code"]) == (401, "FI414")


def test_node_that_is_not_registered_does_not_get_in(deployment, api_key):
    stranger = SiteSpec(name="site-9")
    policy = deployment.write_policy(stranger)
    make_node_key(deployment.folder / "site-9.node")  # nobody registers it
    code, said = fedinfer_once(
        deployment,
        *("site", "up", "--policy", str(policy), "--superlink", deployment.superlink),
        *("--root-certificates", str(deployment.ca), "--node-key", "site-9.node"),
    )
    assert code == 1, said
    log = (deployment.folder / "site-9-home/logs/supernode.log").read_text()
    assert "Traceback" not in said + log
    assert "its key is not registered there" in log
    assert {site["name"] for site in status(deployment, api_key)["sites"]} == {"site-0", "site-1"}


def status(deployment, api_key):
    return httpx.get(
        f"{deployment.gateway_url}/v1/status",
        headers={"Authorization": f"Bearer {api_key}"},
        verify=deployment.trust(),
    ).json()


def test_expired_certificate_of_the_gateway_is_refused_by_clients(deployment, api_key):
    certificate, key = (deployment.folder / f"gateway.{end}" for end in ("pem", "key"))
    for file in (certificate, key):
        shutil.copy(file, file.with_name(f"{file.name}.kept"))
    expired = deployment.authority.issue(deployment.folder, "expired", days=-1)
    try:
        put(expired, (certificate, key))

        def is_refused():
            # Every time another connection: one that is open stays open.
            with gateway_of(deployment, api_key) as gateway:
                try:
                    gateway.models()
                except GatewayError as exc:
                    return "its certificate is refused: it has expired" in str(exc)
            return False

        wait_for(is_refused)
        # `fedinfer serve` would not start with it.
        code, said = fedinfer_once(
            deployment,
            *("serve", "--config", str(deployment.gateway_config)),
            *("--superlink", deployment.superlink, "--root-certificates", str(deployment.ca)),
        )
        assert code != 0
        assert "FI209" in said
        assert "ended" in said
    finally:
        put(
            [file.with_name(f"{file.name}.kept") for file in (certificate, key)], (certificate, key)
        )
    with gateway_of(deployment, api_key) as gateway:
        wait_for(lambda: "digits" in {m.name for m in models_or_none(gateway)})


def models_or_none(gateway):
    try:
        return gateway.models()
    except GatewayError:
        return ()


def put(files, places):
    for file, place in zip(files, places, strict=True):
        draft = place.with_suffix(".draft")
        shutil.copy(file, draft)
        draft.replace(place)


def wait_for(condition, most_s=30.0):
    end = time.monotonic() + most_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


@contextmanager
def superlink_of(folder, authority, *, days, environment):
    certificate, key = authority.issue(folder, "other", days=days)
    (port,) = free_ports(1)
    with (folder / "other.log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(command_path("flower-superlink"), "--host", "127.0.0.1", "--port", str(port)),
                *("--ssl-ca-certfile", str(authority.certificate)),
                *("--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)),
                *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
            ],
            stdout=log,
            stderr=log,
            env=environment,
        )
        try:
            wait_for(lambda: httpx_answers(port), most_s=60.0)
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(timeout=30)


def httpx_answers(port):
    import socket

    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_expired_certificate_of_a_superlink_is_refused_by_sites_and_gateway(deployment, tmp_path):
    environment = deployment.processes.environment | {"FLWR_HOME": str(tmp_path)}
    authority = Authority.make(tmp_path)
    with superlink_of(tmp_path, authority, days=-1, environment=environment) as address:
        make_node_key(tmp_path / "node")
        policy = deployment.write_policy(SiteSpec(name="site-8"))
        code, said = fedinfer_once(
            deployment,
            *("site", "up", "--policy", str(policy), "--superlink", address),
            *("--root-certificates", str(authority.certificate)),
            *("--node-key", str(tmp_path / "node")),
        )
        log = (deployment.folder / "site-8-home/logs/supernode.log").read_text()
        assert code != 0, said
        assert "certificate" in said + log, said + log
        assert "expired" in said + log, said + log
