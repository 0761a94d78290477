"""Which module may know which: the layers, the light import, and what no module may use."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fedinfer_flower
from fedinfer_flower import errors
from fedinfer_flower.errors import FedInferError

PACKAGE = Path(fedinfer_flower.__file__).parent
ROOT = PACKAGE.parent
MODULES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(PACKAGE)) for path in MODULES]
HEAVY = (
    *("torch", "tenseal", "sklearn", "matplotlib", "ray", "scipy", "datasets", "flwr_datasets"),
    *("opacus", "spu", "jax", "transformers", "tokenizers", "safetensors"),
    *("sqlalchemy", "alembic", "psycopg", "pydvl"),
    *("onnxruntime", "opentelemetry", "prometheus_client", "openai"),
)
TORCH_PARTS = ("kv", "language", "refine")
"""Parts that are networks through and through: nothing but themselves loads them at import."""
LIGHT_KV = (
    "planner",
    "handles",
    "share",
    "latency",
    "link",
    "media",
    "media_history",
    "sharing_policy",
)

ERRORS_PAGE = ROOT / "docs" / "reference" / "errors.md"


def tree(name: str) -> ast.Module:
    return ast.parse((PACKAGE / name).read_text(encoding="utf-8"))


def imported(name: str, *, at_top_only: bool = False) -> set[str]:
    """Return all modules that a file imports, wherever in it, as dotted names."""
    found = set()
    for node in tree(name).body if at_top_only else ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            found |= {node.module or ""} | {f"{node.module}.{a.name}" for a in node.names}
    return found


def ours(name: str) -> set[str]:
    """Return which parts of the package a file imports: ``wire``, ``errors``, ..."""
    parts = {tuple(module.split(".")) for module in imported(name)}
    return {path[1] for path in parts if path[0] == "fedinfer_flower" and len(path) > 1}


def in_part(name: str) -> str:
    return name.split("/", maxsplit=1)[0].removesuffix(".py")


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- what is loaded ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "import fedinfer_flower",
        "from fedinfer_flower import *",
        "import fedinfer_flower.strategies, fedinfer_flower.clients, fedinfer_flower.querier",
        "from fedinfer_flower.privacy import legality_matrix; legality_matrix()",
    ],
)
def test_import_loads_no_heavy_module(statement):
    out = run_python(f"{statement}\nimport sys\nsys.stdout.write(' '.join(sys.modules))")
    loaded = {name.split(".")[0] for name in out.split()}
    assert "fedinfer_flower" in loaded
    # flwr loads what it needs itself: only what it does not load counts as ours.
    flwr = run_python(
        "import flwr.serverapp, flwr.clientapp, sys; sys.stdout.write(' '.join(sys.modules))"
    )
    assert not loaded & set(HEAVY) - {name.split(".")[0] for name in flwr.split()}
    assert not loaded & {"torch", "tenseal", "sklearn", "matplotlib", "ray"}


def test_import_of_the_package_alone_loads_no_flower():
    out = run_python("import fedinfer_flower, sys; sys.stdout.write(' '.join(sys.modules))")
    assert not {"flwr", "numpy"} & set(out.split())


@pytest.mark.parametrize("name", NAMES)
def test_heavy_modules_are_imported_where_they_are_used(name):
    top = {module.split(".")[0] for module in imported(name, at_top_only=True)}
    allowed = {"torch"} if in_part(name) in TORCH_PARTS else set()
    assert not top & set(HEAVY) - allowed


@pytest.mark.parametrize("name", [n for n in NAMES if in_part(n) not in TORCH_PARTS])
def test_parts_that_need_torch_are_imported_where_they_are_used(name):
    top = {tuple(m.split(".")[1:3]) for m in imported(name, at_top_only=True)}
    light = {("kv", part) for part in LIGHT_KV}
    heavy = {path for path in top if path and path[0] in TORCH_PARTS and len(path) > 1}
    assert not heavy - light, f"{name} loads torch when it is imported"


# -- layers ------------------------------------------------------------------------------

ALLOWED = {
    "errors": set(),
    "observability": {"errors", "registry"},
    "flower_internals": {"errors"},
    "supervision": {"errors", "observability"},
    "registry": {"errors"},
    "profile": {"errors"},
    "query": {"errors", "profile"},
    "ensemble": {"errors", "registry", "query"},
    "privacy": {"errors", "registry", "query", "ensemble", "wire"},
    "wire": {"errors", "registry", "query"},
    "receipts": {"errors", "privacy", "wire"},
    "attacks": {
        *("errors", "registry", "query", "ensemble", "privacy", "wire", "clients"),
        *("kv", "language", "refine", "incentives", "settlement", "selection"),
    },
    "training": {"errors", "privacy"},
    "selection": {"errors", "registry", "profile", "query", "ensemble"},
    "incentives": {"errors", "registry", "query", "ensemble", "receipts", "wire"},
    "settlement": {"errors", "registry", "query", "ensemble", "privacy", "wire", "incentives"},
    "uncertainty": {"errors", "registry", "query", "ensemble", "privacy", "wire"},
    "encrypted_query": {"errors", "registry", "query", "ensemble", "privacy", "wire"},
    "split": {"errors", "query", "ensemble", "privacy", "querier", "wire"},
    "planning": {"errors", "registry", "query", "ensemble", "privacy", "wire", "selection"},
    "kv": {"errors", "registry"},
    "language": {"errors", "registry", "kv"},
    "refine": {"errors", "registry", "kv", "language"},
    "clients": {
        *("errors", "registry", "query", "ensemble", "privacy", "wire", "receipts"),
        *("encrypted_query", "mpc", "kv", "language", "refine", "settlement", "uncertainty"),
        *("observability", "flower_internals", "supervision"),
    },
    "querier": {
        *("errors", "registry", "query", "ensemble", "privacy", "wire", "planning"),
        *("encrypted_query", "mpc", "selection", "settlement", "incentives", "uncertainty"),
        *("observability", "receipts"),
    },
    "strategies": {
        *("errors", "registry", "query", "ensemble", "privacy", "wire", "planning", "querier"),
        *("receipts", "encrypted_query", "mpc", "kv"),
        *("profile", "selection", "settlement", "incentives", "uncertainty"),
        "observability",
    },
    "serving": {
        *("errors", "registry", "query", "profile", "wire", "privacy", "ensemble", "planning"),
        *("receipts", "selection", "settlement", "incentives", "uncertainty", "strategies"),
        *("querier", "observability", "flower_internals"),
    },
}


@pytest.mark.parametrize("name", [name for name in NAMES if in_part(name) in ALLOWED])
def test_imports_run_one_way(name):
    part = in_part(name)
    assert ours(name) <= ALLOWED[part] | {part}


@pytest.mark.parametrize("name", [n for n in NAMES if in_part(n) == "strategies"])
def test_querier_is_known_to_one_module_of_the_coordinator(name):
    assert ("querier" in ours(name)) == (name == "strategies/opening.py")


@pytest.mark.parametrize("name", [n for n in NAMES if in_part(n) in {"ensemble", "privacy"}])
def test_maths_knows_nothing_of_flower(name):
    assert not {m for m in imported(name) if m.split(".")[0] == "flwr"}


def test_layers_cover_every_part_that_a_query_passes():
    assert set(ALLOWED) <= {in_part(name) for name in NAMES}


# -- what no module may do ---------------------------------------------------------------

FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "print", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {
    ("torch", "load"),
    ("torch", "save"),
    ("os", "system"),
    ("yaml", "load"),
}


@pytest.mark.parametrize("name", NAMES)
def test_module_uses_nothing_that_could_run_what_it_reads(name):
    assert not {m.split(".")[0] for m in imported(name)} & FORBIDDEN_MODULES
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_CALLS, f"{name}:{node.lineno}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in FORBIDDEN_ATTRIBUTES, f"{name}:{node.lineno}"
        if isinstance(node, ast.keyword):
            value = getattr(node.value, "value", True)
            assert node.arg != "allow_pickle" or value is False, f"{name}:{node.value.lineno}"
            is_shell = node.arg == "shell" and getattr(node.value, "value", False) is True
            assert not is_shell, f"{name}:{node.value.lineno}"


@pytest.mark.parametrize("name", NAMES)
def test_module_is_short_enough_to_read(name):
    assert len((PACKAGE / name).read_text(encoding="utf-8").splitlines()) <= 400


# -- names -------------------------------------------------------------------------------


def test_public_names_are_what_they_were():
    # A name that goes breaks its users; one that comes must be documented.
    assert set(fedinfer_flower.__all__) == {
        *("BudgetPolicy", "Directory", "Handover", "Identity", "OptionLimits", "Pins", "read_pins"),
        *("FedCalibrate", "FedCoalitions", "FedGroupMedian", "FedSequential", "FedStack"),
        *("SequentialQuerier", "SiteHistory", "Treasurer"),
        *("FedDecode", "FedRefine", "MixtureOfAnswers", "LanguageQuerier"),
        *("LanguageMod", "LanguagePolicy", "LanguageSite"),
        *("AsyncGateway", "FederatedClassifier", "Gateway", "SitePolicy"),
        "Deadline",
        "FedEnsemble",
        "FedInferError",
        "InferenceMod",
        "InferenceResult",
        "InferenceStrategy",
        "LocalModel",
        "Prediction",
        "Querier",
        "__version__",
        "inference",
    }


@pytest.mark.parametrize("name", fedinfer_flower.__all__)
def test_public_name_can_be_imported(name):
    assert getattr(fedinfer_flower, name) is not None
    assert name in dir(fedinfer_flower)


def test_unknown_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        fedinfer_flower.no_such_name  # noqa: B018


IN_LAYERS = [name for name in NAMES if in_part(name) in ALLOWED]


@pytest.mark.parametrize("name", IN_LAYERS)
def test_names_that_a_module_exports_exist(name):
    dotted = "fedinfer_flower." + name.removesuffix(".py").replace("/", ".")
    module = importlib.import_module(dotted.removesuffix(".__init__"))
    for exported in getattr(module, "__all__", ()):
        assert hasattr(module, exported), exported


# -- errors ------------------------------------------------------------------------------

ALL_ERRORS = [getattr(errors, name) for name in errors.__all__ if name != "error_class"]


def test_error_codes_are_distinct_and_complete():
    codes = [cls.code for cls in ALL_ERRORS]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"FI\d{3}", code) for code in codes)
    assert {errors.error_class(code) for code in codes} == set(ALL_ERRORS)
    for cls in ALL_ERRORS:
        assert issubclass(cls, FedInferError)
        assert cls.code in (errors.__doc__ or "") or cls is FedInferError


def test_error_text_says_what_where_and_what_to_do():
    error = errors.ShapeError("what", hint="do this").at_site("north")
    text = str(error)
    for part in ("FI304", "ShapeError", "[site north]", "what", "fix: do this", "#fi304"):
        assert part in text
    assert type(error) is errors.ShapeError


@pytest.mark.skipif(not ERRORS_PAGE.exists(), reason="the page is not written yet")
@pytest.mark.parametrize("cls", ALL_ERRORS, ids=lambda cls: cls.code)
def test_error_code_has_a_heading_in_the_reference(cls):
    headings = re.findall(r"(?m)^#+ .*$|<a id=\"\w+\">", ERRORS_PAGE.read_text(encoding="utf-8"))
    assert any(cls.code.lower() in heading.lower() for heading in headings)
