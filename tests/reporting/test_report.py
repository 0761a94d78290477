import re
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from fedinfer_flower.errors import InvalidValueError, MissingExtraError
from fedinfer_flower.reporting import write_report
from fedinfer_flower.reporting.answer import LIMITS

HOSTILE = '<script>alert("x")</script>'
SECTIONS = [
    "accuracy",
    "sites",
    "rules",
    "protections",
    "who-learns",
    "by-epsilon",
    "epsilon-meter",
    "reliability",
    "examples",
    "configuration",
    "warnings",
]
VOID = {"meta", "br", "img", "link", "input", "hr", "base"}


class Page(HTMLParser):
    """Collects tags, ids, attributes and what stays open."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.attributes, self.open = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def page_of(results, tmp_path):
    return write_report(results, tmp_path / "report.html").read_text(encoding="utf-8")


def test_write_report_returns_path_and_makes_folders(results, tmp_path):
    path = tmp_path / "a" / "b" / "report.html"
    assert write_report(results, path) == path
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_write_report_shows_sections_in_order(page):
    assert re.findall(r'<h2 id="([\w-]+)"', page) == SECTIONS
    assert page.index('class="answer"') < page.index("<h2")


def test_write_report_loads_nothing(page):
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert "http://" not in without_namespaces
    assert "https://" not in without_namespaces
    assert not re.search(r"<(script|link|iframe|base|object)|@import|@font-face", page)
    for target in re.findall(r'(?:href|src)="([^"]*)"', page) + re.findall(r"url\(([^)]*)\)", page):
        assert target.startswith(("#", "data:"))


def test_write_report_is_well_formed_with_unique_ids_and_live_references(page):
    page = Page(page)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    text = " ".join(value or "" for _, value in page.attributes)
    used = set(re.findall(r"url\(#([^)]*)\)", text))
    used |= {v[1:] for n, v in page.attributes if n.endswith("href") and v.startswith("#")}
    assert used <= set(page.ids)


def test_write_report_draws_every_figure_as_valid_xml(page):
    svgs = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len([svg for svg in svgs if "xmlns" in svg]) == 7
    for svg in svgs:
        ET.fromstring(svg)  # noqa: S314 - made by this test


@pytest.mark.parametrize(
    "hostile", [HOSTILE, "]]><b>", "--><img src=x>", '" onload="x', "{{ 7*7 }}"]
)
def test_write_report_escapes_every_string(results, tmp_path, hostile):
    def poison(value):
        if isinstance(value, dict):
            return {k: poison(v) for k, v in value.items()}
        if isinstance(value, list):
            return [poison(v) for v in value]
        return hostile if isinstance(value, str) else value

    poisoned = poison(results)
    poisoned["versions"] = {hostile: hostile}
    poisoned["by_alpha"][0]["rules"] = {hostile: 0.5}
    poisoned["epsilon_meter"]["cap"] = 1.0
    page = page_of(poisoned, tmp_path)
    parsed = Page(page)
    assert not {"script", "img"} & set(parsed.tags)
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert "49" not in re.findall(r"<h1>(.*)</h1>", page)[0]


def test_write_report_script_site_name_is_text_in_page_and_in_svg(results, tmp_path):
    results["sites"][0]["name"] = HOSTILE
    page = page_of(results, tmp_path)
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert "<script" not in page
    assert "&lt;script&gt;" in drawn
    assert "&lt;script&gt;" in page.replace(drawn, "")


@pytest.mark.parametrize("name", [r"$\frac{1$", "日本 病院", "a\x00b\ud800\u202ec", "", "x" * 500])
def test_write_report_odd_site_name_is_drawn(results, tmp_path, name):
    results["sites"][0]["name"] = name
    page = page_of(results, tmp_path)
    assert not re.search("[\x00\u202e]", page)


def test_write_report_states_limits_and_visibility(page):
    assert LIMITS in page
    assert "Under this protection the coordinator sees: ciphertexts." in page
    assert "held the secret key" not in page


def test_write_report_key_at_coordinator_is_said(results, tmp_path):
    results["protections"][1]["key_at_coordinator"] = True
    assert "held the secret key" in page_of(results, tmp_path)


def test_write_report_marks_rules_of_fedsei_only(page):
    assert "majority-vote †" in page
    assert "median †" not in page


def test_write_report_epsilons_per_query_and_total(page):
    assert '<td class="n">0.5</td><td class="n">50</td><td class="n">1e-06</td>' in page
    assert '<td class="n">-</td><td class="n">-</td><td class="n">-</td>' in page
    assert "grows with each further query" in page


def test_write_report_empty_lists_keep_sections(empty, tmp_path):
    page = page_of(empty, tmp_path)
    assert re.findall(r'<h2 id="([\w-]+)"', page) == SECTIONS
    assert "The protection he was not measured in this run." in page
    assert LIMITS in page


def test_write_report_single_site_says_so(single, tmp_path):
    page = page_of(single, tmp_path)
    assert "Together, 1 site answered" in page
    assert "With a single site, the joint answer is that site&#39;s own." in page


def test_write_report_many_sites_and_classes_draws_the_first(results, tmp_path):
    results["sites"] = [
        {**results["sites"][0], "name": f"site-{i:03d}", "class_counts": [i] * 40}
        for i in range(60)
    ]
    results["classes"] = [f"class-{i}" for i in range(50)]
    page = page_of(results, tmp_path)
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert "site-039" in drawn
    assert "site-040" not in drawn
    assert "The first 40 sites are drawn." in page


@pytest.mark.parametrize("value", [0.0, None])
def test_write_report_cost_without_logarithm_is_drawn(results, tmp_path, value):
    for entry in results["protections"]:
        entry["seconds"] = entry["bytes_per_query"] = value
    page_of(results, tmp_path)


def test_write_report_missing_key_is_named(results, tmp_path):
    del results["rules"]
    with pytest.raises(InvalidValueError, match="lack rules"):
        page_of(results, tmp_path)


@pytest.mark.parametrize("module", ["jinja2", "matplotlib"])
def test_write_report_without_extra_names_it(results, tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"fedinfer-flower\[report\]"):
        page_of(results, tmp_path)


def test_write_report_same_results_same_bytes(results, tmp_path):
    first = write_report(results, tmp_path / "1.html").read_bytes()
    assert write_report(results, tmp_path / "2.html").read_bytes() == first
