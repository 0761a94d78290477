"""A shared latent: N encoders and N decoders serve all N (N - 1) ordered pairs.

Axes: B prompts, S tokens of the sharer, W width of the latent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedinfer_flower.errors import FuserError, InvalidValueError, ProtocolError
from fedinfer_flower.kv.blocks import EntryHead, Trunk
from fedinfer_flower.kv.fuser import FUSERS, Fuser, FuserSpec
from fedinfer_flower.kv.fuser_spec import require_sizes
from fedinfer_flower.kv.layer_map import layer_map
from fedinfer_flower.kv.layout import CacheEntries, CacheLayout
from fedinfer_flower.kv.share import ShareSpec

__all__ = ["Hub", "HubDecoder", "HubEncoder", "HubFuser", "HubSpec"]


@dataclass(frozen=True, kw_only=True)
class HubSpec:
    """What all encoders and decoders of a hub have in common.

    Parameters
    ----------
    share : ShareSpec
    latent_layers : int
        Layers of the latent, whatever the models have.
    width : int
        Of the latent and of the networks.
    depth : int
    dropout : float
    layer_map : str
        From a model's layers to the latent's, and from the latent's to a model's.

    Raises
    ------
    InvalidValueError
    """

    share: ShareSpec = field(default_factory=ShareSpec)
    latent_layers: int = 4
    width: int = 128
    depth: int = 2
    dropout: float = 0.1
    layer_map: str = "depth"

    def __post_init__(self) -> None:
        require_sizes(self)

    def pair(self, sharer: CacheLayout, receiver: CacheLayout) -> FuserSpec:
        """Return the spec of one pair's fuser."""
        return FuserSpec(
            kind="hub",
            sharer=sharer,
            receiver=receiver,
            share=self.share,
            layer_map=self.layer_map,
            width=self.width,
            depth=self.depth,
            dropout=self.dropout,
            latent_layers=self.latent_layers,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HubSpec:
        """Read the fields.

        Raises
        ------
        FuserError
            If one is missing, unknown, or out of its range.
        """
        if not isinstance(values, Mapping) or set(values) != set(cls.__dataclass_fields__):
            raise FuserError("a hub spec that lacks a field or has an unknown one")
        try:
            return cls(**{**values, "share": ShareSpec.from_dict(values["share"])})
        except (InvalidValueError, ProtocolError) as exc:
            raise FuserError(f"a hub spec that cannot be: {exc.message}") from None


class HubEncoder(nn.Module):
    """From one sharer model's entries to the latent.

    Parameters
    ----------
    spec : FuserSpec
        Of any pair with this sharer.
    """

    def __init__(self, spec: FuserSpec) -> None:
        super().__init__()
        size = (spec.width, spec.depth, spec.dropout)
        self.layers = layer_map(spec.sharer.layers, spec.latent_layers, spec.layer_map)
        self.trunks = nn.ModuleList(Trunk((spec.features,), *size) for _ in self.layers)

    def forward(self, features: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Map the features of each latent layer's sharer layer to (B, S, W)."""
        return tuple(trunk(x) for trunk, x in zip(self.trunks, features, strict=True))


class HubDecoder(nn.Module):
    """From the latent to one receiver model's entries.

    Parameters
    ----------
    spec : FuserSpec
        Of any pair with this receiver.
    """

    def __init__(self, spec: FuserSpec) -> None:
        super().__init__()
        to, size = spec.receiver, (spec.width, spec.depth, spec.dropout)
        self.layers = layer_map(spec.latent_layers, to.layers, spec.layer_map)
        self.trunks = nn.ModuleList(Trunk((spec.width,), *size) for _ in self.layers)
        self.heads = nn.ModuleList(
            EntryHead(spec.width, to.heads, to.head_size) for _ in self.layers
        )

    def forward(self, latent: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
        """Return keys and values of each receiver layer."""
        parts = zip(self.layers, self.trunks, self.heads, strict=True)
        return [head(trunk(latent[layer])) for layer, trunk, head in parts]


@FUSERS.register("hub")
class HubFuser(Fuser):
    """One pair's way through the latent: the sharer's encoder, then the receiver's decoder.

    Parameters
    ----------
    spec : FuserSpec
    encoder, decoder : HubEncoder, HubDecoder, optional
        Of a hub, shared with other pairs. Default new ones.

    Privacy
    -------
    As for ``"last-token"``, or ``"concat"`` with a share of the whole prompt.
    Whoever holds a decoder of the hub can read what any encoder of it makes.
    """

    def __init__(
        self,
        spec: FuserSpec,
        *,
        encoder: HubEncoder | None = None,
        decoder: HubDecoder | None = None,
    ) -> None:
        super().__init__(spec)
        self.encoder = HubEncoder(spec) if encoder is None else encoder
        self.decoder = HubDecoder(spec) if decoder is None else decoder

    def project(self, sharer: CacheEntries) -> CacheEntries:
        """Return the sharer's entries in the receiver's space."""
        self.require_sharer(sharer)
        read = tuple(self.features(sharer, layer) for layer in self.encoder.layers)
        pairs = self.decoder(self.encoder(read))
        return replace(
            sharer,
            keys=tuple(k for k, _ in pairs),
            values=tuple(v for _, v in pairs),
            layout=self.spec.receiver,
            hidden=None,
        )


class Hub(nn.Module):
    """All encoders and decoders; models join one by one.

    Parameters
    ----------
    spec : HubSpec

    Examples
    --------
    >>> shape = dict(heads=1, head_size=4, hidden_size=8, window=16, rope="{}",
    ...              architecture="llama", tokenizer_digest="0" * 64)
    >>> first, second = (CacheLayout(layers=n, model_digest=str(n) * 64, **shape) for n in (2, 3))
    >>> hub = Hub(HubSpec(width=8))
    >>> for layout in (first, second):
    ...     hub.join(layout)
    >>> pair = hub.fuser(first.model_digest, second.model_digest)
    >>> pair.encoder is hub.encoders[first.model_digest]
    True
    """

    def __init__(self, spec: HubSpec) -> None:
        super().__init__()
        self.spec = spec
        self.layouts: dict[str, CacheLayout] = {}
        self.encoders = nn.ModuleDict()
        self.decoders = nn.ModuleDict()

    def join(self, layout: CacheLayout, *, seed: int = 0) -> None:
        """Add one encoder and one decoder for a model.

        Raises
        ------
        InvalidValueError
            If the model is in the hub.
        """
        name = layout.model_digest
        if name in self.layouts:
            raise InvalidValueError(f"model {name[:12]} is in the hub already")
        pair = self.spec.pair(layout, layout)
        HubFuser.check(pair)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoders[name], self.decoders[name] = HubEncoder(pair), HubDecoder(pair)
        self.layouts[name] = layout

    def fuser(self, sharer: str, receiver: str) -> HubFuser:
        """Return the fuser of a pair; it shares its weights with the hub.

        Parameters
        ----------
        sharer, receiver : str
            Digests of the models.

        Raises
        ------
        FuserError
            If one of them has not joined.
        """
        for name in (sharer, receiver):
            if name not in self.layouts:
                raise FuserError(
                    f"model {name[:12]} is not in the hub",
                    hint="join it and train its encoder and decoder, or use the text medium",
                )
        fuser = HubFuser(
            self.spec.pair(self.layouts[sharer], self.layouts[receiver]),
            encoder=self._encoder(sharer),
            decoder=self._decoder(receiver),
        )
        return fuser.train(self.training)

    def pairs(self) -> list[tuple[str, str]]:
        """Return all ordered pairs of two models, as (sharer, receiver)."""
        return [(a, b) for a in self.layouts for b in self.layouts if a != b]

    def train_only(self, digest: str | None) -> None:
        """Freeze all models' parts but one's; all are trained again with None.

        This is how a model joins: the others' encoders and decoders stay as they are.

        Raises
        ------
        FuserError
            If the model has not joined.
        """
        if digest is not None and digest not in self.layouts:
            raise FuserError(f"model {digest[:12]} is not in the hub")
        for parts in (self.encoders, self.decoders):
            for name, part in parts.items():
                part.requires_grad_(digest is None or name == digest)

    def _encoder(self, digest: str) -> HubEncoder:
        part: nn.Module = self.encoders[digest]
        if not isinstance(part, HubEncoder):
            raise InvalidValueError("a hub whose encoder is of another class")
        return part

    def _decoder(self, digest: str) -> HubDecoder:
        part: nn.Module = self.decoders[digest]
        if not isinstance(part, HubDecoder):
            raise InvalidValueError("a hub whose decoder is of another class")
        return part
