"""Train a hub: one encoder and one decoder a model serve all ordered pairs of models.

For N models a hub holds 2 N maps instead of N (N - 1) fusers, and a new model joins by training
two, while those of the others stay as they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from fedinfer_flower.errors import FuserError, InvalidValueError
from fedinfer_flower.kv.fuser import Fuser
from fedinfer_flower.kv.fusers.hub import Hub, HubSpec
from fedinfer_flower.kv.static_scales import StaticScales
from fedinfer_flower.language.model import LanguageModel
from fedinfer_flower.refine.examples import FuserExample, examples_digest, split_examples
from fedinfer_flower.refine.fuser_training import (
    TrainedFuser,
    draw,
    held_out_loss,
    hide_prompt,
    make_card,
)
from fedinfer_flower.refine.pair_data import PairData, prepare_pair
from fedinfer_flower.refine.training_loop import Progress, TrainingOptions, optimise

__all__ = ["PairExamples", "TrainedHub", "join_hub", "train_hub"]

PairExamples = Callable[[int, int], Sequence[FuserExample]]
"""From the places of sharer and receiver among the models to the pair's public examples."""


@dataclass(frozen=True, eq=False)
class TrainedHub:
    """A hub in evaluation mode, and the fusers of all pairs that were trained.

    Parameters
    ----------
    hub : Hub
    fusers : list of TrainedFuser
        They share their weights with the hub; each card counts one encoder and one decoder,
        and its seconds are those of the whole training.
    """

    hub: Hub
    fusers: list[TrainedFuser]


@dataclass(eq=False)
class _Pair:
    """One ordered pair in training."""

    receiver: LanguageModel
    fuser: Fuser
    known: PairData
    unseen: PairData
    held_out: list[FuserExample]
    data_digest: str
    reading_s: float


def train_hub(
    models: Sequence[LanguageModel],
    examples: PairExamples,
    spec: HubSpec | None = None,
    options: TrainingOptions | None = None,
    progress: Progress | None = None,
) -> TrainedHub:
    """Train the encoders and decoders of all models jointly.

    Parameters
    ----------
    models : sequence of LanguageModel
        Two or more, none twice.
    examples : callable
        ``examples(sharer, receiver)`` with places in `models`; see `train_fuser`.
    spec : HubSpec, optional
    options : TrainingOptions, optional
        `steps` are for each ordered pair: pairs take turns.
    progress : callable, optional

    Raises
    ------
    InvalidValueError
        If there are fewer than two models, or one twice.
    FuserError
        If the loss is not finite.
    PromptTooLongError

    Privacy
    -------
    As `train_fuser`; besides, whoever holds a decoder of the hub can read what any of its
    encoders makes.
    """
    options = options or TrainingOptions()
    if len(models) < 2:
        raise InvalidValueError("a hub is for two models or more")
    hub = Hub(spec or HubSpec())
    for place, model in enumerate(models):
        hub.join(model.layout, seed=options.seed + place)
    places = [(s, r) for s in range(len(models)) for r in range(len(models)) if s != r]
    return _train(hub, models, places, examples, options, progress)


def join_hub(
    hub: Hub,
    models: Sequence[LanguageModel],
    examples: PairExamples,
    options: TrainingOptions | None = None,
    progress: Progress | None = None,
) -> TrainedHub:
    """Let one more model join: train its encoder and decoder, the others stay frozen.

    Parameters
    ----------
    hub : Hub
        Extended in place.
    models : sequence of LanguageModel
        The new one last; before it those with which it is trained, all in the hub. Pairs with
        other models of the hub work too, though nothing was trained on them.
    examples : callable
        As in `train_hub`.
    options, progress
        As in `train_hub`.

    Returns
    -------
    trained : TrainedHub
        With the fusers of the pairs that were trained.

    Raises
    ------
    FuserError
        If one of the other models is not in the hub.
    InvalidValueError
        If the new one is, or there is no other.
    PromptTooLongError
    """
    options = options or TrainingOptions()
    if len(models) < 2:
        raise InvalidValueError("a model joins a hub with one other model at least")
    for model in models[:-1]:
        if model.layout.model_digest not in hub.layouts:
            raise FuserError(
                "a model with which the new one is trained is not in the hub",
                hint="train the hub with train_hub first, or let that model join",
            )
    new = len(models) - 1
    # A seed of its own: with a seed of the hub's the maps would start as another model's.
    hub.join(models[new].layout, seed=options.seed + len(hub.layouts))
    places = [pair for other in range(new) for pair in ((other, new), (new, other))]
    hub.train_only(models[new].layout.model_digest)
    try:
        return _train(hub, models, places, examples, options, progress)
    finally:
        hub.train_only(None)


def _train(
    hub: Hub,
    models: Sequence[LanguageModel],
    places: Sequence[tuple[int, int]],
    examples: PairExamples,
    options: TrainingOptions,
    progress: Progress | None,
) -> TrainedHub:
    pairs = [_read(hub, models[r], models[s], list(examples(s, r)), options) for s, r in places]
    whole = replace(options, steps=options.steps * len(pairs))

    def batch_loss(step: int, draws: torch.Generator) -> torch.Tensor:
        pair = pairs[step % len(pairs)]
        batch = draw(pair.known, options.batch, draws)
        batch = hide_prompt(batch, pair.fuser, options.prompt_dropout, draws)
        return batch.loss(pair.receiver, pair.fuser)

    def unseen_loss() -> float:
        losses = [held_out_loss(pair.receiver, pair.fuser, pair.unseen) for pair in pairs]
        return sum(losses) / len(losses)

    before = time.process_time()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        steps, _ = optimise(
            hub, whole, batch_loss=batch_loss, held_out_loss=unseen_loss, progress=progress
        )
    seconds = time.process_time() - before
    return TrainedHub(hub, [_finish(pair, options, steps, seconds) for pair in pairs])


def _read(
    hub: Hub,
    receiver: LanguageModel,
    sharer: LanguageModel,
    examples: Sequence[FuserExample],
    options: TrainingOptions,
) -> _Pair:
    train, held_out = split_examples(examples, holdout=options.holdout, seed=options.seed)
    before = time.process_time()
    both = prepare_pair(
        receiver,
        sharer,
        [*train, *held_out],
        hub.spec.share,
        max_answer_tokens=options.max_answer_tokens,
    )
    rows = torch.arange(len(both))
    return _Pair(
        receiver=receiver,
        fuser=hub.fuser(sharer.layout.model_digest, receiver.layout.model_digest),
        known=both.select(rows[: len(train)]),
        unseen=both.select(rows[len(train) :]),
        held_out=held_out,
        data_digest=examples_digest(examples),
        reading_s=time.process_time() - before,
    )


def _finish(pair: _Pair, options: TrainingOptions, steps: int, seconds: float) -> TrainedFuser:
    fuser = pair.fuser.eval()
    card = make_card(
        pair.receiver,
        fuser,
        pair.unseen,
        pair.held_out,
        data_digest=pair.data_digest,
        examples=len(pair.known),
        seed=options.seed,
        steps=steps,
        seconds=round(seconds, 3),
        reading_seconds=round(pair.reading_s, 3),
        loss=round(held_out_loss(pair.receiver, fuser, pair.unseen), 6),
    )
    fuser.scales, fuser.card = StaticScales.fit(pair.known.shared), card.to_dict()
    return TrainedFuser(fuser, card)
