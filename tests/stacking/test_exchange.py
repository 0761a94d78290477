"""What is sealed for one job, site and direction opens in no other."""

import dataclasses

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from fedinfer_flower.clients.stack_shelf import MAX_STACKS, bring_stack, keep_stack, kept_stack
from fedinfer_flower.errors import (
    BindingError,
    EnvelopeError,
    FedInferError,
    InvalidValueError,
    LabelSpaceError,
    SealError,
    ShapeError,
    SignatureError,
    SizeLimitError,
)
from fedinfer_flower.query import SiteProfile
from fedinfer_flower.wire import stack_messages as wire
from fedinfer_flower.wire.directory import Directory, SiteCard
from fedinfer_flower.wire.envelope import decode, encode
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.messages import Question

from .conftest import made_up

RUN = 7
ROWS = np.arange(12.0).reshape(4, 3)
ANSWERS = np.full((4, 2), 0.5)


@pytest.fixture(scope="module")
def identities():
    return sorted((Identity.generate() for _ in range(3)), key=lambda i: i.key_id)


@pytest.fixture(scope="module")
def job(identities):
    cards = tuple(
        SiteCard.signed(SiteProfile(name=f"s{n}", classes=("x", "y")), identity=i, run_id=RUN)
        for n, i in enumerate(identities)
    )
    directory = Directory(run_id=RUN, cards=cards)
    return wire.StackJob(job_id="job", classes=("x", "y"), directory=directory)


def test_rows_open_at_each_peer(job, identities):
    sealed = wire.seal_rows(ROWS, job, identity=identities[0], to=(1, 2))
    for peer in identities[1:]:
        opened = wire.open_rows(sealed, job, identity=peer, owner=identities[0].public, max_rows=10)
        assert np.array_equal(opened, ROWS)


def test_rows_open_at_nobody_else(job, identities):
    sealed = wire.seal_rows(ROWS, job, identity=identities[0], to=(1,))
    with pytest.raises(SealError):
        wire.open_rows(sealed, job, identity=identities[2], owner=identities[0].public, max_rows=10)


@pytest.mark.parametrize("change", [{"job_id": "other"}, {"classes": ("y", "x")}])
def test_rows_and_answers_of_another_job_do_not_open(change, job, identities):
    other = dataclasses.replace(job, **change)
    a, b = identities[:2]
    rows = wire.seal_rows(ROWS, job, identity=a, to=(1,))
    answers = wire.seal_answers(ANSWERS, job, identity=b, owner=a.public)
    with pytest.raises(SealError):
        wire.open_rows(rows, other, identity=b, owner=a.public, max_rows=10)
    with pytest.raises(SealError):
        wire.open_answers(answers, other, identity=a, site=b.public, n_rows=4)


def test_rows_that_another_site_made_up_are_refused(job, identities):
    a, b, c = identities
    forged = wire.seal_rows(ROWS, job, identity=c, to=(1,))
    with pytest.raises(SealError):  # bound to c, who is said to be a
        wire.open_rows(forged, job, identity=b, owner=a.public, max_rows=10)


def test_answers_that_a_coordinator_made_up_are_refused(job, identities):
    a, b = identities[:2]
    stranger = Identity.generate()
    info = wire._info("stack answers", job, a.key_id, b.key_id)
    plain = ANSWERS.astype("<f8").tobytes()
    forged = wire.seal_to(a.public, stranger.sign("stack answers", info + plain) + plain, info=info)
    with pytest.raises(SignatureError):
        wire.open_answers(forged, job, identity=a, site=b.public, n_rows=4)


def test_answers_open_for_the_owner_of_the_rows_alone(job, identities):
    a, b, c = identities
    sealed = wire.seal_answers(ANSWERS, job, identity=b, owner=a.public)
    opened = wire.open_answers(sealed, job, identity=a, site=b.public, n_rows=4)
    assert np.array_equal(opened, ANSWERS)
    with pytest.raises(SealError):
        wire.open_answers(sealed, job, identity=c, site=b.public, n_rows=4)


@pytest.mark.parametrize(
    "answers", [np.full((4, 2), 0.7), np.full((3, 2), 0.5), np.array([[1.5, -0.5]] * 4)]
)
def test_answers_that_are_no_probabilities_are_refused(answers, job, identities):
    a, b = identities[:2]
    sealed = wire.seal_answers(answers, job, identity=b, owner=a.public)
    with pytest.raises(ShapeError):
        wire.open_answers(sealed, job, identity=a, site=b.public, n_rows=4)


def test_too_many_rows_are_refused_before_the_model_sees_them(job, identities):
    sealed = wire.seal_rows(ROWS, job, identity=identities[0], to=(1,))
    with pytest.raises(SizeLimitError):
        wire.open_rows(sealed, job, identity=identities[1], owner=identities[0].public, max_rows=3)


def test_step_gives_back_its_job(job):
    envelope = decode(encode(wire.step(job, {"body-1": b"x"})))
    again, sections = wire.read_step(envelope)
    assert again.binding == job.binding
    assert {name: bytes(data) for name, data in sections.items()} == {"body-1": b"x"}


def test_step_of_another_run_is_refused(job):
    envelope = dataclasses.replace(wire.step(job, {}), run_id=RUN + 1)
    with pytest.raises(BindingError):
        wire.read_step(envelope)


@pytest.mark.parametrize("classes", [["x"], ["x", "x"], "xy", None])
def test_step_without_two_classes_is_refused(classes, job):
    envelope = dataclasses.replace(wire.step(job, {}), meta={"classes": classes})
    with pytest.raises(EnvelopeError):
        wire.read_step(envelope)


# -- the shelf ---------------------------------------------------------------------------


def context():
    return Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})


def question(fitted, classes=None, stack=None):
    return Question(
        query_id="q",
        inputs=np.zeros((1, 1)),
        classes=fitted.classes if classes is None else classes,
        n_sites=3,
        rule=fitted.kind,
        rule_options={"stack": fitted.digest if stack is None else stack},
        protection="plain",
    )


@pytest.mark.parametrize("with_home", [False, True])
def test_kept_stack_is_found_and_others_are_not(with_home, tmp_path):
    folder, here = (tmp_path if with_home else None), context()
    fitted = made_up("linear-stack", seed=41)
    with pytest.raises(InvalidValueError, match="does not keep"):
        bring_stack(question(fitted), here, folder)
    keep_stack(fitted, here, folder)
    bring_stack(question(fitted), here, folder)
    assert kept_stack(fitted.digest, here, folder).digest == fitted.digest


def test_stack_that_only_the_process_knows_is_refused():
    from fedinfer_flower.ensemble.fitted import remember

    fitted = made_up("linear-stack", seed=42)
    remember(fitted)  # as another site of the same process would
    with pytest.raises(InvalidValueError, match="does not keep"):
        bring_stack(question(fitted), context(), None)


def test_other_label_space_is_refused_before_the_model_runs():
    here, fitted = context(), made_up("linear-stack", seed=43)
    keep_stack(fitted, here, None)
    with pytest.raises(LabelSpaceError):
        bring_stack(question(fitted, classes=fitted.classes[::-1]), here, None)


@pytest.mark.parametrize("digest", ["../../identity.json", "", "0" * 63])
def test_digest_that_is_a_path_is_refused(digest, tmp_path):
    with pytest.raises(FedInferError):
        bring_stack(question(made_up("linear-stack"), stack=digest), context(), tmp_path)


def test_damaged_file_on_the_shelf_is_refused(tmp_path):
    a, b = made_up("linear-stack", seed=44), made_up("linear-stack", seed=45)
    keep_stack(a, context(), tmp_path)
    (tmp_path / "stacks" / a.digest).write_bytes(b.to_bytes())
    with pytest.raises(InvalidValueError, match="damaged"):
        kept_stack(a.digest, context(), tmp_path)


def test_rules_without_a_stack_need_none():
    bring_stack(question(made_up("linear-stack"), stack="untrained"), context(), None)


def test_full_shelf_lets_the_oldest_go():
    here = context()
    made = [
        made_up("gated-mixture", seed=seed, n_sites=2, n_classes=2) for seed in range(MAX_STACKS)
    ]
    for fitted in made:
        keep_stack(fitted, here, None)
    keep_stack(made[0], here, None)  # known: now the youngest
    newest = made_up("gated-mixture", seed=99, n_sites=2, n_classes=2)
    keep_stack(newest, here, None)

    assert kept_stack(made[0].digest, here, None).digest == made[0].digest
    assert kept_stack(newest.digest, here, None).digest == newest.digest
    with pytest.raises(InvalidValueError):
        kept_stack(made[1].digest, here, None)
