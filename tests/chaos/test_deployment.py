"""Accidents of a real deployment: killed, frozen and restarted processes, with money at stake.

One federation on loopback (TLS, node keys, three sites, a ledger) goes through all of them in
turn. After each: what was accepted ends, by its deadline where the gateway lived; nothing is
charged, paid or answered twice; and all sites answer again within a minute, by themselves.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest

import fedinfer_flower as fedinfer
from fedinfer_flower.errors import FedInferError
from fedinfer_flower.incentives.ledger import Ledger
from fedinfer_flower.incentives.payments.base import MICRO
from fedinfer_flower.observability.audit_log import verify_audit_log
from fedinfer_flower.serving.accounting import HELD
from fedinfer_flower.simulation.loopback import Deployment, SiteSpec
from fedinfer_flower.simulation.loopback.models import held_out_digits

pytestmark = [pytest.mark.deployment, pytest.mark.slow, pytest.mark.timeout(600)]

N_SITES = 3
N_JOBS = 4
JOB_S = 12.0
GRACE_S = 3.0
"""Between a job's deadline and its end in the outbox: a tick of the gateway, on a busy machine."""
AGAIN_S = 60.0
DEPOSIT = 10_000 * MICRO

MODELS = """
[models.digits]
rule = "mean-probability"
protection = "plain"
timeout-s = 15.0
quorum = 2
min-sites = 2
straggler-s = 2.0
price = 1.0
"""
SLOW = """
import dataclasses, time
from fedinfer_flower.simulation.loopback.models import digits_site

class Slow:
    def __init__(self, model):
        self.model, self.classes_ = model, model.classes_
    def predict_proba(self, x):
        time.sleep(0.5)  # so that an accident comes upon queries under way
        return self.model.predict_proba(x)

def site(context):
    fast = digits_site(context)
    return dataclasses.replace(fast, model=Slow(fast.model), digest="slow")
"""


class Federation:
    """A deployment, somebody who asks it, and what it accepted so far."""

    def __init__(self, folder: Path) -> None:
        (folder / "chaos_models.py").write_text(SLOW)
        site = {"loader": "chaos_models:site", "policy": "[limits]\nrows-per-day = 100000\n"}
        self.deployment = Deployment(
            folder,
            sites=[SiteSpec(name=f"site-{i}", **site) for i in range(N_SITES)],
            models=MODELS,
            gateway=f'ledger = "sqlite:///{folder}/ledger.db"\n',
        )
        paths = filter(None, (str(folder), os.environ.get("PYTHONPATH")))
        self.deployment.processes.environment["PYTHONPATH"] = os.pathsep.join(paths)
        self.folder = folder
        self.accepted: dict[str, dict] = {}
        self.row = 0

    def open(self) -> None:
        self.deployment.start()
        self.api_key = self.deployment.api_key("app", scopes=("query", "sealed", "status"))
        self.account = f"key:{self.api_key.split('_')[1]}"
        self.ledger = Ledger(f"sqlite:///{self.folder}/ledger.db")
        self.ledger.deposit(self.account, DEPOSIT, key="opening")
        self.http = httpx.Client(
            base_url=self.deployment.gateway_url,
            verify=self.deployment.trust(),
            headers={"Authorization": f"Bearer {self.api_key}"},
            timeout=20.0,
        )
        self.sdk = fedinfer.Gateway(
            self.deployment.gateway_url, api_key=self.api_key, ca=self.deployment.ca
        )

    # -- asking --------------------------------------------------------------------------

    def submit(self, *, wait_s: float = 0.0, timeout_s: float = JOB_S) -> dict | None:
        """Hand a row in, in clear; None if the gateway did not say that it took it."""
        x, _ = held_out_digits(397)
        self.row = (self.row + 1) % len(x)
        body = {"model": "digits", "inputs": x[self.row : self.row + 1].tolist()}
        try:
            reply = self.http.post(
                f"/v1/query?wait_s={wait_s:g}&timeout_s={timeout_s:g}", json=body
            )
        except httpx.HTTPError:
            return None
        said = reply.json()
        if reply.status_code in (200, 202):
            self.accepted[said["id"]] = said
            return said
        assert said["error"]["code"].startswith("FI"), said
        return None

    def burst(self) -> list:
        """Hand in some rows in clear, and one job that the gateway cannot read."""
        for _ in range(N_JOBS):
            assert self.submit() is not None
        x, _ = held_out_digits(1)
        sealed = self.sdk.submit(
            x, model="digits", seal=True, identity=self.deployment.app_identity, timeout_s=JOB_S
        )
        self.accepted[sealed.job_id] = {"id": sealed.job_id, "state": "accepted"}
        return sealed

    def job(self, job_id: str) -> dict | None:
        try:
            reply = self.http.get(f"/v1/queries/{job_id}")
        except httpx.HTTPError:
            return None
        # A failed job has the status of its error; not to be ready is no word on the job.
        said = reply.json()
        return said if "state" in said else None

    def settle(self, *, most_s: float = 90.0) -> dict[str, dict]:
        """Wait until all that was accepted has ended; return how."""
        end = time.monotonic() + most_s
        while time.monotonic() < end:
            for job_id, job in self.accepted.items():
                if "ended_at" not in job or not job["ended_at"]:
                    self.accepted[job_id] = self.job(job_id) or job
            if all(job.get("ended_at") for job in self.accepted.values()):
                return self.accepted
            time.sleep(0.2)
        hanging = {i: job for i, job in self.accepted.items() if not job.get("ended_at")}
        raise AssertionError(f"accepted, and neither answered nor failed: {hanging}")

    def wait_until_whole(self, *, most_s: float = 120.0) -> float:
        """Ask until every site is in an answer; return the seconds that took."""
        begun, said = time.monotonic(), None
        while time.monotonic() - begun < most_s:
            said = self.submit(wait_s=6.0, timeout_s=6.0)
            if said and (said["provenance"] or {}).get("sites_answered") == N_SITES:
                return time.monotonic() - begun
            time.sleep(0.2)
        raise AssertionError(f"not whole after {most_s} s: {said}, {self.why()}")

    def why(self) -> str:
        try:
            return self.http.get("/v1/status").text[:2000]
        except httpx.HTTPError as exc:
            return type(exc).__name__

    # -- processes -----------------------------------------------------------------------

    def child(self, site: str, name: str) -> int:
        facts = json.loads((self.folder / f"{site}-home/run/supervisor.json").read_text())
        return next(child["pid"] for child in facts["children"] if child["name"] == name)

    def gateway(self) -> dict:
        return json.loads((self.folder / "gateway-state/gateway.pid").read_text())

    # -- what must hold after every accident ---------------------------------------------

    def check_money(self, jobs: dict[str, dict]) -> None:
        assert self.ledger.verify().ok
        entries = list(self.ledger.entries())
        assert all(sum(p.amount for p in entry.postings) == 0 for entry in entries)
        times = Counter(entry.draft.key for entry in entries)
        assert max(times.values()) == 1
        paid = {e.draft.key: e for e in entries}
        for job_id, job in jobs.items():
            assert f"reserve.{job_id}" in paid
            amounts = {p.account: p.amount for p in paid[f"settle.{job_id}"].postings}
            to_sites = {n: v for n, v in amounts.items() if n.startswith("site:")}
            assert amounts[HELD] == -MICRO
            if job["state"] == "done":
                assert sum(to_sites.values()) == MICRO
                assert len(to_sites) == job["provenance"]["sites_answered"]
            else:
                assert to_sites == {}
                assert amounts[self.account] == MICRO
        done = sum(job["state"] == "done" for job in jobs.values())
        # Jobs that were accepted without our learning of it are paid for as well.
        assert self.ledger.balance(HELD) == 0
        assert self.ledger.balance(self.account) <= DEPOSIT - done * MICRO

    def check_sites(self) -> None:
        for i in range(N_SITES):
            log = self.folder / f"site-{i}-home/audit.jsonl"
            assert verify_audit_log(log).ok
            answered = Counter(
                entry["facts"]["query_id"]
                for entry in map(json.loads, log.read_text().splitlines())
                if entry["event"] == "answered" and entry["facts"].get("action") == "predict"
            )
            assert max(answered.values()) == 1
            assert sum(answered.values()) <= self.counted(i)
        assert verify_audit_log(self.folder / "gateway-state/audit.jsonl").ok

    def counted(self, site: int) -> int:
        from fedinfer_flower.clients.policy_tables import LimitRules
        from fedinfer_flower.clients.rate_guard import RateGuard

        file = self.folder / f"site-{site}-home/limits.sqlite"
        return RateGuard(file, LimitRules(rows_per_day=100000)).rows_of_day()


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    it = Federation(tmp_path_factory.mktemp("federation"))
    try:
        it.open()
        with it.http, it.sdk:
            yield it
    finally:
        it.deployment.close()


def play(federation, capsys, name, accident, *, mend=lambda: None, lives=True):
    """Have an accident while queries are under way, and check all that has to hold.

    `lives`: whether the gateway does, so that deadlines are kept to the second.
    """
    federation.wait_until_whole()
    federation.settle()
    before = set(federation.accepted)
    sealed = federation.burst()
    time.sleep(0.3)
    begun = time.monotonic()
    accident()
    mend()
    federation.wait_until_whole()
    again_s = time.monotonic() - begun
    jobs = {i: job for i, job in federation.settle().items() if i not in before}
    outcomes = Counter(
        f"{job['error']['code']}"
        if job["error"]
        else f"{'degraded' if job['provenance'].get('degraded') else 'whole'}"
        for job in jobs.values()
    )
    late_s = max(job["ended_at"] - job["deadline_at"] for job in jobs.values())
    with capsys.disabled():
        print(  # noqa: T201  the measurement that docs/explanation/failures.md repeats
            f"\n{name}: all sites answer again after {again_s:.1f} s; {dict(outcomes)};"
            f" latest end {late_s:+.2f} s after its deadline"
        )
    for job in jobs.values():
        if lives:
            assert job["ended_at"] <= job["deadline_at"] + GRACE_S, job
    # The client's side of the same promise: an answer that opens, or a typed error.
    code = ""
    try:
        assert len(sealed.wait(20.0).prediction.names) == 1
    except FedInferError as exc:
        code = exc.code
    assert code in {"", *(job["error"]["code"] for job in jobs.values() if job["error"])}
    federation.check_money(jobs)
    federation.check_sites()
    # Most of it is Python starting; a machine that is busy with other things takes longer.
    busy = os.getloadavg()[0] / (os.cpu_count() or 1)
    assert again_s <= AGAIN_S * max(1.0, busy / 4.0)
    return jobs


def kill(pid):
    os.kill(pid, signal.SIGKILL)


def test_worker_killed(federation, capsys):
    jobs = play(
        federation, capsys, "worker killed", lambda: kill(federation.child("site-0", "worker"))
    )
    assert all(job["state"] == "done" for job in jobs.values())


def test_worker_frozen(federation, capsys):
    def freeze():
        os.kill(federation.child("site-1", "worker"), signal.SIGSTOP)

    jobs = play(federation, capsys, "worker frozen", freeze)
    assert any(job["provenance"].get("degraded") for job in jobs.values())


def test_supernode_frozen(federation, capsys):
    def freeze():
        os.kill(federation.child("site-2", "supernode"), signal.SIGSTOP)

    play(federation, capsys, "SuperNode frozen", freeze)


def test_site_killed_and_started_again(federation, capsys):
    processes = federation.deployment.processes
    play(
        federation,
        capsys,
        "site killed, started again",
        lambda: processes.end("site-0", how=signal.SIGKILL),
        mend=lambda: processes.start_again("site-0"),
    )


def test_serve_killed_gateway_goes_on(federation, capsys):
    processes, run = federation.deployment.processes, federation.gateway()["run_id"]
    jobs = play(
        federation,
        capsys,
        "fedinfer serve killed, started again",
        lambda: processes.end("gateway", how=signal.SIGKILL),
        mend=lambda: processes.start_again("gateway"),
    )
    assert all(job["state"] == "done" for job in jobs.values())
    assert federation.gateway()["run_id"] == run


def test_gateway_killed(federation, capsys):
    run = federation.gateway()["run_id"]
    play(
        federation,
        capsys,
        "gateway killed",
        lambda: kill(federation.gateway()["pid"]),
        lives=False,
    )
    assert federation.gateway()["run_id"] != run


def test_superlink_killed_and_started_again(federation, capsys):
    processes = federation.deployment.processes
    play(
        federation,
        capsys,
        "SuperLink killed, started again",
        lambda: processes.end("superlink", how=signal.SIGKILL),
        mend=lambda: processes.start_again("superlink"),
        lives=False,
    )
