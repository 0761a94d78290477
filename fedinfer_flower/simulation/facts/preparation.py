"""Fusers and gates of the fact world: trained once, kept in a folder, found there again."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fedinfer_flower.errors import FuserError
from fedinfer_flower.simulation.facts.checkpoints import NAMES, load
from fedinfer_flower.simulation.facts.fuser_data import (
    HeldExample,
    fuser_examples,
    gate_examples,
)
from fedinfer_flower.simulation.facts.world import FactWorld

if TYPE_CHECKING:
    from fedinfer_flower.kv.fuser_bank import FuserBank
    from fedinfer_flower.language.model import LanguageModel
    from fedinfer_flower.refine.examples import FuserExample
    from fedinfer_flower.refine.training_loop import TrainingStep

__all__ = ["Prepared", "Recipe", "prepare"]

Progress = Callable[[int, int, str], None]
_SHOWN_EVERY: Final = 5


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How fusers and gates are trained.

    Parameters
    ----------
    seed : int
    steps : int
        Of a fuser, at most.
    documents : int
        Read by a sharer in its fuser's training.
    gates : bool
    gate_documents : int
        At each sharer, in a gate's training.
    allowed_harm : float
        Most that a gate may cost a receiver on any kind of question: see `train_gate`.

    Examples
    --------
    >>> Recipe().digest() == Recipe(seed=1).digest()
    False
    """

    seed: int = 0
    steps: int = 400
    documents: int = 2000
    gates: bool = True
    gate_documents: int = 450
    allowed_harm: float = 0.05

    def digest(self) -> str:
        """Return a short name of the recipe."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Where the trained parts are.

    Parameters
    ----------
    fusers : Path
        Folder of a `FuserBank`.
    gates : dict of str to Path
        By receiver; empty without gates.
    fuser_cards, gate_cards : dict
        By (sharer, receiver), and by receiver: what was measured in training.
    parameters : dict of str to int
        Of each model.
    trained : tuple of str
        What this call trained; the rest was there.
    """

    fusers: Path
    gates: dict[str, Path]
    fuser_cards: dict[tuple[str, str], dict[str, Any]]
    gate_cards: dict[str, dict[str, Any]]
    parameters: dict[str, int]
    trained: tuple[str, ...]


def prepare(
    folder: Path,
    *,
    receivers: Sequence[str] = NAMES,
    recipe: Recipe | None = None,
    progress: Progress = lambda done, of, label: None,  # noqa: ARG005
) -> Prepared:
    """Train the fusers into some receivers, and their gates; take what is there already.

    A fuser counts as there if it is of the same recipe, the same two models and the same
    examples, all by digest; a gate, if it was trained with the same weights of fusers.

    Parameters
    ----------
    folder : Path
        Made when it is not there. One recipe is one folder in it.
    receivers : sequence of str
        Of `checkpoints.NAMES`; each has the others as sharers.
    recipe : Recipe, optional
    progress : callable, optional
        Called with (steps done, steps in all, what is worked on).

    Raises
    ------
    UnknownNameError, FuserError

    Privacy
    -------
    Everything here runs in one process, with all models: on the public part of the world.
    Private facts and the documents of tests are in no training.
    """
    recipe = recipe or Recipe()
    home = folder / recipe.digest()
    work = _Workshop(home, recipe, progress, pairs=len(receivers) * (len(NAMES) - 1))
    with _one_thread():
        work.read_models()
        for receiver in receivers:
            for sharer in work.sharers_of(receiver):
                work.fuser(sharer, receiver)
        if recipe.gates:
            for receiver in receivers:
                work.gate(receiver)
    return work.prepared()


class _Workshop:
    def __init__(self, home: Path, recipe: Recipe, progress: Progress, *, pairs: int) -> None:
        from fedinfer_flower.kv.fuser_bank import FuserBank

        self.home, self.recipe, self.progress = home, recipe, progress
        (home / "fusers").mkdir(parents=True, exist_ok=True)
        self.world = FactWorld()
        self.models: dict[str, LanguageModel] = {}
        self.bank: FuserBank = FuserBank(home / "fusers")
        self.trained: list[str] = []
        self.fuser_cards: dict[tuple[str, str], dict[str, Any]] = {}
        self.gate_cards: dict[str, dict[str, Any]] = {}
        self._done, self._of = 0, pairs * recipe.steps

    def read_models(self) -> None:
        for name in NAMES:
            self.models[name] = load(name)

    def sharers_of(self, receiver: str) -> list[str]:
        return [name for name in NAMES if name != receiver]

    def fuser(self, sharer: str, receiver: str) -> None:
        """Train the fuser of an ordered pair, unless it is there."""
        from fedinfer_flower.refine.examples import examples_digest
        from fedinfer_flower.refine.fuser_training import default_spec, train_fuser
        from fedinfer_flower.refine.training_loop import TrainingOptions

        recipe = self.recipe
        examples = fuser_examples(
            self.world,
            sharer=NAMES.index(sharer),
            receiver=NAMES.index(receiver),
            documents=recipe.documents,
            seed=recipe.seed,
        )
        card = self._card_of(sharer, receiver)
        if card is None or card.get("data_digest") != examples_digest(examples):
            ours, theirs = self.models[receiver], self.models[sharer]
            made = train_fuser(
                ours,
                theirs,
                default_spec(ours, theirs),
                examples,
                TrainingOptions(steps=recipe.steps, seed=recipe.seed),
                lambda now: self._tell(now, f"training fuser {sharer} → {receiver}"),
            )
            card = made.card.to_dict()
            self.bank.add(made.fuser, card)
            self.trained.append(f"fuser {sharer} → {receiver}")
        self.fuser_cards[sharer, receiver] = card
        self._done += recipe.steps
        self.progress(self._done, self._of, f"fuser {sharer} → {receiver}")

    def gate(self, receiver: str) -> None:
        """Train a receiver's gate, unless one for these fusers is there."""
        from fedinfer_flower.kv.gate_file import read_gate_card, save_gate
        from fedinfer_flower.refine.gate_data import read_gate_trial
        from fedinfer_flower.refine.gate_training import GateTrainingOptions, train_gate

        folder, made_with = self.home / "gates" / receiver, self._fuser_weights(receiver)
        with contextlib.suppress(FuserError):
            card = read_gate_card(folder)
            if card.get("fusers") == made_with:
                self.gate_cards[receiver] = card
                return
        self.progress(self._done, self._of, f"training the gate of {receiver}")
        model, recipe, sharers = self.models[receiver], self.recipe, self.sharers_of(receiver)
        held = gate_examples(
            self.world,
            receiver=NAMES.index(receiver),
            sharers=[NAMES.index(name) for name in sharers],
            documents=recipe.gate_documents,
            seed=recipe.seed + 1,
        )
        trial = read_gate_trial(
            model,
            [(self.models[s], self.bank.get(self.models[s].layout, model.layout)) for s in sharers],
            [_by_sharer(each) for each in held],
            holders=[() if each.holder is None else (each.holder,) for each in held],
        )
        digest = model.layout.model_digest
        made = train_gate(
            trial.gate_examples(),
            GateTrainingOptions(seed=recipe.seed, allowed_harm=recipe.allowed_harm, holdout=0.6),
            receiver=digest,
            sharers=[self.models[s].layout.model_digest for s in sharers],
        )
        card = json.loads(json.dumps(made.card.to_dict() | {"fusers": made_with}))
        save_gate(made.gate, folder, card, receiver=digest)
        self.gate_cards[receiver] = card
        self.trained.append(f"gate of {receiver}")

    def prepared(self) -> Prepared:
        return Prepared(
            fusers=self.home / "fusers",
            gates={name: self.home / "gates" / name for name in self.gate_cards},
            fuser_cards=self.fuser_cards,
            gate_cards=self.gate_cards,
            parameters={
                name: sum(p.numel() for p in model.model.parameters())
                for name, model in self.models.items()
            },
            trained=tuple(self.trained),
        )

    def _card_of(self, sharer: str, receiver: str) -> dict[str, Any] | None:
        layouts = self.models[sharer].layout, self.models[receiver].layout
        pair = tuple(layout.model_digest for layout in layouts)
        return dict(self.bank.get(*layouts).card) if pair in self.bank else None

    def _fuser_weights(self, receiver: str) -> dict[str, str]:
        """Return digests of the weights of the fusers into a receiver, by sharer."""
        found = {}
        for sharer in self.sharers_of(receiver):
            fuser = self.bank.get(self.models[sharer].layout, self.models[receiver].layout)
            digest = hashlib.sha256()
            for _, weights in sorted(fuser.state_dict().items()):
                digest.update(weights.detach().double().contiguous().numpy().tobytes())
            found[sharer] = digest.hexdigest()
        return found

    def _tell(self, now: TrainingStep, label: str) -> None:
        if now.step % _SHOWN_EVERY == 0 or now.step == now.steps:
            self.progress(self._done + now.step, self._of, label)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Train on one thread: on small models faster than on several, and the same every time."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _by_sharer(held: HeldExample) -> FuserExample:
    """Name the task by who knows the answer, so that harm is bounded for each."""
    if held.holder is None:
        return held.example
    return replace(held.example, task=f"{held.example.task[:3]} {held.holder}")
