"""Differencing exact sums: it works without the guard, and is refused with it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fedinfer_flower.errors import (
    BindingError,
    ConfigError,
    DifferencingError,
    FedInferError,
    InvalidValueError,
    ReplayError,
)
from fedinfer_flower.privacy.answer_cache import AnswerCache
from fedinfer_flower.privacy.base import ScorePlan
from fedinfer_flower.privacy.cohort_guard import CohortGuard
from fedinfer_flower.privacy.row_digest import (
    EXACT_SUM_CONTEXT,
    answer_context,
    key_fingerprint,
    row_digests,
)

SITES = ("a", "b", "c", "d")
WIDTH = 5
ROSTER, OTHER = b"roster of all", b"another roster"


def digest(row: int) -> bytes:
    return row.to_bytes(32, "big")


NOISY_SUM = {
    "rule": "mean-probability",
    "rule_options": {},
    "protection": "secagg",
    "protection_options": {"epsilon": 1.0},
    "classes": ("x", "y"),
    "plan": ScorePlan(width=2, bound=1.0, sensitivity_l2=1.0, n_sites_max=4, n_classes=2),
    "model": "weights",
}


class Federation:
    """Exact sums with an honest coordinator: the querier sees one sum a query.

    The sum opens under pairwise masks, so survivors must agree to a dropout; with
    `masked=False` it does not need them.
    """

    def __init__(self, *, guarded: bool, masked: bool = True) -> None:
        self.masked = masked
        self.guards = {s: CohortGuard(None) if guarded else None for s in SITES}
        self.keys = {site: os.urandom(32) for site in SITES}
        rng = np.random.default_rng(11)
        self.weights = {site: rng.integers(-9999, 9999, (3, WIDTH)) for site in SITES}

    def answer(self, site: str, row: np.ndarray) -> np.ndarray:
        return np.rint(row @ self.weights[site]).astype(np.int64)

    def sum(
        self, query_id: str, row: np.ndarray, cohort: Iterable[str], *, missing: str = ""
    ) -> np.ndarray:
        cohort = sorted(cohort)
        for site in cohort:
            if (guard := self.guards[site]) is not None and site != missing:
                digests = row_digests(row[None], context=EXACT_SUM_CONTEXT, key=self.keys[site])
                roster = ",".join(cohort).encode()
                guard.admit(query_id, digests, roster, survivors_known=self.masked)
        survivors = [site for site in cohort if site != missing]
        if missing and self.masked:
            for site in survivors:
                if (guard := self.guards[site]) is not None:
                    guard.admit_recovery(query_id, frozenset({missing}))
        return sum(self.answer(site, row) for site in survivors)


ROW = np.array([1.0, -2.0, 0.5])


# -- the attacks, without and with the guard ------------------------------------------------


def other_cohort(federation: Federation) -> np.ndarray:
    return federation.sum("q-1", ROW, SITES) - federation.sum("q-2", ROW, "acd")


def dropout_after_the_full_sum(federation: Federation) -> np.ndarray:
    return federation.sum("q-1", ROW, SITES) - federation.sum("q-2", ROW, SITES, missing="b")


def full_sum_after_a_dropout(federation: Federation) -> np.ndarray:
    return -federation.sum("q-1", ROW, SITES, missing="b") + federation.sum("q-2", ROW, SITES)


def respelled_row(federation: Federation) -> np.ndarray:
    first = federation.sum("q-1", ROW.astype(np.float32), SITES)
    return first - federation.sum("q-2", ROW, "acd")


@pytest.mark.parametrize(
    "attack", [other_cohort, dropout_after_the_full_sum, full_sum_after_a_dropout, respelled_row]
)
@pytest.mark.parametrize("masked", [True, False])
def test_a_difference_of_sums_is_a_sites_answer_unless_guarded(attack, masked: bool) -> None:
    unguarded = Federation(guarded=False, masked=masked)
    np.testing.assert_array_equal(attack(unguarded), unguarded.answer("b", ROW))

    with pytest.raises(DifferencingError):
        attack(Federation(guarded=True, masked=masked))


def test_the_weaker_rule_would_not_do_where_survivors_are_unknown() -> None:
    # Why `survivors_known` exists: the same roster twice, one site silently missing.
    federation = Federation(guarded=True, masked=False)
    total = {}
    for query_id, missing in (("q-1", ""), ("q-2", "b")):
        for guard in federation.guards.values():
            guard.admit(query_id, [digest(1)], ROSTER, survivors_known=True)  # not true here
        total[query_id] = sum(federation.answer(s, ROW) for s in SITES if s != missing)
    np.testing.assert_array_equal(total["q-1"] - total["q-2"], federation.answer("b", ROW))


def test_a_row_changed_in_its_last_bit_gets_through() -> None:
    # The limit that the documentation states: the guard is no barrier to one who knows it.
    federation = Federation(guarded=True)
    near = ROW.copy()
    near[0] = np.nextafter(near[0], 2.0)
    difference = federation.sum("q-1", ROW, SITES) - federation.sum("q-2", near, "acd")
    # Weights are below 1e4 and the change is 2e-16; rounding moves each answer by at most 1.
    assert np.abs(difference - federation.answer("b", ROW)).max() <= 3


def test_remembered_shares_of_noise_need_the_cohort_in_their_context() -> None:
    # Four sites, each with a quarter of the variance that protects the sum.
    share = {s: np.random.default_rng(i).normal(0.0, 50.0, WIDTH) for i, s in enumerate(SITES)}
    exact = {s: np.full(WIDTH, 100.0 * i) for i, s in enumerate(SITES)}
    whole, without = (sum(exact[s] + share[s] for s in cohort) for cohort in (SITES, "acd"))
    # Same shares in both sums: all noise cancels but that of the site which is singled out.
    np.testing.assert_allclose(whole - without, exact["b"] + share["b"])

    cache, key = AnswerCache(None, max_rows=10), bytes(32)
    fresh = []
    for cohort in (b"abcd", b"acd"):
        context = answer_context(**NOISY_SUM, cohort=cohort)
        plan = cache.plan("q", row_digests(ROW[None], context=context, key=key))
        fresh.append(plan.fresh)
        cache.complete(plan, [b"share"])
    assert fresh == [(0,), (0,)]


def test_remembered_shares_of_noise_need_the_guard_against_dropouts_too() -> None:
    share = {s: np.random.default_rng(i).normal(0.0, 50.0, WIDTH) for i, s in enumerate(SITES)}
    whole, without = (sum(share[s] for s in cohort) for cohort in (SITES, "acd"))
    np.testing.assert_allclose(whole - without, share["b"])  # same cohort, b "dropped out"

    guard = CohortGuard(None)
    digests = row_digests(
        ROW[None], context=answer_context(**NOISY_SUM, cohort=ROSTER), key=bytes(32)
    )
    guard.admit("q-1", digests, ROSTER, survivors_known=True)
    guard.admit("q-2", digests, ROSTER, survivors_known=True)
    with pytest.raises(DifferencingError):
        guard.admit_recovery("q-2", frozenset({"b"}))
    # Another cohort gets other noise, so it may ask.
    other = row_digests(ROW[None], context=answer_context(**NOISY_SUM, cohort=OTHER), key=bytes(32))
    guard.admit("q-3", other, OTHER, survivors_known=True)


# -- the rules one by one -------------------------------------------------------------------


@pytest.fixture
def guard(tmp_path: Path) -> CohortGuard:
    return CohortGuard(tmp_path / "cohorts")


def test_the_same_cohort_may_ask_again(guard: CohortGuard) -> None:
    for i in range(3):
        guard.admit(f"q-{i}", [digest(1), digest(1)], ROSTER, survivors_known=True)


def test_one_row_of_another_cohort_refuses_the_whole_query_and_records_none(
    guard: CohortGuard,
) -> None:
    guard.admit("q-1", [digest(1)], ROSTER, survivors_known=True)

    with pytest.raises(DifferencingError, match="another cohort"):
        guard.admit("q-2", [digest(2), digest(1), digest(3)], OTHER, survivors_known=True)

    # Neither the id nor the other rows were used up.
    guard.admit("q-2", [digest(2), digest(3)], ROSTER, survivors_known=True)


def test_rows_stay_with_their_cohort_through_queries_that_share_some(guard: CohortGuard) -> None:
    guard.admit("q-1", [digest(1), digest(2)], ROSTER, survivors_known=True)
    guard.admit("q-2", [digest(2), digest(3)], ROSTER, survivors_known=True)
    for row in (1, 2, 3):
        with pytest.raises(DifferencingError):
            guard.admit("q-3", [digest(row)], OTHER, survivors_known=True)


def test_a_query_id_is_used_once(guard: CohortGuard) -> None:
    guard.admit("q-1", [digest(1)], ROSTER, survivors_known=True)
    for row, roster in ((1, ROSTER), (2, ROSTER), (1, OTHER)):
        with pytest.raises(ReplayError):
            guard.admit("q-1", [digest(row)], roster, survivors_known=True)


@pytest.mark.parametrize(("first", "second"), [(True, False), (False, True), (False, False)])
def test_a_row_is_asked_once_where_survivors_are_unknown(
    guard: CohortGuard, first: bool, second: bool
) -> None:
    guard.admit("q-1", [digest(1)], ROSTER, survivors_known=first)
    with pytest.raises(DifferencingError, match="who is in such a sum"):
        guard.admit("q-2", [digest(1)], ROSTER, survivors_known=second)


def test_a_recovery_may_be_asked_for_again_but_not_changed(guard: CohortGuard) -> None:
    guard.admit("q-1", [digest(1)], ROSTER, survivors_known=True)
    guard.admit_recovery("q-1", frozenset({"a", "b"}))
    guard.admit_recovery("q-1", frozenset({"b", "a"}))
    for dropped in (set(), {"a"}, {"a", "b", "c"}, {"ab"}, {'a", "b'}):
        with pytest.raises(DifferencingError, match="another set"):
            guard.admit_recovery("q-1", frozenset(dropped))


def test_confirming_that_all_survived_closes_nothing_but_that_query(guard: CohortGuard) -> None:
    # Sums with self-masks are confirmed in every query, dropouts or not.
    for query_id in ("q-1", "q-2"):
        guard.admit(query_id, [digest(1)], ROSTER, survivors_known=True)
        guard.admit_recovery(query_id, frozenset())
        guard.admit_recovery(query_id, frozenset())
    guard.admit("q-3", [digest(2)], ROSTER, survivors_known=True)
    guard.admit_recovery("q-3", frozenset())
    for query_id in ("q-1", "q-2", "q-3"):
        with pytest.raises(DifferencingError, match="another set"):
            guard.admit_recovery(query_id, frozenset({"a"}))


def test_no_row_of_a_recovered_query_is_summed_again(guard: CohortGuard) -> None:
    guard.admit("q-1", [digest(1), digest(2)], ROSTER, survivors_known=True)
    guard.admit_recovery("q-1", frozenset({"a"}))
    for roster in (ROSTER, OTHER):
        with pytest.raises(DifferencingError):
            guard.admit("q-2", [digest(3), digest(2)], roster, survivors_known=True)


@pytest.mark.parametrize("query_id", ["q-1", "q-2", "q-3"])
def test_no_query_that_shares_a_row_is_recovered(guard: CohortGuard, query_id: str) -> None:
    # q-3 shares a row with q-2 only, which was not the first to be asked of q-2's other row.
    guard.admit("q-1", [digest(1)], ROSTER, survivors_known=True)
    guard.admit("q-2", [digest(1), digest(2)], ROSTER, survivors_known=True)
    guard.admit("q-3", [digest(2)], ROSTER, survivors_known=True)
    with pytest.raises(DifferencingError, match="another sum"):
        guard.admit_recovery(query_id, frozenset({"a"}))


def test_recoveries_that_make_no_sense_are_refused(guard: CohortGuard) -> None:
    with pytest.raises(BindingError):
        guard.admit_recovery("never asked", frozenset({"a"}))
    guard.admit("q-1", [digest(1)], ROSTER, survivors_known=True)
    guard.admit("q-2", [digest(2)], ROSTER)
    with pytest.raises(BindingError):
        guard.admit_recovery("q-2", frozenset({"a"}))


def test_malformed_queries_are_refused(guard: CohortGuard) -> None:
    for query_id, digests, roster in (
        ("", [digest(1)], ROSTER),
        ("x" * 65, [digest(1)], ROSTER),
        ("q", [], ROSTER),
        ("q", [b"short"], ROSTER),
        ("q", [digest(1)], b""),
        ("q", [digest(1)], bytes(65)),
    ):
        with pytest.raises(InvalidValueError):
            guard.admit(query_id, digests, roster)


def test_refusals_name_neither_query_nor_row_nor_site(guard: CohortGuard) -> None:
    row = b"canary-row" + bytes(22)
    guard.admit("canary-query", [row], b"canary-roster", survivors_known=True)
    refusals = []
    for attempt in (
        lambda: guard.admit("canary-query", [row], b"canary-roster"),
        lambda: guard.admit("canary-2", [row], b"canary-other"),
        lambda: guard.admit_recovery("canary-3", frozenset({"canary-site"})),
    ):
        with pytest.raises(FedInferError) as refused:
            attempt()
        refusals.append(str(refused.value))
    assert len(refusals) == 3
    assert not any("canary" in text for text in refusals)


# -- any order of queries and recoveries ----------------------------------------------------


class Differencing(RuleBasedStateMachine):
    """Whatever is admitted, no two sums that may have been opened differ for a row."""

    def __init__(self) -> None:
        super().__init__()
        self.guard = CohortGuard(None)
        self.queries: dict[str, tuple[frozenset[int], bytes, bool]] = {}
        self.dropped: dict[str, frozenset[str]] = {}

    @rule(
        rows=st.frozensets(st.integers(0, 4), min_size=1, max_size=3),
        roster=st.sampled_from([ROSTER, OTHER]),
        known=st.sampled_from([True, True, False]),
    )
    def ask(self, rows: frozenset[int], roster: bytes, known: bool) -> None:
        query_id = f"q-{len(self.queries)}"
        try:
            self.guard.admit(query_id, [digest(r) for r in rows], roster, survivors_known=known)
        except DifferencingError:
            # Refused only for a reason: a row is shared with an earlier query.
            assert any(rows & earlier for earlier, _, _ in self.queries.values())
        else:
            self.queries[query_id] = (rows, roster, known)

    @rule(number=st.integers(0, 6), dropped=st.sampled_from(["", "a", "b", "ab"]))
    def recover(self, number: int, dropped: str) -> None:
        try:
            self.guard.admit_recovery(f"q-{number}", frozenset(dropped))
        except (BindingError, DifferencingError):
            return
        assert self.dropped.setdefault(f"q-{number}", frozenset(dropped)) == frozenset(dropped)

    @invariant()
    def sums_of_a_row_have_the_same_terms(self) -> None:
        for row in range(5):
            asked = [
                (roster, known, self.dropped.get(query_id))
                for query_id, (rows, roster, known) in self.queries.items()
                if row in rows
            ]
            if len(asked) > 1:
                # One roster, pairwise masks in all, and nobody's dropout made good for.
                assert {entry[:2] for entry in asked} == {(asked[0][0], True)}
                assert not any(dropped for _, _, dropped in asked)


TestDifferencing = Differencing.TestCase
TestDifferencing.settings = settings(deadline=None, max_examples=60, stateful_step_count=25)


# -- threads, processes, restarts, damaged files --------------------------------------------


def test_a_restart_keeps_rows_ids_and_recoveries(tmp_path: Path) -> None:
    path = tmp_path / "site" / "cohorts"
    first = CohortGuard(path)
    first.admit("q-1", [digest(1)], ROSTER, survivors_known=True)
    first.admit("q-2", [digest(2)], ROSTER, survivors_known=True)
    first.admit_recovery("q-2", frozenset({"a"}))

    guard = CohortGuard(path)

    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ReplayError):
        guard.admit("q-1", [digest(9)], ROSTER, survivors_known=True)
    with pytest.raises(DifferencingError):
        guard.admit("q-3", [digest(1)], OTHER, survivors_known=True)
    with pytest.raises(DifferencingError):
        guard.admit("q-3", [digest(2)], ROSTER, survivors_known=True)
    guard.admit_recovery("q-2", frozenset({"a"}))


@pytest.mark.parametrize("kept", ["memory", "file"])
def test_of_threads_with_different_cohorts_one_wins(tmp_path: Path, kept: str) -> None:
    guard = CohortGuard(None if kept == "memory" else tmp_path / "cohorts")
    barrier, outcomes = threading.Barrier(6), []

    def ask(i: int) -> None:
        barrier.wait(timeout=30)
        try:
            guard.admit(f"q-{i}", [digest(1)], f"roster-{i}".encode(), survivors_known=True)
            outcomes.append("admitted")
        except DifferencingError:
            outcomes.append("refused")

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)

    assert sorted(outcomes) == ["admitted"] + ["refused"] * 5


RACER = """
import sys, time
from pathlib import Path
from fedinfer_flower.errors import DifferencingError
from fedinfer_flower.privacy.cohort_guard import CohortGuard

path, name = Path(sys.argv[1]), sys.argv[2]
Path(f"{path}.{name}").touch()
while not Path(f"{path}.go").exists():
    time.sleep(0.001)
guard = CohortGuard(path)
for row in range(60):
    try:
        guard.admit(f"{name}-{row}", [row.to_bytes(32, "big")], name.encode())
        print("admitted")
    except DifferencingError:
        print("refused")
"""


def test_of_processes_with_different_cohorts_one_wins_each_row(tmp_path: Path) -> None:
    path = tmp_path / "cohorts"
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(path), name], stdout=subprocess.PIPE, text=True
        )
        for name in ("a", "b")
    ]
    # Both are loaded before either starts, so that they create the file and ask side by side.
    while not all((tmp_path / f"cohorts.{name}").exists() for name in ("a", "b")):
        assert all(racer.poll() is None for racer in racers)
        time.sleep(0.01)
    (tmp_path / "cohorts.go").touch()
    one, other = (racer.communicate(timeout=120)[0].split() for racer in racers)

    assert len(one) == len(other) == 60
    assert all({x, y} == {"admitted", "refused"} for x, y in zip(one, other, strict=True))


def test_a_file_that_cannot_be_trusted_is_an_error(tmp_path: Path) -> None:
    path, key_id = tmp_path / "cohorts", key_fingerprint(bytes(32))
    CohortGuard(path, key_id=key_id).admit("q-1", [digest(1)], ROSTER)
    good = path.read_bytes()

    with pytest.raises(ConfigError, match="another key"):
        CohortGuard(path)
    with pytest.raises(ConfigError):
        CohortGuard(tmp_path / "deleted", key_id=key_id, must_exist=True)
    assert not (tmp_path / "deleted").exists()
    CohortGuard(path, key_id=key_id, must_exist=True)
    for damaged in (b"", b"text" * 1000, good[: len(good) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError):
            CohortGuard(path, key_id=key_id)
        assert path.read_bytes() == damaged
    path.write_bytes(good)
    path.chmod(0o604)
    with pytest.raises(ConfigError, match="read by others"):
        CohortGuard(path, key_id=key_id)


def test_a_file_of_answers_is_not_one_of_cohorts(tmp_path: Path) -> None:
    AnswerCache(tmp_path / "answers", max_rows=1)
    CohortGuard(tmp_path / "cohorts")
    with pytest.raises(ConfigError, match="another kind"):
        CohortGuard(tmp_path / "answers")
    with pytest.raises(ConfigError, match="another kind"):
        AnswerCache(tmp_path / "cohorts", max_rows=1)


def test_a_file_damaged_while_open_refuses(tmp_path: Path) -> None:
    path = tmp_path / "cohorts"
    guard = CohortGuard(path)
    guard.admit("q-1", [digest(1)], ROSTER)
    path.write_bytes(b"not a database any more" * 500)
    with pytest.raises(ConfigError):
        guard.admit("q-2", [digest(1)], OTHER)
    path.unlink()
    with pytest.raises(ConfigError):
        guard.admit("q-2", [digest(1)], OTHER)
    assert not path.exists()
