"""The budget of a site: caps hold, nothing spent is forgotten, no file is trusted blindly."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fedinfer_flower.errors import (
    BudgetExceededError,
    ConfigError,
    InvalidValueError,
    MissingExtraError,
    ReplayError,
)
from fedinfer_flower.privacy import base
from fedinfer_flower.privacy.charge import Charge
from fedinfer_flower.privacy.gaussian_dp import epsilon_of, mu_for
from fedinfer_flower.privacy.site_budget import BudgetPolicy, Reservation, SiteBudget

POLICY = BudgetPolicy(epsilon_per_querier=2.0, epsilon_global=3.0)
HALF = Charge.pure(0.5, 1)
FIVE = Charge.pure(5.0, 1)
"""So large that the sum of epsilon, and no other bound, is what counts."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "budget.db"


@pytest.fixture
def budget(path: Path) -> SiteBudget:
    return SiteBudget(path, POLICY)


def reserve(
    budget: SiteBudget,
    query_id: str,
    charge: Charge = HALF,
    *,
    querier: str = "ann",
    globally: Charge | None = None,
) -> Reservation:
    return budget.reserve(
        querier=querier,
        query_id=query_id,
        charge_querier=charge,
        charge_global=charge if globally is None else globally,
    )


# -- caps ---------------------------------------------------------------------------------


def test_cap_of_one_querier_stops_that_querier_alone(budget: SiteBudget) -> None:
    for i in range(4):
        budget.commit(reserve(budget, f"q{i}"))

    with pytest.raises(BudgetExceededError) as caught:
        reserve(budget, "q4")

    for part in ("one querier", "epsilon 2 ", "2 is spent", "2.5 would be", "fix: ask fewer"):
        assert part in str(caught.value)
    assert budget.spent("ann") == (2.0, 0.0)
    reserve(budget, "q4", querier="bob")


def test_cap_of_all_together_stops_a_fresh_querier(budget: SiteBudget) -> None:
    for querier in ("ann", "bob", "eve"):
        for i in range(2):
            reserve(budget, f"q{i}", querier=querier)

    with pytest.raises(BudgetExceededError, match="all queriers together"):
        reserve(budget, "q0", querier="zoe")

    assert budget.spent(None) == (3.0, 0.0)
    assert budget.spent("zoe") == (0.0, 0.0)


def test_refused_query_leaves_no_trace(budget: SiteBudget) -> None:
    reserve(budget, "q0")
    with pytest.raises(BudgetExceededError):
        reserve(budget, "q1", Charge.pure(5.0, 1))
    assert not budget.answered_before("ann", "q1")
    assert budget.spent("ann") == budget.spent(None) == (0.5, 0.0)
    reserve(budget, "q1")


@pytest.mark.parametrize("charge", [Charge.gaussian(mu_for(2.0, 1e-5), 1), Charge.pure(2.0, 1)])
def test_one_query_of_the_whole_cap_fits_and_no_second(budget: SiteBudget, charge: Charge) -> None:
    reserve(budget, "q0", charge)
    with pytest.raises(BudgetExceededError):
        reserve(budget, "q1", Charge.gaussian(0.01, 1))


def test_gaussian_rows_are_counted_exactly(path: Path) -> None:
    mu, cap = 0.05, 2.0
    budget = SiteBudget(path, BudgetPolicy(epsilon_per_querier=cap, epsilon_global=cap))
    n_rows = 0
    with contextlib.suppress(BudgetExceededError):
        while True:
            reserve(budget, f"q{n_rows}", Charge.gaussian(mu, 1))
            n_rows += 1
    assert epsilon_of(mu * n_rows**0.5, 1e-5) <= cap < epsilon_of(mu * (n_rows + 1) ** 0.5, 1e-5)
    assert budget.spent("ann")[0] == pytest.approx(epsilon_of(mu * n_rows**0.5, 1e-5), rel=1e-9)


def test_charges_below_every_unit_still_add_up(budget: SiteBudget) -> None:
    tiny = Charge.gaussian(1e-12, 1)
    for i in range(5):
        reserve(budget, f"q{i}", tiny)
    budget.cancel(Reservation(querier="ann", query_id="q0"))
    for querier in ("ann", None):
        assert Fraction(budget.total(querier).mu_squared) >= 4 * Fraction(tiny.mu_squared)


def test_rows_seen_by_others_cost_a_new_querier_only(budget: SiteBudget) -> None:
    reserve(budget, "q0", Charge.pure(0.5, 2))
    for querier in ("bob", "eve"):
        reserve(budget, "q0", Charge.pure(0.5, 2), querier=querier, globally=Charge())
    assert budget.spent(None) == (1.0, 0.0)
    assert budget.spent("eve") == (1.0, 0.0)
    assert budget.status()[0].n_rows == 2


def test_refusal_does_not_tell_what_others_have_asked(budget: SiteBudget) -> None:
    """Whether rows were free for all together must not show, in words or in being refused."""
    cap = budget.policy.epsilon_global
    reserve(budget, "q0", Charge.pure(0.75 * cap / 2, 1))
    reserve(budget, "q1", Charge.pure(0.75 * cap / 2, 1), querier="bob")
    texts = set()
    for querier, globally in (("eve", Charge()), ("mallory", Charge.pure(cap / 2, 1))):
        with pytest.raises(BudgetExceededError) as caught:
            reserve(budget, "q2", Charge.pure(cap / 2, 1), querier=querier, globally=globally)
        texts.add(str(caught.value))
    assert len(texts) == 1
    assert not any(
        character.isdigit() for character in texts.pop().split(":", 1)[1].split("docs")[0]
    )


def test_free_answer_passes_a_cap_that_is_used_up(path: Path) -> None:
    reserve(SiteBudget(path, POLICY), "q0", Charge.pure(2.0, 1))
    smaller = SiteBudget(path, BudgetPolicy(epsilon_per_querier=1.0, epsilon_global=1.0))
    reserve(smaller, "q1", Charge())
    with pytest.raises(BudgetExceededError):
        reserve(smaller, "q2", Charge.pure(1e-6, 1))


def test_absurd_charge_is_refused(budget: SiteBudget) -> None:
    with pytest.raises(BudgetExceededError):
        reserve(budget, "q0", Charge.pure(1e100, 1))
    with pytest.raises(BudgetExceededError):
        reserve(budget, "q0", Charge.gaussian(1e100, 1))
    with pytest.raises(InvalidValueError, match="beyond every number"):
        reserve(budget, "q0", Charge.gaussian(1e200, 1))
    assert budget.spent(None) == (0.0, 0.0)


def test_rho_needs_the_concentrated_composition(path: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match="concentrated"):
        reserve(SiteBudget(path, POLICY), "q0", Charge.zcdp(0.01, 1))
    policy = BudgetPolicy(epsilon_per_querier=2.0, epsilon_global=2.0, composition="concentrated")
    budget = SiteBudget(tmp_path / "other.db", policy)
    reserve(budget, "q0", Charge.zcdp(0.01, 1))
    assert 0.0 < budget.spent("ann")[0] < 2.0


# -- states -------------------------------------------------------------------------------


def test_query_id_is_used_once_whatever_became_of_it(budget: SiteBudget) -> None:
    left, open_, gone = (reserve(budget, f"q{i}") for i in range(3))
    budget.commit(left)
    budget.cancel(gone)
    for reservation in (left, open_, gone):
        assert budget.answered_before("ann", reservation.query_id)
        with pytest.raises(ReplayError):
            reserve(budget, reservation.query_id)
    assert not budget.answered_before("bob", "q0")
    reserve(budget, "q0", querier="bob")


def test_last_state_is_final(budget: SiteBudget) -> None:
    left, gone = reserve(budget, "q0"), reserve(budget, "q1")
    budget.commit(left)
    budget.cancel(gone)
    for reservation in (left, gone, Reservation(querier="ann", query_id="never")):
        for step in (budget.commit, budget.cancel):
            with pytest.raises(ReplayError, match="must not leave"):
                step(reservation)
    assert budget.spent("ann") == (0.5, 0.0)


def test_cancel_gives_back_exactly_and_dead_reservations_stay_spent(path: Path) -> None:
    budget = SiteBudget(path, POLICY)
    for i in range(50):
        budget.cancel(reserve(budget, f"gone{i}", Charge.gaussian(0.1 + i / 1000, 3)))
    assert budget.spent("ann") == budget.spent(None) == (0.0, 0.0)
    reserve(budget, "dead", Charge.pure(0.5, 3))
    del budget

    reopened = SiteBudget(path, POLICY)
    everyone, ann = reopened.status()
    assert (everyone.querier, ann.querier) == (None, "ann")
    for line in (everyone, ann):
        assert (line.spent, line.n_open, line.n_queries, line.n_rows) == (1.5, 1, 1, 3)
    assert (everyone.remaining, ann.remaining) == (1.5, 0.5)
    reopened.verify()


def test_other_policy_applies_to_what_was_spent_before(path: Path) -> None:
    charge = Charge.gaussian(0.3, 1)
    reserve(SiteBudget(path, POLICY), "q0", charge)

    stricter = SiteBudget(
        path, BudgetPolicy(epsilon_per_querier=0.5, epsilon_global=0.5, delta=1e-9)
    )

    assert stricter.spent("ann")[0] == pytest.approx(epsilon_of(0.3, 1e-9), rel=1e-9)
    assert stricter.status()[0].remaining == 0.0
    with pytest.raises(BudgetExceededError):
        reserve(stricter, "q1", Charge.gaussian(0.001, 1))
    # Reading takes the policy last used, and keeps none.
    assert SiteBudget.inspect(path).policy == stricter.policy
    SiteBudget.inspect(path, POLICY)
    assert SiteBudget.inspect(path).policy == stricter.policy


def test_empty_budget_has_one_line(budget: SiteBudget) -> None:
    (line,) = budget.status()
    assert (line.spent, line.n_queries, line.n_open, line.cap) == (0.0, 0, 0, 3.0)


# -- any interleaving ---------------------------------------------------------------------

queriers = st.sampled_from(["ann", "bob", "eve"])
some_charges = st.one_of(
    st.builds(Charge.gaussian, st.floats(0.001, 0.5), st.integers(1, 4)),
    st.builds(Charge.pure, st.floats(0.001, 1.0), st.integers(1, 4)),
)


class Interleavings(RuleBasedStateMachine):
    """Three queriers, answers in every state, and processes that die in between."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.mkdtemp()
        self.path = Path(self.folder) / "budget.db"
        self.open: dict[Reservation, tuple[Charge, Charge]] = {}
        self.counted: dict[Reservation, tuple[Charge, Charge]] = {}
        self.used: set[tuple[str, str]] = set()

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @initialize()
    def start(self) -> None:
        self.budget = SiteBudget(self.path, POLICY)

    @rule()
    def die_and_start_again(self) -> None:
        self.budget = SiteBudget(self.path, POLICY)
        self.open.clear()

    @rule(querier=queriers, number=st.integers(0, 40), charge=some_charges, cached=st.booleans())
    def reserve(self, querier: str, number: int, charge: Charge, cached: bool) -> None:
        globally = Charge() if cached else charge
        key = (querier, f"q{number}")
        try:
            taken = self.budget.reserve(
                querier=querier, query_id=key[1], charge_querier=charge, charge_global=globally
            )
        except ReplayError:
            assert key in self.used
        except BudgetExceededError:
            assert key not in self.used
        else:
            assert key not in self.used
            self.used.add(key)
            self.open[taken] = self.counted[taken] = (charge, globally)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        taken = data.draw(st.sampled_from(sorted(self.open, key=str)))
        self.budget.commit(taken)
        del self.open[taken]

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        taken = data.draw(st.sampled_from(sorted(self.open, key=str)))
        self.budget.cancel(taken)
        del self.open[taken], self.counted[taken]

    @invariant()
    def caps_hold_and_nothing_is_forgotten(self) -> None:
        for querier, cap in (("ann", 2.0), ("bob", 2.0), ("eve", 2.0), (None, 3.0)):
            mine = [
                charges[querier is None]
                for taken, charges in self.counted.items()
                if querier in (None, taken.querier)
            ]
            spent, _ = self.budget.spent(querier)
            assert spent <= cap * (1 + 1e-9)
            exact = sum(Fraction(c.mu_squared) + Fraction(c.pure_mu_squared) for c in mine)
            pure = sum(Fraction(c.pure_epsilon) for c in mine)
            if any(c.mu_squared for c in mine):
                assert spent >= epsilon_of(float(exact) ** 0.5, 1e-5) * (1 - 1e-9)
            else:
                least = min(float(pure), epsilon_of(float(exact) ** 0.5, 1e-5))
                assert spent >= least * (1 - 1e-9)
                assert spent <= float(pure) * (1 + 1e-9)
        self.budget.verify()


Interleavings.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestInterleavings = Interleavings.TestCase


# -- races --------------------------------------------------------------------------------


def test_a_hundred_threads_do_not_overspend(path: Path) -> None:
    policy = BudgetPolicy(epsilon_per_querier=150.0, epsilon_global=200.0)
    budget, granted, failed = SiteBudget(path, policy), [], []
    start = threading.Barrier(100)

    def ask(number: int) -> None:
        start.wait()
        try:
            taken = reserve(budget, f"q{number}", FIVE, querier=f"k{number % 2}")
            budget.commit(taken)
            granted.append(taken)
        except BudgetExceededError:
            pass
        except Exception as exc:
            failed.append(exc)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not failed
    # 100 wishes for 40 fives: all are spent, and none twice.
    assert len(granted) == 40
    assert budget.spent(None) == (200.0, 0.0)
    budget.verify()


def test_a_query_id_is_given_to_one_of_many_threads(budget: SiteBudget) -> None:
    outcomes = []
    start = threading.Barrier(20)

    def ask() -> None:
        start.wait()
        try:
            outcomes.append(reserve(budget, "same", Charge.pure(0.01, 1)))
        except ReplayError as exc:
            outcomes.append(exc)

    threads = [threading.Thread(target=ask) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sum(isinstance(outcome, Reservation) for outcome in outcomes) == 1
    assert len(outcomes) == 20


RACER = """
import sys
from pathlib import Path
from fedinfer_flower.errors import BudgetExceededError
from fedinfer_flower.privacy.charge import Charge
from fedinfer_flower.privacy.site_budget import BudgetPolicy, SiteBudget

policy = BudgetPolicy(epsilon_per_querier=1000.0, epsilon_global=1000.0)
cost = Charge.pure(5.0, 1)
sys.stdout.write("ready\\n")
sys.stdout.flush()
sys.stdin.readline()
budget = SiteBudget(Path(sys.argv[1]), policy)  # both may find no file
n = 0
try:
    while True:
        taken = budget.reserve(
            querier="ann", query_id=f"{sys.argv[2]}-{n}", charge_querier=cost, charge_global=cost
        )
        budget.commit(taken)
        n += 1
except BudgetExceededError:
    sys.stdout.write(f"{n}\\n")
"""


def test_processes_race_for_one_budget_from_its_first_moment(path: Path) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(path), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two", "three")
    ]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    granted = [int(racer.communicate(timeout=120)[0]) for racer in racers]

    assert [racer.returncode for racer in racers] == [0, 0, 0]
    assert sum(granted) == 200
    found = SiteBudget.inspect(path)
    assert found.spent(None) == (1000.0, 0.0)
    found.verify()
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_busy_file_is_an_error_and_spends_nothing(
    budget: SiteBudget, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedinfer_flower.privacy import budget_file

    monkeypatch.setattr(budget_file, "_BUSY_S", 0.05)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(ConfigError, match="SQLITE_BUSY"):
        reserve(budget, "q0")
    other.execute("ROLLBACK")
    other.close()
    assert budget.spent(None) == (0.0, 0.0)
    reserve(budget, "q0")


# -- the file -----------------------------------------------------------------------------


def test_file_is_for_its_owner_alone(budget: SiteBudget, path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="by others"):
        SiteBudget(path, POLICY)


def test_missing_file_can_be_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match="no budget file"):
        SiteBudget(path, POLICY, must_exist=True)
    assert not path.exists()
    SiteBudget(path, POLICY)
    SiteBudget(path, POLICY, must_exist=True)


def foreign_database(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE accounts (x)")
    db.close()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not a budget" * 500),
        lambda path: path.write_bytes(path.read_bytes()[:50]),
        lambda path: path.write_bytes(path.read_bytes()[:5000]),
        lambda path: (path.unlink(), foreign_database(path), path.chmod(0o600)),
    ],
    ids=["emptied", "text", "header only", "cut off", "foreign database"],
)
def test_file_that_is_no_budget_is_an_error_and_kept(path: Path, spoil) -> None:
    reserve(SiteBudget(path, POLICY), "q0")
    spoil(path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="no budget file, or damaged"):
        SiteBudget(path, POLICY).verify()
    assert path.read_bytes() == before


def test_random_damage_never_raises_anything_but_typed_errors(path: Path) -> None:
    budget = SiteBudget(path, POLICY)
    for i in range(3):
        reserve(budget, f"q{i}")
    sound, rng = path.read_bytes(), random.Random(5)  # noqa: S311
    for _ in range(300):
        spoilt = bytearray(sound)
        for _ in range(rng.choice((1, 8, 200))):
            spoilt[rng.randrange(len(spoilt))] = rng.randrange(256)
        path.write_bytes(spoilt)
        try:
            found = SiteBudget(path, POLICY)
            found.status()
            found.verify()
            reserve(found, "q9", Charge.pure(0.1, 1))
        except (ConfigError, BudgetExceededError):
            continue
    # Chance damage is often harmless: in free space, or in a name.


@pytest.mark.parametrize(
    "forgery",
    [
        "UPDATE accounts SET total = replace(total, '5', '4') WHERE querier = 'ann'",
        "DELETE FROM accounts WHERE querier = 'ann'",
        "DELETE FROM reservations",
        "UPDATE accounts SET total = '{}'",
        "UPDATE accounts SET total = 'x'",
    ],
)
def test_totals_that_do_not_add_up_are_found(path: Path, forgery: str) -> None:
    reserve(SiteBudget(path, POLICY), "q0")
    with sqlite3.connect(path) as db:
        db.execute(forgery)
    db.close()
    with pytest.raises(ConfigError, match="damaged"):
        SiteBudget(path, POLICY).verify()


def test_file_deleted_or_replaced_in_use_is_noticed(budget: SiteBudget, path: Path) -> None:
    reservation = reserve(budget, "q0")
    older = path.with_name("older.db")
    shutil.copy(path, older)
    budget.commit(reservation)

    path.rename(path.with_name("moved.db"))
    for step in (
        lambda: reserve(budget, "q1"),
        lambda: budget.commit(reservation),
        lambda: budget.spent(None),
    ):
        with pytest.raises(ConfigError, match="SQLITE_CANTOPEN"):
            step()
    assert not path.exists()
    SiteBudget(path, POLICY)
    with pytest.raises(ConfigError, match="was replaced"):
        reserve(budget, "q1")
    shutil.copy(older, path)
    with pytest.raises(ConfigError, match="older state"):
        reserve(budget, "q1")
    shutil.copy(path.with_name("moved.db"), path)
    reserve(budget, "q1")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_read_only_folder_spends_nothing(budget: SiteBudget, path: Path) -> None:
    path.parent.chmod(0o500)
    try:
        with pytest.raises(ConfigError):
            reserve(budget, "q0")
    finally:
        path.parent.chmod(0o700)
    assert budget.spent(None) == (0.0, 0.0)


@pytest.mark.parametrize("failing", ["INSERT INTO reservations", "UPDATE file", "COMMIT"])
def test_failure_inside_a_step_undoes_all_of_it(
    budget: SiteBudget, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    from fedinfer_flower.privacy import budget_file

    reserve(budget, "q0")
    real = budget_file._connect

    class FullDisk:
        def __init__(self, db: sqlite3.Connection) -> None:
            self.close, self.db = db.close, db

        def execute(self, sql: str, *rest: object) -> sqlite3.Cursor:
            if sql.startswith(failing):
                raise sqlite3.OperationalError("disk full")
            return self.db.execute(sql, *rest)

    monkeypatch.setattr(budget_file, "_connect", lambda path: FullDisk(real(path)))
    with pytest.raises(ConfigError):
        reserve(budget, "q1")
    monkeypatch.undo()

    assert budget.spent("ann") == budget.spent(None) == (0.5, 0.0)
    assert not budget.answered_before("ann", "q1")
    budget.verify()


def test_extra_is_missed_before_any_query(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str, *rest: object) -> object:
        raise ImportError(name)

    monkeypatch.setattr(base.importlib, "import_module", absent)
    with pytest.raises(MissingExtraError, match=r"fedinfer-flower\[dp\]"):
        SiteBudget(path, POLICY)


# -- nonsense -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon_per_querier": 0.0},
        {"epsilon_per_querier": float("nan")},
        {"epsilon_per_querier": True},
        {"epsilon_global": float("inf")},
        {"epsilon_global": 1.9},
        {"delta": 0.0},
        {"delta": 0.01},
        {"delta": "1e-5"},
        {"composition": "fixed"},
    ],
)
def test_policy_out_of_range_is_refused(change: dict[str, object]) -> None:
    good = {"epsilon_per_querier": 2.0, "epsilon_global": 3.0, "delta": 1e-5}
    with pytest.raises(InvalidValueError):
        BudgetPolicy(**{**good, **change})


@pytest.mark.parametrize("name", ["", "x" * 257, "a\x00b", "\ud800", b"ann", None])
def test_names_are_short_printable_text(budget: SiteBudget, name: object) -> None:
    with pytest.raises(InvalidValueError):
        reserve(budget, "q0", querier=name)
    with pytest.raises(InvalidValueError):
        reserve(budget, name)
    assert budget.spent(None) == (0.0, 0.0)
