"""Fusers: trained networks from a sharer's cache into a receiver's space.

Axes: B prompts, H key-value heads, P entries of the receiver's past, S tokens of the
sharer, D head size. All entries are position-free.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fedinfer_flower.errors import CacheError, FuserError, InvalidValueError
from fedinfer_flower.kv.fuser_spec import FuserSpec
from fedinfer_flower.kv.layout import CacheEntries, CacheLayout
from fedinfer_flower.kv.past import Past
from fedinfer_flower.kv.share import ShareSpec
from fedinfer_flower.registry import Registry

if TYPE_CHECKING:
    from fedinfer_flower.kv.static_scales import StaticScales

__all__ = ["FUSERS", "Fuser", "FuserSpec", "count_parameters", "make_fuser"]


class Fuser(nn.Module):
    """F(j to i): brings what a sharer computed into the space of a receiver.

    A kind implements `project` (entries that stand in front of the receiver's own) or
    `extend` (anything else), and `check`.

    Parameters
    ----------
    spec : FuserSpec

    Attributes
    ----------
    needs_alignment : bool
        Whether `extend` must be told which sharer token belongs to which receiver token.
    projects : bool
        Whether the sharer's half can be computed without the receiver's own entries.
    trainable : bool
        Whether there is anything to train.
    default_share : ShareSpec
    default_lookahead : int
    temperature : float
        Of the switches of a residual fuser in training; a trainer lowers it towards 0.
    scales : StaticScales or None
        Fixed scales for payloads to this fuser, saved with it.
    card : dict
        What its trainer wrote down about it, saved with it.

    Raises
    ------
    FuserError
        If the kind does not fit the pair or what travels.

    Privacy
    -------
    A fuser is trained on public examples, and its weights may be published as far
    as those may be. What it makes of a sharer's entries still tells of the sharer's prompt.
    """

    name: ClassVar[str]
    needs_alignment: ClassVar[bool] = False
    projects: ClassVar[bool] = True
    trainable: ClassVar[bool] = True
    default_share: ClassVar[ShareSpec] = ShareSpec()
    default_lookahead: ClassVar[int] = 0

    def __init__(self, spec: FuserSpec) -> None:
        super().__init__()
        self.check(spec)
        self.spec = spec
        self.temperature = 1.0
        self.scales: StaticScales | None = None
        self.card: dict[str, Any] = {}

    @classmethod
    def check(cls, spec: FuserSpec) -> None:
        """Require that a fuser of this kind can be made from the spec.

        Raises
        ------
        FuserError
        """
        if spec.lookahead and not cls.needs_alignment:
            raise FuserError(
                f"a {spec.kind} fuser aligns no tokens, so it cannot look ahead",
                hint="leave lookahead at 0",
            )

    # -- in use ------------------------------------------------------------------------

    def extend(
        self,
        past: Past,
        sharer: CacheEntries,
        *,
        gate: Tensor | None = None,
        alignment: Tensor | None = None,  # noqa: ARG002
        clean: Past | None = None,  # noqa: ARG002
    ) -> Past:
        """Return the receiver's past with the sharer's help in it.

        Parameters
        ----------
        past : Past
            The receiver's own, or one that other sharers extended already.
        sharer : CacheEntries
            What travelled: see `ShareSpec`.
        gate : tensor (B,) of 0 and 1, optional
            Rows with 0 decode exactly as the receiver alone. Default all 1.
        alignment : int64 tensor (B, P), optional
            For each of the receiver's own entries a column of the sharer, -1 for none.
            Only kinds with `needs_alignment` read it.
        clean : Past, optional
            The receiver's own past before any sharer: residuals are then computed from it
            (all sharers in parallel) and not from `past` (one after the other). Only
            residual kinds read it.

        Raises
        ------
        CacheError
            If the entries are of another model or shape than the fuser was made for.
        FuserError
            If the past is not of the receiver that the fuser was made for.
        InvalidValueError
        """
        return self.extend_projected(past, self.project(sharer), gate)

    def project(self, sharer: CacheEntries) -> CacheEntries:  # noqa: ARG002
        """Return the sharer's entries in the receiver's space, for whoever hosts the fuser.

        Raises
        ------
        CacheError
            If the entries are of another model or shape than the fuser was made for.
        FuserError
            If the kind needs the receiver's own entries for it.
        """
        raise FuserError(
            f"a {self.spec.kind} fuser reads the receiver's own entries",
            hint="host it at the receiver, or take a kind that puts entries in front",
        )

    def extend_projected(
        self, past: Past, projected: CacheEntries, gate: Tensor | None = None
    ) -> Past:
        """Put projected entries in front of the receiver's own (FedRefine, equations 1 and 4).

        Their positions start at 0 and overlap the receiver's. Padding and closed rows are
        hidden and set to zero: what stands behind a mask cannot matter, not even NaN.

        Raises
        ------
        CacheError
            If the entries are not in the receiver's space.
        """
        if not self.projects:
            self.project(projected)
        self.require_past(past)
        self._require_entries(projected, self.spec.receiver, rows=len(past.ids))
        mask = projected.mask * self.open_rows(gate, past)[:, None].to(projected.mask.dtype)
        shown = mask[:, None, :, None] > 0
        zero = torch.zeros((), dtype=projected.keys[0].dtype)
        return past.with_prefix(
            tuple(torch.where(shown, k, zero) for k in projected.keys),
            tuple(torch.where(shown, v, zero) for v in projected.values),
            mask,
            projected.positions,
        )

    # -- for kinds ---------------------------------------------------------------------

    def features(self, sharer: CacheEntries, layer: int) -> Tensor:
        """Return what the networks read of one sharer layer: float32 (B, S, features)."""
        flat = sharer.flat(layer)
        if self.spec.share.hidden and sharer.hidden is not None:
            flat = torch.cat([flat, sharer.hidden.to(flat.dtype)], -1)
        return flat.float()

    def open_rows(self, gate: Tensor | None, past: Past) -> Tensor:
        """Return which rows are helped: bool (B,)."""
        rows = len(past.ids)
        if gate is None:
            return torch.ones(rows, dtype=torch.bool, device=past.ids.device)
        if tuple(gate.shape) != (rows,) or not bool(((gate == 0) | (gate == 1)).all()):
            raise InvalidValueError("the gate of a fuser is one 0 or 1 for each prompt")
        return gate == 1

    def require_sharer(self, sharer: CacheEntries) -> None:
        """Require entries of the sharer's model that travelled as the spec says.

        Raises
        ------
        CacheError
        """
        share = self.spec.share
        self._require_entries(sharer, self.spec.sharer, rows=sharer.rows)
        if sharer.tokens < 1 or (not share.full and sharer.tokens > share.last + share.decode):
            raise CacheError(
                f"a cache of {sharer.tokens} tokens, the fuser reads the last {share.last}"
                f" and {share.decode} decoded ones"
            )
        if share.hidden and sharer.hidden is None:
            raise CacheError("a cache without the hidden state that the fuser reads")

    def require_past(self, past: Past) -> None:
        """Require a past of the receiver that the fuser was made for.

        Raises
        ------
        FuserError
        """
        layout = self.spec.receiver
        shape = (len(past.ids), layout.heads, past.mask.shape[1], layout.head_size)
        layers = len(past.keys) == len(past.values) == layout.layers
        if not layers or any(tuple(x.shape) != shape for x in (*past.keys, *past.values)):
            raise FuserError(
                "a fuser for a receiver with other layers or heads",
                hint="take the fuser of this pair from the bank; a fuser serves one pair",
            )

    @staticmethod
    def _require_entries(entries: CacheEntries, layout: CacheLayout, *, rows: int) -> None:
        entries.layout.require_model(layout.model_digest)
        if entries.layout != layout:
            raise CacheError("a cache whose layout is not the one that the fuser was made for")
        if entries.rows != rows:
            raise CacheError(f"a cache of {entries.rows} prompts, expected {rows}")


FUSERS: Registry[Fuser] = Registry(
    kind="fuser", package="fedinfer_flower.kv.fusers", group="fedinfer_flower.fusers"
)


def make_fuser(spec: FuserSpec, *, seed: int = 0) -> Fuser:
    """Return an untrained fuser; the same seed gives the same weights.

    Torch's own generator is left as it was.

    Raises
    ------
    UnknownNameError
    FuserError
        If the kind does not fit the pair or what travels.
    """
    cls = FUSERS.get(spec.kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(spec)


def count_parameters(spec: FuserSpec) -> int:
    """Return the number of parameters of a fuser, without the memory for them."""
    with torch.device("meta"):
        return sum(p.numel() for p in make_fuser(spec).parameters())
