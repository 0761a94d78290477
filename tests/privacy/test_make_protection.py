from __future__ import annotations

import math

import pytest

from fedinfer_flower.ensemble.base import RULES, Disclosure
from fedinfer_flower.errors import InvalidValueError, UnknownNameError
from fedinfer_flower.privacy import PROTECTIONS, KeyPair, ScorePlan, make_protection
from fedinfer_flower.privacy.base import key_id_of
from fedinfer_flower.privacy.dp import DP


def test_defaults_and_options_are_taken() -> None:
    assert make_protection("dp") == DP()
    assert make_protection("dp", {}) == DP()
    made = make_protection("dp", {"epsilon": 2, "delta": 1e-6})
    assert made == DP(epsilon=2.0, delta=1e-6)
    assert type(made.options()["epsilon"]) is float


@pytest.mark.parametrize("name", PROTECTIONS.names())
def test_options_make_the_same_protection_again(name: str) -> None:
    made = make_protection(name)
    assert make_protection(made.name, made.options()) == made


def test_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean plain"):
        make_protection("plane")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epsilonn": 1.0}, "did you mean epsilon"),
        ({"noise": 1.0}, "options: delta, epsilon, mechanism"),
        ({"epsilon": "1.0"}, "finite number"),
        ({"epsilon": True}, "finite number"),
        ({"epsilon": None}, "finite number"),
        ({"epsilon": math.nan}, "epsilon"),
        ({"epsilon": math.inf}, "finite number"),
        ({"epsilon": 10**400}, "finite number"),
        ({"mechanism": 1}, "text"),
        ({"mechanism": ["gaussian"]}, "text"),
    ],
)
def test_wrong_option_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidValueError, match=words):
        make_protection("dp", options)


def test_option_of_another_protection_is_refused() -> None:
    with pytest.raises(InvalidValueError):
        make_protection("plain", {"epsilon": 1.0})


def test_plan_of_a_rule_carries_what_all_sides_need() -> None:
    rule = RULES.get("median")()
    plan = ScorePlan.for_rule(rule, n_classes=4, n_sites_max=6)
    assert plan.discloses is Disclosure.SCORES
    assert (plan.width, plan.n_classes, plan.n_sites_max) == (4, 4, 6)


@pytest.mark.parametrize(
    "changed",
    [
        {"width": 0},
        {"n_sites_max": 0},
        {"n_classes": -1},
        {"bound": 0.0},
        {"bound": math.nan},
        {"sensitivity_l2": math.inf},
    ],
)
def test_impossible_plan_is_refused(changed: dict[str, float]) -> None:
    sound = {
        "width": 1,
        "bound": 1.0,
        "sensitivity_l2": 1.0,
        "n_sites_max": 1,
        "n_classes": 1,
    }
    with pytest.raises(InvalidValueError, match=next(iter(changed))):
        ScorePlan(**(sound | changed))


def test_key_pair_hides_its_secret() -> None:
    keys = KeyPair(public_key=b"public", secret_key=b"do not show")
    assert "do not show" not in repr(keys)
    assert keys.key_id == key_id_of(b"public")
    assert KeyPair().key_id == ""
