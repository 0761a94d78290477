"""A marker in every part of a request turns up in nothing that is written down or shown."""

from __future__ import annotations

import asyncio
import json
import logging

import httpx
import numpy as np
import pytest

from fedinfer_flower.observability.audit_log import AuditLog
from fedinfer_flower.observability.json_logs import JsonFormatter
from fedinfer_flower.observability.metrics import GatewayMetrics
from fedinfer_flower.serving.http_app import create_app

CANARY = "canary9d41"
NUMBER = 4242.424242
MARKS = (CANARY, "4242.42", np.float64(NUMBER).tobytes().hex())


@pytest.fixture
def logged():
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record):
            lines.append(JsonFormatter().format(record))

    handler, root = Keep(), logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield lines
    root.removeHandler(handler)
    root.setLevel(level)


async def _ask(core, metrics, keys, audit, secret):
    """Ask in many ways, right and wrong; return (end states, status page, metrics)."""
    app = create_app(core, core._config, keys=keys, metrics=metrics, audit=audit)
    headers = {"Authorization": f"Bearer {secret}", "X-Note": CANARY, "User-Agent": CANARY}
    headers |= {"Referer": f"https://{CANARY}/", "Cookie": f"a={CANARY}", "traceparent": CANARY}
    rows = [[NUMBER] * 4, [1.0] * 4]
    states = []
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url=f"http://{CANARY}.test") as client:

        async def post(body, *, query="", **more):
            reply = await client.post(f"/v1/query{query}", json=body, headers=headers | more)
            return reply.json()

        good = {"model": "m", "inputs": rows, "dtype": "float64", "wait_s": 20}
        done = await post(good, **{"Idempotency-Key": CANARY})
        states.append(done["state"])
        failed = await post(good | {"inputs": [[NUMBER] * 7]})
        states.append(failed["error"]["code"])
        for wrong in (
            good | {"model": CANARY},
            good | {"dtype": CANARY},
            good | {CANARY: 1},
            good | {"inputs": [[CANARY]]},
            good | {"wait_s": CANARY},
            [CANARY],
            CANARY,
        ):
            reply = await post(wrong, query=f"?{CANARY}={CANARY}")
            assert CANARY not in json.dumps(reply), wrong
        for path in (f"/{CANARY}", f"/v1/queries/{CANARY}", f"/v1/models/{CANARY}/directory"):
            reply = await client.get(f"{path}?wait_s={CANARY}", headers=headers)
            assert CANARY not in reply.text + str(reply.headers)
        files = {"file": (f"{CANARY}.npy", CANARY.encode())}
        reply = await client.post("/v1/query", files=files, headers=headers)
        assert CANARY not in reply.text + str(reply.headers)
        page = await client.get("/v1/status", headers=headers)
        shown = await client.get("/metrics", headers=headers)
    return states, page.text, shown.text


def test_marker_is_in_no_log_metric_status_or_audit_line_nor_in_the_outbox_afterwards(
    bed, keys, key, logged, tmp_path
):
    sites = bed.sites(2)
    audit, metrics = AuditLog(tmp_path / "audit.jsonl", role="gateway"), GatewayMetrics()
    core = bed.core(sites, audit=audit, limits={"result-ttl-s": 0.0})
    core._metrics = core._ends._metrics = metrics
    states, page, shown = asyncio.run(_ask(core, metrics, keys, audit, key))
    assert states[0] == "done"
    assert states[1].startswith("FI")
    assert len(core._outbox.unfinished()) == 0
    core._outbox.expire(core._clock() + 1.0)
    core.close()
    written = (tmp_path / "audit.jsonl").read_text()
    assert '"done"' in written
    assert "jobs_ended" in shown or "fedinfer" in shown
    everything = {"logs": "\n".join(logged), "status": page, "metrics": shown, "audit": written}
    for where, text in everything.items():
        for mark in MARKS:
            assert mark not in text, where
    left = b"".join(path.read_bytes() for path in bed.folder.glob("outbox.db*"))
    assert CANARY.encode() not in left
    assert np.float64(NUMBER).tobytes() not in left
