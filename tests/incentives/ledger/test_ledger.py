"""Money in, around and out: double entry, once a key, nobody below zero."""

from __future__ import annotations

import csv
import io
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedinfer_flower.errors import InvalidValueError, LedgerError
from fedinfer_flower.incentives.ledger import Ledger
from fedinfer_flower.incentives.ledger.names import MAX_AMOUNT, is_account, is_ordinary

from .conftest import FEE, Opened


def test_deposit_comes_from_outside_alone(opened: Opened) -> None:
    assert opened.ledger.balances() == {"clinic": 10 * FEE, "external": -10 * FEE}
    assert sum(opened.ledger.balances().values()) == 0


def test_same_key_again_changes_nothing(opened: Opened) -> None:
    one = opened.ledger.post("bonus", "b1", {"clinic": -3, "north": 3}, {"month": 5})
    again = opened.ledger.post("bonus", "b1", {"north": 3, "clinic": -3}, {"month": 5})
    assert again == one
    assert opened.ledger.balance("north") == 3


@pytest.mark.parametrize(
    "change",
    [
        {"postings": {"clinic": -4, "north": 4}},
        {"kind": "other"},
        {"memo": {"month": 6}},
        {"postings": {"clinic": -3, "south": 3}},
    ],
)
def test_same_key_for_something_else_is_refused(opened: Opened, change: dict) -> None:
    first = {"kind": "bonus", "postings": {"clinic": -3, "north": 3}, "memo": {"month": 5}}
    opened.ledger.post(key="b1", **first)
    with pytest.raises(LedgerError, match="another entry"):
        opened.ledger.post(key="b1", **(first | change))
    assert opened.ledger.balance("north") == 3


def test_nobody_pays_what_they_do_not_have(opened: Opened) -> None:
    with pytest.raises(LedgerError, match="holds 10000000"):
        opened.ledger.post("fee", "f1", {"clinic": -10 * FEE - 1, "north": 10 * FEE + 1})
    with pytest.raises(LedgerError, match="holds 0"):
        opened.ledger.withdraw("north", 1, key="w1")
    assert opened.ledger.verify().n_entries == 2


def test_withdrawal_ends_where_deposit_began(opened: Opened) -> None:
    opened.ledger.withdraw("clinic", 10 * FEE, key="w1")
    assert opened.ledger.balances() == {"clinic": 0, "external": 0}


@pytest.mark.parametrize(
    ("kind", "key", "postings"),
    [
        ("deposit", "k", {"clinic": -1, "north": 1}),
        ("release", "k", {"clinic": -1, "north": 1}),
        ("open-ledger", "k", {"clinic": -1, "north": 1}),
        ("Fee", "k", {"clinic": -1, "north": 1}),
        ("fee", "a:b", {"clinic": -1, "north": 1}),
        ("fee", "", {"clinic": -1, "north": 1}),
        ("fee", "k", {"external": -1, "north": 1}),
        ("fee", "k", {"clinic": -1, "escrow:job": 1}),
        ("fee", "k", {"stake:clinic": -1, "clinic": 1}),
        ("fee", "k", {"clinic": -1, "north": 2}),
        ("fee", "k", {"clinic": 0, "north": 0}),
        ("fee", "k", {"clinic": -0.5, "north": 0.5}),
        ("fee", "k", {"clinic": -True, "north": True}),
        ("fee", "k", {"clinic": -MAX_AMOUNT - 1, "north": MAX_AMOUNT + 1}),
        ("fee", "k", {}),
        ("fee", "k", {"=HYPERLINK(1)": 1, "clinic": -1}),
        ("fee", "k", {"a\x00": 1, "clinic": -1}),
    ],
)
def test_post_refuses_what_is_the_ledgers_own_or_no_money(
    sqlite_opened: Opened, kind: str, key: str, postings: dict
) -> None:
    with pytest.raises(InvalidValueError):
        sqlite_opened.ledger.post(kind, key, postings)
    assert sqlite_opened.ledger.verify().n_entries == 2


@pytest.mark.parametrize(
    "memo",
    [
        {"note": "x" * 257},
        {"note": "a\nb"},
        {"note": 0.5},
        {"note": ["a"]},
        {"Note": "a"},
        {"note": True},
        {f"n{i}": i for i in range(17)},
    ],
)
def test_memo_is_a_few_short_texts_and_whole_numbers(sqlite_opened: Opened, memo: dict) -> None:
    with pytest.raises(InvalidValueError):
        sqlite_opened.ledger.post("fee", "k", {"clinic": -1, "north": 1}, memo)


@pytest.mark.parametrize("amount", [0, -1, 0.5, True, MAX_AMOUNT + 1])
def test_deposit_is_of_a_whole_positive_amount(sqlite_opened: Opened, amount: int) -> None:
    with pytest.raises(InvalidValueError):
        sqlite_opened.ledger.deposit("clinic", amount, key="d2")


@given(st.text(max_size=140))
def test_account_names_survive_a_round_trip_through_csv(name: str) -> None:
    assert is_ordinary(name) <= is_account(name)
    if is_account(name):
        out = io.StringIO()
        csv.writer(out).writerow([name])
        assert next(csv.reader([out.getvalue()])) == [name]
        assert name[0] not in "=+-@\t\r"
        assert name.encode().decode() == name


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    moves=st.lists(
        st.tuples(
            st.sampled_from(["deposit", "move", "withdraw"]),
            st.sampled_from("abc"),
            st.sampled_from("abc"),
            st.integers(min_value=1, max_value=50),
        ),
        max_size=12,
    )
)
def test_balances_are_those_of_a_plain_sum(tmp_path_factory, moves) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path_factory.mktemp('l')}/ledger.db")
    ledger.migrate()
    model: dict[str, int] = dict.fromkeys(("a", "b", "c"), 0)
    for number, (what, source, target, amount) in enumerate(moves):
        key = f"k{number}"
        if what == "deposit":
            ledger.deposit(source, amount, key=key)
            model[source] += amount
        elif what == "withdraw" and model[source] >= amount:
            ledger.withdraw(source, amount, key=key)
            model[source] -= amount
        elif what == "move" and source != target and model[source] >= amount:
            ledger.post("gift", key, {source: -amount, target: amount})
            model[source] -= amount
            model[target] += amount
        elif what != "move" or source != target:
            with pytest.raises(LedgerError):
                ledger.withdraw(source, amount, key=key)
    found = ledger.verify()
    assert found.ok
    assert {name: found.balances.get(name, 0) for name in model} == model
    assert sum(found.balances.values()) == 0
    assert ledger.balances() == found.balances


def test_writers_at_once_make_one_chain(opened: Opened) -> None:
    errors: list[BaseException] = []

    def pay(worker: int) -> None:
        ledger = Ledger(opened.url)
        try:
            for number in range(5):
                ledger.post("fee", f"{worker}-{number}", {"clinic": -1, f"site {worker}": 1})
                # The same of everybody: one of them is first.
                ledger.post("bonus", f"shared-{number}", {"clinic": -1, "shared": 1})
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=pay, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert opened.ledger.balance("shared") == 5
    found = opened.ledger.verify()
    assert found.ok
    assert found.n_entries == 2 + 4 * 5 + 5


def test_entry_times_never_go_back_when_the_clock_does(opened: Opened) -> None:
    opened.clock.now -= 1000
    opened.ledger.deposit("clinic", 1, key="d2")
    times = [entry.at for entry in opened.ledger.entries()]
    assert times == sorted(times)
    assert opened.ledger.verify().ok


def test_csv_has_a_line_a_posting(opened: Opened) -> None:
    opened.ledger.post("fee", "f1", {"clinic": -5, "north": 5}, {"month": 5})
    rows = list(csv.DictReader(io.StringIO("".join(opened.ledger.export("csv")))))
    fee = {row["account"]: (row["amount"], row["balance"]) for row in rows if row["key"] == "f1"}
    assert fee == {"clinic": ("-5", str(10 * FEE - 5)), "north": ("5", "5")}
    with pytest.raises(InvalidValueError):
        opened.ledger.export("pdf")
