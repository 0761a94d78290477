"""Training: what learns, what stays frozen, what is written down."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fedinfer_flower.simulation
from fedinfer_flower.errors import FuserError, InvalidValueError
from fedinfer_flower.kv.fuser_file import load_fuser, save_fuser
from fedinfer_flower.kv.fusers.hub import HubSpec
from fedinfer_flower.kv.share import ShareSpec
from fedinfer_flower.language.model import LanguageModel
from fedinfer_flower.refine.examples import FuserExample, examples_digest
from fedinfer_flower.refine.fuser_card import FuserCard
from fedinfer_flower.refine.fuser_training import (
    TrainedFuser,
    TrainingOptions,
    default_spec,
    hide_prompt,
    train_fuser,
)
from fedinfer_flower.refine.hub_training import join_hub, train_hub
from fedinfer_flower.refine.pair_data import prepare_pair
from fedinfer_flower.refine.training_loop import TrainingStep, optimise
from fedinfer_flower.simulation.facts.fuser_data import fuser_examples
from fedinfer_flower.simulation.facts.prompts import FactPrompts
from fedinfer_flower.simulation.facts.world import FactWorld

FOLDER = Path(fedinfer_flower.simulation.__file__).parent / "checkpoints"
QUICK = TrainingOptions(steps=6, batch=16, check_every=3)


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in module.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def trained(models: list[LanguageModel], examples: list[FuserExample]) -> TrainedFuser:
    spec = default_spec(models[0], models[1], width=16)
    return train_fuser(models[0], models[1], spec, examples, QUICK)


@pytest.mark.parametrize("kind", ["last-token", "concat", "fuse"])
def test_frozen_models_stay_and_every_part_of_the_fuser_moves(
    models: list[LanguageModel], examples: list[FuserExample], kind: str
) -> None:
    before = [weights(m.model) for m in models[:2]]
    spec = default_spec(models[0], models[1], kind, width=8)
    at_first: dict[str, torch.Tensor] = {}
    state = torch.get_rng_state()

    done = train_fuser(models[0], models[1], spec, examples, replace(QUICK, steps=10))

    from fedinfer_flower.kv.fuser import make_fuser

    at_first = weights(make_fuser(spec, seed=QUICK.seed))
    assert all(equal(a, weights(m.model)) for a, m in zip(before, models, strict=False))
    assert all(p.grad is None for m in models[:2] for p in m.model.parameters())
    assert not done.fuser.training
    moved = [not torch.equal(at_first[n], x) for n, x in done.fuser.state_dict().items()]
    assert all(moved)
    assert torch.equal(state, torch.get_rng_state())


def test_same_seed_gives_the_same_weights_and_another_one_others(
    models: list[LanguageModel], examples: list[FuserExample], trained: TrainedFuser
) -> None:
    torch.manual_seed(12345)  # the caller's generator must not matter
    again = train_fuser(models[0], models[1], trained.fuser.spec, examples, QUICK)
    other = train_fuser(models[0], models[1], trained.fuser.spec, examples, replace(QUICK, seed=1))

    assert equal(weights(trained.fuser), weights(again.fuser))
    assert not equal(weights(trained.fuser), weights(other.fuser))


def test_fuser_brings_what_only_the_sharer_reads(world: FactWorld) -> None:
    receiver, sharer = (
        LanguageModel.from_folder(FOLDER / name, prompts=FactPrompts(world.words))
        for name in ("qwen3", "llama")
    )
    every = fuser_examples(world, sharer=1, receiver=0, documents=1200)
    documents = [e for e in every if e.task == "doc1"]
    seen: list[TrainingStep] = []
    options = TrainingOptions(steps=100, batch=32, check_every=50, lr=4e-3)

    card = train_fuser(
        receiver, sharer, default_spec(receiver, sharer, width=64), documents, options, seen.append
    ).card

    assert card.alone["doc1"] < 0.1
    assert card.fused["doc1"] > 0.5
    assert card.shuffled["doc1"] < 0.25  # chance is 1/12; 40 examples
    assert [s.step for s in seen] == list(range(1, 101))
    assert [s.step for s in seen if s.held_out is not None] == [50, 100]


def test_hiding_the_prompt_leaves_what_was_decoded(
    models: list[LanguageModel], examples: list[FuserExample], trained: TrainedFuser
) -> None:
    data = prepare_pair(models[0], models[1], examples, trained.fuser.spec.share)
    draws = torch.Generator().manual_seed(0)

    hidden = hide_prompt(data, trained.fuser, 0.5, draws).shared.mask
    all_hidden = hide_prompt(data, trained.fuser, 1.0, draws).shared.mask

    assert bool((hidden[:, 1] == 1).all())
    assert 0 < int(hidden[:, 0].sum()) < len(examples)
    assert all_hidden.tolist() == [[0, 1]] * len(examples)
    assert bool((data.shared.mask == 1).all())
    assert hide_prompt(data, trained.fuser, 0.0, draws) is data


def test_card_says_what_was_done(
    models: list[LanguageModel], examples: list[FuserExample], trained: TrainedFuser
) -> None:
    card = trained.card

    assert (card.sharer, card.receiver) == (
        models[1].layout.model_digest,
        models[0].layout.model_digest,
    )
    assert card.data_digest == examples_digest(examples)
    assert card.examples + card.held_out == len(examples)
    assert card.parameters == sum(p.numel() for p in trained.fuser.parameters())
    assert card.steps == QUICK.steps
    assert set(card.counts) == {e.task for e in examples} == set(card.shuffled)
    assert sum(card.counts.values()) == card.held_out
    assert card.seconds > 0.0
    assert card.reading_seconds > 0.0


def test_fuser_is_saved_with_card_and_scales(trained: TrainedFuser, tmp_path: Path) -> None:
    save_fuser(trained.fuser, tmp_path / "fuser")
    loaded = load_fuser(tmp_path / "fuser")

    assert equal(weights(loaded), weights(trained.fuser))
    assert FuserCard.from_dict(loaded.card) == trained.card
    assert trained.fuser.scales is not None
    assert loaded.scales is not None
    assert loaded.scales.digest == trained.fuser.scales.digest
    assert loaded.scales.layout.model_digest == trained.card.sharer


@pytest.mark.parametrize(
    "change",
    [
        {"steps": "6"},
        {"steps": True},
        {"counts": {"fact": 1.5}},
        {"alone": [("fact", 1.0)]},
        {"version": 2},
    ],
)
def test_card_of_another_form_is_refused(trained: TrainedFuser, change: dict) -> None:
    values = trained.card.to_dict()

    with pytest.raises(FuserError):
        FuserCard.from_dict({**values, **change})
    with pytest.raises(FuserError):
        FuserCard.from_dict({**values, "more": 1})
    values.pop("loss")
    with pytest.raises(FuserError):
        FuserCard.from_dict(values)


def test_card_suspects_a_task_on_which_any_cache_helps(trained: TrainedFuser) -> None:
    card = replace(
        trained.card,
        alone={"own": 1.0, "fact": 0.0, "doc1": 0.0},
        shuffled={"own": 1.0, "fact": 0.1, "doc1": 0.6},
    )

    helped = replace(card, fused={"own": 1.0, "fact": 0.9, "doc1": 0.62})

    assert helped.helped() == ("fact",)
    assert card.suspect() == ("doc1",)
    assert card.suspect(chance=0.0) == ("fact", "doc1")


def test_identity_has_nothing_to_train_and_a_card_all_the_same(
    models: list[LanguageModel], examples: list[FuserExample]
) -> None:
    same = models[0]
    spec = default_spec(same, same, "identity")

    done = train_fuser(same, same, spec, examples)

    assert (done.card.steps, done.card.parameters) == (0, 0)


def test_spec_of_other_models_is_refused(
    models: list[LanguageModel], examples: list[FuserExample]
) -> None:
    spec = default_spec(models[0], models[1])

    with pytest.raises(FuserError, match="other models"):
        train_fuser(models[1], models[0], spec, examples, QUICK)


def test_default_spec_keeps_the_fuser_within_twice_the_smaller_model(
    models: list[LanguageModel],
) -> None:
    from fedinfer_flower.kv.fuser import count_parameters

    size = [sum(p.numel() for p in m.model.parameters()) for m in models]
    for r in range(3):
        for s in range(3):
            if r != s:
                spec = default_spec(models[r], models[s], width=4096)
                assert count_parameters(spec) <= 2 * min(size[r], size[s])


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"steps": 1.5},
        {"batch": True},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"holdout": 1.0},
        {"clip": -1.0},
        {"weight_decay": -0.1},
        {"patience": -1},
        {"seed": -1},
        {"prompt_dropout": 1.1},
    ],
)
def test_option_out_of_its_range_is_refused(wrong: dict) -> None:
    with pytest.raises(InvalidValueError):
        TrainingOptions(**wrong)


class TestLoop:
    """`optimise` on one number, whose losses are written down in advance."""

    def run(self, held_out: list[float], **options: object) -> tuple[float, int, float]:
        module = torch.nn.Linear(1, 1, bias=False)
        seen: list[float] = []
        left = iter(held_out)

        def unseen() -> float:
            seen.append(float(module.weight.detach()))
            return next(left)

        settings = TrainingOptions(**{"steps": 50, "check_every": 10, "warmup": 0, **options})
        steps, best = optimise(
            module,
            settings,
            batch_loss=lambda step, draws: module.weight.sum(),
            held_out_loss=unseen,
        )
        place = seen.index(float(module.weight.detach()))
        assert best == min(held_out[: len(seen)])
        return best, steps, place

    def test_best_weights_are_kept(self) -> None:
        assert self.run([3.0, 1.0, 2.0, 2.0, 2.0], patience=0) == (1.0, 50, 1)

    def test_ends_when_patience_is_out(self) -> None:
        assert self.run([3.0, 1.0, 2.0, 2.0, 0.0], patience=2) == (1.0, 40, 1)

    def test_loss_that_is_not_finite_ends_with_a_typed_error(self) -> None:
        with pytest.raises(FuserError, match="not finite"):
            self.run([float("nan")])

    def test_nothing_to_train_is_an_error(self) -> None:
        with pytest.raises(FuserError, match="nothing to train"):
            optimise(
                torch.nn.Identity(),
                TrainingOptions(),
                batch_loss=lambda step, draws: torch.zeros(()),
                held_out_loss=lambda: 0.0,
            )


def test_hub_shares_maps_and_a_model_joins_without_moving_the_others(
    models: list[LanguageModel], examples: list[FuserExample]
) -> None:
    spec = HubSpec(width=8, latent_layers=2, share=ShareSpec())

    first = train_hub(models[:2], lambda s, r: examples, spec, QUICK)
    before = weights(first.hub)
    joined = join_hub(first.hub, [models[0], models[2]], lambda s, r: examples, QUICK)

    digests = [m.layout.model_digest for m in models]
    assert [(c.card.sharer, c.card.receiver) for c in first.fusers] == [
        (digests[0], digests[1]),
        (digests[1], digests[0]),
    ]
    assert first.fusers[0].card.steps == 2 * QUICK.steps
    assert [(c.card.sharer, c.card.receiver) for c in joined.fusers] == [
        (digests[0], digests[2]),
        (digests[2], digests[0]),
    ]
    after = weights(joined.hub)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(digests[2] in name for name in after)
    assert all(p.requires_grad for p in joined.hub.parameters())
    # A pair that nothing was trained on works through the same two maps.
    assert joined.hub.fuser(digests[1], digests[2]).decoder is joined.fusers[0].fuser.decoder


def test_hub_refuses_one_model_a_stranger_and_a_model_twice(
    models: list[LanguageModel], examples: list[FuserExample]
) -> None:
    with pytest.raises(InvalidValueError, match="two models"):
        train_hub(models[:1], lambda s, r: examples)
    hub = train_hub(
        models[:2],
        lambda s, r: examples,
        HubSpec(width=8, latent_layers=1),
        replace(QUICK, steps=1),
    ).hub
    with pytest.raises(FuserError, match="not in the hub"):
        join_hub(hub, [models[2], models[0]], lambda s, r: examples)
    with pytest.raises(InvalidValueError, match="one other"):
        join_hub(hub, [models[2]], lambda s, r: examples)
    with pytest.raises(InvalidValueError, match="in the hub already"):
        join_hub(hub, models[:2], lambda s, r: examples)
