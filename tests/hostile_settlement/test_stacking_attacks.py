"""Stacks against whoever trains them, asks with them, or carries the messages."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedinfer_flower import InferenceMod, LocalModel
from fedinfer_flower.clients.stack_shelf import bring_stack, keep_stack
from fedinfer_flower.clients.stack_training import local_step
from fedinfer_flower.ensemble.fitted import FittedAggregator
from fedinfer_flower.ensemble.stack_participation import check_participation, stack_scores
from fedinfer_flower.errors import ConfigError, FedInferError, UntrustedKeyError
from fedinfer_flower.privacy.base import make_protection
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.wire import stack_messages
from fedinfer_flower.wire.actions import message_type
from fedinfer_flower.wire.directory import Directory, SiteCard
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.messages import Question
from fedinfer_flower.wire.records import pack, unpack
from fedinfer_flower.wire.sealing import SealedBody

K, C = 10, 3
CLASSES = ("a", "b", "c")


def fitted_of(weights_kcc, sites):
    return FittedAggregator(
        kind="linear-stack",
        arrays={"weights_kcc": weights_kcc, "bias_kc": np.zeros(weights_kcc.shape[:2])},
        card={
            "classes": list(CLASSES),
            "sites": sites,
            "trainer": "FedAdam",
            "rounds": 3,
            "rows": 100,
        },
    )


def half_silent():
    """Six sites of ten alike, four with matrices of zeros: whose sum it is depends on who."""
    weights = np.tile(2.0 * np.eye(C), (K, 1, 1))
    weights[6:] = 0.0
    return weights


def question_to(fitted, identities, options=None):
    return Question(
        query_id="q",
        inputs=np.zeros((1, 1)),
        classes=CLASSES,
        n_sites=len(identities),
        rule="linear-stack",
        rule_options={"stack": fitted.digest},
        protection="secagg",
        protection_options=options or {},
        roster=directory_of(identities).roster,
    )


def test_stack_does_not_read_a_site_that_is_asked_with_silent_ones():
    identities = sorted((Identity.generate() for _ in range(K)), key=lambda i: i.key_id)
    fitted = fitted_of(half_silent(), [i.key_id for i in identities])
    check_participation(fitted)  # as at installation: it passes
    asked = [0, 8, 9]  # three sites, the least that `secagg` sums
    rng = np.random.default_rng(0)
    answers = rng.dirichlet(np.ones(C), size=(K, 50))
    total = stack_scores(fitted, answers)[asked].sum(axis=0)
    assert np.abs(total / 2.0 - answers[0]).max() < 1e-9  # the attack: the sum is one answer
    question = question_to(fitted, [identities[k] for k in asked])
    here = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
    keep_stack(fitted, here, None)
    with pytest.raises(FedInferError):
        bring_stack(question, here, None)


def test_stack_does_not_read_a_site_when_all_but_silent_ones_drop_out():
    identities = sorted((Identity.generate() for _ in range(5)), key=lambda i: i.key_id)
    weights = np.tile(2.0 * np.eye(C), (5, 1, 1))
    weights[3:] = 0.0
    fitted = fitted_of(weights, [i.key_id for i in identities])
    check_participation(fitted)
    # Two of five may be called dropped: the first is left with the two that say nothing.
    assert make_protection("secagg", {"dropout_share": 0.49}).least_sites(5) == 3
    answers = np.random.default_rng(0).dirichlet(np.ones(C), size=(5, 50))
    total = stack_scores(fitted, answers)[[0, 3, 4]].sum(axis=0)
    assert np.abs(total / 2.0 - answers[0]).max() < 1e-9  # the attack
    here = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
    keep_stack(fitted, here, None)
    with pytest.raises(FedInferError):
        bring_stack(question_to(fitted, identities, {"dropout_share": 0.49}), here, None)


# -- labels by gradients --------------------------------------------------------------------


def coded_answers(n_rows):
    """Probabilities that write a row's number in one entry, as exactly as float64 can."""
    answers = np.zeros((n_rows, C))
    answers[:, 0] = 0.5 ** (1 + np.arange(n_rows))
    answers[:, 1] = 1.0 - answers[:, 0]
    return answers


def test_coordinator_and_one_peer_read_every_held_out_label_from_one_gradient():
    """What `StackingMod` says is less: "about how often each class comes". This passes today."""
    rng = np.random.default_rng(4)
    n_rows = 40
    labels = rng.integers(0, C, size=n_rows)
    answers = np.stack([coded_answers(n_rows), rng.dirichlet(np.ones(C), size=n_rows)])
    # Rule untouched: zeros, so that the loss's softmax is 1/C whatever the others answer.
    arrays = {"weights_kcc": np.zeros((2, C, C)), "bias_kc": np.zeros((2, C))}
    moved, _ = local_step(
        "linear-stack", arrays, answers, labels, steps=1, learning_rate=1.0, decay=0.0
    )
    # From here on: what the coordinator receives, and the code that its peer chose.
    slope = -moved["weights_kcc"][0, 0] * n_rows  # sum_b code_b (1/C - [y_b = c])
    code = answers[0, :, 0]
    guessed = np.full(n_rows, -1)
    for c in range(C):
        left = code.sum() / C - slope[c]
        for row in range(n_rows):
            if left > code[row] * (1.0 - 2.0**-6):
                guessed[row] = c
                left -= code[row]
    assert (guessed == labels).all()


# -- made-up peers -----------------------------------------------------------------------------


def small_model(context) -> LocalModel:
    rng = np.random.default_rng(context.node_config["partition-id"])
    inputs = rng.standard_normal((12, 4))
    return LocalModel(
        model=lambda rows: np.asarray(rows, dtype=float) @ np.ones((4, 3)),
        classes=CLASSES,
        outputs="logits",
        holdout=(inputs, ["a", "b", "c"] * 4),
    )


def directory_of(identities, profile=None, run_id=1):
    from fedinfer_flower.profile import SiteProfile

    cards = [
        SiteCard.signed(
            profile or SiteProfile(name=f"s{k}", classes=CLASSES), identity=identity, run_id=run_id
        )
        for k, identity in enumerate(identities)
    ]
    return Directory(run_id=run_id, cards=tuple(cards))


def test_coordinator_alone_gets_held_out_inputs_of_a_site_without_pins():
    """As the threat model says. It takes one message, before any training."""
    app = InferenceMod(small_model, agrees_to=("stacking",)).attach(ClientApp())
    made_up = Identity.generate()
    with LocalGrid(app, num_supernodes=1) as grid:
        node = next(iter(grid.get_node_ids()))
        run_id = int(grid.run.run_id)
        from fedinfer_flower.strategies.onboarding import onboard

        site = onboard(grid, [node], run_id=run_id, timeout_s=10).cards[node]
        mine = SiteCard.signed(
            dataclasses.replace(site.profile, name="peer"), identity=made_up, run_id=run_id
        )
        job = stack_messages.StackJob(
            job_id="job",
            classes=CLASSES,
            directory=Directory(run_id=run_id, cards=(site, mine)),
        )
        ask = Message(
            pack(stack_messages.step(job, {})), node, message_type(stack_messages.OFFER), ttl=10
        )
        (reply,) = grid.send_and_receive([ask], timeout=10)
        envelope = unpack(reply.content)
        sealed = SealedBody(body=envelope.section("body"), wraps=envelope.section("wraps"))
        place = job.key_ids.index(site.key_id)
        rows = stack_messages.open_rows(
            sealed, job, identity=made_up, owner=job.identity(place), max_rows=100
        )
    expected = np.random.default_rng(0).standard_normal((12, 4))
    assert np.array_equal(rows, expected)


# -- the shelf ----------------------------------------------------------------------------------


def test_coordinator_cannot_fill_the_shelf_for_good(tmp_path):
    app = InferenceMod(small_model, agrees_to=("stacking",), home=tmp_path).attach(ClientApp())
    with LocalGrid(app, num_supernodes=2) as grid:
        nodes = sorted(grid.get_node_ids())
        run_id = int(grid.run.run_id)
        from fedinfer_flower.strategies.onboarding import onboard

        cards = onboard(grid, nodes, run_id=run_id, timeout_s=10).cards
        directory = Directory(run_id=run_id, cards=tuple(cards.values()))
        job = stack_messages.StackJob(job_id="job", classes=CLASSES, directory=directory)
        refused = 0
        for number in range(66):
            weights = np.tile((2.0 + number) * np.eye(C), (2, 1, 1))
            fitted = fitted_of(weights, list(job.key_ids))
            ask = Message(
                pack(stack_messages.step(job, {"aggregator": fitted.to_bytes()})),
                nodes[0],
                message_type(stack_messages.INSTALL),
                ttl=10,
            )
            (reply,) = grid.send_and_receive([ask], timeout=10)
            refused += unpack(reply.content).kind.value == "error"
    # All are taken, as they bend nothing unless they are asked for; the oldest go.
    assert refused == 0
    (partition,) = {p.parent for p in tmp_path.rglob("stacks")}
    assert len(list((partition / "stacks").iterdir())) == 64


def test_stack_option_of_the_mod_that_its_hint_names_exists():
    """`agrees_to=("stacking",)` makes a StackingMod of its own: can its limit be set?"""
    mod = InferenceMod(small_model, agrees_to=("stacking",))
    from fedinfer_flower.clients.stack_mod import StackingMod

    with pytest.raises((ConfigError, ValueError, UntrustedKeyError)):
        StackingMod(mod, max_rows=5).attach(mod.attach(ClientApp()))
