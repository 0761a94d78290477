"""Known values of single schemes, and what those who do no work earn."""

import numpy as np
import pytest

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.incentives import AuditedAnswers, make_scheme
from fedinfer_flower.incentives.base import likeliest
from fedinfer_flower.incentives.measures import attacker_share

LINEAR_WITH_LABELS = ["audited-blend", "smooth-shapley", "linear-ca", "brier-shapley"]


def specialists(seed, *, n_sites=5, n_queries=300, n_classes=10):
    """Sites that each know some of the classes: sure and right there, guessing elsewhere."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_classes, n_queries)
    p = np.empty((n_sites, n_queries, n_classes))
    for k in range(n_sites):
        known = rng.random(n_classes) < 0.5
        known[k % n_classes] = True
        logits = rng.normal(size=(n_queries, n_classes))
        logits += 4 * np.eye(n_classes)[labels] * known[labels][:, None]
        p[k] = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return AuditedAnswers(probabilities_ktc=p, labels=labels)


def joined_by(answers, newcomer):
    p = np.concatenate([answers.probabilities_ktc, newcomer[None]])
    return AuditedAnswers(probabilities_ktc=p, labels=answers.labels)


def idle(kind, answers, rng):
    shape = (answers.n_queries, answers.n_classes)
    if kind == "uniform":
        return np.full(shape, 1 / shape[1])
    votes = rng.integers(0, shape[1], shape[0])
    if kind == "constant":
        votes = np.full(shape[0], np.bincount(answers.labels).argmax())
    return np.eye(shape[1])[votes]


@pytest.mark.parametrize("name", LINEAR_WITH_LABELS)
@pytest.mark.parametrize("kind", ["constant", "uniform", "random"])
def test_idle_site_gets_a_fiftieth_of_the_pot_at_most(name, kind):
    share = []
    for seed in range(5):
        answers = specialists(seed)
        newcomer = idle(kind, answers, np.random.default_rng(1000 + seed))
        values = make_scheme(name).contributions(joined_by(answers, newcomer))
        share.append(attacker_share(values, {5}))

    assert np.mean(share) <= 0.02


@pytest.mark.parametrize("kind", ["constant", "random"])
def test_idle_site_is_paid_without_audits(kind):
    # What the audits are for: the baselines pay it several times as much.
    answers = specialists(0)
    newcomer = idle(kind, answers, np.random.default_rng(1000))

    values = make_scheme("entropy").contributions(joined_by(answers, newcomer))

    assert attacker_share(values, {5}) > 0.1


def test_echo_of_the_joint_answer_is_paid_even_with_audits():
    # It is right as often as the ensemble: only sealing keeps answers from being echoed.
    answers = specialists(0)
    joint = answers.probabilities_ktc.mean(axis=0)

    for name in (*LINEAR_WITH_LABELS, "shapley"):
        values = make_scheme(name).contributions(joined_by(answers, joint))
        assert attacker_share(values, {5}) > 0.05


def test_equal_and_final_agreement_and_entropy_share_out_one():
    answers = specialists(1)

    for name in ("equal", "final-agreement", "entropy"):
        assert make_scheme(name).contributions(answers).sum() == pytest.approx(1.0, abs=1e-9)


def test_proper_score_is_best_where_one_says_what_one_believes():
    believed = np.array([0.6, 0.3, 0.1])
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    scheme = make_scheme("proper-score")
    rng = np.random.default_rng(0)

    def score(said):
        p = np.tile(said, (1, 100, 1))
        return scheme.contributions(AuditedAnswers(probabilities_ktc=p, labels=labels))[0]

    honest = score(believed)
    assert all(score(said) < honest for said in rng.dirichlet(np.ones(3), size=50))


@pytest.mark.parametrize("name", ["linear-ca", "audited-blend"])
def test_any_fixed_answer_earns_exactly_nothing(name):
    answers = specialists(2)
    rng = np.random.default_rng(0)

    for fixed in rng.dirichlet(np.ones(10), size=10):
        newcomer = np.tile(fixed, (answers.n_queries, 1))
        values = make_scheme(name).contributions(joined_by(answers, newcomer))
        assert values[5] == pytest.approx(0.0, abs=1e-12)


def test_linear_ca_without_labels_leaves_an_owners_sites_out_of_its_reference():
    good = specialists(3, n_sites=2)
    rng = np.random.default_rng(0)
    noise = np.eye(10)[rng.integers(0, 10, good.n_queries)]
    # Three copies of noise outvote two good sites: the joint answer is theirs.
    p = np.concatenate([good.probabilities_ktc, np.stack([noise] * 3)])
    owners = ("a", "b", "c", "c", "c")

    bent = make_scheme("linear-ca", {"leave_out": False}).contributions(
        AuditedAnswers(probabilities_ktc=p, owners=owners)
    )
    fair = make_scheme("linear-ca").contributions(
        AuditedAnswers(probabilities_ktc=p, owners=owners)
    )

    assert bent[2] > bent[:2].max()
    # Agreement by chance over 300 queries of 10 classes: a standard error of 0.02.
    assert abs(fair[2]) < 0.1
    assert (
        make_scheme("linear-ca").contributions(
            AuditedAnswers(probabilities_ktc=p, owners=("c",) * 5)
        )
        == 0.0
    ).all()


def test_constant_answer_earns_in_the_accuracy_game_where_classes_are_unlike_in_number():
    # Why the blend is centred: the frequent class breaks ties, and is right to.
    rng = np.random.default_rng(0)
    labels = (rng.random(400) < 0.1).astype(int)
    weak = rng.normal(size=(3, 400, 2)) + 0.8 * np.eye(2)[labels]
    p = np.exp(weak) / np.exp(weak).sum(axis=-1, keepdims=True)
    constant = np.eye(2)[np.zeros(400, dtype=int)]
    answers = joined_by(AuditedAnswers(probabilities_ktc=p, labels=labels), constant)

    free = make_scheme("audited-blend", {"centred": False}).contributions(answers)
    centred = make_scheme("audited-blend").contributions(answers)

    assert attacker_share(free, {3}) > 0.1
    assert attacker_share(make_scheme("shapley").contributions(answers), {3}) > 0.1
    assert attacker_share(centred, {3}) < 1e-9


def test_correlated_agreement_sees_through_other_names_for_the_classes():
    answers = specialists(4, n_classes=3)
    renamed = answers.probabilities_ktc.copy()
    renamed[4] = renamed[4][:, [1, 2, 0]]

    values = make_scheme("correlated-agreement").contributions(answers)
    same = make_scheme("correlated-agreement").contributions(
        AuditedAnswers(probabilities_ktc=renamed)
    )

    assert np.allclose(values, same, atol=1e-9)


@pytest.mark.parametrize("name", ["correlated-agreement", "dmi"])
def test_peer_schemes_score_nobody_by_his_own_other_sites(name):
    answers = specialists(5, n_sites=3, n_classes=2)
    p = np.concatenate([answers.probabilities_ktc, answers.probabilities_ktc[:1]])
    scheme = make_scheme(name)

    with_copy = scheme.contributions(
        AuditedAnswers(probabilities_ktc=p, owners=("a", "b", "c", "a"))
    )
    alone = scheme.contributions(AuditedAnswers(probabilities_ktc=p[:3], owners=("a", "b", "c")))

    assert with_copy[0] == pytest.approx(alone[0], abs=1e-12)


@pytest.mark.parametrize(("name", "n_queries"), [("correlated-agreement", 1), ("dmi", 5)])
def test_peer_schemes_refuse_too_few_queries(name, n_queries):
    p = np.full((3, n_queries, 3), 1 / 3)

    with pytest.raises(InvalidValueError):
        make_scheme(name).contributions(AuditedAnswers(probabilities_ktc=p))


def test_dmi_says_nothing_where_a_class_is_never_voted():
    answers = specialists(6, n_classes=3)
    p = answers.probabilities_ktc.copy()
    p[0, :, 2] = 0.0
    p[0] /= p[0].sum(axis=1, keepdims=True)

    assert make_scheme("dmi").contributions(AuditedAnswers(probabilities_ktc=p))[0] == 0.0


def test_likeliest_does_not_let_rounding_decide_a_tie():
    terms = np.array([0.1, 0.2, 0.3])

    assert likeliest(np.array([0.6, sum(terms)])) == 0
    assert likeliest(np.array([sum(terms[::-1]), 0.6000000001])) == 0
    assert likeliest(np.array([0.6, 0.61])) == 1
