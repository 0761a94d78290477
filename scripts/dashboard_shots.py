"""Draw docs/images/dashboard.png and dashboard-phone.png: the dashboard with made-up figures.

    python scripts/dashboard_shots.py [--out docs/images] [--dark]

Needs Chromium on the PATH and the package `websockets`.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from fedinfer_flower.serving.routes.dashboard import add_routes

KEY = "fik_0a1b2c3d_" + "k" * 43
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--no-first-run", "--remote-debugging-port=0", "--disable-background-networking"),
    *("--disable-component-update", "--disable-default-apps", "--disable-sync", "--mute-audio"),
    "--hide-scrollbars",
)


def sample_status(now: float | None = None) -> dict[str, Any]:
    """Return what a gateway of five hospitals might say; every figure is made up."""
    now = time.time() if now is None else now
    rng = random.Random(3)
    names = ["St. Mary's", "Nordklinikum", "Hôpital Sud", "Coast General", "Lakeside"]
    latency = [0.182, 0.214, 0.391, 0.176, 0.0]
    answers = [12041, 11987, 11206, 12038, 8467]
    minutes = [max(0, round(34 + 22 * math.sin(i / 9) + rng.gauss(0, 6))) for i in range(60)]
    keys = [f"{rng.getrandbits(256):064x}" for _ in range(7)]
    spent = [(0, 5, 1.14), (1, 5, 1.14), (2, 5, 2.61), (3, 5, 0.92), (1, 6, 0.30)]
    return {
        "gateway": {
            "name": "Chest X-ray consortium",
            "version": "0.5.0",
            "started_at": now - 3 * 86400 - 7000,
            "ready": True,
            "why": "",
            "run_id": 4711,
            "queue_rows": 96,
        },
        "sites": [
            {
                "name": name,
                "key_id": keys[i],
                "node_id": i,
                "online": i != 4,
                "last_seen_at": now - (2 + i) - (3200 if i == 4 else 0),
                "latency_s": latency[i],
                "answers": answers[i],
                "failures": [0, 2, 14, 0, 31][i],
                "price_per_query": 1.0,
            }
            for i, name in enumerate(names)
        ],
        "queries_a_minute": minutes,
        "models": [
            _model("pneumonia-triage", "classifier", "secagg", 10904, 9),
            _model("fracture", "classifier", "dp", 1523, 0),
            _model("case-notes", "language", "plain", 212, 3),
        ],
        "protections": {"secagg": 69410, "dp": 18200, "he": 4096, "plain": 1270},
        "epsilon": [
            {
                "site": names[site],
                "querier": keys[querier],
                "spent": value,
                "cap": 3.0,
                "delta": 1e-6,
            }
            for site, querier, value in spent
        ],
        "rewards": [
            {"site": name, "credits": value}
            for name, value in zip(names, (412.5, 398.2, 301.7, 377.0, 166.4), strict=True)
        ],
        "errors": [
            _error(now - 340, "FI402", "2 of 5 sites answered before 30 s (need 3)"),
            _error(now - 2210, "FI315", "the privacy budget of the site does not cover the query"),
            _error(now - 5400, "FI415", "the API key has asked its rows of the day"),
        ],
        "receipts": [
            {
                "job_id": f"{rng.getrandbits(128):032x}",
                "at": now - 40 * i - 6,
                "n_rows": rows,
                "sites": names[: 4 - i % 2],
            }
            for i, rows in enumerate((256, 32, 1, 64, 128, 8))
        ],
    }


def _model(name: str, kind: str, protection: str, jobs: int, failed: int) -> dict[str, Any]:
    rule = "mean-probability" if kind == "classifier" else "mixture"
    facts = {"id": name, "kind": kind, "protection": protection, "rule": rule}
    return facts | {"jobs": jobs, "failed": failed}


def _error(at: float, code: str, message: str) -> dict[str, Any]:
    job_id = hashlib.sha256(code.encode()).hexdigest()[:32]
    return {"at": at, "code": code, "message": message, "job_id": job_id}


class PageServer:
    """The dashboard's own routes, and a ``/v1/status`` whose reply is a function's."""

    def __init__(self, status: Callable[[], Any], *, port: int = 0) -> None:
        self.status = status
        self.paths: list[str] = []
        app = FastAPI(openapi_url=None)
        add_routes(app, None)  # type: ignore[arg-type]

        @app.get("/v1/status")
        async def answer(request: Request) -> Response:
            if request.headers.get("authorization") != f"Bearer {KEY}":
                return JSONResponse({"error": {"code": "FI414"}}, status_code=401)
            found = self.status()
            return found if isinstance(found, Response) else JSONResponse(found)

        async def noting(scope: Any, receive: Any, send: Any) -> None:
            self.paths.append(scope["path"] + "?" * bool(scope["query_string"]))
            await app(scope, receive, send)

        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))
        self.port = sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        config = uvicorn.Config(noting, log_config=None, ws="none", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [sock]}, daemon=True
        )
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(timeout=10.0)


class Chromium:
    """A headless Chromium, driven over its DevTools protocol."""

    def __init__(self) -> None:
        from websockets.sync.client import connect

        found = shutil.which("chromium") or shutil.which("chromium-browser")
        program = found or shutil.which("google-chrome")
        if program is None:
            raise FileNotFoundError("no Chromium on the PATH")
        self._open = contextlib.ExitStack()
        self._folder = tempfile.mkdtemp(prefix="dashboard-")
        self._process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={self._folder}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            address = self._page_address()
            self._socket = self._open.enter_context(connect(address, max_size=None))
        except BaseException:
            self._end()
            raise
        self._number = 0
        self.events: list[dict[str, Any]] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _page_address(self) -> str:
        import httpx

        noted = Path(self._folder) / "DevToolsActivePort"
        end = time.monotonic() + 30.0
        while time.monotonic() < end and self._process.poll() is None:
            with contextlib.suppress(OSError, ValueError, IndexError, httpx.HTTPError):
                port = int(noted.read_text().split()[0])
                with httpx.Client(trust_env=False) as client:
                    pages = client.get(f"http://127.0.0.1:{port}/json/list").json()
                return str(next(p for p in pages if p["type"] == "page")["webSocketDebuggerUrl"])
            time.sleep(0.05)
        raise TimeoutError("Chromium did not start")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command and return its result; events on the way are kept."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=30.0))
            if message.get("id") == self._number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return dict(message["result"])
            if "method" in message:
                self.events.append(message)

    def size(self, width: int, height: int, *, dark: bool = False, phone: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1.0,
            mobile=phone,
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def value(self, expression: str) -> Any:
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']['text']}")
        return found["result"].get("value")

    def until(self, expression: str, *, timeout_s: float = 15.0) -> None:
        end = time.monotonic() + timeout_s
        while not self.value(expression):
            if time.monotonic() > end:
                raise TimeoutError(expression)
            time.sleep(0.05)

    def enter_key(self, key: str = KEY) -> None:
        self.value(
            f"document.getElementById('key').value = {json.dumps(key)};"
            "document.getElementById('enter').requestSubmit()"
        )

    def errors(self) -> list[str]:
        """Return what the console was told of errors, and exceptions."""
        self.value("1")  # what is on the way arrives before the reply
        found = []
        for event in self.events:
            entry = event["params"].get("entry", {})
            if event["method"] == "Runtime.exceptionThrown":
                found.append(str(event["params"]["exceptionDetails"]["text"]))
            if event["method"] == "Log.entryAdded" and entry["level"] in ("error", "warning"):
                found.append(str(entry["text"]))
        return found

    def requests(self) -> list[str]:
        """Return the addresses of all requests of the page."""
        sent = [e for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [str(event["params"]["request"]["url"]) for event in sent]

    def picture(self, *, width: int, height: int) -> bytes:
        found = self.call(
            "Page.captureScreenshot",
            format="png",
            captureBeyondViewport=True,
            clip={"x": 0, "y": 0, "width": width, "height": height, "scale": 1},
        )
        return base64.b64decode(found["data"])

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._open.close()
        self._end()

    def _end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(timeout=10.0)
        shutil.rmtree(self._folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="draw the pictures of the dashboard")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--dark", action="store_true")
    options = parser.parse_args()
    server, chromium = PageServer(sample_status), Chromium()
    try:
        for name, width, phone in (("dashboard", 1180, False), ("dashboard-phone", 360, True)):
            chromium.size(width, 900, dark=options.dark, phone=phone)
            chromium.open(server.url)
            if chromium.value("!document.getElementById('enter').hidden"):
                chromium.enter_key()
            chromium.until("document.querySelectorAll('#sites tr').length === 5")
            time.sleep(0.5)
            height = int(chromium.value("document.documentElement.scrollHeight"))
            height = min(height, 1500)
            path = options.out / f"{name}.png"
            path.write_bytes(_small(chromium.picture(width=width, height=height)))
            print(f"{path}: {width} x {height}, {path.stat().st_size} bytes")
    finally:
        chromium.close()
        server.stop()


def _small(png: bytes) -> bytes:
    """Return the picture with a palette of 256 colours, if Pillow is installed."""
    try:
        import io

        from PIL import Image
    except ImportError:
        return png
    out = io.BytesIO()
    with Image.open(io.BytesIO(png)) as image:
        image.convert("RGB").quantize(256).save(out, "png", optimize=True)
    return out.getvalue()


if __name__ == "__main__":
    main()
