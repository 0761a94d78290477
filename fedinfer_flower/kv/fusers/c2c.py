"""Networks in the published C2C form, which read keys as models cache them: rotated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final

import torch
from torch import Tensor, nn

from fedinfer_flower.errors import CacheError, FuserError, InvalidValueError
from fedinfer_flower.kv.c2c_projector import C2CProjector, ProjectorShape
from fedinfer_flower.kv.fuser import FUSERS, Fuser, FuserSpec
from fedinfer_flower.kv.fusers.fuse import Fuse
from fedinfer_flower.kv.layout import CacheEntries
from fedinfer_flower.kv.past import Past
from fedinfer_flower.kv.rope_tables import layout_tables, require_known_rotation
from fedinfer_flower.kv.rotary import rotate, unrotate
from fedinfer_flower.kv.share import ShareSpec

__all__ = ["MULTI_SOURCE_MODES", "C2CFuser"]

MULTI_SOURCE_MODES: Final = ("sequential", "parallel")
_NONE: Final = -1.0


@FUSERS.register("c2c")
class C2CFuser(Fuse):
    """A residual on the receiver's own entries, by networks in the published form of C2C.

    For each own entry the sharer's aligned entry is taken, its key turned to the *receiver's*
    position as the sharer's model would turn it, and the receiver's key as its own model
    does: the networks were trained on such pairs. What they add to a key is turned back, so
    the past stays free of positions.

    `fedinfer_flower.kv.c2c_checkpoint.load_c2c` makes one from a published folder. From a spec
    alone comes an untrained one: width and depth are ``hidden_dim`` (and
    ``intermediate_dim``) and ``num_layers - 1`` of the published form, and layer map
    ``"terminal"`` is its ``last_aligned``. Prefer kind ``"fuse"`` or ``"last-token"`` for
    trainings of your own.

    Parameters
    ----------
    spec : FuserSpec
        Its share is of the whole prompt, without decoded tokens and hidden state.
    shape : ProjectorShape, optional
        Of the networks. Default from the spec.
    layers : mapping of int to (int, int), optional
        For a layer of the receiver, the layer of the sharer and the number of the network.
        Layers that are not named stay as they are. Default the spec's layer map, one network
        a layer.
    multi_source_mode : str
        ``"parallel"``: several sharers' residuals are all computed from the receiver's clean
        past, where it is given, and added up. ``"sequential"``: each from what those before
        left.

    Raises
    ------
    FuserError
        If a model turns its keys in a way that `fedinfer_flower.kv.rope_tables` does not know.

    Notes
    -----
    Both sides must read the same text; a rephrased question calls for ``"last-token"``.

    *Privacy.* As for ``"concat"``: the whole prompt's entries travel, and whoever opens them
    can read the sharer's prompt.

    References
    ----------
    Fu et al., "Cache-to-Cache: Direct Semantic Communication Between Large Language Models",
    2025.

    Examples
    --------
    >>> from fedinfer_flower.kv.layout import CacheLayout
    >>> shape = dict(heads=1, head_size=4, hidden_size=8, window=16, architecture="llama",
    ...              rope='{"rope_theta": 1e4, "rope_type": "default"}', tokenizer_digest="0" * 64)
    >>> sharer = CacheLayout(layers=3, model_digest="1" * 64, **shape)
    >>> receiver = CacheLayout(layers=2, model_digest="2" * 64, **shape)
    >>> fuser = C2CFuser(FuserSpec.for_pair("c2c", sharer, receiver, layer_map="terminal"))
    >>> fuser.layers.tolist(), fuser.multi_source_mode  # sharer layer and network, a receiver layer
    ([[1.0, 0.0], [2.0, 1.0]], 'parallel')
    """

    default_share: ClassVar[ShareSpec] = ShareSpec(last=0, decode=0)
    default_lookahead: ClassVar[int] = 0

    layers: Tensor
    parallel: Tensor

    def __init__(
        self,
        spec: FuserSpec,
        *,
        shape: ProjectorShape | None = None,
        layers: Mapping[int, tuple[int, int]] | None = None,
        multi_source_mode: str = "parallel",
    ) -> None:
        Fuser.__init__(self, spec)
        if multi_source_mode not in MULTI_SOURCE_MODES:
            raise InvalidValueError(
                f"the multi-source mode of a C2C fuser is one of {', '.join(MULTI_SOURCE_MODES)}"
            )
        shape = _shape_of(spec) if shape is None else shape
        if layers is None:
            layers = {here: (there, here) for here, there in enumerate(spec.layers)}
        _require_fit(spec, shape, layers)
        count = 1 + max(number for _, number in layers.values())
        self.projectors = nn.ModuleList(C2CProjector(shape) for _ in range(count))
        # Buffers, as numbers: they are saved with the weights, which a layer map could not be
        # without a place of its own in every fuser's file.
        rows = [layers.get(here, (_NONE, _NONE)) for here in range(spec.receiver.layers)]
        self.register_buffer("layers", torch.tensor(rows, dtype=torch.float32))
        self.register_buffer("parallel", torch.tensor(float(multi_source_mode == "parallel")))

    @classmethod
    def check(cls, spec: FuserSpec) -> None:
        """Require a share of the whole prompt and nothing else, and rotations that are known."""
        super().check(spec)
        if spec.share.decode or spec.share.hidden or spec.lookahead:
            raise FuserError(
                "a c2c fuser reads the entries of the prompt and nothing else",
                hint="give ShareSpec(last=0, decode=0) and lookahead=0",
            )
        if spec.depth < 2:
            raise FuserError("a c2c fuser has a depth of 2 or more", hint="the usual depth is 2")
        for layout in (spec.sharer, spec.receiver):
            try:
                require_known_rotation(layout)
            except CacheError as exc:
                raise FuserError(exc.message, hint=exc.hint) from None

    @property
    def multi_source_mode(self) -> str:
        """``"sequential"`` or ``"parallel"``."""
        return MULTI_SOURCE_MODES[bool(self.parallel > 0)]

    def extend(
        self,
        past: Past,
        sharer: CacheEntries,
        *,
        gate: Tensor | None = None,
        alignment: Tensor | None = None,
        clean: Past | None = None,
    ) -> Past:
        """Return the receiver's past with a residual on its own entries."""
        base = clean if clean is not None and bool(self.parallel > 0) else past
        self.require_past(past)
        self.require_past(base)
        self.require_sharer(sharer)
        start, own_mask = base.own_from, base.mask[:, base.own_from :]
        if tuple(past.mask[:, past.own_from :].shape) != tuple(own_mask.shape):
            raise FuserError("a clean past of other prompts than the past that is extended")
        columns, aligned = self._columns(alignment, sharer, own_mask)
        shown = (aligned & (own_mask > 0) & self.open_rows(gate, past)[:, None])[:, None, :, None]
        # Matching positions: both keys are turned to where the receiver's token stands.
        positions = base.positions[:, start:]
        ours = layout_tables(self.spec.receiver, positions)
        theirs = layout_tables(self.spec.sharer, positions)
        keys, values = [], []
        for (there, number), k, v in zip(self._layers(), base.keys, base.values, strict=True):
            own_k, own_v = k[:, :, start:].float(), v[:, :, start:].float()
            if number < 0:
                keys.append(torch.zeros_like(own_k))
                values.append(torch.zeros_like(own_v))
                continue
            k_there, v_there = (_taken(x[there], columns) for x in (sharer.keys, sharer.values))
            more_k, more_v = self.projectors[number](
                (rotate(k_there, *theirs), v_there),
                (rotate(own_k, *ours), own_v),
                temperature=self.temperature,
            )
            zero = torch.zeros(())
            keys.append(torch.where(shown, unrotate(more_k.float(), *ours), zero))
            values.append(torch.where(shown, more_v.float(), zero))
        return past.with_residual(tuple(keys), tuple(values))

    def _layers(self) -> list[tuple[int, int]]:
        """Return, for each receiver layer, sharer layer and network; -1 for none."""
        rows = [(int(there), int(number)) for there, number in self.layers.tolist()]
        used = {here: row for here, row in enumerate(rows) if row != (_NONE, _NONE)}
        _require_fit(self.spec, self.projectors[0].shape, used)  # type: ignore[arg-type]
        if max(number for _, number in used.values()) >= len(self.projectors):
            raise FuserError("a C2C fuser that names a network which it has not")
        return rows


def _shape_of(spec: FuserSpec) -> ProjectorShape:
    return ProjectorShape(
        source_dim=spec.sharer.head_size,
        target_dim=spec.receiver.head_size,
        source_num_heads=spec.sharer.heads,
        target_num_heads=spec.receiver.heads,
        hidden_dim=spec.width,
        intermediate_dim=spec.width,
        num_layers=spec.depth + 1,
        dropout=spec.dropout,
    )


def _require_fit(
    spec: FuserSpec, shape: ProjectorShape, layers: Mapping[int, tuple[int, int]]
) -> None:
    there, here = spec.sharer, spec.receiver
    sizes = (shape.source_num_heads, shape.source_dim, shape.target_num_heads, shape.target_dim)
    if sizes != (there.heads, there.head_size, here.heads, here.head_size):
        raise FuserError(
            f"C2C networks from {sizes[0]} heads of {sizes[1]} to {sizes[2]} of {sizes[3]};"
            f" the models have {there.heads} of {there.head_size}"
            f" and {here.heads} of {here.head_size}",
            hint="a published fuser serves one ordered pair of models: check which is the sharer",
        )
    bad = any(
        not 0 <= own < here.layers or not 0 <= other < there.layers or number < 0
        for own, (other, number) in layers.items()
    )
    if bad or not layers:
        raise FuserError("a C2C layer map that names layers which the models have not")


def _taken(entries: Tensor, columns: Tensor) -> Tensor:
    """Return the entries (B, H, T, D) of some columns (B, P): float32 (B, H, P, D)."""
    index = columns[:, None, :, None].expand(-1, entries.shape[1], -1, entries.shape[3])
    return entries.gather(2, index).float()
