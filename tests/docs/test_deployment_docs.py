"""What the pages on deployment list, the code has, and the other way round."""

import ast
import dataclasses
import importlib.util
import json
import re
import tomllib
from pathlib import Path

import pytest
import typer

from fedinfer_flower.cli.main import app as commands
from fedinfer_flower.clients.adapters import MODELS
from fedinfer_flower.clients.language_policy import LanguagePolicy
from fedinfer_flower.clients.policy import SitePolicy
from fedinfer_flower.clients.policy_kinds import ACTION_VERBS, KINDS
from fedinfer_flower.clients.policy_language import LanguageRules
from fedinfer_flower.clients.policy_tables import (
    AnswerRules,
    AuditRules,
    CodeRules,
    LimitRules,
    ModelRules,
    SiteRules,
)
from fedinfer_flower.errors import FedInferError
from fedinfer_flower.errors.by_code import _walk
from fedinfer_flower.observability.metrics import GatewayMetrics
from fedinfer_flower.privacy.site_budget import BudgetPolicy
from fedinfer_flower.serving.auth import SCOPES
from fedinfer_flower.serving.config import (
    BatchingConfig,
    GatewayConfig,
    LimitsConfig,
    ModelConfig,
)
from fedinfer_flower.serving.http_app import create_app
from fedinfer_flower.serving.key_store import KeyStore
from fedinfer_flower.serving.problem import status_of

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def section(page, heading):
    """Return the text under a heading of a page, up to the next one of its level."""
    text = "\n" + (DOCS / page).read_text()
    level = heading.split(" ")[0]
    found = text.partition(f"\n{heading}\n")[2]
    assert found, f"{page} has no {heading!r}"
    return re.split(rf"^#{{1,{len(level)}}} ", found, maxsplit=1, flags=re.M)[0]


def rows_of(text):
    """Return the cells of every row of the tables in a text whose first cell is one name."""
    lines = [line for line in text.splitlines() if re.match(r"\| `[^`]+` \|", line)]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def settings_of(text):
    """Return key -> default of a table, None where there is none."""
    found = {}
    for name, default, *_ in rows_of(text):
        assert default in ("required", "none") or re.fullmatch(r"`[^`]+`", default), name
        found[name.strip("`")] = (
            default
            if default == "required"
            else None
            if default == "none"
            else json.loads(default[1:-1])
        )
    return found


def fields_of(*classes, without=()):
    """Return key -> default of dataclasses as JSON would have it, None where there is none."""
    found = {}
    for field in (f for cls in classes for f in dataclasses.fields(cls)):
        if field.name in without:
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if default is dataclasses.MISSING:
            default = "required"
        if isinstance(default, tuple):
            default = list(default)
        found[field.name.replace("_", "-")] = str(default) if isinstance(default, Path) else default
    return found


@pytest.mark.parametrize(
    ("table", "classes", "without"),
    [
        ("site", [SiteRules], ()),
        ("model", [ModelRules], ()),
        ("answers", [AnswerRules], ()),
        ("budget", [BudgetPolicy], ()),
        ("limits", [LimitRules], ()),
        ("language", [LanguageRules, LanguagePolicy], ("policy", "says_answers")),
        ("code", [CodeRules], ()),
        ("audit", [AuditRules], ()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_site_policy_page_has_every_key_with_its_default(table, classes, without):
    text = section("reference/site-policy.md", f"### `[{table}]`")
    rows = [row for row in rows_of(text) if row[0].strip("`") not in KINDS or table == "language"]
    written = settings_of("\n".join("| " + " | ".join(row) + " |" for row in rows))
    assert written == fields_of(*classes, without=without)


def test_site_policy_page_has_every_table():
    text = (DOCS / "reference" / "site-policy.md").read_text()
    headings = re.findall(r"^### (.+)$", text, flags=re.M)
    named = {name for line in headings for name in re.findall(r"`\[(\w+)\]`", line)}
    assert named == {f.name for f in dataclasses.fields(SitePolicy)} - {"digest"}


def test_site_policy_page_names_every_action_and_kind():
    text = section("reference/site-policy.md", "### `[answers]`")
    assert set(KINDS) <= set(re.findall(r"`([\w-]+)`", text))
    rows = {row[0].strip("`"): row for row in rows_of(text)}
    also = rows["actions"][3].partition("also ")[2]
    default = json.loads(rows["actions"][1].strip("`"))
    assert sorted([*default, *re.findall(r"[\w-]+", also)]) == sorted(ACTION_VERBS)


@pytest.mark.parametrize(
    ("table", "cls", "without"),
    [
        ("gateway", GatewayConfig, ("limits", "batching", "models")),
        ("limits", LimitsConfig, ()),
        ("batching", BatchingConfig, ()),
        ("models.NAME", ModelConfig, ()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_gateway_page_has_every_key_with_its_default(table, cls, without):
    written = settings_of(section("reference/gateway-config.md", f"## `[{table}]`"))
    assert written == fields_of(cls, without=without)


def test_every_setting_file_in_the_documentation_can_be_read(tmp_path):
    n_read = 0
    for page in PAGES:
        for block in re.findall(r"^```toml\n(.*?)^```", page.read_text(), flags=re.M | re.S):
            # A key id that the reader has to fill in.
            given = tomllib.loads(re.sub(r'"<key id[^"]*>"', f'"{"ab" * 32}"', block))
            if "models" in given:
                GatewayConfig.from_mapping(given, folder=tmp_path)
            elif "model" in given or "site" in given:
                given.setdefault("site", {"name": "north", "home": "home"})
                given.setdefault("answers", {"protections": ["secagg"], "anyone": True})
                if given["answers"].get("anyone"):
                    given["model"].setdefault("digest", "")
                _without_dots(given["model"])
                SitePolicy.from_mapping(given, folder=tmp_path)
            else:
                continue
            n_read += 1
    assert n_read >= 8


def _without_dots(model):
    options = model.get("options", {})
    known = MODELS.get(model["kind"]) if "kind" in model else None
    if known is not None:
        names = {f.name.replace("_", "-") for f in dataclasses.fields(known)}
        assert set(options) <= names, model["kind"]


def _board_routes(tmp_path):
    tmp_path.chmod(0o700)
    config = GatewayConfig.from_mapping({"models": {"wine": {}}})
    store = KeyStore(tmp_path / "keys.db")
    try:
        return create_app(object(), config, keys=store).routes
    finally:
        store.close()


def test_http_page_has_every_route(tmp_path):
    text = section("reference/http-api.md", "## Routes")
    written = {re.sub(r"\?.*", "", row[0].strip("`")) for row in rows_of(text)}
    routes = {
        f"{method} {route.path}"
        for route in _board_routes(tmp_path)
        for method in route.methods - {"HEAD"}
        if not route.path.startswith("/dashboard/")
    }
    assert written == routes


def test_http_page_has_every_scope():
    text = section("reference/http-api.md", "## Keys")
    assert {row[0].strip("`") for row in rows_of(text)} == set(SCOPES)


def test_http_page_gives_each_error_its_status():
    text = section("reference/http-api.md", "## Errors")
    table = re.findall(r"^\| ([\d, ]+) \| (.*) \|$", text, flags=re.M)
    classes = _walk(FedInferError)
    n_checked = 0
    for statuses, words in table:
        for code in re.findall(r"FI\d{3}", words.partition(" 404 for ")[0]):
            if code in classes and code != "FI000":  # which stands for any other exception
                n_checked += 1
                assert str(status_of(classes[code]("words"))) in statuses, code
    assert n_checked > 15


def test_observe_page_has_every_metric_with_its_labels():
    if importlib.util.find_spec("prometheus_client") is None:
        pytest.skip("prometheus_client is not installed")
    metrics = GatewayMetrics()
    text = section("how-to/observe.md", "## Metrics")
    written = {
        row[0].strip("`").removesuffix("_total"): re.findall(r"`(\w+)`", row[1])
        for row in rows_of(text)
    }
    made = {
        metric._metric._name: list(metric._metric._labelnames)
        for metric in vars(metrics).values()
        if hasattr(metric, "_metric")
    }
    assert written == made


def test_audit_page_has_every_event():
    text = (DOCS / "how-to" / "read-the-audit-log.md").read_text()
    table = text.partition("| event | written by |")[2].partition("\n\n")[0]
    cells = re.findall(r"^ *\| ([^|]+) \|", table, flags=re.M)
    written = {name for cell in cells for name in re.findall(r"`([\w-]+)`", cell)}
    assert written == _events()


def _events():
    """Return the events that the package writes: the first text in calls of its writers."""
    found = set()
    for path in (ROOT / "fedinfer_flower").rglob("*.py"):
        source = path.read_text()
        if "AuditLog" not in source and path.name != "audit_log.py":
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and _writes_down(node):
                texts = [a.value for a in node.args if isinstance(a, ast.Constant)]
                found |= {text for text in texts[:1] if isinstance(text, str)}
    from fedinfer_flower.serving.endings import _EVENTS

    return found | set(_EVENTS.values())


def _writes_down(call):
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name == "append":
        return "audit" in ast.unparse(call.func.value).lower()
    return name in ("_enter", "_write_down", "_note", "_write")


@pytest.mark.parametrize("words", ["site up", "serve", "query"])
def test_command_line_page_has_every_option(words):
    command = typer.main.get_command(commands)
    for word in words.split():
        command = command.commands[word]
    options = {
        option
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
        if option.startswith("--")
    }
    text = section("reference/command-line.md", f"## `fedinfer {words}`")
    cells = re.findall(r"^\| (`--[^|]+) \|", text, flags=re.M)
    assert {o for cell in cells for o in re.findall(r"`(--[\w-]+)`", cell)} == options


def test_pages_use_commands_and_options_that_exist():
    root = typer.main.get_command(commands)
    wrong = []
    for page in PAGES:
        for block in re.findall(
            r"^ *```(?:bash|console)\n(.*?)^ *```", page.read_text(), flags=re.M | re.S
        ):
            for line in block.replace("\\\n", " ").splitlines():
                if found := re.search(
                    r"(?:^|(?<!--owner)[ (]|/bin/)fedinfer((?: +[^#|;&()]+)*)", line.split(" # ")[0]
                ):
                    wrong += _unknown(root, found[1].split(), page)
    assert not wrong


def _unknown(command, words, page):
    given = list(words)
    while given and hasattr(command, "commands"):
        name = given.pop(0)
        if name not in command.commands:
            return [] if name.startswith(("-", "X", "COMMAND")) else [f"{page.name}: {name}"]
        command = command.commands[name]
    known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
    used = {word.partition("=")[0] for word in given if word.startswith("--")}
    return [f"{page.name}: {option}" for option in sorted(used - known - {"--help"})]
