"""Charged before it is drawn, drawn once, given again to repeats."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from fedinfer_flower.clients.remembered import UNSIGNED, charged_payload
from fedinfer_flower.clients.site_memory import HomeMemory
from fedinfer_flower.ensemble.base import make_rule
from fedinfer_flower.errors import BudgetExceededError, ModelAnswerError
from fedinfer_flower.privacy.base import ScorePlan, make_protection
from fedinfer_flower.privacy.site_budget import BudgetPolicy
from fedinfer_flower.query import SiteProfile
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.messages import Question

RULE = make_rule("mean-probability", {})
PLAN = ScorePlan.for_rule(RULE, n_classes=2, n_sites_max=1)
DP = make_protection("dp", {"epsilon": 2.0})
QUERIER = Identity.generate()
ROWS = np.arange(6.0).reshape(3, 2)


class Asker:
    """Asks one memory, and counts the rows that the model saw."""

    def __init__(self, memory, *, name: str = "north") -> None:
        self.memory = memory
        self.model = SimpleNamespace(profile=SiteProfile(name=name, classes=("a", "b")))
        self.rows_seen = 0
        self.number = 0
        self.fail = False

    def scored(self, asked: Question) -> np.ndarray:
        self.rows_seen += asked.n_queries
        if self.fail:
            raise ModelAnswerError("the model failed")
        return np.full((asked.n_queries, 2), 0.5)

    def ask(self, rows=ROWS, *, protection=DP, querier=QUERIER, **changes):
        self.number += 1
        asked = Question(
            **{
                "query_id": f"q-{self.number}",
                "inputs": rows,
                "classes": ("a", "b"),
                "n_sites": 1,
                "rule": RULE.name,
                "protection": protection.name,
                "protection_options": protection.options(),
                "querier": None if querier is None else querier.public,
            }
            | changes
        )
        side = protection.site_side(PLAN, public_key=b"")
        return charged_payload(
            side,
            asked,
            PLAN,
            protection=protection,
            model=self.model,
            memory=self.memory,
            scored=self.scored,
        )


@pytest.fixture
def policy():
    return BudgetPolicy(epsilon_per_querier=6.0, epsilon_global=6.0)


@pytest.fixture
def asker(tmp_path, policy):
    return Asker(HomeMemory(tmp_path, policy))


def test_repeat_is_the_same_bytes_costs_nothing_and_asks_no_model(asker):
    one, cost = asker.ask()
    two, again = asker.ask()
    assert one == two
    assert (cost.n_fresh, again.n_fresh) == (3, 0)
    assert again.to_querier.is_free
    assert again.to_all.is_free
    assert asker.rows_seen == 3
    assert asker.memory.budget.spent(QUERIER.key_id) == asker.memory.budget.spent(None)


def test_rows_in_another_order_and_batch_are_repeats(asker):
    one, _ = asker.ask()
    two, again = asker.ask(np.ascontiguousarray(ROWS[::-1]))
    three, _ = asker.ask(ROWS[1:2].astype(np.float32))
    width = len(one) // 3
    assert [one[i : i + width] for i in (0, width, 2 * width)] == [
        two[i : i + width] for i in (2 * width, width, 0)
    ]
    assert three == one[width : 2 * width]
    assert again.n_fresh == 0


def test_new_rows_among_old_ones_are_charged_alone(asker):
    asker.ask(ROWS[:2])
    _, cost = asker.ask(ROWS)
    assert (cost.n_fresh, cost.to_querier.n_rows, cost.to_all.n_rows) == (1, 1, 1)


def test_second_querier_pays_for_itself_and_all_together_for_nothing(asker):
    one, _ = asker.ask()
    two, cost = asker.ask(querier=Identity.generate())
    assert one == two
    assert (cost.to_querier.n_rows, cost.to_all.n_rows, cost.n_fresh) == (3, 0, 0)


def test_unsigned_queries_share_one_account(asker):
    _, cost = asker.ask(querier=None)
    assert cost.querier == UNSIGNED
    assert asker.memory.budget.spent(UNSIGNED)[0] > 0.0


def test_refused_query_was_not_seen_by_the_model_and_costs_nothing(asker):
    asker.ask()
    spent, seen = asker.memory.budget.spent(None), asker.rows_seen
    with pytest.raises(BudgetExceededError):
        asker.ask(np.random.default_rng(1).standard_normal((50, 2)))
    assert asker.memory.budget.spent(None) == spent
    assert asker.rows_seen == seen
    # What was drawn before is still given.
    asker.ask()


def test_failed_model_keeps_the_charge_and_stores_nothing(asker):
    """That a model fails on a row tells something about it, and errors carry no noise."""
    asker.fail = True
    with pytest.raises(ModelAnswerError):
        asker.ask()
    assert asker.memory.budget.spent(None)[0] > 0.0
    assert len(asker.memory.answers) == 0
    asker.memory.budget.verify()


def test_draw_that_cannot_be_stored_stays_charged(asker, monkeypatch):
    def broken(*_: object) -> list[bytes]:
        raise OSError("disk full")

    monkeypatch.setattr(asker.memory.answers, "complete", broken)
    with pytest.raises(OSError, match="disk full"):
        asker.ask()
    assert asker.memory.budget.spent(QUERIER.key_id)[0] > 0.0


@pytest.mark.parametrize(
    "changes",
    [
        {"classes": ("b", "a")},
        {"class_totals": np.array([1.0, 2.0])},
        {"rule_options": {"x": 1}},
        {"protection": make_protection("dp", {"epsilon": 1.5})},
        {"inputs": ROWS.astype(int)},
        {"inputs": np.nextafter(ROWS, 9.0)},
    ],
    ids=["class order", "class totals", "rule options", "epsilon", "kind", "last bit"],
)
def test_other_terms_are_drawn_and_charged_anew(asker, changes):
    asker.ask(ROWS[:1])
    spent = asker.memory.budget.spent(None)[0]
    rows = changes.pop("inputs", ROWS)[:1]
    _, cost = asker.ask(rows, **changes)
    assert cost.n_fresh == 1
    assert asker.memory.budget.spent(None)[0] > spent


def test_other_model_is_drawn_and_charged_anew(asker):
    asker.ask(ROWS[:1])
    asker.model = SimpleNamespace(profile=SiteProfile(name="north", classes=("a", "b", "c")))
    _, cost = asker.ask(ROWS[:1])
    assert cost.n_fresh == 1


def test_exact_answers_are_neither_charged_nor_kept(asker):
    payload, cost = asker.ask(protection=make_protection("plain"))
    assert np.frombuffer(payload, "<f4").tolist() == [0.5] * 6
    assert (cost.to_querier, cost.n_fresh) == (None, 0)
    assert len(asker.memory.answers) == 0


def test_without_a_home_every_answer_is_drawn_and_stated_as_charged():
    memory = SimpleNamespace(answers=None, budget=None)
    asker = Asker(memory)
    one, cost = asker.ask()
    two, again = asker.ask()
    assert one != two
    assert cost.to_querier == again.to_querier
    assert cost.n_fresh == 3
    assert asker.rows_seen == 6
