"""Train the fuser of one ordered pair; both models stay as they are."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fedinfer_flower.errors import FuserError
from fedinfer_flower.kv.fuser import Fuser, FuserSpec, make_fuser
from fedinfer_flower.kv.static_scales import StaticScales
from fedinfer_flower.language.model import LanguageModel
from fedinfer_flower.refine.evaluation import (
    accuracy,
    answers_alone,
    answers_fused,
    other_questions,
)
from fedinfer_flower.refine.examples import FuserExample, examples_digest, split_examples
from fedinfer_flower.refine.fuser_card import FuserCard
from fedinfer_flower.refine.pair_data import PairData, prepare_pair
from fedinfer_flower.refine.training_loop import (
    Progress,
    TrainingOptions,
    TrainingStep,
    optimise,
    temperature_at,
)

__all__ = ["TrainedFuser", "TrainingOptions", "TrainingStep", "default_spec", "train_fuser"]


@dataclass(frozen=True, eq=False)
class TrainedFuser:
    """A fuser in evaluation mode, with its card.

    Parameters
    ----------
    fuser : Fuser
        Its `card` and `scales` are set: `save_fuser` writes them.
    card : FuserCard
    """

    fuser: Fuser
    card: FuserCard


def default_spec(
    receiver: LanguageModel, sharer: LanguageModel, kind: str = "last-token", **options: object
) -> FuserSpec:
    """Return a spec for a pair, of at most twice the smaller model's parameters.

    Parameters
    ----------
    receiver, sharer : LanguageModel
    kind : str
    **options
        Fields of `FuserSpec`; see `FuserSpec.for_pair`.

    Raises
    ------
    FuserError
        If the kind does not fit the pair.
    InvalidValueError
    """
    smaller = min(sum(p.numel() for p in m.model.parameters()) for m in (receiver, sharer))
    options.setdefault("max_parameters", 2 * smaller)
    return FuserSpec.for_pair(kind, sharer.layout, receiver.layout, **options)  # type: ignore[arg-type]


def train_fuser(
    receiver: LanguageModel,
    sharer: LanguageModel,
    spec: FuserSpec,
    examples: Sequence[FuserExample],
    options: TrainingOptions | None = None,
    progress: Progress | None = None,
) -> TrainedFuser:
    """Train a fuser on public examples.

    Both models read every example once; a step costs one pass of the receiver over the
    answers and the fuser's own work. Fixed scales for 4-bit payloads are fitted on the same
    entries and stored with the fuser.

    Parameters
    ----------
    receiver, sharer : LanguageModel
        Neither is changed.
    spec : FuserSpec
        Of these two models.
    examples : sequence of FuserExample
        Facts that only the sharer knows, documents that only the sharer reads, questions that
        only the receiver can answer, and questions that nobody can: without the last two the
        fuser unlearns the receiver's own knowledge and its abstention.
    options : TrainingOptions, optional
    progress : callable, optional
        Called after every step.

    Returns
    -------
    trained : TrainedFuser

    Raises
    ------
    FuserError
        If the spec is of other models, or the loss is not finite.
    PromptTooLongError
        If an example does not fit into a model's window.
    InvalidValueError
        If there are too few examples to hold some out.

    Privacy
    -------
    Whoever trains sees both models and all examples: train on public ones. The weights can
    remember examples, and the card publishes their digest and how often each task was right.

    References
    ----------
    Cache-to-Cache (C2C): frozen models, loss on the answer, annealed switches. FedRefine:
    one fuser an ordered pair, concatenation (equation 1).

    Examples
    --------
    >>> from fedinfer_flower.simulation.facts.families import FAMILIES, build
    >>> from fedinfer_flower.simulation.facts.fuser_data import fuser_examples
    >>> from fedinfer_flower.simulation.facts.prompts import FactPrompts
    >>> from fedinfer_flower.simulation.facts.world import FactWorld
    >>> world = FactWorld()
    >>> receiver, sharer = (
    ...     LanguageModel(*build(family, world), prompts=FactPrompts(world.words))
    ...     for family in FAMILIES[:2]
    ... )
    >>> trained = train_fuser(receiver, sharer, default_spec(receiver, sharer, width=8),
    ...     fuser_examples(world, sharer=1, receiver=0)[-100:], TrainingOptions(steps=2))
    >>> trained.card.kind, trained.card.steps, trained.card.held_out
    ('last-token', 2, 10)
    """
    options = options or TrainingOptions()
    _require_pair(receiver, sharer, spec)
    train, held_out = split_examples(examples, holdout=options.holdout, seed=options.seed)
    fuser = make_fuser(spec, seed=options.seed)
    before = time.process_time()
    # Read together: the widths of both parts then agree.
    both = prepare_pair(
        receiver,
        sharer,
        [*train, *held_out],
        spec.share,
        aligned=fuser.needs_alignment,
        max_answer_tokens=options.max_answer_tokens,
    )
    rows = torch.arange(len(both))
    known, unseen = both.select(rows[: len(train)]), both.select(rows[len(train) :])
    reading = time.process_time() - before
    before, steps = time.process_time(), 0
    if fuser.trainable:
        steps, loss = _fit(fuser, receiver, known, unseen, options, progress)
    else:
        loss = held_out_loss(receiver, fuser.eval(), unseen)
    card = make_card(
        receiver,
        fuser,
        unseen,
        held_out,
        data_digest=examples_digest(examples),
        examples=len(train),
        seed=options.seed,
        steps=steps,
        seconds=round(time.process_time() - before, 3),
        reading_seconds=round(reading, 3),
        loss=round(loss, 6),
    )
    fuser.scales, fuser.card = StaticScales.fit(known.shared), card.to_dict()
    return TrainedFuser(fuser, card)


def make_card(
    receiver: LanguageModel,
    fuser: Fuser,
    data: PairData,
    held_out: Sequence[FuserExample],
    **facts: Any,
) -> FuserCard:
    """Measure a fuser on held-out examples, with the control, and write its card."""
    wrong = data.with_caches_of(other_questions(held_out))
    prompts = receiver.prompts

    def share(texts: list[str]) -> dict[str, float]:
        return {k: round(v, 4) for k, v in accuracy(texts, held_out, prompts).items()}

    sharer, own = fuser.spec.pair
    return FuserCard(
        kind=fuser.spec.kind,
        sharer=sharer,
        receiver=own,
        held_out=len(held_out),
        parameters=sum(p.numel() for p in fuser.parameters()),
        counts=dict(Counter(e.task for e in held_out)),
        alone=share(answers_alone(receiver, held_out)),
        fused=share(answers_fused(receiver, fuser, data)),
        shuffled=share(answers_fused(receiver, fuser, wrong)),
        **facts,
    )


def held_out_loss(receiver: LanguageModel, fuser: Fuser, data: PairData) -> float:
    """Return the mean loss over batches, weighted by their sizes; no gradients."""
    with torch.no_grad():
        parts = [(float(b.loss(receiver, fuser)), len(b)) for b in data.batches()]
    return math.fsum(loss * n for loss, n in parts) / len(data)


def draw(data: PairData, n: int, draws: torch.Generator) -> PairData:
    """Return `n` examples drawn with replacement."""
    return data.select(torch.randint(len(data), (n,), generator=draws))


def hide_prompt(data: PairData, fuser: Fuser, chance: float, draws: torch.Generator) -> PairData:
    """Hide what travels of the prompt in some rows, so that decoded tokens must suffice.

    The last prompt token tells which public question this is: a fuser learns those by heart
    and is then misled by new ones. What the sharer decoded is the same for both.
    """
    share = fuser.spec.share
    if not chance or not share.decode or share.full or fuser.needs_alignment:
        return data
    hidden = torch.rand(len(data), generator=draws) < chance
    mask = data.shared.mask.clone()
    mask[hidden, : -share.decode] = 0
    return replace(data, shared=replace(data.shared, mask=mask))


def _fit(
    fuser: Fuser,
    receiver: LanguageModel,
    known: PairData,
    unseen: PairData,
    options: TrainingOptions,
    progress: Progress | None,
) -> tuple[int, float]:
    def batch_loss(step: int, draws: torch.Generator) -> torch.Tensor:
        fuser.temperature = temperature_at(step, options.steps)
        batch = draw(known, options.batch, draws)
        return hide_prompt(batch, fuser, options.prompt_dropout, draws).loss(receiver, fuser)

    # Dropout and switches draw from torch's own generator: the caller's stays as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        return optimise(
            fuser,
            options,
            batch_loss=batch_loss,
            held_out_loss=lambda: held_out_loss(receiver, fuser, unseen),
            progress=progress,
        )


def _require_pair(receiver: LanguageModel, sharer: LanguageModel, spec: FuserSpec) -> None:
    if spec.receiver != receiver.layout or spec.sharer != sharer.layout:
        raise FuserError(
            "a fuser spec of other models than the two that were given",
            hint="make it with default_spec(receiver, sharer)",
        )
