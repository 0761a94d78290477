"""The fusers that a receiver or a coordinator holds, by pair of models."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedinfer_flower.errors import FuserError, InvalidValueError
from fedinfer_flower.kv.fuser import Fuser, FuserSpec
from fedinfer_flower.kv.fuser_file import load_fuser, read_fuser_spec, save_fuser
from fedinfer_flower.kv.layout import CacheLayout

__all__ = ["FuserBank"]

Pair = tuple[str, str]


class FuserBank:
    """Fusers by (digest of the sharer's model, digest of the receiver's).

    Parameters
    ----------
    source : path or mapping, optional
        A folder with one folder a fuser, whose weights are read on first use; or fusers by
        pair. Default an empty bank in memory.

    Raises
    ------
    FuserError
        If a folder holds a damaged fuser, or two for one pair.
    InvalidValueError
        If a mapping names another pair than a fuser is for.

    Privacy
    -------
    The bank tells which pairs of models were trained together, and nothing of a
    query.

    Examples
    --------
    >>> FuserBank().get("1" * 64, "2" * 64)
    Traceback (most recent call last):
    fedinfer_flower.errors.FuserError: FI409 FuserError: no fuser from model 111111111111 to \
model 222222222222
      fix: train one (fedinfer fuser train), or use the text medium, which needs none   docs: \
docs/reference/errors.md#fi409
    """

    def __init__(self, source: str | Path | Mapping[Pair, Fuser] | None = None) -> None:
        self._lock = threading.RLock()
        self._specs: dict[Pair, FuserSpec] = {}
        self._loaded: dict[Pair, Fuser] = {}
        self._folders: dict[Pair, Path] = {}
        self._folder = Path(source) if isinstance(source, (str, Path)) else None
        if self._folder is not None:
            self._index(self._folder)
        elif isinstance(source, Mapping):
            for pair, fuser in source.items():
                if fuser.spec.pair != tuple(pair):
                    raise InvalidValueError("a bank that names another pair than its fuser's")
                self.add(fuser)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the lock: simulation engines copy apps, and what they hold, to workers."""
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.RLock()

    def _index(self, folder: Path) -> None:
        for file in sorted(folder.glob("*/fuser.json")):
            spec = read_fuser_spec(file.parent)
            if spec.pair in self._specs:
                raise FuserError(
                    f"two fusers from model {spec.pair[0][:12]} to model {spec.pair[1][:12]}"
                    f" in one bank: {self._folders[spec.pair].name}, {file.parent.name}",
                    hint="move one of them out of the folder",
                )
            self._specs[spec.pair], self._folders[spec.pair] = spec, file.parent

    def pairs(self) -> list[FuserSpec]:
        """Return the specs of all fusers, ordered by pair."""
        with self._lock:
            return [self._specs[pair] for pair in sorted(self._specs)]

    def __len__(self) -> int:
        return len(self._specs)

    def __contains__(self, pair: object) -> bool:
        return pair in self._specs

    def get(self, sharer: str | CacheLayout, receiver: str | CacheLayout) -> Fuser:
        """Return the fuser of a pair, in evaluation mode.

        Parameters
        ----------
        sharer, receiver : str or CacheLayout
            The model's digest; with its layout the error can tell another revision of a
            model from another model.

        Raises
        ------
        FuserError
            If there is none, or its files are damaged.
        """
        pair = (_digest(sharer), _digest(receiver))
        with self._lock:
            if pair not in self._specs:
                raise self._missing(sharer, receiver)
            if pair not in self._loaded:
                fuser = load_fuser(self._folders[pair])
                if fuser.spec != self._specs[pair]:
                    raise FuserError(
                        "a fuser that was replaced while the bank was in use",
                        hint="open the bank again",
                    )
                self._loaded[pair] = fuser
            return self._loaded[pair]

    def add(self, fuser: Fuser, card: Mapping[str, Any] | None = None) -> None:
        """Add a fuser, or replace that of the same pair; a bank of a folder writes it there.

        Parameters
        ----------
        fuser : Fuser
        card : mapping, optional
            Default the fuser's own.
        """
        pair = fuser.spec.pair
        with self._lock:
            if card is not None:
                fuser.card = dict(card)
            if self._folder is not None:
                name = f"{pair[0][:12]}-{pair[1][:12]}"
                folder = self._folders.get(pair, self._folder / name)
                self._folders[pair] = save_fuser(fuser, folder)
            self._specs[pair], self._loaded[pair] = fuser.spec, fuser.eval()

    def _missing(self, sharer: str | CacheLayout, receiver: str | CacheLayout) -> FuserError:
        hint = "train one (fedinfer fuser train), or use the text medium, which needs none"
        pair = (_digest(sharer), _digest(receiver))
        for spec in self.pairs():
            # One side is right and the other may be another revision of the same model.
            revisions = [
                f"the fuser here is for revision {known.model_digest[:12]} of the {role}'s model"
                for role, asked, known in (
                    ("sharer", sharer, spec.sharer),
                    ("receiver", receiver, spec.receiver),
                )
                if _digest(asked) != known.model_digest and _same_shape(asked, known)
            ]
            wrong = sum(a != b for a, b in zip(pair, spec.pair, strict=True))
            if wrong == len(revisions):
                hint = f"{'; '.join(revisions)}. Use it, {hint}"
                break
        return FuserError(f"no fuser from model {pair[0][:12]} to model {pair[1][:12]}", hint=hint)


def _digest(model: str | CacheLayout) -> str:
    return model if isinstance(model, str) else model.model_digest


def _same_shape(asked: str | CacheLayout, known: CacheLayout) -> bool:
    """Return whether two layouts differ in nothing but the weights."""
    if isinstance(asked, str):
        return False
    return {**vars(asked), "model_digest": ""} == {**vars(known), "model_digest": ""}
