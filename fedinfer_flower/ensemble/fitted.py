"""Fitted aggregators: what a learned rule has learned, named by its content.

A rule's options are short texts, so a learned rule names its numbers by their digest and
every party looks them up in its own process: `remember` puts them there, `recall` finds
them. Nobody can put other numbers under a name.

Layout of `FittedAggregator.to_bytes` (big-endian header, little-endian float64)::

    b"FIST" | version (2) | length of the header (4) | header, JSON | arrays, by name

Axes: K sites, C classes.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from fedinfer_flower.ensemble.base import Array
from fedinfer_flower.ensemble.stack_shapes import require_shapes
from fedinfer_flower.errors import (
    EnvelopeError,
    InvalidValueError,
    MissingExtraError,
    SizeLimitError,
)

__all__ = [
    "MAX_BYTES",
    "MAX_VALUE",
    "UNTRAINED",
    "FittedAggregator",
    "recall",
    "remember",
    "require_digest",
]

UNTRAINED: Final = "untrained"
"""In place of a digest: the documented starting point of a rule."""

MAX_VALUE: Final = 1e3
"""Largest parameter. Training ends far below it; beyond it, rounding decides classes."""

MAX_BYTES: Final = 256 << 20

_MAGIC: Final = b"FIST"
_VERSION: Final = 1
_PREFIX: Final = struct.Struct(">4sHI")
_MAX_HEADER: Final = 4 << 20
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_CARD: Final = {"classes": list, "sites": list, "trainer": str, "rounds": int, "rows": int}
_CARD_FILE: Final = "card.json"
_ARRAYS_FILE: Final = "aggregator.safetensors"


@dataclass(frozen=True, kw_only=True, eq=False)
class FittedAggregator:
    """The parameters of one learned rule, with what must be known to use them.

    Parameters
    ----------
    kind : str
        Name of the rule that reads them.
    arrays : mapping of str to float64 array
        As `stack_shapes` says; finite, at most `MAX_VALUE` in size. Copied, read-only.
    card : mapping
        ``classes``, list of str: the label space, in its order. ``sites``, list of str: key
        ids of the roster, in the order of the axis K. ``trainer``, ``rounds``: how it was
        trained. ``rows``: held-out rows of all sites together.

    Raises
    ------
    InvalidValueError
        If an array is missing, has another shape or a value out of range, or the card
        lacks a field.

    Privacy
    -------
    Parameters are a function of the sites' held-out labels and of all sites' answers to the
    held-out rows. Whoever holds them learns what they show of both. The card has no count
    of a single site.

    Examples
    --------
    >>> fitted = FittedAggregator(
    ...     kind="gated-mixture",
    ...     arrays={"gate_kc": np.zeros((1, 2)), "gate_bias_k": np.zeros(1)},
    ...     card={"classes": ["no", "yes"], "sites": ["ab" * 32], "trainer": "FedAdam",
    ...           "rounds": 1, "rows": 40},
    ... )
    >>> FittedAggregator.from_bytes(fitted.to_bytes()).digest == fitted.digest
    True
    """

    kind: str
    arrays: Mapping[str, Array] = field(repr=False)
    card: Mapping[str, Any] = field(repr=False)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        card = _checked_card(self.card)
        arrays = {name: _checked_array(name, self.arrays[name]) for name in sorted(self.arrays)}
        require_shapes(
            self.kind, arrays, n_sites=len(card["sites"]), n_classes=len(card["classes"])
        )
        object.__setattr__(self, "card", MappingProxyType(card))
        object.__setattr__(self, "arrays", MappingProxyType(arrays))
        object.__setattr__(self, "digest", hashlib.sha256(self.to_bytes()).hexdigest())

    @property
    def classes(self) -> tuple[str, ...]:
        """The label space that it was trained on."""
        return tuple(self.card["classes"])

    @property
    def sites(self) -> tuple[str, ...]:
        """Key ids of the sites that it was trained with."""
        return tuple(self.card["sites"])

    def to_bytes(self) -> bytes:
        """Return the one encoding of this aggregator; its SHA-256 is the digest."""
        header = json.dumps(
            {
                "kind": self.kind,
                "card": dict(self.card),
                "arrays": [[name, list(array.shape)] for name, array in self.arrays.items()],
            },
            sort_keys=True,
            separators=(",", ":"),
            allow_nan=False,
        ).encode()
        body = [np.ascontiguousarray(array, "<f8").tobytes() for array in self.arrays.values()]
        return b"".join([_PREFIX.pack(_MAGIC, _VERSION, len(header)), header, *body])

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> FittedAggregator:
        """Read what `to_bytes` made, and nothing else.

        Raises
        ------
        SizeLimitError
            If it is larger than `MAX_BYTES`.
        EnvelopeError
            If the bytes are not exactly one valid aggregator.
        """
        header, body = _split(bytes(data))
        try:
            arrays: dict[str, Array] = {}
            offset = 0
            for name, shape in header["arrays"]:
                if not all(type(n) is int and 0 < n <= MAX_BYTES for n in shape):
                    raise EnvelopeError("a fitted aggregator with a malformed shape")
                count = math.prod(shape)
                if offset + 8 * count > len(body):
                    raise EnvelopeError("a fitted aggregator that is cut off")
                values = np.frombuffer(body, "<f8", count=count, offset=offset)
                arrays[str(name)] = values.reshape(shape).astype(np.float64)
                offset += 8 * count
            fitted = cls(kind=header["kind"], arrays=arrays, card=header["card"])
        except (InvalidValueError, KeyError, TypeError, ValueError) as exc:
            words = exc.message if isinstance(exc, InvalidValueError) else "malformed"
            raise EnvelopeError(f"not a valid fitted aggregator: {words}") from None
        if fitted.to_bytes() != bytes(data):  # one aggregator, one encoding, one digest
            raise EnvelopeError("a fitted aggregator in another encoding than its own")
        return fitted

    def save(self, folder: Path) -> None:
        """Write ``aggregator.safetensors`` and ``card.json`` to a folder.

        Raises
        ------
        MissingExtraError
            Without the package safetensors.
        """
        folder.mkdir(parents=True, exist_ok=True)
        card = {"kind": self.kind, "digest": self.digest, **self.card}
        arrays = {name: np.array(array) for name, array in self.arrays.items()}
        _safetensors().save_file(arrays, str(folder / _ARRAYS_FILE))
        (folder / _CARD_FILE).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> FittedAggregator:
        """Read what `save` wrote, and require that it is what its card says.

        Raises
        ------
        EnvelopeError
            If a file is damaged, or the digest is another.
        MissingExtraError
            Without the package safetensors.
        """
        loader = _safetensors().load_file
        try:
            card = json.loads((folder / _CARD_FILE).read_text(encoding="utf-8"))
            arrays = loader(str(folder / _ARRAYS_FILE))
            kind, digest = card.pop("kind"), card.pop("digest")
            fitted = cls(kind=kind, arrays=arrays, card=card)
        except FileNotFoundError:
            raise
        except Exception:  # a damaged file may raise anything, with any words
            raise EnvelopeError("the folder does not hold a valid fitted aggregator") from None
        if fitted.digest != digest:
            raise EnvelopeError("the arrays are not those that the card names")
        return fitted


_KEPT: Final = 64
_STORE: OrderedDict[str, FittedAggregator] = OrderedDict()
_LOCK = threading.Lock()


def remember(fitted: FittedAggregator) -> str:
    """Make an aggregator known in this process, and return its digest.

    The 64 that were used last are kept.
    """
    with _LOCK:
        _STORE[fitted.digest] = fitted
        _STORE.move_to_end(fitted.digest)
        while len(_STORE) > _KEPT:
            _STORE.popitem(last=False)
    return fitted.digest


def recall(digest: str) -> FittedAggregator:
    """Return a remembered aggregator.

    Raises
    ------
    InvalidValueError
        If this process does not know it.
    """
    with _LOCK:
        found = _STORE.get(digest)
        if found is not None:
            _STORE.move_to_end(digest)
    if found is None:
        raise InvalidValueError(
            f"no fitted aggregator {digest[:16]} is known here",
            hint="FittedAggregator.load(folder) and remember(it); at a site, install it",
        )
    return found


def require_digest(value: str) -> None:
    """Require `UNTRAINED` or 64 hex digits.

    Raises
    ------
    InvalidValueError
        For any other text.
    """
    if value != UNTRAINED and not _DIGEST.fullmatch(value):
        raise InvalidValueError(
            "option 'stack' is a digest of 64 hex digits", hint=f"or {UNTRAINED!r}"
        )


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    if len(data) > MAX_BYTES:
        raise SizeLimitError(f"a fitted aggregator of {len(data)} bytes; the limit is {MAX_BYTES}")
    if len(data) < _PREFIX.size:
        raise EnvelopeError("the bytes are no fitted aggregator")
    magic, version, length = _PREFIX.unpack_from(data)
    if magic != _MAGIC or version != _VERSION or length > min(_MAX_HEADER, len(data)):
        raise EnvelopeError("the bytes are no fitted aggregator of this version")
    try:
        header = json.loads(data[_PREFIX.size : _PREFIX.size + length])
    except (ValueError, RecursionError):
        raise EnvelopeError("the header of a fitted aggregator is not JSON") from None
    if not isinstance(header, dict) or header.keys() != {"kind", "card", "arrays"}:
        raise EnvelopeError("the header of a fitted aggregator lacks a field or has one more")
    return header, data[_PREFIX.size + length :]


def _checked_card(card: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(card, Mapping) or card.keys() != _CARD.keys():
        raise InvalidValueError(f"a card has exactly {', '.join(_CARD)}")
    for name, kind in _CARD.items():
        if type(card[name]) is not kind:
            raise InvalidValueError(f"field {name!r} of a card is no {kind.__name__}")
    classes, sites = card["classes"], card["sites"]
    for name, listed in (("classes", classes), ("sites", sites)):
        if not listed or not all(isinstance(item, str) for item in listed):
            raise InvalidValueError(f"{name} of a card are at least one, and texts")
        if len(set(listed)) != len(listed):
            raise InvalidValueError(f"{name} of a card: one comes twice")
    if not all(_DIGEST.fullmatch(site) for site in sites):
        raise InvalidValueError("sites of a card are key ids")
    if min(card["rounds"], card["rows"]) < 0:
        raise InvalidValueError("rounds and rows of a card are not negative")
    return {**card, "classes": list(classes), "sites": list(sites)}


def _checked_array(name: str, array: Array) -> Array:
    copy = np.array(array, dtype=np.float64)
    # "not <=" catches NaN with the rest.
    if not copy.size or not bool((np.abs(copy) <= MAX_VALUE).all()):
        raise InvalidValueError(f"array {name[:32]!r} is empty, not finite or beyond {MAX_VALUE:g}")
    copy += 0.0  # minus zero would be another digest of the same function
    copy.flags.writeable = False
    return copy


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError:
        raise MissingExtraError(
            "safetensors is not installed", hint="pip install 'fedinfer-flower[stack]'"
        ) from None
    return safetensors.numpy
