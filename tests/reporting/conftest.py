import copy
import math

import pytest

from fedinfer_flower.reporting import write_report

# Accountant().epsilon(Charge.gaussian(mu_for(0.5, 1e-6), n), 1e-6), to two decimals.
SPENT = {1: 0.5, 2: 0.72, 5: 1.19, 10: 1.73, 20: 2.53, 50: 4.21, 100: 6.26, 200: 9.4, 500: 16.46}
SPENT[1000] = 25.7

CLASSES = [str(digit) for digit in range(10)]


def interval(accuracy):
    return {"accuracy": accuracy, "low": accuracy - 0.03, "high": accuracy + 0.03}


def site(index):
    return {
        "name": f"hospital-{'abcdefghij'[index]}",
        "kind": ["logistic", "forest", "knn"][index % 3],
        "n_train": 120,
        "class_counts": [60 if (index + digit) % 5 < 2 else digit % 2 for digit in range(10)],
        **interval(0.3 + 0.05 * index),
    }


def rule(name, accuracy, *, fedsei=False, discloses="sum"):
    return {
        "name": name,
        **interval(accuracy),
        "fedsei": fedsei,
        "seconds": 0.31,
        "bytes_per_query": 412.0,
        "discloses": discloses,
    }


def protection(name, label, *, seconds, size, epsilon=None, key=False, sees="one sum"):
    return {
        "name": name,
        "label": label,
        "rule": "open-set-class-share",
        **interval(0.88 if epsilon is None else 0.81),
        "seconds": seconds,
        "bytes_per_query": size,
        "epsilon_per_query": epsilon,
        "epsilon_total": None if epsilon is None else epsilon * 100,
        "delta": None if epsilon is None else 1e-6,
        "key_at_coordinator": key,
        "coordinator_sees": sees,
    }


def alpha_point(alpha, shift):
    names = ["open-set-class-share", "majority-vote", "mean-probability", "median"]
    return {
        "alpha": alpha,
        "rules": {name: 0.9 - 0.05 * i - shift for i, name in enumerate(names)},
        "best_site": 0.5,
        "mean_site": 0.4,
        "central": 0.96,
    }


def example(truth, joint, pixels):
    opinions = [{"name": site(i)["name"], "label": str(i), "probability": 0.5} for i in range(5)]
    return {
        "pixels": pixels,
        "truth": truth,
        "joint": joint,
        "joint_probability": 0.9,
        "sites": opinions,
    }


def epsilon_point(protection, epsilon, accuracy):
    return {"protection": protection, "epsilon": epsilon, **interval(accuracy)}


FULL = {
    "title": "Five sites read digits together",
    "dataset": "digits",
    "seed": 0,
    "alpha": 0.1,
    "n_sites": 5,
    "classes": CLASSES,
    "n_queries": 540,
    "command": "fedinfer demo --seed 0",
    "versions": {"flwr": "1.41.0", "numpy": "2.4.6"},
    "seconds_total": 41.2,
    "rule": "open-set-class-share",
    "rule_reason": "Sites know few classes each, and the protection shows a sum.",
    "protection": "he",
    "sites": [site(index) for index in range(5)],
    "best_site": {"name": "hospital-e", **interval(0.5)},
    "mean_site": interval(0.4),
    "central": {"kind": "logistic", **interval(0.96)},
    "rules": [
        rule("open-set-class-share", 0.88),
        rule("majority-vote", 0.62, fedsei=True),
        rule("median", 0.58, discloses="scores"),
    ],
    "protections": [
        protection("plain", "in clear", seconds=0.3, size=412.0, sees="each site's scores"),
        protection("he", "homomorphic encryption", seconds=2.4, size=81_000.0, sees="ciphertexts"),
        protection(
            "dp", "Gaussian noise", seconds=0.4, size=412.0, epsilon=0.5, sees="noisy scores"
        ),
    ],
    "by_alpha": [alpha_point(0.05, 0.1), alpha_point(0.1, 0.05), alpha_point(1.0, 0.0)],
    "reliability": {
        "bins": [
            {"confidence": 0.05, "accuracy": 0.0, "count": 0},
            {"confidence": 0.45, "accuracy": 0.5, "count": 100},
            {"confidence": 0.95, "accuracy": 0.9, "count": 440},
        ],
        "ece": 0.034,
    },
    "examples": [
        example("3", "3", [[(x + y) / 14 for x in range(8)] for y in range(8)]),
        example("4", "9", None),
    ],
    "by_epsilon": [
        *(epsilon_point("secagg+dp", 2.0**i, 0.60 + 0.04 * i) for i in range(-1, 6)),
        *(epsilon_point("dp", 2.0**i, 0.45 + 0.05 * i) for i in range(-1, 5)),
    ],
    "epsilon_reference": {"label": "mean-probability without noise", "accuracy": 0.88},
    "epsilon_meter": {
        "protection": "secagg+dp",
        "epsilon_per_query": 0.5,
        "delta": 1e-6,
        "cap": 20.0,
        "points": [{"queries": n, "epsilon": epsilon} for n, epsilon in SPENT.items()],
    },
    "who_learns": [
        {"about": "answer", "party": "coordinator alone", "learns": "ciphertexts"},
        {"about": "query", "party": "sites that are asked", "learns": "the query, in clear"},
        {"about": "answer", "party": "querier alone", "learns": "the sum of the answers"},
        {"about": "the model", "party": "querier alone", "learns": "what answers tell"},
    ],
    "sealed": False,
    "warnings": ["1 of 5 sites answered late."],
}


@pytest.fixture
def results():
    return copy.deepcopy(FULL)


@pytest.fixture
def empty(results):
    lists = ("classes", "sites", "rules", "protections", "by_alpha", "examples", "warnings")
    for key in (*lists, "by_epsilon", "who_learns"):
        results[key] = []
    results["epsilon_reference"] = results["epsilon_meter"] = None
    results["versions"] = {}
    results["reliability"] = {"bins": [], "ece": math.nan}
    return results


@pytest.fixture
def single(results):
    results["n_sites"] = 1
    results["sites"] = results["sites"][:1]
    results["best_site"]["name"] = results["sites"][0]["name"]
    results["by_alpha"] = results["by_alpha"][:1]
    return results


@pytest.fixture(scope="session")
def page(tmp_path_factory):
    """The page of the untouched results, drawn once."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    return write_report(copy.deepcopy(FULL), path).read_text(encoding="utf-8")
