"""The dashboard's routes, and the page itself in a headless Chromium."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import shutil
import sys
from importlib import resources
from pathlib import Path
from types import ModuleType

import httpx
import pytest
from fastapi import FastAPI
from starlette.responses import Response

from fedinfer_flower.serving.routes.dashboard import CONTENT_POLICY, add_routes

SCRIPT = Path(__file__).parents[2] / "scripts" / "dashboard_shots.py"
FILES = ("index.html", "dashboard.css", "dashboard.js", "icon.svg")
HOSTILE = "<img src=x onerror=\"document.title='owned'\">"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dashboard_shots", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


shots = _load()


def text_of(name: str) -> str:
    found = resources.files("fedinfer_flower.serving").joinpath("dashboard", name)
    return found.read_text(encoding="utf-8")


# -- the files ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_file_names_no_other_server(name):
    allowed = {"http://www.w3.org/2000/svg"}
    # Comments of the script begin with two slashes, and a blank.
    assert set(re.findall(r"(?:https?:)?//[\w.-]+[\w./-]*", text_of(name))) <= allowed


def test_page_has_no_script_or_style_in_it():
    page = text_of("index.html")
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", page)
    assert re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL) == [""]


def test_script_makes_no_markup_of_text():
    script = text_of("dashboard.js")
    for sink in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "srcdoc",
    ):
        assert sink not in script
    assert "localStorage" not in script
    assert "cookie" not in script


def test_every_id_that_the_script_uses_is_in_the_page():
    used = set(re.findall(r"(?:\$|fill)\(\"([\w-]+)\"", text_of("dashboard.js")))
    there = set(re.findall(r"\sid=\"([\w-]+)\"", text_of("index.html")))
    assert used
    assert used <= there


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html"),
        ("/dashboard/dashboard.css", "text/css"),
        ("/dashboard/dashboard.js", "text/javascript"),
        ("/dashboard/icon.svg", "image/svg+xml"),
        ("/dashboard/../config.py", ""),
        ("/dashboard/%2e%2e/config.py", ""),
        ("/dashboard/", ""),
    ],
)
def test_only_the_files_of_the_page_are_served(path, kind):
    app = FastAPI(openapi_url=None)
    add_routes(app, None)

    async def fetched() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            return await client.get(path)

    reply = asyncio.run(fetched())
    assert reply.status_code == (200 if kind else 404)
    if kind:
        assert reply.headers["content-type"].startswith(kind)
        assert reply.headers["content-security-policy"] == CONTENT_POLICY
        assert "unsafe" not in CONTENT_POLICY


# -- the page in a browser ---------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium():
    pytest.importorskip("websockets", reason="drives Chromium: pip install websockets")
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        pytest.skip("no Chromium on the PATH")
    try:
        browser = shots.Chromium()
    except (OSError, TimeoutError) as exc:
        pytest.skip(f"Chromium does not start here: {type(exc).__name__}")
    yield browser
    browser.close()


class Served:
    """The page on a server whose status a test may change."""

    def __init__(self) -> None:
        self.status = shots.sample_status()
        self.server = shots.PageServer(lambda: self.status)

    def restart(self) -> None:
        port = self.server.port
        self.server = shots.PageServer(lambda: self.status, port=port)


@pytest.fixture
def served():
    found = Served()
    yield found
    found.server.stop()


@pytest.fixture
def page(chromium, served):
    """Open the page, give it the key, wait for figures."""
    chromium.size(1180, 900)
    chromium.open(served.server.url)
    chromium.events.clear()
    if chromium.value("!document.getElementById('enter').hidden"):
        chromium.enter_key()
    chromium.until("document.querySelectorAll('#sites tr').length >= 1")
    return chromium


def shown(page, element: str) -> str:
    return str(page.value(f"document.getElementById('{element}').innerText"))


def test_page_shows_the_figures_without_an_error_or_a_foreign_request(page, served):
    assert shown(page, "name") == "Chest X-ray consortium"
    assert shown(page, "t-sites") == "4 of 5"
    assert shown(page, "state") == "Ready"
    assert page.value("document.querySelectorAll('#queries rect').length") == 60
    for element, words in (
        ("sites", "Nordklinikum"),
        ("mix", "secagg"),
        ("epsilon", "0.39 of 3"),
        ("rewards", "Lakeside"),
        ("models", "pneumonia-triage"),
        ("errors", "FI402"),
        ("receipts", "256 rows"),
    ):
        assert words in shown(page, element), element
    assert page.errors() == []
    assert all(url.startswith(served.server.url) for url in page.requests())


def test_key_is_in_no_address_and_in_no_lasting_store(page, served):
    assert page.value("Object.keys(localStorage).length") == 0
    assert page.value("document.cookie") == ""
    assert page.value("location.search + location.hash") == ""
    assert not any("?" in path for path in served.server.paths)
    assert page.value("document.getElementById('key').value") == ""
    page.value("document.getElementById('forget').click()")
    assert page.value("Object.keys(sessionStorage).length") == 0
    assert page.value("document.getElementById('board').hidden") is True


def test_markup_in_names_stays_text(page, served):
    served.status = shots.sample_status()
    for site in served.status["sites"]:
        site["name"] = HOSTILE
    served.status["errors"][0] |= {"message": HOSTILE, "code": HOSTILE, "job_id": HOSTILE}
    served.status["epsilon"][0] |= {"site": HOSTILE, "querier": HOSTILE}
    served.status["rewards"][0]["site"] = HOSTILE
    served.status["protections"] = {HOSTILE: 3}
    served.status["models"][0] |= {"id": HOSTILE, "protection": HOSTILE, "rule": HOSTILE}
    served.status["receipts"][0] |= {"sites": [HOSTILE], "job_id": HOSTILE}
    page.until("document.getElementById('sites').innerText.includes('onerror')")
    assert page.value("document.images.length + document.querySelectorAll('img').length") == 0
    assert page.value("document.title") != "owned"
    assert page.errors() == []


@pytest.mark.parametrize(
    "status",
    [
        {},
        {"gateway": None, "sites": "no", "epsilon": [None, 3], "queries_a_minute": ["x", None]},
        {"sites": [{"name": 7, "latency_s": "fast", "answers": -1}], "protections": {"a": "b"}},
    ],
    ids=["empty", "other types", "odd values"],
)
def test_status_of_another_shape_breaks_nothing(page, served, status):
    served.status = status
    page.until("document.getElementById('t-sites').innerText !== '4 of 5'")
    assert page.errors() == []


def test_budgets_without_a_known_cap_show_what_was_spent(page, served):
    served.status["epsilon"] = [entry | {"cap": None} for entry in served.status["epsilon"]]
    page.until("document.getElementById('t-eps-name').innerText.includes('spent')")
    assert shown(page, "t-eps") == "2.61"
    assert "2.61 spent" in shown(page, "epsilon")
    assert page.errors() == []


def test_gateway_that_is_not_ready_says_why(page, served):
    served.status["gateway"] |= {"ready": False, "why": "the SuperLink is not reachable"}
    page.until("document.getElementById('state').innerText === 'Not ready'")
    assert "SuperLink" in shown(page, "banner")


def test_old_figures_are_shown_as_old_and_come_back_after_a_restart(page, served):
    served.server.stop()
    page.until("document.getElementById('board').classList.contains('stale')", timeout_s=20.0)
    assert "old" in shown(page, "banner")
    assert shown(page, "t-sites") == "4 of 5"
    served.status["sites"][4]["online"] = True
    served.restart()
    page.until("document.getElementById('t-sites').innerText === '5 of 5'", timeout_s=20.0)
    assert page.value("document.getElementById('board').classList.contains('stale')") is False


def test_reply_that_is_no_json_makes_the_figures_old_not_the_page(page, served):
    served.status = Response(b"<html>", media_type="text/html")
    page.until("document.getElementById('banner').innerText.includes('read')", timeout_s=20.0)
    assert shown(page, "t-sites") == "4 of 5"


def test_wrong_key_is_asked_for_again(page, served):
    page.value("document.getElementById('forget').click()")
    page.enter_key("fik_00000000_wrong")
    page.until("document.getElementById('key-error').innerText.includes('does not know')")
    assert page.value("document.getElementById('board').hidden") is True
    assert page.value("Object.keys(sessionStorage).length") == 0


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1180])
def test_page_fits_its_width(page, served, width, dark):
    served.status["sites"][0]["name"] = "Klinik" * 20
    page.until("document.getElementById('sites').innerText.includes('KlinikKlinik')")
    page.size(width, 800, dark=dark, phone=width < 500)
    assert page.value("document.documentElement.scrollWidth") <= width
    outside = (
        "[...document.querySelectorAll('main *')].filter(e => e.offsetParent"
        f" && e.getBoundingClientRect().right > {width} + 0.5 && !e.closest('.cut')).length"
    )
    assert page.value(outside) == 0


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_has_contrast(page, dark):
    page.size(1180, 900, dark=dark)
    page.value(_CONTRAST)
    # 4.5 : 1 is what WCAG 2 asks of text, level AA.
    assert page.value("lowContrast()") == []


def test_every_control_and_chart_has_a_name(page):
    assert page.value("[...document.querySelectorAll('svg[role=img]')].every(s => s.ariaLabel)")
    assert page.value("[...document.querySelectorAll('input')].every(i => i.labels.length)")
    assert page.value(
        "[...document.querySelectorAll('section')].every(s => s.ariaLabelledByElements"
        " ? s.ariaLabelledByElements.length : s.hasAttribute('aria-labelledby'))"
    )
    assert page.value("document.documentElement.lang") == "en"


_CONTRAST = """
window.lowContrast = () => {
  const rgb = (s) => s.match(/[\\d.]+/g).map(Number);
  const lum = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const back = (e) => {
    for (; e; e = e.parentElement) {
      const found = rgb(getComputedStyle(e).backgroundColor);
      if (found.length < 4 || found[3] > 0) return found;
    }
    return [255, 255, 255];
  };
  const low = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.offsetParent) continue;
    const a = lum(rgb(getComputedStyle(e).color)), b = lum(back(e));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push(`${e.tagName} ${e.className} ${ratio.toFixed(2)}`);
  }
  return low;
};
"""
