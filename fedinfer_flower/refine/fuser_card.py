"""What is written down about a trained fuser, and saved with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from fedinfer_flower.errors import FuserError

__all__ = ["CARD_VERSION", "FuserCard"]

CARD_VERSION: Final = 1


@dataclass(frozen=True, kw_only=True)
class FuserCard:
    """How a fuser was made and what it does on examples that it never saw.

    Parameters
    ----------
    kind : str
    sharer, receiver : str
        SHA-256 digests of the models.
    data_digest : str
        SHA-256 of the examples, the held-out ones included.
    examples, held_out : int
        How many there were to train on, and held out.
    seed, steps : int
        Steps actually taken.
    seconds : float
        CPU time of the training alone, without both models' reading of the examples.
    reading_seconds : float
        CPU time of that reading.
    parameters : int
    loss : float
        Held out, of the weights that were kept.
    counts : dict
        Held-out examples of each task.
    alone, fused, shuffled : dict
        Share of right answers by task, on the held-out examples: see
        `fedinfer_flower.refine.evaluation.Comparison`.
    version : int

    Examples
    --------
    >>> card = FuserCard(kind="last-token", sharer="0" * 64, receiver="1" * 64,
    ...     data_digest="2" * 64, examples=90, held_out=10, seed=0, steps=400, seconds=12.0,
    ...     reading_seconds=6.0, parameters=645_000, loss=0.1, counts={"fact": 10},
    ...     alone={"fact": 0.0}, fused={"fact": 0.9}, shuffled={"fact": 0.1})
    >>> card.helped(), card.suspect(), FuserCard.from_dict(card.to_dict()) == card
    (('fact',), (), True)
    """

    kind: str
    sharer: str
    receiver: str
    data_digest: str
    examples: int
    held_out: int
    seed: int
    steps: int
    seconds: float
    reading_seconds: float
    parameters: int
    loss: float
    counts: dict[str, int]
    alone: dict[str, float]
    fused: dict[str, float]
    shuffled: dict[str, float]
    version: int = CARD_VERSION

    def suspect(self, *, chance: float = 1 / 12, margin: float = 0.05) -> tuple[str, ...]:
        """Return the tasks on which another question's cache helps as well.

        There the fuser merely tuned the receiver: the sharer's cache is not what helps.

        Parameters
        ----------
        chance : float
            Share of right answers by guessing.
        margin : float
        """
        return tuple(
            task
            for task, share in self.shuffled.items()
            if share > max(chance, self.alone.get(task, 0.0)) + margin
        )

    def helped(self, *, margin: float = 0.05) -> tuple[str, ...]:
        """Return the tasks on which the right cache helps, and another question's does not.

        Parameters
        ----------
        margin : float
            By how much it must exceed both the receiver alone and the control.
        """
        return tuple(
            task
            for task, share in self.fused.items()
            if share > max(self.alone.get(task, 0.0), self.shuffled.get(task, 0.0)) + margin
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FuserCard:
        """Read the fields.

        Raises
        ------
        FuserError
            If one is missing, unknown, of another type, or of another version.
        """
        if not isinstance(values, Mapping) or set(values) != {f.name for f in fields(cls)}:
            raise FuserError("a fuser card that lacks a field or has an unknown one")
        for field in fields(cls):
            if not _fits(values[field.name], str(field.type)):
                raise FuserError(f"a fuser card whose {field.name} is of another type")
        if values["version"] != CARD_VERSION:
            raise FuserError(
                f"a fuser card of version {values['version']}, this release reads {CARD_VERSION}",
                hint="install the release that wrote it, or train the fuser again",
            )
        return cls(**values)


def _fits(value: Any, wanted: str) -> bool:
    if wanted.startswith("dict"):
        of_dict = wanted.removeprefix("dict[str, ").removesuffix("]")
        return isinstance(value, dict) and all(
            isinstance(k, str) and _fits(v, of_dict) for k, v in value.items()
        )
    if wanted == "str":
        return isinstance(value, str)
    whole = type(value) is int
    return whole or type(value) is float if wanted == "float" else whole
