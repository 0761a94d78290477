"""The whole way in one process: HTTP, the core, the sites, and back."""

from __future__ import annotations

import asyncio

import httpx
import numpy as np
import pytest

from fedinfer_flower import Querier
from fedinfer_flower.serving.http_app import create_app
from fedinfer_flower.serving.key_store import KeyStore
from fedinfer_flower.wire.directory import Directory
from fedinfer_flower.wire.documents import CombinedAnswer


@pytest.fixture
def call(bed, tmp_path):
    """Return ``call(core, method, path, **options)`` with a key of all scopes."""
    keys = KeyStore(tmp_path / "keys.db")
    secret = keys.create("app", scopes=["query", "sealed", "status"])

    def send(core, method: str, path: str, **options) -> httpx.Response:
        async def go() -> httpx.Response:
            transport = httpx.ASGITransport(create_app(core, core._config, keys=keys))
            headers = {"Authorization": f"Bearer {secret}"} | options.pop("headers", {})
            async with httpx.AsyncClient(transport=transport, base_url="http://g") as client:
                return await client.request(method, path, headers=headers, **options)

        return asyncio.run(go())

    yield send
    keys.close()


def test_rows_over_http_are_answered_by_the_sites(bed, call, rows, mean_probability):
    core = bed.core(bed.sites(), models={"m": {"protection": "secagg"}})
    asked = {"model": "m", "inputs": rows.tolist(), "dtype": "float64", "wait_s": 20}
    headers = {"Idempotency-Key": "k"}

    reply = call(core, "POST", "/v1/query", json=asked, headers=headers)

    assert reply.status_code == 200, reply.text
    job = reply.json()
    np.testing.assert_allclose(
        job["answer"]["probabilities"], mean_probability(rows), rtol=0.0, atol=1e-4
    )
    again = call(core, "POST", "/v1/query", json=asked, headers=headers).json()
    assert again["id"] == job["id"]
    status = call(core, "GET", "/v1/status")
    assert status.status_code == 200
    assert status.json()["models"][0]["jobs"] == 1
    assert call(core, "GET", "/ready").status_code == 200
    assert call(core, "GET", f"/v1/queries/{job['id']}/receipt").status_code == 200


def test_sealed_job_over_http_is_opened_by_its_querier(bed, call, rows, mean_probability):
    core = bed.core(bed.sites(), models={"m": {"protection": "secagg"}})
    querier = Querier(protection="secagg")
    directory = call(core, "GET", "/v1/models/m/directory")
    sealed = querier.ask(
        rows, directory=Directory.from_bytes(directory.content), rule="mean-probability"
    )

    reply = call(
        core,
        "POST",
        "/v1/query?model=m&wait_s=20",
        content=sealed.to_bytes(),
        headers={"Content-Type": "application/vnd.fedinfer.sealed-job"},
    )

    assert reply.status_code == 200, reply.text
    answer = call(core, "GET", f"/v1/queries/{reply.json()['id']}/answer")
    found = querier.open(CombinedAnswer.from_bytes(answer.content))
    np.testing.assert_allclose(found.probabilities, mean_probability(rows), rtol=0.0, atol=1e-4)


def test_failure_of_the_sites_has_its_status_and_shape(bed, call, rows):
    core = bed.core(bed.sites(2), start=False, models={"m": {"protection": "secagg"}})
    core.start()
    asked = {"model": "m", "inputs": rows.tolist(), "timeout_s": 0.3}
    reply = call(core, "POST", "/v1/query", json=asked)
    assert reply.status_code == 503
    assert call(core, "GET", "/ready").status_code == 503
    assert reply.json()["error"]["code"] == "FI405"
