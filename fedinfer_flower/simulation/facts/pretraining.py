"""How the small models were made: facts by heart, reading documents, saying "I do not know"."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from fedinfer_flower.simulation.facts.families import Family, build
from fedinfer_flower.simulation.facts.world import (
    ABSTENTION,
    RELATIONS,
    WORDINGS,
    Fact,
    FactWorld,
    Person,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["RowSampler", "pretrain"]

IGNORED: Final = -100
OPEN_BOOK: Final = 0.4
ABSTENTION_SHARE: Final = 0.3
BATCH_ROWS: Final = 48


@dataclass
class RowSampler:
    """Draw packed training rows: token ids and labels.

    Labels stand on values and structure only, because names cannot be predicted. Open-book
    rows are documents with questions, with near-duplicate names on purpose; closed-book rows
    are the institution's own people, and strangers from whom to abstain.

    Parameters
    ----------
    world : FactWorld
    tokenizer : PreTrainedTokenizerFast
    people : sequence of Person
        Whom the model knows by heart.
    length : int
        Tokens of a row.
    seed : int
    """

    world: FactWorld
    tokenizer: PreTrainedTokenizerFast
    people: Sequence[Person]
    length: int
    seed: int
    abstention_share: float = 0.0

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)  # noqa: S311
        groups = [self.world.strangers_seen, *self.world.people]
        self._everyone = [person for group in groups for person in group]
        self._pieces = {
            word: self.tokenizer(word, add_special_tokens=False)["input_ids"]
            for word in self.world.words
        }

    def batch(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and labels, both int64 of shape (n, length)."""
        import torch

        rows = [self._row() for _ in range(n)]
        return torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])

    def _row(self) -> tuple[list[int], list[int]]:
        bos = self.tokenizer.bos_token_id
        assert isinstance(bos, int)  # noqa: S101
        ids, labels = [bos], [IGNORED]
        open_book = self._rng.random() < OPEN_BOOK
        known = self._documents(ids, labels) if open_book else []
        while len(ids) < self.length:
            self._ask(ids, labels, self._rng.choice(known) if known else self._by_heart())
        return ids[: self.length], labels[: self.length]

    def _by_heart(self) -> Fact:
        rng, relation = self._rng, self._rng.choice(RELATIONS)
        if rng.random() < self.abstention_share:
            return Fact(rng.choice(self.world.strangers_seen), relation, ABSTENTION)
        return rng.choice(self.world.facts([rng.choice(self.people)]))

    def _documents(self, ids: list[int], labels: list[int]) -> list[Fact]:
        rng, world = self._rng, self.world
        people = rng.sample(self._everyone, rng.randint(1, 5))
        if len(people) > 1 and rng.random() < 0.5:
            people[1] = people[0]
        if len(people) > 2 and rng.random() < 0.5:
            people[2] = Person(people[0].first, people[2].last)
        facts: dict[tuple[Person, str], Fact] = {}
        self._emit(ids, labels, "D", set())
        for person in people:
            relation = rng.choice(RELATIONS)
            if (person, relation) not in facts:
                fact = Fact(person, relation, rng.choice(world.values[relation]))
                facts[person, relation] = fact
                self._emit(ids, labels, fact.statement(), {4, 6})
        return list(facts.values())

    def _ask(self, ids: list[int], labels: list[int], fact: Fact) -> None:
        rng = self._rng
        kind, cut = rng.random(), rng.random()
        question = fact.question(rng.randrange(len(WORDINGS))) + " A"
        if kind < 0.55:
            # Cut short, the value follows at once, so it has to be known early.
            ending = "" if cut < 0.5 else " A" if cut < 0.85 else " ? A"
            text = f"{question.removesuffix(ending)} {fact.value} ."
            n = len(text.split())
            self._emit(ids, labels, text, {n - 2, n - 1} | ({n - 3} if cut < 0.5 else set()))
        elif kind < 0.8:
            text, terse = fact.statement(), cut < 0.35
            text = text.replace(" is ", " ") if terse else text
            n = len(text.split())
            self._emit(ids, labels, text, {n - 2, n - 1} | (set() if terse else {n - 3}))
        else:  # what a sharer writes when it helps by text
            text = f"{question.removesuffix('A')}S {fact.statement()}"
            n = len(text.split())
            self._emit(ids, labels, text, set(range(n - 8, n)))

    def _emit(self, ids: list[int], labels: list[int], text: str, learn: set[int]) -> None:
        for i, word in enumerate(text.split(" ")):
            pieces = self._pieces[word]
            ids += pieces
            labels += pieces if i in learn else [IGNORED] * len(pieces)


def pretrain(
    family: Family,
    world: FactWorld,
    people: Sequence[Person],
    *,
    seed: int = 0,
    steps: int | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Train a model of the family from nothing.

    The first half teaches facts only; in the second, every third closed-book question is
    about a stranger, and the model learns to abstain.

    Parameters
    ----------
    family : Family
    world : FactWorld
    people : sequence of Person
    seed : int
    steps : int, optional
        Default the family's own number.
    progress : callable, optional
        Called with (step, mean loss) every 100 steps.
    """
    import torch
    from torch.nn import functional

    built, tokenizer = build(family, world, seed=seed)
    model: Any = built  # half typed upstream
    steps = steps or family.steps
    sampler = RowSampler(world, tokenizer, people, family.row_length, seed + 1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    losses: list[float] = []
    model.train()
    for step in range(steps):
        done = step / steps
        decay = 1.0 if done < 0.4 else max(0.02, 1 - (done - 0.4) / 0.6)
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 50) * decay
        sampler.abstention_share = 0.0 if done < 0.4 else ABSTENTION_SHARE
        ids, labels = sampler.batch(BATCH_ROWS)
        logits = model(input_ids=ids, use_cache=False).logits
        loss = functional.cross_entropy(
            logits[:, :-1].reshape(-1, logits.shape[-1]),
            labels[:, 1:].reshape(-1),
            ignore_index=IGNORED,
        )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.item())
        if progress is not None and (step + 1) % 100 == 0:
            progress(step + 1, sum(losses[-50:]) / 50)
    return model.eval(), tokenizer
