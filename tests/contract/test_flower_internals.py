"""Flower's internals: which are used, that they are as known, and that nobody else uses any."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fedinfer_flower
from fedinfer_flower import flower_internals
from fedinfer_flower.errors import DeploymentError
from fedinfer_flower.flower_internals import guard, require_flower, shorten_pull_backoff

PACKAGE = Path(fedinfer_flower.__file__).parent

PUBLIC = {
    *("flwr.app", "flwr.clientapp", "flwr.clientapp.typing", "flwr.serverapp"),
    *("flwr.serverapp.strategy", "flwr.simulation", "flwr.client"),
}
"""Modules of Flower that its documentation tells users to import from."""
TOLERATED = {("flwr.common.constant", "ErrorCode")}
"""Undocumented, but the meaning of numbers that travel: no signature that could change."""


def imports_of_flower(path: Path) -> set[tuple[str, str]]:
    """Return (module, name) of all that a file imports from Flower, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.module or "", alias.name) for alias in node.names}
    return {(module, name) for module, name in found if module.split(".")[0] == "flwr"}


OURS = sorted(PACKAGE.rglob("*.py"))
OTHERS = [path for path in OURS if "flower_internals" not in path.parts]


def test_no_other_module_uses_internals_of_flower():
    private = {
        str(path.relative_to(PACKAGE)): used
        for path in OTHERS
        if (
            used := {
                (module, name)
                for module, name in imports_of_flower(path)
                if module not in PUBLIC and (module, name) not in TOLERATED
            }
        )
    }
    assert not private, "import them in fedinfer_flower/flower_internals, and list them in guard.py"


def test_every_internal_function_that_is_imported_is_guarded():
    # Generated protobuf classes and public modules have no signature to compare.
    guarded = {(i.module, i.name.split(".")[0]) for i in guard.INTERNALS}
    modules = {i.module for i in guard.INTERNALS}
    unguarded = {
        (module, name)
        for path in OURS
        if "flower_internals" in path.parts
        for module, name in imports_of_flower(path)
        if module not in PUBLIC and not module.startswith("flwr.proto.")
        if (module, name) not in guarded | TOLERATED
        if module not in modules or name
        if f"{module}.{name}" not in modules
    }
    assert unguarded <= {
        # A module whose functions are guarded under its full name, and plain constructors.
        ("flwr.supernode.nodestate", "NodeStateFactory"),
        ("flwr.supercore.exit", "add_exit_handler"),
        ("flwr.supercore.inflatable.inflatable_protobuf_utils", "make_pull_object_fn_protobuf"),
        (
            "flwr.supercore.inflatable.inflatable_protobuf_utils",
            "make_confirm_message_received_fn_protobuf",
        ),
    }


def test_installed_flower_is_as_known():
    require_flower()


@pytest.mark.parametrize("internal", guard.INTERNALS, ids=lambda i: f"{i.module}.{i.name}")
def test_internal_is_as_known(internal):
    assert internal.problem() == ""


@pytest.mark.parametrize("other", ["1.40.2", "1.42.0", "2.0"])
def test_other_version_is_refused_with_what_to_do(monkeypatch, other):
    monkeypatch.setattr(guard, "version", lambda name: other)
    with pytest.raises(DeploymentError) as caught:
        require_flower()
    assert caught.value.message == f"the warm path knows Flower 1.41, this is {other}"
    assert "fedinfer site up --stock" in caught.value.hint


def test_patch_release_is_accepted(monkeypatch):
    monkeypatch.setattr(guard, "version", lambda name: "1.41.7")
    require_flower()


@pytest.mark.parametrize(
    ("internal", "words"),
    [
        (guard.Internal(module="flwr.gone", name="x"), "flwr.gone cannot be imported"),
        (guard.Internal(module="flwr.app", name="Gone"), "flwr.app.Gone is not there"),
        (
            guard.Internal(
                module="flwr.cli.install", name="install_from_fab", parameters=("other",)
            ),
            "flwr.cli.install.install_from_fab takes other parameters",
        ),
    ],
    ids=["module", "name", "signature"],
)
def test_changed_internal_is_refused_by_name(monkeypatch, internal, words):
    monkeypatch.setattr(guard, "INTERNALS", (internal,))
    with pytest.raises(DeploymentError, match=words):
        require_flower()


def test_pull_backoff_is_shortened_for_good_and_nothing_else():
    from flwr.supercore.inflatable import inflatable_utils

    functions = (
        inflatable_utils.pull_objects,
        inflatable_utils.pull_and_inflate_object_from_tree,
    )
    before = [dict(function.__kwdefaults__) for function in functions]
    try:
        shorten_pull_backoff(initial_s=0.5, cap_s=0.75)
        for function, was in zip(functions, before, strict=True):
            changed = {"initial_backoff": 0.5, "backoff_cap": 0.75, "max_tries_per_object": None}
            assert function.__kwdefaults__ == was | changed
    finally:
        for function, was in zip(functions, before, strict=True):
            function.__kwdefaults__.update(was)


def test_heartbeats_are_as_often_as_a_superlink_accepts(monkeypatch):
    from flwr.common.constant import HEARTBEAT_MIN_INTERVAL
    from flwr.supercore import heartbeat
    from flwr.supernode import fleet_http_connection

    from fedinfer_flower.flower_internals.beating import beat_often

    modules = (heartbeat, fleet_http_connection)
    for module in modules:
        monkeypatch.setattr(module, "HEARTBEAT_DEFAULT_INTERVAL", 30)
    beat_often()
    assert {m.HEARTBEAT_DEFAULT_INTERVAL for m in modules} == {HEARTBEAT_MIN_INTERVAL}


def test_importing_the_guard_loads_no_flower():
    code = "import fedinfer_flower.flower_internals, sys; sys.stdout.write(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "flwr" not in done.stdout.split()
    assert flower_internals.KNOWN_FLOWER == (1, 41)
