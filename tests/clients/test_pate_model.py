"""Sub-teachers behind a noisy vote: one vote a record, memory, budget, and what leaves."""

from __future__ import annotations

import logging
import math
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.linear_model import LogisticRegression

from fedinfer_flower.clients.pate_model import PateModel, shard_of_records
from fedinfer_flower.clients.site_model import prepare
from fedinfer_flower.errors import BudgetExceededError, ModelAnswerError, ModelError
from fedinfer_flower.privacy.gaussian_dp import epsilon_of
from fedinfer_flower.privacy.gnmax import ABSTAIN, ConfidenceCheck, GNMax
from fedinfer_flower.query import CountsKind

SIGNIFICANCE = 1e-6
RNG = np.random.default_rng(5)
CENTRES = np.array([[4.0, 0.0], [-4.0, 0.0], [0.0, 4.0]])
LABELS = RNG.integers(0, 3, 600)
INPUTS = CENTRES[LABELS] + RNG.normal(size=(600, 2))
NAMES = np.array(["cat", "dog", "owl"])


def some_rows(n_rows: int, *, seed: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-6.0, 6.0, (n_rows, 2))


class NearestMean:
    """Quick, and any record moves it."""

    def __init__(self, inputs, labels) -> None:
        self.classes = np.unique(labels)
        self.means = np.stack([inputs[labels == c].mean(axis=0) for c in self.classes])

    def predict(self, rows):
        return self.classes[((rows[:, None] - self.means) ** 2).sum(axis=2).argmin(axis=1)]


def make(fit=NearestMean, inputs=INPUTS, labels=LABELS, **changes) -> PateModel:
    options = {
        "classes": [0, 1, 2],
        "n_teachers": 60,
        "mechanism": GNMax(sigma=4.0),
        "epsilon_cap": 20.0,
        "delta": 1e-5,
    }
    return PateModel(inputs, labels, fit=fit, **options | changes)


def votes_of(model: PateModel, rows: np.ndarray) -> np.ndarray:
    return model._counts(np.asarray(rows, dtype=float))


# -- one record, one vote ---------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 599), st.integers(0, 2), st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=2)
)
def test_replacing_a_record_moves_one_vote_at_most(record, label, values) -> None:
    inputs, labels = INPUTS.copy(), LABELS.copy()
    inputs[record], labels[record] = values, label
    rows = some_rows(30, seed=record)

    moved = votes_of(make(inputs=inputs, labels=labels), rows) - votes_of(make(), rows)

    assert np.abs(moved).sum(axis=1).max() <= 2
    assert (moved.sum(axis=1) == 0).all()


def test_replacing_all_records_of_a_group_moves_one_vote_at_most() -> None:
    groups = [f"patient-{i // 7}" for i in range(600)]
    inputs, labels = INPUTS.copy(), LABELS.copy()
    mine = np.array([group == "patient-3" for group in groups])
    inputs[mine], labels[mine] = 50.0, 2
    rows = some_rows(200)
    options = {"groups": groups, "n_teachers": 20}

    moved = votes_of(make(inputs=inputs, labels=labels, **options), rows)
    moved = moved - votes_of(make(**options), rows)

    assert 0 < np.abs(moved).sum(axis=1).max() <= 2
    # Without groups the same change reaches seven sub-teachers.
    spread = votes_of(make(inputs=inputs, labels=labels), rows) - votes_of(make(), rows)
    assert np.abs(spread).sum(axis=1).max() > 2


@given(st.integers(2, 40), st.integers(0, 200))
def test_shards_are_a_partition_that_sees_no_data(n_shards: int, more: int) -> None:
    n_records = n_shards + more
    shards = shard_of_records(n_records, n_shards=n_shards)
    sizes = np.bincount(shards, minlength=n_shards)
    assert sizes.sum() == n_records
    assert sizes.max() - sizes.min() <= 1


def test_a_group_stays_where_it_is_when_others_go() -> None:
    groups = [f"g{i}" for i in range(300)]
    whole = shard_of_records(300, n_shards=20, groups=groups)
    rest = shard_of_records(299, n_shards=20, groups=groups[1:])
    np.testing.assert_array_equal(whole[1:], rest)


def test_a_failing_sub_teacher_moves_its_own_vote_only(caplog: pytest.LogCaptureFixture) -> None:
    class Fragile(NearestMean):
        def __init__(self, inputs, labels) -> None:
            super().__init__(inputs, labels)
            self.breaks = bool((np.abs(inputs) > 90.0).any())

        def predict(self, rows):
            if self.breaks and len(rows) == 2:  # not on its shard, when it is tried out
                raise ValueError("quotes 97.0 of the records")
            return super().predict(rows)

    inputs = INPUTS.copy()
    inputs[17] = 97.0
    rows = np.array([[-4.0, 0.0], [0.0, 4.0]])

    with caplog.at_level(logging.WARNING):
        moved = votes_of(make(Fragile, inputs=inputs), rows) - votes_of(make(Fragile), rows)

    np.testing.assert_array_equal(moved, [[1, -1, 0], [1, 0, -1]])
    assert "97" not in caplog.text
    assert "ValueError" in caplog.text


# -- answers ----------------------------------------------------------------------------------


def test_sub_teachers_that_agree_are_right() -> None:
    model = make(lambda x, y: LogisticRegression().fit(x, y), labels=NAMES[LABELS], classes=NAMES)
    # 60 votes to none, noise 4: the margin is 10.6 standard deviations of the difference.
    np.testing.assert_array_equal(model(CENTRES), np.eye(3))
    np.testing.assert_array_equal(model.predict(CENTRES), [0, 1, 2])


def test_disagreement_abstains_and_abstaining_is_uniform() -> None:
    check = ConfidenceCheck(threshold=50.0, sigma=1.5)
    model = make(mechanism=GNMax(sigma=4.0, check=check))
    between = CENTRES[:2].mean(axis=0)  # about half of the votes each
    rows = np.stack([CENTRES[0], between])

    # 10 votes above and some 20 below the threshold: 6.7 standard deviations and more.
    np.testing.assert_array_equal(model.predict(rows), [0, ABSTAIN])
    np.testing.assert_allclose(model(rows)[1], 1.0 / 3.0)
    report = model.report()
    assert (report.n_rows, report.n_answered) == (2, 1)


def test_shard_of_one_class_votes_for_it_without_being_fitted() -> None:
    labels = np.repeat([0, 1], 50)
    inputs = np.zeros((100, 1))
    model = make(_not_called, inputs, labels, n_teachers=2, classes=[0, 1], groups=_two_shards())
    assert votes_of(model, np.zeros((3, 1))).tolist() == [[1, 1]] * 3


def _not_called(inputs, labels):
    raise AssertionError("one class only")


def _two_shards() -> list[str]:
    names = [f"n{i}" for i in range(20)]
    shards = shard_of_records(20, n_shards=2, groups=names)
    first, second = names[int(np.argmin(shards))], names[int(np.argmax(shards))]
    return [first] * 50 + [second] * 50


# -- memory -----------------------------------------------------------------------------------


def test_the_same_row_gets_the_same_label_at_no_charge() -> None:
    # Noise as large as the vote: fresh draws would differ.
    model = make(mechanism=GNMax(sigma=200.0))
    rows = some_rows(40)
    first = model.predict(rows)
    spent = model.report()

    for again in (rows, rows[::-1][::-1], np.asfortranarray(rows), np.repeat(rows, 2, axis=0)[::2]):
        np.testing.assert_array_equal(model.predict(again), first)
    np.testing.assert_array_equal(model.predict(rows[[3, 3, 7]]), first[[3, 3, 7]])
    assert model.report() == spent
    assert spent.n_rows == 40


def test_averaging_works_against_fresh_noise_and_not_against_memory() -> None:
    # Between class 0 and 1, where single votes show: 33 to 27, say. Noise hides it once.
    row, sigma, n_asked = CENTRES[:2].mean(axis=0)[None] + [[0.3, 0.0]], 30.0, 4000
    model = make(mechanism=GNMax(sigma=sigma))
    counts = votes_of(model, row)
    gap = (counts[0, 0] - counts[0, 1]) / (math.sqrt(2.0) * sigma)
    assert gap > 0.1

    fresh = GNMax(sigma=sigma).release(np.repeat(counts[:, :2], n_asked, axis=0))
    remembered = [int(model.predict(row)[0]) for _ in range(50)]

    # The attack: from the share of answers the vote gap comes out.
    share = float((fresh == 0).mean())
    assert stats.norm.ppf(share) == pytest.approx(gap, abs=0.12)  # 5 std of a share of 4000
    assert len(set(remembered)) == 1
    assert model.report().n_rows == 1


def test_duplicates_in_a_batch_are_charged_once() -> None:
    model = make()
    rows = np.repeat(some_rows(3), 5, axis=0)
    labels = model.predict(rows).reshape(3, 5)
    assert (labels == labels[:, :1]).all()
    assert model.report().n_rows == 3


def test_a_row_changed_in_its_last_bit_is_charged() -> None:
    model = make()
    model.predict(np.array([[1.0, 2.0]]))
    model.predict(np.array([[1.0, np.nextafter(2.0, 3.0)]]))
    assert model.report().n_rows == 2


def test_threads_share_one_memory_and_one_budget() -> None:
    model = make(mechanism=GNMax(sigma=50.0))
    rows = some_rows(64)
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(model.predict(rows))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 8
    for answer in answers:
        np.testing.assert_array_equal(answer, answers[0])
    assert model.report().n_rows == 64


# -- budget -----------------------------------------------------------------------------------


def test_budget_ends_where_the_public_epsilon_would_pass_the_cap() -> None:
    sigma, cap = 10.0, 3.0
    model = make(mechanism=GNMax(sigma=sigma), epsilon_cap=cap)
    rows = some_rows(200)

    def ask_all() -> None:
        for row in rows:
            model.predict(row[None])

    with pytest.raises(BudgetExceededError):
        ask_all()
    answered = model.report().n_rows
    assert epsilon_of(math.sqrt(answered * 2.0) / sigma, 1e-5) <= cap
    assert epsilon_of(math.sqrt((answered + 1) * 2.0) / sigma, 1e-5) > cap
    # What was answered stays free, and a batch with one new row is refused as a whole.
    model.predict(rows[:answered])
    with pytest.raises(BudgetExceededError):
        model.predict(rows[: answered + 1])
    assert model.report().n_rows == answered


def test_a_new_model_goes_on_where_the_last_one_ended() -> None:
    first = make(mechanism=GNMax(sigma=10.0), epsilon_cap=3.0)
    first.predict(some_rows(10))
    spent = first.report().mu_squared
    second = make(mechanism=GNMax(sigma=10.0), epsilon_cap=3.0, mu_squared_before=spent)
    second.predict(some_rows(10))
    assert second.report().mu_squared == pytest.approx(2 * spent)
    with pytest.raises(BudgetExceededError):
        second.predict(some_rows(10, seed=8))


# -- at a site --------------------------------------------------------------------------------


def test_answers_as_a_local_model_of_a_site(make_site) -> None:
    model = make(labels=NAMES[LABELS], classes=NAMES)
    site = make_site(lambda context: model.local_model())

    scores = site.scores(inputs=CENTRES, classes=tuple(NAMES), rule="majority-vote")
    again = site.scores(inputs=CENTRES, classes=tuple(NAMES), rule="majority-vote", query_id="q-1")

    np.testing.assert_array_equal(scores, np.eye(3))
    np.testing.assert_array_equal(again, scores)
    assert model.report().n_rows == 3


def test_an_abstention_splits_the_vote_of_the_site(make_site) -> None:
    check = ConfidenceCheck(threshold=60.0, sigma=0.5)
    model = make(mechanism=GNMax(sigma=4.0, check=check))
    site = make_site(lambda context: model.local_model())
    row = CENTRES[:2].mean(axis=0)[None]
    scores = site.scores(inputs=row, classes=("0", "1", "2"), rule="majority-vote")
    # float32 on the way.
    np.testing.assert_allclose(scores, 1.0 / 3.0, rtol=1e-6)


def test_the_site_is_refused_beyond_its_budget(make_site) -> None:
    model = make(mechanism=GNMax(sigma=10.0), epsilon_cap=1.0)
    site = make_site(lambda context: model.local_model())
    error = site.error(inputs=INPUTS[:100], classes=("0", "1", "2"))
    assert isinstance(error, BudgetExceededError | ModelAnswerError)
    assert model.report().n_rows == 0


def test_the_profile_of_the_site_holds_public_facts_only() -> None:
    profiles = []
    for labels in (LABELS, np.roll(LABELS, 200)):
        model = make(labels=labels)
        model.predict(INPUTS[:20])
        prepared = prepare(model.local_model(), name="a", share_counts=CountsKind.COUNTS)
        profiles.append(prepared.profile)
        assert model.report().n_rows == 20  # preparing asked nothing
    assert profiles[0] == profiles[1]
    card = profiles[0].model_card
    assert card["privacy"] == "gnmax"
    assert card["epsilon-cap"] == "20"
    assert profiles[0].temperature == 1.0
    assert not profiles[0].familiarity
    assert not profiles[0].calibrated


# -- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inputs",
    [
        np.zeros((2, 3)),
        np.zeros(2),
        np.array([[np.nan, 0.0]]),
        np.array([[0.0, np.inf]]),
        np.array([["a", "b"]]),
        np.zeros((1, 2), dtype=complex),
    ],
)
def test_inputs_unlike_the_records_are_refused_before_any_vote(inputs) -> None:
    model = make(Unused)
    with pytest.raises(ModelAnswerError):
        model.predict(inputs)
    assert model.report().n_rows == 0


class Unused(NearestMean):
    def predict(self, rows):
        assert len(rows) == 10, "asked beyond its own shard"
        return super().predict(rows)


def test_no_rows_are_no_answer() -> None:
    model = make()
    assert model(np.empty((0, 2))).shape == (0, 3)
    assert model.report().n_rows == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"n_teachers": 1},
        {"n_teachers": 601},
        {"classes": [0, 1]},
        {"classes": [0]},
        {"classes": [0, 1, 2, 2.0]},
        {"labels": LABELS[:-1]},
        {"inputs": INPUTS[:, 0]},
        {"inputs": np.full_like(INPUTS, np.nan)},
        {"groups": ["a"] * 3},
        {"groups": ["a"] * 600},
        {"fit": lambda x, y: None},
        {"fit": lambda x, y: LogisticRegression().fit(x, NAMES[y])},
        {"mechanism": GNMax(sigma=1.0, check=ConfidenceCheck(threshold=61.0, sigma=1.0))},
    ],
)
def test_records_that_do_not_fit_are_refused(changes) -> None:
    with pytest.raises(ModelError):
        make(**changes)


def test_importing_the_model_imports_no_extra() -> None:
    import subprocess
    import sys

    code = (
        "import fedinfer_flower.clients.pate_model, sys\n"
        "assert not {'sklearn', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
