"""The documented example and the template are rules that pass all checks."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from fedinfer_flower.ensemble.checks import check_rule

ROOT = Path(__file__).parents[2]
HOW_TO = ROOT / "docs" / "how-to" / "add-a-rule.md"


def example():
    (block,) = re.findall(r"^```python\n(.*?)^```", HOW_TO.read_text(), flags=re.M | re.S)
    return block


def load(path, name, monkeypatch):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_how_to_example_passes_all_checks(tmp_path, monkeypatch, own_registry):
    path = tmp_path / "approval_vote.py"
    path.write_text(example())

    module = load(path, "approval_vote", monkeypatch)

    check_rule(module.ApprovalVote)
    check_rule(module.ApprovalVote, {"share": 1.0})


def test_how_to_example_is_short():
    assert len(example().splitlines()) <= 40


def test_template_passes_all_checks(monkeypatch, own_registry):
    module = load(ROOT / "extension_templates" / "rule.py", "rule_template", monkeypatch)

    check_rule(module.MyRule)
    check_rule(module.MyRule, {"strength": 10.0})


@pytest.mark.parametrize("name", ["approval-vote", "my-rule"])
def test_rules_of_documentation_are_not_left_registered(name):
    from fedinfer_flower.ensemble import RULES

    assert name not in RULES.names()
