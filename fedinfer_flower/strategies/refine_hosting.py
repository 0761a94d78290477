"""Fusers at the coordinator, as the FedRefine paper has them: it reads every cache.

Only what travels in clear can be fused here, so this is for queries that the coordinator
asks itself. Sites must have agreed to it, each in its own policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import CacheError, ConfigError, FuserError
from fedinfer_flower.kv.share import ShareSpec
from fedinfer_flower.strategies.refine_onboarding import LanguageSite
from fedinfer_flower.wire.refine_ask import ShareBody, open_body
from fedinfer_flower.wire.refine_fields import Evidence
from fedinfer_flower.wire.refine_seats import SharerSeat

if TYPE_CHECKING:
    from fedinfer_flower.kv.fuser_bank import FuserBank
    from fedinfer_flower.kv.gate import Gate

__all__ = ["FuserHost", "gate_of", "host_of"]

_CODEC: Final = "int8"


class FuserHost:
    """Project sharers' caches into receivers' spaces, and choose between sharers.

    Parameters
    ----------
    bank : FuserBank
    gate : Gate, optional
        Chooses sharers for each question from the evidence that sites share; default all.

    Raises
    ------
    ConfigError
        If a fuser of the bank needs the receiver's own entries: those never leave it.

    Privacy
    -------
    The coordinator reads the rewritten questions, the caches, and from those the prompts of
    the sharers. Nothing of a sealed job may pass here.
    """

    def __init__(self, bank: FuserBank, gate: Gate | None = None) -> None:
        from fedinfer_flower.kv.fuser import FUSERS

        kinds = {spec.kind for spec in bank.pairs()}
        bound = sorted(kind for kind in kinds if not FUSERS.get(kind).projects)
        if bound:
            raise ConfigError(
                f"fusers of kind {bound[0]!r} read the receiver's own entries, which never leave"
                " the receiver",
                hint="host them there (fusers='receiver'), or train 'last-token' or 'concat'",
            )
        self._bank, self._gate = bank, gate

    @property
    def gated(self) -> bool:
        """Whether a gate chooses sharers."""
        return self._gate is not None

    def share_of(self, receiver: LanguageSite, sharer: LanguageSite) -> ShareSpec | None:
        """Return what a sharer sends to the fuser of this pair; None without one."""
        if not (receiver.card.coordinator_fusers and sharer.card.coordinator_fusers):
            return None
        pair = (sharer.card.model_digest, receiver.card.model_digest)
        specs = {spec.pair: spec for spec in self._bank.pairs()}
        return specs[pair].share if pair in specs else None

    def seat(self, receiver: LanguageSite, sharer: LanguageSite) -> SharerSeat:
        """Return a sharer's seat, with what the fuser of this pair needs.

        Raises
        ------
        FuserError
        """
        fuser = self._bank.get(sharer.card.model_digest, receiver.card.model_digest)
        scales = fuser.scales
        # Fixed scales halve the message, where fuser and sharer have them.
        static = scales is not None and "static4" in sharer.card.codecs
        return SharerSeat(
            card=sharer.card,
            medium="cache",
            share=fuser.spec.share.to_dict(),
            codec="static4" if static else _CODEC,
            scales=scales.to_bytes() if static and scales is not None else b"",
        )

    def read(
        self,
        body: bytes,
        *,
        receiver: LanguageSite,
        sharer: LanguageSite,
        run_id: int,
        query_id: str,
        round_number: int,
    ) -> ShareBody:
        """Read a body in clear, and require its sharer's signature.

        Raises
        ------
        ProtocolError
        """
        return open_body(
            body,
            sharer=sharer.card.identity,
            run_id=run_id,
            query_id=query_id,
            round_number=round_number,
            sealed=False,
            receiver=receiver.key_id,
        )

    def project(
        self, body: ShareBody, *, receiver: LanguageSite, sharer: LanguageSite, rows: int
    ) -> bytes:
        """Return a sharer's entries in the receiver's space, encoded for the receiver.

        Raises
        ------
        CacheError
            If they are malformed, not finite, of another model, or of other questions.
        FuserError
        """
        import torch

        from fedinfer_flower.kv.payload import PayloadLimits, decode_entries, encode_entries

        fuser = self._bank.get(sharer.card.model_digest, receiver.card.model_digest)
        # Padding does not travel: what counts is how large a cache was asked for.
        layout, usual = fuser.spec.sharer, PayloadLimits()
        tokens = min(fuser.spec.share.tokens(layout.window), usual.max_tokens)
        asked_for = 4 * rows * tokens * layout.floats_per_token(hidden=True)
        limits = PayloadLimits(
            max_rows=rows,
            max_tokens=tokens,
            max_entries_bytes=min(asked_for, usual.max_entries_bytes),
        )
        entries = decode_entries(body.payload, limits=limits, scales=fuser.scales)
        if entries.rows != rows:
            raise CacheError(f"a cache of {entries.rows} prompts, expected {rows}")
        entries.require_finite()
        with torch.no_grad():
            projected = fuser.project(entries)
        return encode_entries(projected, codec=_CODEC)

    def choose(
        self, own: Evidence | None, sharers: Sequence[Evidence | None], rows: int
    ) -> npt.NDArray[np.uint8]:
        """Return which sharer to use for which question: (B, J) zeros and ones.

        All of them where there is no gate. A gate never takes a sharer without evidence.

        Raises
        ------
        FuserError
            If the receiver keeps its own evidence to itself: a gate cannot do without.
        """
        if self._gate is None:
            return np.ones((rows, len(sharers)), dtype=np.uint8)
        if own is None or own.shape != (rows, 4):
            raise FuserError(
                "a gate at the coordinator, and a receiver that keeps its evidence to itself",
                hint="leave gate=None, or let the receiver host fusers and gate",
            )
        import torch

        seen = [e is not None and e.shape == (rows, 4) for e in sharers]
        stacked = np.stack(
            [
                e if ok and e is not None else np.zeros((rows, 4), np.float32)
                for e, ok in zip(sharers, seen, strict=True)
            ],
            axis=1,
        )
        available = torch.tensor([seen] * rows, dtype=torch.float32)
        chosen = self._gate.choose(torch.from_numpy(own), torch.from_numpy(stacked), available)
        return np.asarray(chosen.numpy(), dtype=np.uint8)


def gate_of(given: Any) -> Any:
    """Return a gate from its name, or as it is.

    Raises
    ------
    ConfigError
        If it is neither.
    """
    from fedinfer_flower.kv.gate import Gate, make_gate

    if given is None or isinstance(given, Gate):
        return given
    if isinstance(given, str):
        return make_gate(given)
    raise ConfigError("gate is a name, a Gate, or None", hint="gate='top-k', or load_gate(folder)")


def host_of(fusers: Any, gate: Any) -> FuserHost | None:
    """Return the host of the coordinator's fusers; None where receivers host them.

    Raises
    ------
    ConfigError
        If `fusers` is neither ``"receiver"`` nor a bank, or a gate has no fusers here.
    """
    if isinstance(fusers, str):
        if fusers != "receiver":
            raise ConfigError(
                f"fusers is 'receiver' or a FuserBank, not {fusers[:64]!r}",
                hint="fusers=FuserBank(folder) to host them at the coordinator",
            )
        if gate is not None:
            raise ConfigError(
                "a gate at the coordinator, and fusers at the receivers: the gate would see"
                " nothing to choose from",
                hint="a receiver brings its own gate; gate=... goes with fusers=FuserBank(...)",
            )
        return None
    if not hasattr(fusers, "pairs") or not hasattr(fusers, "get"):
        raise ConfigError("fusers is 'receiver' or a FuserBank")
    return FuserHost(fusers, gate_of(gate))
