"""The documentation keeps up with the code: links, tables, examples, error codes."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from fedinfer_flower.errors import FedInferError
from fedinfer_flower.errors.by_code import _walk
from fedinfer_flower.privacy.legality import legality_matrix

# What other packages deprecate among themselves is no fault of an example.
pytestmark = pytest.mark.filterwarnings("ignore:'click:DeprecationWarning")

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
RUN = re.compile(r"^<!-- run -->\n+```python[^\n]*\n(.*?)^```", flags=re.M | re.S)
WITH_EXAMPLES = [page for page in PAGES if RUN.search(page.read_text())]


def name(page):
    return str(page.relative_to(ROOT))


def without_code(text):
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", "code", text)


def anchors(page):
    """Return the anchors of a page's headings, as common renderers make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    titles = re.findall(r"^#+ +(.+)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_of_page_resolve(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=name)
def test_marked_examples_of_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "documentation"}
    for number, block in enumerate(RUN.findall(page.read_text())):
        exec(compile(block, f"{name(page)}, example {number}", "exec"), namespace)  # noqa: S102


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_run_marker_of_page_has_a_python_block(page):
    text = page.read_text()
    assert len(RUN.findall(text)) == text.count("<!-- run -->")


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=name)
def test_named_sources_and_tests_of_page_exist(page):
    text = page.read_text()
    missing = []
    for path, test in re.findall(r"`((?:tests|fedinfer_flower)/[\w/]+\.py)(?:::(\w+))?`", text):
        source = ROOT / path
        if not source.exists() or (test and f"def {test}(" not in source.read_text()):
            missing.append(f"{path}::{test}")
    package = "|".join(path.name for path in (ROOT / "fedinfer_flower").iterdir() if path.is_dir())
    for path, thing in re.findall(rf"`((?:{package})/[\w/]+\.py)`(?:, `([\w.]+)`)?", text):
        source = ROOT / "fedinfer_flower" / path
        last = thing.rpartition(".")[2]
        if not source.exists() or not re.search(rf"(def|class) {last}\b", source.read_text()):
            missing.append(f"{path} {thing}")
    assert not missing


def test_legality_table_of_how_to_is_that_of_the_code():
    text = (DOCS / "how-to" / "choose-a-rule.md").read_text()
    table = text.partition("<!-- legality -->\n")[2].partition("\n\n")[0].splitlines()
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table]
    protections = rows[0][1:]
    written = {row[0]: dict(zip(protections, row[1:], strict=True)) for row in rows[2:]}
    expected = {
        rule: {protection: "no" if reason else "yes" for protection, reason in cells.items()}
        for rule, cells in legality_matrix().items()
        if not _of_another_test(rule)
    }
    assert written == expected


def _of_another_test(rule):
    from fedinfer_flower.ensemble.base import RULES

    return not RULES.get(rule).__module__.startswith("fedinfer_flower.")


def test_rule_table_of_how_to_names_every_rule():
    text = (DOCS / "how-to" / "choose-a-rule.md").read_text()
    listed = text.partition("## All rules")[2].partition("## Which rule")[0]
    named = set(re.findall(r"^\| `([\w-]+)` \| (?:SUM|SCORES)", listed, flags=re.M))
    assert named == {rule for rule in legality_matrix() if not _of_another_test(rule)}


def test_errors_page_has_every_code_with_its_class():
    text = (DOCS / "reference" / "errors.md").read_text()
    written = dict(re.findall(r"^## (FI\d{3})\n+`(\w+)`", text, flags=re.M))
    assert written == {code: cls.__name__ for code, cls in _walk(FedInferError).items()}


def test_run_config_page_has_every_key_with_its_default():
    import dataclasses
    import json

    from fedinfer_flower.strategies.config import InferConfig

    text = (DOCS / "reference" / "run-config.md").read_text()
    written = dict(re.findall(r"^\| `fedinfer\.([\w-]+)` \| \w+ \| `([^`]+)` \|", text, flags=re.M))
    expected = {
        field.name.replace("_", "-"): json.dumps(field.default)
        for field in dataclasses.fields(InferConfig)
        if field.name != "protection_options"
    }
    assert written == expected


def test_index_links_to_every_page():
    index = (DOCS / "README.md").read_text()
    linked = set(re.findall(r"\]\(([^)#\s]+)\)", index))
    assert {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} - {"README.md"} <= linked


def test_threat_model_has_a_row_and_a_section_for_every_mode():
    from fedinfer_flower.receipts.disclosure import MODES

    text = (DOCS / "explanation" / "threat-model.md").read_text()
    rows = set(re.findall(r"^\| \*\*`([\w+-]+)`\*\*", text, flags=re.M))
    sections = set(re.findall(r"^### `([\w+-]+)`", text, flags=re.M))
    assert rows == sections == set(MODES)


def test_threat_model_has_a_row_for_every_way_that_language_models_help():
    from fedinfer_flower.strategies.refine_options import CONSENTS
    from fedinfer_flower.wire.refine_fields import HOSTS, MEDIA

    text = (DOCS / "explanation" / "threat-model.md").read_text()
    section = text.partition("## Language models\n")[2].partition("\n## ")[0]
    rows = set(re.findall(r"^\| \*\*([a-z -]+)\*\* \|", section, flags=re.M))
    assert set(MEDIA) == set(CONSENTS)
    assert rows == {"own", *MEDIA, *(f"fusers at the {h}" for h in HOSTS if h != "receiver")}


def test_policy_table_of_refine_page_names_fields_with_their_defaults():
    from fedinfer_flower.clients.language_policy import LanguagePolicy

    defaults = {f.name: f.default for f in dataclasses.fields(LanguagePolicy)}
    text = (DOCS / "how-to" / "refine.md").read_text()
    table = text.partition("| `LanguagePolicy` |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (`[^|]+`)[^|]* \| ([^|]*) \|", table, flags=re.M)
    words = {"on": True, "off": False, "1": 1}
    named = {n: default for cell, default in rows for n in re.findall(r"`(\w+)`", cell)}
    assert named.keys() <= defaults.keys()
    assert {n: words[d] for n, d in named.items() if d} == {
        n: defaults[n] for n, d in named.items() if d
    }
    # Every switch is in the table: a site shares by them.
    assert {n for n, default in defaults.items() if type(default) is bool} <= named.keys()


def test_wire_format_page_names_every_action():
    from fedinfer_flower.wire.actions import ACTIONS, LANGUAGE_ACTIONS, message_type

    text = (DOCS / "reference" / "wire-format.md").read_text()
    for action in (*ACTIONS, *LANGUAGE_ACTIONS):
        assert f"`{message_type(action)}`" in text, action


def test_protection_tables_name_every_protection():
    from fedinfer_flower.privacy.base import PROTECTIONS

    ours = {
        name
        for name in PROTECTIONS.names()
        if PROTECTIONS.get(name).__module__.startswith("fedinfer_flower.")
    }
    readme = (ROOT / "README.md").read_text().partition("## Which protection")[2]
    assert ours <= set(re.findall(r"^\| `([\w+-]+)`", readme, flags=re.M))
    text = (DOCS / "how-to" / "choose-a-protection.md").read_text().partition("## Side by side")[2]
    header = next(line for line in text.splitlines() if line.startswith("|"))
    assert set(re.findall(r"`([\w+-]+)`", header)) == ours


def test_command_line_page_names_every_command():
    import typer

    from fedinfer_flower.cli.main import app

    def paths(group, words):
        for name, command in sorted(group.commands.items()):
            if hasattr(command, "commands"):
                yield from paths(command, [*words, name])
            else:
                yield " ".join([*words, name])

    text = (DOCS / "reference" / "command-line.md").read_text()
    listed = re.findall(r"^\| `(fedinfer [a-z ]+)` \|", text, flags=re.M)
    assert sorted(listed) == sorted(paths(typer.main.get_command(app), ["fedinfer"]))


def test_querier_ask_options_of_command_line_page_are_those_of_the_command():
    import typer

    from fedinfer_flower.cli.main import app

    ask = typer.main.get_command(app).commands["querier"].commands["ask"]
    options = {option for parameter in ask.params for option in parameter.opts}
    text = (DOCS / "reference" / "command-line.md").read_text()
    table = text.partition("## `fedinfer querier ask`")[2].partition("\n\nHow")[0]
    cells = re.findall(r"^\| (`--[^|]+) \|", table, flags=re.M)
    assert {o for cell in cells for o in re.findall(r"`(--[\w-]+)`", cell)} == options


def test_gate_and_selector_tables_of_how_to_are_those_of_the_code():
    from fedinfer_flower.selection import SELECTORS
    from fedinfer_flower.selection.gates import GATES

    text = (DOCS / "how-to" / "choose-collaborators.md").read_text()
    gates = text.partition("## Gates\n")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `([\w-]+)` \| ([^|]*) \|", gates, flags=re.M))
    named = {gate: set(re.findall(r"`(\w+)`", cell)) for gate, cell in rows.items()}
    assert named == {
        name: {field.name for field in dataclasses.fields(GATES.get(name))}
        for name in GATES.names()
    }
    selectors = text.partition("## Selectors\n")[2].partition("\n\nWithout what")[0]
    cells = re.findall(r"^\| (`[^|]+) \|", selectors, flags=re.M)
    assert {n for cell in cells for n in re.findall(r"`([\w-]+)`", cell)} == {
        name
        for name in SELECTORS.names()
        if SELECTORS.get(name).__module__.startswith("fedinfer_flower.")
    }


def _options_of_page(page, heading):
    """Return option names and defaults by name, of the table under a heading."""
    text = (DOCS / "reference" / page).read_text().partition(f"\n## {heading}\n")[2]
    table = text.partition("\n## ")[0]
    rows = re.findall(r"^\| `([\w-]+)` \|(.*)$", table, flags=re.M)
    return {name: dict(re.findall(r"`(\w+)=([^`]+)`", cells)) for name, cells in rows}


def _options_of_registry(registry):
    ours = [n for n in registry.names() if registry.get(n).__module__.startswith("fedinfer_")]
    return {
        name: {f.name: json.dumps(f.default) for f in dataclasses.fields(registry.get(name))}
        for name in ours
    }


@pytest.mark.parametrize(
    ("page", "heading"),
    [
        ("selectors.md", "Selectors"),
        ("selectors.md", "Gates"),
        ("schemes.md", "Schemes"),
        ("schemes.md", "Payment rules"),
    ],
)
def test_reference_table_has_every_name_with_its_options(page, heading):
    from fedinfer_flower.incentives.base import SCHEMES
    from fedinfer_flower.incentives.payments.base import PAYMENTS
    from fedinfer_flower.selection.base import SELECTORS
    from fedinfer_flower.selection.gates.base import GATES

    registries = {
        "Selectors": SELECTORS,
        "Gates": GATES,
        "Schemes": SCHEMES,
        "Payment rules": PAYMENTS,
    }
    assert _options_of_page(page, heading) == _options_of_registry(registries[heading])
