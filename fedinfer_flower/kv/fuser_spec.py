"""What a fuser is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final

from fedinfer_flower.errors import ConfigError, FuserError, InvalidValueError, ProtocolError
from fedinfer_flower.kv.layer_map import LAYER_MAPS, layer_map
from fedinfer_flower.kv.layout import CacheLayout
from fedinfer_flower.kv.share import ShareSpec

__all__ = ["FuserSpec", "require_sizes"]

_SIZES: Final = {
    "width": (1, 16_384),
    "depth": (0, 8),
    "lookahead": (0, 1),
    "latent_layers": (1, 256),
}
_WIDTH_STEP: Final = 8
_LATENT_LAYERS: Final = 4


@dataclass(frozen=True, kw_only=True)
class FuserSpec:
    """What a fuser is made from: kind, both models, what travels, and its size.

    Parameters
    ----------
    kind : str
        A name in `fedinfer_flower.kv.fuser.FUSERS`.
    sharer, receiver : CacheLayout
        One revision of each model: a fuser is of no use with another.
    share : ShareSpec
    layer_map : str
        ``"bottom"``, ``"terminal"`` or ``"depth"``; see `fedinfer_flower.kv.layer_map`.
    width : int
        Of the networks, and of the latent of a hub.
    depth : int
        Feed-forward blocks of a network.
    dropout : float
        In [0, 1), in training only.
    lookahead : int
        0 or 1. With 1 a receiver token of kind ``"fuse"`` reads the sharer's token *after*
        the one aligned with it, which has digested that one.
    latent_layers : int
        Of a hub; other kinds leave it at its default.

    Raises
    ------
    InvalidValueError

    Examples
    --------
    >>> from fedinfer_flower.kv.fuser import count_parameters
    >>> shape = dict(heads=1, head_size=4, hidden_size=8, window=16, rope="{}",
    ...              architecture="llama", tokenizer_digest="0" * 64)
    >>> sharer = CacheLayout(layers=3, model_digest="1" * 64, **shape)
    >>> receiver = CacheLayout(layers=2, model_digest="2" * 64, **shape)
    >>> spec = FuserSpec.for_pair("last-token", sharer, receiver, max_parameters=20_000)
    >>> spec.width, count_parameters(spec) <= 20_000, spec.layers
    (32, True, (0, 2))
    >>> FuserSpec.from_dict(spec.to_dict()) == spec
    True
    """

    kind: str
    sharer: CacheLayout
    receiver: CacheLayout
    share: ShareSpec
    layer_map: str = "depth"
    width: int = 128
    depth: int = 2
    dropout: float = 0.1
    lookahead: int = 0
    latent_layers: int = _LATENT_LAYERS

    def __post_init__(self) -> None:
        parts = {"sharer": CacheLayout, "receiver": CacheLayout, "share": ShareSpec}
        for name, cls in parts.items():
            if not isinstance(getattr(self, name), cls):
                raise InvalidValueError(f"{name} of a fuser is a {cls.__name__}")
        if not isinstance(self.kind, str) or not 1 <= len(self.kind) <= 64:
            raise InvalidValueError("kind of a fuser is a short name")
        require_sizes(self)

    @classmethod
    def for_pair(
        cls,
        kind: str,
        sharer: CacheLayout,
        receiver: CacheLayout,
        share: ShareSpec | None = None,
        *,
        max_parameters: int | None = None,
        **options: Any,
    ) -> FuserSpec:
        """Return a spec with the kind's defaults, as wide as the bound on parameters allows.

        Parameters
        ----------
        kind : str
        sharer, receiver : CacheLayout
        share : ShareSpec, optional
            Default that of the kind.
        max_parameters : int, optional
            Twice those of the smaller model is a usual bound.
        **options
            Other fields of the spec; `width` is then the largest to consider.

        Raises
        ------
        InvalidValueError
            If even the narrowest network has more parameters.
        FuserError
            If the kind does not fit the pair.
        """
        from fedinfer_flower.kv.fuser import FUSERS, count_parameters

        cls_of_kind = FUSERS.get(kind)
        chosen = cls_of_kind.default_share if share is None else share
        options.setdefault("lookahead", cls_of_kind.default_lookahead)
        spec = cls(kind=kind, sharer=sharer, receiver=receiver, share=chosen, **options)
        if max_parameters is None or count_parameters(spec) <= max_parameters:
            return spec
        # The number of parameters grows with the width: bisect over multiples of a step.
        fits, too_wide = 0, -(-spec.width // _WIDTH_STEP)
        while too_wide - fits > 1:
            middle = (fits + too_wide) // 2
            count = count_parameters(replace(spec, width=middle * _WIDTH_STEP))
            fits, too_wide = (middle, too_wide) if count <= max_parameters else (fits, middle)
        if not fits:
            raise InvalidValueError(
                f"no {kind} fuser of this pair has at most {max_parameters} parameters",
                hint="raise the bound, or lower depth",
            )
        return replace(spec, width=fits * _WIDTH_STEP)

    @property
    def pair(self) -> tuple[str, str]:
        """Digests of the sharer's and of the receiver's model."""
        return self.sharer.model_digest, self.receiver.model_digest

    @property
    def layers(self) -> tuple[int, ...]:
        """For each layer of the receiver, the layer of the sharer that it reads."""
        return layer_map(self.sharer.layers, self.receiver.layers, self.layer_map)

    @property
    def features(self) -> int:
        """Numbers that a network reads of one token of the sharer."""
        return self.sharer.entry_floats + (self.sharer.hidden_size if self.share.hidden else 0)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON; layouts as their canonical JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["sharer"], values["receiver"] = self.sharer.to_json(), self.receiver.to_json()
        values["share"] = self.share.to_dict()
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FuserSpec:
        """Read the fields.

        Raises
        ------
        FuserError
            If one is missing, unknown, or out of its range.
        """
        if not isinstance(values, Mapping) or set(values) != {f.name for f in fields(cls)}:
            raise FuserError("a fuser spec that lacks a field or has an unknown one")
        if not all(isinstance(values[name], str) for name in ("sharer", "receiver")):
            raise FuserError("a fuser spec whose layouts are no text")
        try:
            return cls(
                **{
                    **values,
                    "sharer": CacheLayout.from_json(values["sharer"]),
                    "receiver": CacheLayout.from_json(values["receiver"]),
                    "share": ShareSpec.from_dict(values["share"]),
                }
            )
        except (InvalidValueError, ProtocolError, TypeError) as exc:
            text = exc.message if isinstance(exc, (ConfigError, ProtocolError)) else "a wrong type"
            raise FuserError(f"a fuser spec that cannot be: {text}") from None


def require_sizes(spec: Any) -> None:
    """Require sizes of networks in their ranges, of a `FuserSpec` or of what makes one.

    Raises
    ------
    InvalidValueError
    """
    for name, (least, most) in _SIZES.items():
        value = getattr(spec, name, least)
        if type(value) is not int or not least <= value <= most:
            raise InvalidValueError(f"{name} of a fuser is a whole number in [{least}, {most}]")
    if spec.layer_map not in LAYER_MAPS:
        raise InvalidValueError(f"layer_map of a fuser is one of {', '.join(LAYER_MAPS)}")
    if type(spec.dropout) not in (int, float) or not 0.0 <= spec.dropout < 1.0:
        raise InvalidValueError("dropout of a fuser is in [0, 1)")
